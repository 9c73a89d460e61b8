"""docs/performance.md from a run: what is not yet ahead first, then what is, then every figure, then how it was measured. Pure."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from bench.charts import CHARTS, number
from bench.facts import Facts
from bench.measure import Result
from bench.targets import US, Verdict, judge

TITLES = {
    "P1": "HTTP/1.1 through the mutual TLS pair, 32 connections, 1 KiB answers",
    "P2": "HTTP/1.1 through the mutual TLS pair, 1 connection",
    "P3": "HTTP/2 and gRPC unary through the pair (connections x streams)",
    "P4": "Large bodies and opaque TCP through the pair, 4 connections",
    "P5": "New mutual TLS connections per second of CPU, one request each",
    "P6": "Memory of idle sidecars (proportional set size), all running on one machine",
    "P7": "Idle keep-alive connections with mutual TLS through one inbound sidecar; given back: 15 s after they closed",
    "P8": "The hop between app and sidecar by each way of capture, with a relay in C, and with a real pair of sidecars",
    "P9": "Latency at fixed rates, open loop (no coordinated omission), and what the pair adds to it",
    "P11": "From exec to ready, certificate included",
    "P12": "P1 as policy and service grow; growth is CPU per request over that of the smallest size",
}

METHOD = """\
- Every contestant is a pair of proxies in two network namespaces, a client pod and a server pod, joined by a veth pair. The client dials
  the service; the same nftables redirect, with the same exemption by uid, leads the traffic of **every** contestant through its proxies,
  as it does in a mesh. `pillion-ebpf` alone is led, and accelerated, by the node's agent ([ebpf.md](ebpf.md)): what a node runs whose
  kernel allows it. `none` is the client dialling the server pod without proxies and without redirect.
- One worker each: Envoy `--concurrency 1`, HAProxy `nbthread 1`, Pillion's one process. Mutual TLS 1.3 with ECDSA P-256 certificates on
  the hop between the proxies; both ends verify each other (Envoy and Pillion by SPIFFE URI, HAProxy 2.6, which cannot read one, by DNS
  name and common name). No session resumption for anybody.
- Every inbound proxy allows six combinations of method and path prefix, to the client's identity only, and refuses the rest: before each
  row an allowed request must be answered with 200 and another one with 403 or 404, or the contestant does not take part. Envoy normalises
  paths, as its guide asks when paths decide. Statistics on, access logs off.
- The configurations of the peers are in `bench/configs`, what fills them in `bench/contestants`. Envoy is the release build from PyPI:
  request ids and its own headers off, circuit breakers above any load, route and idle timeouts off, its default buffers and HTTP/2 windows.
  HAProxy is Debian's 2.6 on OpenSSL 3.0: `http-reuse always` with unlimited pools on both sides, its default buffers of 16 KiB, HTTP/2
  windows of 1 MiB, paths as they come, not normalised; newer releases, or a build with AWS-LC, need less for handshakes. Pillion runs with
  the settings of an injected sidecar: reads of up to 256 KiB, HTTP/2 windows of 256 KiB a stream. All keep connections to the peer and to
  the app, and share them among clients.
- In P12 the peers hold a policy (Envoy) or a line (HAProxy) for each rule, walked in order, as control planes write them. A map in
  HAProxy or a matcher tree in Envoy would grow less; only Pillion's growth is judged.
- P7 opens 10,000 connections, or as many as the limit on open files lets a sidecar take: each is two descriptors, and an eighth of all is
  kept for the app's own calls.
- HTTP/1.1 load is wrk with `bench/load/varied.lua`: 50 paths with ids, 8 headers, of which 3 are different in every request. HTTP/2 load
  is `bench/load/h2.py`, because h2load can vary no header; large HTTP/2 bodies are h2load's. The answers come from nginx (HTTP/1.1),
  nghttpd (HTTP/2) and `bench/load/bulk.py` (large bodies).
- All contestants of a row are started first, then their rounds run interleaved, in turn from both ends, after a warm-up that counts for
  nothing. Rounds are shorter where a second or less holds thousands of requests or hundreds of megabytes: half of the length above for
  P2 and P12, a quarter for P3, P4 and P5. A figure is the median of its rounds; spread is (largest - smallest) / median. A round with any
  failed request is reported as failed and keeps no figure.
- CPU is user and system time of the two proxies' processes, from `/proc/<pid>/stat`. Load, server and Pillion's control plane are not in
  it. Memory is the proportional set size.
