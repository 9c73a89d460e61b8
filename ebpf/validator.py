"""Proves from inside a pod that capture is in place, before anything else runs there: ``python -m ebpf.validator``.

It listens where the sidecar will listen for outbound connections (on loopback only), dials an address that belongs to nobody, and waits
for its own connection to arrive. Nobody else can bring that about: what arrives must come from this process's own socket (same local
address and port, which the kernel gave it), must carry a word made up for this attempt, and must have been meant for the address that
was dialled (SO_ORIGINAL_DST). A network that answers for the address, or refuses it, proves nothing and is not taken for it.

Inbound is proven with it: whoever captures (ebpf.plan, or one nftables transaction) puts inbound in place before outbound. It has to run
before the sidecar, as a user that is not the sidecar's and has no capability; both IPv4 and, where the pod has it, IPv6 are proven.

Exit codes: 0 proven, 1 not proven within the time (the last reasons on stderr), 2 wrong usage or wrong user.
Imports little, because a pod's start waits for it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping

OUTBOUND_PORT = 4140
SIDECAR_UID = 2102
# TEST-NET-1 (RFC 5737) and the discard prefix (RFC 6666): nobody is there. The port is the sidecar's own, which no app may skip.
NOBODY = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "100::1"}
_LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
_SO_ORIGINAL_DST = 80
_ATTEMPT_S = 0.3
_PAUSE_S = 0.05
_TOKEN_BYTES = 16
# without a route nothing can leave around the sidecar either
_NO_WAY_OUT = {errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


class NotProven(Exception):
    """What was seen instead of capture."""


class NoWayOut(Exception):
    """The pod has no such addresses: there is nothing to capture."""


def prove(family: socket.AddressFamily, port: int = OUTBOUND_PORT) -> None:
    """One attempt; raises NotProven, NoWayOut."""
    name, nobody = ("IPv6" if family == socket.AF_INET6 else "IPv4"), NOBODY[family]
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise NoWayOut(f"{name}: {error.strerror}") from None
    with listener, socket.socket(family, socket.SOCK_STREAM) as dialled:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            listener.bind((_LOOPBACK[family], port))
        except OSError as error:
            if error.errno in _NO_WAY_OUT:
                raise NoWayOut(f"{name}: {error.strerror}") from None
            raise NotProven(f"{name}: port {port} is taken ({error.strerror}): this must run before the sidecar") from None
        listener.listen(8)
        listener.settimeout(_ATTEMPT_S)
        dialled.settimeout(_ATTEMPT_S)
        token = os.urandom(_TOKEN_BYTES)
        try:
            dialled.connect((nobody, port))
            dialled.sendall(token)
            _expect(listener, dialled, token, (nobody, port))
        except OSError as error:
            if error.errno in _NO_WAY_OUT:
                raise NoWayOut(f"{name}: no route ({error.strerror})") from None
            raise NotProven(f"{name}: a connection to {nobody} did not arrive at the sidecar's port ({error.strerror or error})") from None


def _expect(listener: socket.socket, dialled: socket.socket, token: bytes, meant: tuple[str, int]) -> None:
    """Our own connection is the one that arrives; raises NotProven, OSError."""
    own = dialled.getsockname()[:2]
    deadline = time.monotonic() + _ATTEMPT_S
    while time.monotonic() < deadline:
        arrived, peer = listener.accept()
        with arrived:
            arrived.settimeout(_ATTEMPT_S)
            if peer[:2] != own or arrived.recv(_TOKEN_BYTES, socket.MSG_WAITALL) != token:
                continue  # somebody else's connection
            found = original_dst(arrived)
            if found != meant:
                raise NotProven(f"capture works, but says {found[0]} port {found[1]} instead of {meant[0]}: the sidecar could not go on")
            return
    raise NotProven(f"a connection to {meant[0]} did not arrive at the sidecar's port")


def original_dst(sock: socket.socket) -> tuple[str, int]:
    """As proxy.transport.original_dst asks; the connection's own address when nobody translated it."""
    six = sock.family == socket.AF_INET6
    try:
        raw = sock.getsockopt(socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP, _SO_ORIGINAL_DST, 28 if six else 16)
    except OSError:
        address: tuple[str, int] = sock.getsockname()[:2]
        return address
    port = struct.unpack("!H", raw[2:4])[0]
    return socket.inet_ntop(sock.family, raw[8:24] if six else raw[4:8]), port


def validate(port: int, within_s: float) -> list[str]:
    """Prove both families, trying again until the time is over; returns what is missing, empty when capture is proven."""
    deadline = time.monotonic() + within_s
    missing: dict[socket.AddressFamily, str] = {socket.AF_INET: "", socket.AF_INET6: ""}
    proven = 0
    while True:
        absent = []
        for family in list(missing):
            try:
                prove(family, port)
            except NotProven as error:
                missing[family] = str(error)
            except NoWayOut as error:
                missing[family] = str(error)
                absent.append(family)
            else:
                proven += 1
                del missing[family]
        if not missing or (proven and len(absent) == len(missing)):
            return []
        if time.monotonic() > deadline:
            return list(missing.values())
        time.sleep(_PAUSE_S)


def main(environ: Mapping[str, str]) -> int:
    """PILLION_VALIDATE_WITHIN_S: how long (30). PILLION_OUTBOUND_PORT: the sidecar's (4140)."""
    try:
        within_s = float(environ.get("PILLION_VALIDATE_WITHIN_S", "30"))
        port = int(environ.get("PILLION_OUTBOUND_PORT", str(OUTBOUND_PORT)))
    except ValueError as error:
        print(f"pillion-capture: PILLION_VALIDATE_WITHIN_S and PILLION_OUTBOUND_PORT must be numbers: {error}", file=sys.stderr)
        return 2
    if os.geteuid() == SIDECAR_UID:
        print(f"pillion-capture: runs as the sidecar's uid {SIDECAR_UID}, which capture lets pass: use another", file=sys.stderr)
        return 2
    missing = validate(port, within_s)
    for reason in missing:
        print(f"pillion-capture: {reason}", file=sys.stderr)
    if missing:
        print(
            f"pillion-capture: this pod's traffic is not led to its sidecar after {within_s:g} s, so its containers do not start."
            " Does pillion-agent run on this node, and what does it say about this pod? (pillion check)",
            file=sys.stderr,
        )
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(os.environ))
