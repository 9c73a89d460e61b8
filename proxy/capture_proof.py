"""Proves from inside the sidecar that the connections its pod makes are led to it. Called by proxy.app.

The sidecar dials an address that belongs to nobody, at its own outbound port, and waits for its own connection to arrive at its own
listener. Capture lets the sidecar's own connections pass, except this one (ebpf/bpf/connect.bpf.c, ebpf.redirect), which it treats like an
app's. Nobody else can bring that about: what arrives must carry a token made for this attempt, come from the very socket that dialled (its
address and port), and be meant for the address that was dialled, according to the kernel. A network that answers for the address, or
refuses it, proves nothing. This proves inbound too: capture puts inbound in place before outbound (ebpf.plan, or one transaction of
nftables).

ebpf.validator proves the same from a container of its own, where there is one.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

import trio

from core.addrs import Addr, ClientAddr, OriginalDst, from_sockaddr
from core.capture import NOBODY
from core.runtime import logs
from core.runtime.sockets import Connecting
from core.runtime.watch import Cell
from proxy.rescue import Cause, Failure
from proxy.transport.accept import Accepted

_log = logs.logger("capture")

_ATTEMPT_S = 0.3
_PAUSE_S = 0.02
_TOKEN_BYTES = 16
# without a route nothing can leave around the sidecar either
_NO_WAY_OUT = {errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


class NotCaptured(Exception):
    """What was seen instead of capture."""


class NoWayOut(Exception):
    """The pod has no such addresses: there is nothing to capture."""


class _Attempt(NamedTuple):
    own: Addr
    meant: OriginalDst
    arrived: trio.Event


class CaptureProof:
    """Whether capture is in place. port: where the sidecar takes what the app calls. problem: what is missing, "" once it is proven."""

    def __init__(self, port: int) -> None:
        self.proven = Cell(False)
        self.problem = "capture was not tried yet"
        self._port = port
        self._attempts: dict[bytes, _Attempt] = {}

    async def prove(self) -> None:
        """Try until each of IPv4 and IPv6 is proven or not there, and at least one is proven."""
        missing = [OriginalDst(Addr(ip, self._port)) for ip in NOBODY]
        found = False
        while True:
            problems, absent = [], 0
            for meant in tuple(missing):
                try:
                    await self.attempt(meant)
                except (NotCaptured, NoWayOut) as error:
                    problems.append(str(error))
                    absent += isinstance(error, NoWayOut)
                else:
                    missing.remove(meant)
                    found = True
            if found and absent == len(missing):
                break
            self.problem = "; ".join(problems)
            await trio.sleep(_PAUSE_S)
        self.problem = ""
        self.proven.set(True)
        _log.info("capture proven")

    async def attempt(self, meant: OriginalDst) -> None:
        """Dial once, and see whether it arrives; raises NotCaptured, NoWayOut."""
        token = os.urandom(_TOKEN_BYTES)
        try:
            with trio.fail_after(_ATTEMPT_S):
                connecting = Connecting(meant)
                if not connecting.done:
                    await connecting.wait()
                stream = connecting.stream()
                try:
                    attempt = self._attempts[token] = _Attempt(from_sockaddr(stream.sock.getsockname()), meant, trio.Event())
                    await stream.send_all(token)
                    await attempt.arrived.wait()
                finally:
                    self._attempts.pop(token, None)
                    stream.abort()
        except trio.TooSlowError:
            raise NotCaptured(f"a connection to {meant.ip} did not arrive at the sidecar") from None
        except trio.BrokenResourceError as error:
            raise NotCaptured(f"a connection to {meant.ip} broke: {error}") from None
        except OSError as error:
            kind = NoWayOut if error.errno in _NO_WAY_OUT else NotCaptured
            raise kind(f"a connection to {meant.ip} did not arrive at the sidecar ({error.strerror})") from None

    def concerns(self, accepted: Accepted) -> bool:
        """Whether an outbound connection was meant for nobody. It must never be dialled on: it would come back."""
        return accepted.dst.port == self._port and accepted.dst.ip in NOBODY

    async def take(self, accepted: Accepted) -> None:
        """A connection that `concerns` us; raises Failure when it is somebody else's."""
        word = b""
        with trio.move_on_after(_ATTEMPT_S):
            while len(word) < _TOKEN_BYTES and (more := await accepted.stream.receive_some(_TOKEN_BYTES - len(word))):
                word += more
        attempt = self._attempts.get(word)
        if attempt is None or ClientAddr(attempt.own) != accepted.client or attempt.meant != accepted.dst:
            raise Failure(Cause.LOOP, f"{accepted.dst} is where the sidecar proves capture: nothing is there")
        attempt.arrived.set()
        accepted.stream.abort()
