"""Calls between the shop's workloads, and what the sidecar of the called one says about each: its own log and counters, nothing made up.

Called by cli.demo.acts. The calls are made inside the pods by examples/shop/tools.yaml, with clients that know nothing of the mesh.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from cli.output import CommandFailed
from cli.reach import LocalMesh
from injector.fixed import SIDECAR_NAME
from local import protocol

NAMESPACE = "shop"
_LOG_WAIT_S = 2.0


@dataclass(frozen=True)
class Call:
    """One row of the table. words: for call.py. target: whose sidecar decides. answer: what the caller must see.

    by: the object that must have let it in, "" when it must not be let in. why: what the sidecar's reason must contain then.
    """

    caller: str
    target: str
    shown: str
    words: tuple[str, ...]
    answer: str
    by: str = ""
    why: str = ""

    @property
    def opaque(self) -> bool:
        """Bytes, not requests."""
        return self.words[0] == "tcp"


@dataclass(frozen=True)
class Decision:
    """What the sidecar decided. by: the policy that let in, "" when none did. client: the verified identity, "" without one."""

    by: str
    reason: str
    client: str


@dataclass(frozen=True)
class Outcome:
    """What the caller saw, and the decision behind it (None: the sidecar tells nothing of it)."""

    answer: str
    body: str
    decision: Decision | None

    def wrong(self, call: Call, note: str) -> str:
        """Why this is not as it should be, "" when it is."""
        if self.answer != call.answer:
            return f"the caller saw {self.answer}, not {call.answer} ({self.body.strip()})"
        if call.by and note not in self.body:
            return f"the answer does not hold what was sent along ({note})"
        if self.decision is None:
            return "the sidecar's log and counters say nothing about it"
        if self.decision.by != call.by:
            return f"let in by {self.decision.by or 'nobody'}, not by {call.by or 'nobody'}"
        return "" if call.why in self.decision.reason else f"the reason does not say {call.why!r}"


class Shop:
    """The running example. pods: app name -> its (only) pod. notes: what the runner has to say."""

    def __init__(self, mesh: LocalMesh) -> None:
        self.mesh = mesh
        status = mesh.ask(protocol.Status())
        assert isinstance(status, protocol.MeshStatus)
        self.notes = status.notes
        self.pods: Mapping[str, protocol.PodStatus] = {pod.owner.partition("/")[2]: pod for pod in status.pods}

    def run(self, app: str, *argv: str) -> str:
        """What a command prints that runs in an app's pod; raises CommandFailed when it fails."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors, open(os.devnull, "rb") as null:
            answer = self.mesh.ask(protocol.Exec(NAMESPACE, app, None, argv), (null.fileno(), out.fileno(), errors.fileno()))
            out.seek(0)
            errors.seek(0)
            if not isinstance(answer, protocol.Exited) or answer.code:
                said = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise CommandFailed(f"in {app}: {' '.join(argv)}: {said}")
            return out.read().decode()

    def call(self, call: Call, note: str, trace: str) -> Outcome:
        """Make a call and find the decision about it. note: sent along. trace: unique, finds a request in the access log."""
        log = LogEnd(self, call.target)
        before = self._tcp_decisions(call.target) if call.opaque else {}
        said = msgspec.json.decode(self.run(call.caller, "python3", "/tools/call.py", *call.words, "--note", note, "--trace", trace))
        caller_ip = self.pods[call.caller].addresses[0]
        deadline = time.monotonic() + _LOG_WAIT_S
        while True:
            lines = log.lines()
            decision = self._of_connection(call, before, lines, caller_ip) if call.opaque else of_request(lines, trace)
            if decision is not None or time.monotonic() > deadline:
                return Outcome(said["answer"], said["body"], decision)
            time.sleep(0.05)

    def _of_connection(self, call: Call, before: Mapping[Any, float], lines: list[dict[str, Any]], ip: str) -> Decision | None:
        """From the counters of permitted and denied connections; a denial's sentence is in the log."""
        grown = [key for key, count in self._tcp_decisions(call.target).items() if count > before.get(key, 0)]
        for verdict, client, by in grown:
            if verdict == "allow":
                return Decision(by, "", client)
            for line in lines:
                if line.get("event") == "inbound denied" and str(line.get("client", "")).startswith(f"{ip}:"):
                    return Decision("", str(line.get("reason") or line.get("detail") or ""), client)
        return None

    def _tcp_decisions(self, app: str) -> dict[tuple[str, str, str], float]:
        """(allow or deny, client's identity, policy) -> connections."""
        found: dict[tuple[str, str, str], float] = {}
        for name, labels, value in self.samples(app):
            if name.startswith("pillion_inbound_tcp_authz_"):
                verdict = name.removeprefix("pillion_inbound_tcp_authz_").removesuffix("_total")
                by = " ".join(part for part in (labels.get("authz_kind", ""), _path(labels, "authz")) if part)
                found[verdict, labels.get("client_id", ""), by] = value
        return found

    def samples(self, app: str) -> list[tuple[str, Mapping[str, str], float]]:
        """(name, labels, value) of everything the sidecar of an app counts."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(self.mesh.sidecar(self.pods[app], "/metrics").decode())
        return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]


class LogEnd:
    """What a sidecar logs from now on."""

    def __init__(self, shop: Shop, app: str) -> None:
        answer = shop.mesh.ask(protocol.Logs(NAMESPACE, shop.pods[app].name, SIDECAR_NAME))
        assert isinstance(answer, protocol.LogFiles)
        self._path = answer.files[0][1]
        self._position = os.path.getsize(self._path)

    def lines(self) -> list[dict[str, Any]]:
        """All since, oldest first."""
        with open(self._path, "rb") as file:
            file.seek(self._position)
            found = []
            for line in file.read().splitlines():
                try:
                    value = msgspec.json.decode(line)
                except msgspec.DecodeError:
                    continue  # the last line, half written
                if isinstance(value, dict):
                    found.append(value)
            return found


def of_request(lines: list[dict[str, Any]], trace: str) -> Decision | None:
    """The decision about a request, from the access log (docs/access-log.md)."""
    for line in lines:
        if line.get("event") == "access" and line.get("direction") == "inbound" and line.get("trace_id") == trace:
            by = str(line.get("authorization", ""))
            return Decision(by, _sentence(line), str(line.get("client_id", "")))
    return None


def _sentence(line: Mapping[str, Any]) -> str:
    if line.get("authorization"):
        return f"on {line['route']}" if line.get("route") else ""
    return str(line.get("reason", ""))


def _path(labels: Mapping[str, str], prefix: str) -> str:
    namespace, name = labels.get(f"{prefix}_namespace", ""), labels.get(f"{prefix}_name", "")
    return f"{namespace}/{name}" if namespace else name


def told(decision: Decision | None) -> str:
    """The decision as the table's last column."""
    if decision is None:
        return "(unknown)"
    who = decision.client or "a client without identity"
    if decision.by:
        return " ".join(part for part in ("allowed by", decision.by, decision.reason, "to", who) if part)
    return f"denied: {decision.reason}"
