"""What the node's agent and those who start pods say to each other over its Unix socket: one JSON object a line. Pure.

A ``register`` comes with one file descriptor: the pod's network namespace (``/proc/PID/ns/net``). Spoken by ebpf.server and ebpf.client.
The standard library's json is used because the agent's memory is a headline number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from core.addrs import InvalidAddr, canonical_ip
from ebpf.redirect import INBOUND_PORT, OUTBOUND_PORT, SIDECAR_UID, Range

MAX_LINE_BYTES = 64 << 10
_TEXT_MAX = 512  # namespace, name and id of a pod have 253 characters at most
_RANGES_MAX = 256
_ADDRESSES_MAX = 16


class BadMessage(ValueError):
    """A line that is no message of this protocol; the text says what is wrong with it."""


class PodFacts(NamedTuple):
    """A pod that must be captured. id: stable and unique on the node (Kubernetes: the pod's uid).

    skip_inbound, skip_outbound: ports that are not captured. accelerate: False when its app reads in ways that acceleration breaks;
    unaccelerated: the same for single ports, of the app or of what it calls. real_caller: whether the app sees callers' addresses.
    addresses: the pod's own, which it reaches without its sidecar; empty when the agent shall look into the namespace. resume: the
    app never reads with MSG_WAITALL, so bytes towards it may go back to the short way without a look at who sleeps in a read.
    """

    id: str
    namespace: str
    name: str
    sidecar_uid: int = SIDECAR_UID
    outbound_port: int = OUTBOUND_PORT
    inbound_port: int = INBOUND_PORT
    skip_inbound: tuple[Range, ...] = ()
    skip_outbound: tuple[Range, ...] = ()
    accelerate: bool = True
    unaccelerated: tuple[Range, ...] = ()
    real_caller: bool = True
    addresses: tuple[str, ...] = ()
    resume: bool = False


class Register(NamedTuple):
    """Capture this pod; the answer says how, or why its containers must not start. Registering again changes the options."""

    pod: PodFacts


class Unregister(NamedTuple):
    """The pod is gone."""

    id: str


class Steer(NamedTuple):
    """The pod's sidecar listens now: lead what arrives to it, and answer when that is so."""

    id: str


class Status(NamedTuple):
    """What the node can do and what every pod has."""


class Remove(NamedTuple):
    """Take everything of eBPF away and end; pods that run are led by nftables first."""


Request = Register | Unregister | Steer | Status | Remove


def encode(message: Mapping[str, Any]) -> bytes:
    """One line, newline included."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def request_line(request: Request) -> bytes:
    """What `decode_request_untrusted` reads."""
    body: dict[str, Any] = {"op": type(request).__name__.lower()}
    if isinstance(request, Register):
        body["pod"] = request.pod._asdict()
    elif isinstance(request, Unregister | Steer):
        body["id"] = request.id
    return encode(body)


def decode_untrusted(line: bytes) -> dict[str, Any]:
    """Any bytes give an object or BadMessage."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadMessage("expected an object")
    return found


def decode_request_untrusted(line: bytes) -> Request:
    """Any bytes give a request or BadMessage."""
    body = decode_untrusted(line)
    op = body.get("op")
    if op == "register":
        return Register(pod_facts(body.get("pod")))
    if op == "unregister":
        return Unregister(_text(body, "id"))
    if op == "steer":
        return Steer(_text(body, "id"))
    if op == "status":
        return Status()
    if op == "remove":
        return Remove()
    raise BadMessage(f"op is {str(op)[:40]!r}: expected register, unregister, steer, status or remove")


def pod_facts(body: object) -> PodFacts:
    """A pod as JSON, also in the agent's own state file; raises BadMessage."""
    if not isinstance(body, dict):
        raise BadMessage("pod: expected an object")
    if unknown := body.keys() - set(PodFacts._fields):
        raise BadMessage(f"pod: unknown field {sorted(map(str, unknown))[0][:40]!r}: the agent and its caller are of different versions")
    defaults = PodFacts._field_defaults
    return PodFacts(
        id=_text(body, "id"),
        namespace=_text(body, "namespace"),
        name=_text(body, "name"),
        sidecar_uid=_number(body, "sidecar_uid", defaults, 0, (1 << 32) - 2),
        outbound_port=_number(body, "outbound_port", defaults, 1, 65535),
        inbound_port=_number(body, "inbound_port", defaults, 1, 65535),
        skip_inbound=_ranges(body, "skip_inbound"),
        skip_outbound=_ranges(body, "skip_outbound"),
        accelerate=_flag(body, "accelerate"),
        unaccelerated=_ranges(body, "unaccelerated"),
        real_caller=_flag(body, "real_caller"),
        addresses=_addresses(body),
        resume=_flag(body, "resume"),
    )


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= _TEXT_MAX or not value.isprintable():
        raise BadMessage(f"{name}: expected printable text of 1 to {_TEXT_MAX} characters")
    return value


def _number(body: Mapping[str, Any], name: str, defaults: Mapping[str, Any], low: int, high: int) -> int:
    value = body.get(name, defaults[name])
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadMessage(f"{name}: expected a number from {low} to {high}")
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, True)
    if not isinstance(value, bool):
        raise BadMessage(f"{name}: expected true or false")
    return value


def _ranges(body: Mapping[str, Any], name: str) -> tuple[Range, ...]:
    value = body.get(name, ())
    if not isinstance(value, list | tuple) or len(value) > _RANGES_MAX:
        raise BadMessage(f"{name}: expected a list of at most {_RANGES_MAX} port ranges")
    return tuple(_range(name, entry) for entry in value)


def _addresses(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("addresses", ())
    if not isinstance(value, list | tuple) or len(value) > _ADDRESSES_MAX:
        raise BadMessage(f"addresses: expected at most {_ADDRESSES_MAX} IP addresses")
    try:
        return tuple(canonical_ip(_text({"addresses": one}, "addresses")) for one in value)
    except InvalidAddr as error:
        raise BadMessage(f"addresses: {error}") from None


def _range(name: str, entry: object) -> Range:
    if isinstance(entry, list | tuple) and len(entry) == 2:
        low, high = entry
        if type(low) is int and type(high) is int and 1 <= low <= high <= 65535:
            return low, high
    raise BadMessage(f"{name}: expected pairs of ports such as [8000, 8010]")