- P8 measures one hop by the ways of capture: `bench/load/hop.c` is client, relay (waiting by epoll, as sidecars do) and server. With
  sixteen connections each has a message under way all the time. "sidecar pair" is Pillion's own two sidecars in place of the relay, in two
  pods on each rung of the [ladder](ebpf.md#the-ladder): `connect+sockmap` is level 1, `nftables+sockmap` level 2, `nftables` level 3,
  `connect` level 1 of a pod whose acceleration is switched off. CPU is that of client, relay or sidecars, server and the kernel's workers;
  for HTTP/1.1 the sidecars' alone, as in P1.
- Load, proxies and server share the machine's cores, so that a throughput ratio is nearer to 1 than the ratio of what the proxies cost:
  look at CPU per request beside it.
"""


def performance_page(facts: Facts, rows: Sequence[Result], notes: str = "") -> str:
    """The whole page as Markdown. notes: what is written by hand about where time goes, put under what is behind."""
    verdicts = judge(rows)
    behind = sorted((one for one in verdicts if not one.met and one.figure is not None), key=lambda one: -one.shortfall)
    unknown = [one for one in verdicts if one.figure is None]
    ahead = [one for one in verdicts if one.met]
    parts = [
        "# Performance: Pillion beside Envoy and HAProxy",
        f"Written by `make bench` from one run; do not edit. {_where(facts)}",
        "## Not yet ahead",
        _verdict_table(behind) if behind else "Every figure that was measured reaches its target.",
    ]
    if unknown:
        lines = "\n".join(f"- {one.target.row} {one.work or TITLES[one.target.row]}: {_metric(one)}" for one in unknown)
        parts += ["Not measured in this run:", lines]
    if notes:
        parts += ["### Where the remaining time goes, and what was tried", notes.strip()]
        parts += _unexplained([one.target.row for one in behind], notes)
    parts += ["## Ahead", _verdict_table(ahead) if ahead else "Nothing yet."]
    if failed := [row for row in rows if row.failed]:
        parts += ["## Failed rounds", _failed(failed)]
    parts.append("## All figures")
    for row in dict.fromkeys(one.row for one in rows):
        parts.append(f"### {row}: {TITLES[row]}")
        parts += [f"![{row} {one.metric}](performance/{one.file})" for one in CHARTS if one.row == row and one.shown(rows)]
        parts.append(_figures([one for one in rows if one.row == row and one.metric]))
    parts += ["## How it was measured", METHOD.strip() + "\n" + _tls(facts)]
    return "\n\n".join(parts) + "\n"


def _unexplained(behind: Sequence[str], notes: str) -> list[str]:
    """A sentence naming the rows behind that the notes do not speak of, when there are any."""
    missing = sorted(set(behind) - set(re.findall(r"\bP\d+\b", notes)))
    return [f"Not looked into yet: {', '.join(missing)}."] if missing else []


def _where(facts: Facts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))
    machine = facts.machine
    day = time.strftime("%Y-%m-%d", time.gmtime(facts.started))
    quick = " **A quick run: the figures mean little.**" if facts.quick else ""
    return (
        f"Commit {facts.commit}, {day}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}, TCP {machine['congestion_control']}, "
        f"Python {machine['python']} ({machine['python_build']}); {versions}. {facts.rounds} interleaved rounds of {facts.seconds:g} s, "
        f"{facts.took_s / 60:.0f} minutes in all; {facts.pinning}.{quick}"
    )


def _tls(facts: Facts) -> str:
    agreed = "; ".join(f"{name}: {what}" for name, what in facts.tls.items()) or "not noted in this run"
    return (
        "- The group of the key exchange is each one's own default. What the two proxies of each contestant agreed on, read off the wire: "
        f"{agreed}. Where the load itself speaks TLS (P5 inbound, P7) it offers everybody what its OpenSSL does by default."
    )


def _metric(verdict: Verdict) -> str:
    return verdict.target.metric.replace("_", " ") + (f" beside {verdict.target.against}" if verdict.target.against else "")


def _verdict_table(verdicts: Sequence[Verdict]) -> str:
    lines = ["| row | work | figure | must be | is | with eBPF |", "|---|---|---|---|---|---|"]
    for one in verdicts:
        sign, unit = (">=" if one.target.at_least else "<="), ("x" if one.target.against else f" {one.unit}")
        assert one.figure is not None
        fast = "" if one.accelerated is None else f"{one.accelerated:.3g}{unit}"
        must = f"{sign} {one.target.value:g}{unit}"
        lines.append(f"| {one.target.row} | {one.work} | {_metric(one)} | {must} | **{one.figure:.3g}{unit}** | {fast} |")
    return "\n".join(lines)


def _failed(rows: Sequence[Result]) -> str:
    worst = {(row.row, row.work, row.contestant): row for row in rows}
    return "\n".join(f"- {row.row} {row.work}, {row.contestant}: {row.failed} of {row.rounds} ({row.note})" for row in worst.values())


def _figures(rows: Sequence[Result]) -> str:
    """Ratios of the hop are to plain nftables, all others to the peers."""
    hop = rows[0].row == "P8"
    heads = ("to nftables",) if hop else ("to Envoy", "to HAProxy")
    lines = [_line("work", "metric", "contestant", "median", "spread", *heads), "|---" * (5 + len(heads)) + "|"]
    for metric in dict.fromkeys((row.work, row.metric) for row in rows):
        group = [row for row in rows if (row.work, row.metric) == metric]
        base = next((row.median for row in group if row.contestant == "nftables"), None)
        for row in group:
            mark = "**" if row.contestant == US else ""
            beside = (_ratio(row.median, base),) if hop else (row.ratio_to_envoy, row.ratio_to_haproxy)
            ratios = ("" if ratio is None else f"{ratio:.2f}" for ratio in beside)
            spread = "" if row.spread is None else f"{row.spread:.0%}"
            name = row.metric.replace("_", " ")
            lines.append(_line(row.work, name, f"{mark}{row.contestant}{mark}", f"{number(row.median)} {row.unit}", spread, *ratios))
    return "\n".join(lines)


def _ratio(figure: float | None, base: float | None) -> float | None:
    return figure / base if figure is not None and base else None


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
