"""What the other replicas know: each is asked over TLS, proven to be an identity service, by a token that proves us to be one.

Moves ledgers; `census` decides what follows from them. Called by the leader, for a rotation.
"""

from __future__ import annotations

from pathlib import Path

import h11
import trio

from core.addrs import Addr
from core.k8s.api import Api
from core.names import WorkloadId
from core.runtime.sockets import Connecting
from core.runtime.tls import HandshakeFailed, TlsStream, client_context
from identity.cluster.census import Replica
from identity.cluster.pods import list_replicas
from identity.exchange import ExchangeFailed, exchange
from identity.wire import TOKEN_MAX_BYTES, WireError, known_untrusted

_TIMEOUT_S = 10.0
_ANSWER_MAX_BYTES = 64 * 1024 * 1024  # 20 000 workloads with several leaves


class Peers:
    """The replicas besides the one called ``me``. token_file: of our own service account, for the identity service's audience."""

    def __init__(self, api: Api, ours: WorkloadId, me: str, port: int, token_file: Path) -> None:
        self._api = api
        self._ours = ours
        self._me = me
        self._port = port
        self._token_file = token_file

    async def ask(self, bundle_pem: bytes) -> list[Replica]:
        """What every other replica knows; one that nobody serves any more is left out. Raises ApiError when they are not known."""
        found: list[Replica] = []

        async def one(name: str, ip: str) -> None:
            replica = await self._ask(name, ip, bundle_pem)
            if replica is not None:
                found.append(replica)

        async with trio.open_nursery() as nursery:
            for name, ip in await list_replicas(self._api, self._ours):
                if name != self._me:
                    nursery.start_soon(one, name, ip)
        return sorted(found, key=lambda replica: replica.name)

    async def _ask(self, name: str, ip: str, bundle_pem: bytes) -> Replica | None:
        try:
            with trio.fail_after(_TIMEOUT_S):
                token = (await trio.Path(self._token_file).read_bytes())[:TOKEN_MAX_BYTES].decode("ascii").strip()
                status, answer = await self._exchange(ip, bundle_pem, token)
            if status != 200:
                return Replica(name, error=f"it answers {status}: {answer[:200].decode('utf-8', 'replace')}")
            known = known_untrusted(answer)
        except ConnectionRefusedError:
            return None  # nobody listens there: it signs nothing, and its workloads have turned to others
        except trio.TooSlowError:
            return Replica(name, error=f"no answer within {_TIMEOUT_S:g} s")
        except (OSError, UnicodeDecodeError, HandshakeFailed, trio.BrokenResourceError, ExchangeFailed, WireError) as error:
            return Replica(name, error=str(error) or type(error).__name__)
        return Replica(name, known.generation, known.issuer, known.up_s, known.holdings)

    async def _exchange(self, ip: str, bundle_pem: bytes, token: str) -> tuple[int, bytes]:
        context = client_context(None, bundle_pem, (b"http/1.1",))
        connecting = Connecting(Addr(ip, self._port))
        await connecting.wait()
        transport = connecting.stream()
        stream = TlsStream.client(transport, context, self._ours.server_name, self._ours)
        try:
            await stream.do_handshake()
            headers = [("host", self._ours.server_name), ("authorization", f"Bearer {token}"), ("content-length", "0")]
            request = h11.Request(method="GET", target="/v1/ledger", headers=[*headers, ("connection", "close")])
            return await exchange(stream, h11.Connection(h11.CLIENT), request, b"", _ANSWER_MAX_BYTES)
        finally:
            await trio.aclose_forcefully(transport)
