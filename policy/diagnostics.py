"""Questions about policy and discovery over HTTP with JSON answers: what ``pillion diagnostics``, ``authz`` and ``check`` print.

Reads only. Served on a Unix socket, because the answers describe the whole mesh. Called by policy.controller.

GET /diagnostics/policy?namespace=&pod=&port=   how the policy of a port came about, and the policy itself
GET /diagnostics/authz?namespace=&pod=          who may use which port of a pod
GET /diagnostics/endpoints?addr=IP:PORT         what stands behind a dialled address
GET /diagnostics/conflicts                      objects that do not act as meant, and manifests that are refused
GET /diagnostics/pods                           which pods are known, meshed or not
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence

import trio

from core.addrs import InvalidAddr
from core.k8s.source import Refusal
from core.runtime.admin import Handler, Request, Response, json_response
from policy.index import Index
from policy.index.destinations import meshed
from policy.index.report import authz, explain, problems
from policy.limits import Counters


def routes(index: Index, refusals: Callable[[], Sequence[Refusal]]) -> dict[tuple[str, str], Handler]:
    """The handlers by method and path."""

    async def policy(request: Request) -> Response:
        port = request.query.get("port", "")
        if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
            return json_response({"error": "expected ?namespace=&pod=&port= with a port from 1 to 65535"}, 400)
        report = explain(index, *_pod(request), int(port))
        return _unknown_pod(request) if report is None else json_response(report)

    async def rows(request: Request) -> Response:
        if index.pod(*_pod(request)) is None:
            return _unknown_pod(request)
        return json_response(authz(index, *_pod(request)))

    async def endpoints(request: Request) -> Response:
        try:
            return json_response(index.destination(request.query.get("addr", "")))
        except InvalidAddr as error:
            return json_response({"error": f"?addr=: {error}"}, 400)

    async def conflicts(_: Request) -> Response:
        refused = [{"where": refusal.where, "ref": refusal.ref, "message": str(refusal)} for refusal in refusals()]
        return json_response({"problems": problems(index), "refused": refused})

    async def pods(_: Request) -> Response:
        known = [pod for by_name in index.store.pods.values() for pod in by_name.values()]
        return json_response([{"ref": pod.ref, "ips": pod.ips, "identity": index.identity(pod), "meshed": meshed(pod)} for pod in known])

    return {
        ("GET", "/diagnostics/policy"): policy,
        ("GET", "/diagnostics/authz"): rows,
        ("GET", "/diagnostics/endpoints"): endpoints,
        ("GET", "/diagnostics/conflicts"): conflicts,
        ("GET", "/diagnostics/pods"): pods,
    }


def _pod(request: Request) -> tuple[str, str]:
    return request.query.get("namespace", "default"), request.query.get("pod", "")


def _unknown_pod(request: Request) -> Response:
    namespace, pod = _pod(request)
    return json_response({"error": f"pod {namespace}/{pod} is not known; /diagnostics/pods lists those that are"}, 404)


def listen_unix(path: str) -> trio.SocketListener:
    """A Unix socket that only our own user may use; replaces one that a dead process left. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        mask = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        sock.listen(64)
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    except BaseException:
        sock.close()
        raise


def exposition(index: Index, counters: Counters, refusals: Sequence[Refusal]) -> bytes:
    """Metrics in Prometheus' text format 0.0.4; no label holds anything from a peer."""
    objects: dict[str, int] = {}
    for ref in index.store.objects:
        objects[ref.kind] = objects.get(ref.kind, 0) + 1
    rows: list[Row] = [
        ("pillion_policy_subscribers", "gauge", "Connected peers", {"": counters.connected}),
        ("pillion_policy_subscribers_total", "counter", "Peers admitted", {"": counters.accepted}),
        ("pillion_policy_subscribers_bytes", "gauge", "Memory set aside for them", {"": counters.bytes_taken}),
        ("pillion_policy_messages_sent_total", "counter", "States sent to sidecars", {"": counters.messages_sent}),
        ("pillion_policy_subscriptions_ignored_total", "counter", "Beyond a bound", {"": counters.subscriptions_ignored}),
        (
            "pillion_policy_refused_total",
            "counter",
            "Peers refused or cut",
            {f'{{reason="{k}"}}': n for k, n in sorted(counters.refused.items())},
        ),
        ("pillion_policy_objects", "gauge", "Objects in the index", {f'{{kind="{k}"}}': n for k, n in sorted(objects.items())}),
        ("pillion_policy_objects_refused", "gauge", "Manifests that are refused at present", {"": len(refusals)}),
    ]
    return lines_of(rows)


Row = tuple[str, str, str, dict[str, int]]
"""Name, type, meaning, and the values by their labels as they are written (``{kind="Pod"}``, or nothing)."""


def lines_of(rows: Sequence[Row]) -> bytes:
    """The families in the text format."""
    lines: list[str] = []
    for name, kind, meaning, values in rows:
        lines += [f"# HELP {name} {meaning}.", f"# TYPE {name} {kind}", *(f"{name}{labels} {value}" for labels, value in values.items())]
    return ("\n".join(lines) + "\n").encode()
