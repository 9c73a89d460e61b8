"""Opaque bytes through both sidecars: who speaks first, ends and resets, the app's own TLS, permits that are withdrawn."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import h2.events
import pytest
import trio
from cryptography import x509

from core.addrs import Addr, OriginalDst
from policy.wire import Destination, Endpoint, HttpMatch, InboundPolicy, PathMatch, Route, Rule
from tests.certs import Authority
from tests.ports import unused_port
from tests.scenarios.h2_peers import H2, H2App
from tests.scenarios.mesh import ANYONE, CART, FOR_CART, WEB, inbound_policy, mesh, only
from tests.scenarios.peers import MIB, PATIENCE_S, H11App, program, read_all, read_until, run

_RESET = struct.pack("ii", 1, 0)
_BANNER = b"220 mail.shop ESMTP\r\n"
_SILENCE_S = 0.1  # PILLION_DETECT_SILENCE_MS


class Recorded:
    """A handler of connections that keeps what arrived. said: the bytes of each connection. over: one of them has ended."""

    def __init__(self, serve: Callable[[trio.SocketStream, bytearray], Awaitable[None]]) -> None:
        self._serve = serve
        self.said: list[bytearray] = []
        self.over = trio.Event()

    async def __call__(self, stream: trio.SocketStream) -> None:
        said = bytearray()
        self.said.append(said)
        async with stream:
            try:
                await self._serve(stream, said)
            except trio.BrokenResourceError:
                said += b"<reset>"
            finally:
                self.over.set()


async def _mail(stream: trio.SocketStream, said: bytearray) -> None:
    """Greets, then answers every line with its length."""
    await stream.send_all(_BANNER)
    async for data in stream:
        said += data
        await stream.send_all(b"250 %d\r\n" % len(data))


async def _echo(stream: trio.SocketStream, said: bytearray) -> None:
    async for data in stream:
        said += data
        await stream.send_all(data)


async def _listen(stream: trio.SocketStream, said: bytearray) -> None:
    """As a server of HTTP that has not seen a whole request."""
    async for data in stream:
        said += data


def _with_route() -> InboundPolicy:
    everything = Rule((HttpMatch(PathMatch("PathPrefix", "/")),))
    return inbound_policy(only(CART), routes=(Route(FOR_CART.server, "http", (), (everything,), FOR_CART.authorizations),))


async def _was_reset(stream: trio.SocketStream) -> bool:
    with trio.fail_after(PATIENCE_S):
        try:
            return await stream.receive_some(65536) == b"<no, it ended in order>"
        except trio.BrokenResourceError:
            return True


async def test_a_server_that_speaks_first_is_heard_after_the_silence_and_nothing_is_said_twice(autojump_clock: trio.testing.MockClock):
    app = Recorded(_mail)
    async with mesh(app) as made:
        began = trio.current_time()
        stream = await made.dial()
        assert await read_until(stream, b"\r\n") == _BANNER
        assert _SILENCE_S <= trio.current_time() - began < _SILENCE_S + 0.05
        await stream.send_all(b"GET / HTTP/1.1\r\n")  # looks like HTTP, and is none
        assert await read_until(stream, b"\r\n") == b"250 16\r\n"
        await stream.send_all(b"QUIT\r\n")
        assert await read_until(stream, b"\r\n") == b"250 6\r\n"
        await stream.send_eof()
        assert await read_all(stream) == b""
        assert app.said == [b"GET / HTTP/1.1\r\nQUIT\r\n"]
        assert made.metric(made.server, "pillion_inbound_tcp_authz_allow_total", client_id=CART.uri) == 1


async def test_an_unmeshed_client_hears_a_server_that_speaks_first(autojump_clock: trio.testing.MockClock):
    app = Recorded(_mail)
    async with mesh(app, policy=inbound_policy(ANYONE)) as made:
        stream = await made.dial_unmeshed()
        assert await read_until(stream, b"\r\n") == _BANNER
        await stream.send_all(b"HELO\r\n")
        assert await read_until(stream, b"\r\n") == b"250 6\r\n"
        assert app.said == [b"HELO\r\n"]


async def test_an_unmeshed_client_without_a_permit_learns_nothing_from_a_silent_port(autojump_clock: trio.testing.MockClock):
    app = Recorded(_mail)
    async with mesh(app) as made:
        stream = await made.dial_unmeshed()
        with trio.move_on_after(5):
            assert await stream.receive_some(100) == b"<anything>"
        await stream.send_all(b"\x00\x01")
        assert await _was_reset(stream)
        assert app.said == []
        assert made.metric(made.server, "pillion_inbound_tcp_authz_deny_total") == 1


async def test_a_port_marked_opaque_does_not_wait_for_silence(autojump_clock: trio.testing.MockClock):
    async with mesh(Recorded(_mail), policy=inbound_policy(only(CART), protocol="opaque")) as made:
        made.destination(protocol="opaque")
        began = trio.current_time()
        assert await read_until(await made.dial(), b"\r\n") == _BANNER
        assert trio.current_time() == began


@pytest.mark.parametrize("pause_s", [0.0, _SILENCE_S / 2, 3.0])
async def test_opaque_bytes_arrive_once_however_late_they_begin(autojump_clock: trio.testing.MockClock, pause_s: float):
    app = Recorded(_echo)
    async with mesh(app) as made:
        stream = await made.dial()
        await trio.sleep(pause_s)
        await stream.send_all(b"\x00binary")
        assert await read_until(stream, b"binary") == b"\x00binary"
        assert [said for said in app.said if said] == [b"\x00binary"]


@pytest.mark.parametrize("policy", [FOR_CART, _with_route()], ids=["no routes", "routes, so nothing opaque"])
async def test_a_client_that_hesitates_before_its_request_is_served_as_http(autojump_clock: trio.testing.MockClock, policy):
    async def answer(exchange) -> None:
        await exchange.answer(exchange.headers[b"pillion-client-id"])

    async with mesh(H11App(answer), policy=policy) as made:
        for dial in (made.dial, made.dial):
            stream = await dial()
            await trio.sleep(4)
            await stream.send_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
            assert (await read_until(stream, CART.uri.encode())).startswith(b"HTTP/1.1 200")
        assert made.metric(made.server, "pillion_inbound_http_authz_allow_total") == 2


async def _answer_with_the_name(end: H2, event: h2.events.Event) -> None:
    if isinstance(event, h2.events.RequestReceived):
        end.h2.send_headers(event.stream_id, [(":status", "200"), ("x-name", dict(event.headers).get("pillion-client-id", "nobody"))])
        end.h2.end_stream(event.stream_id)


@pytest.mark.parametrize("meshed", [True, False])
@pytest.mark.parametrize("protocol", ["detect", "opaque"])
async def test_a_server_of_http2_that_speaks_first_sees_no_forged_identity(
    autojump_clock: trio.testing.MockClock, meshed: bool, protocol: str
):
    """Its SETTINGS need not wait for a request. protocol: what the caller's own sidecar was told about the Service."""
    app = H2App(_answer_with_the_name)
    async with mesh(app, policy=inbound_policy(ANYONE)) as made, trio.open_nursery() as nursery:
        made.destination(protocol=protocol)
        client = H2(await (made.dial() if meshed else made.dial_unmeshed()), client=True)
        await trio.sleep(4)  # beyond the silence in which a client is expected to speak
        with contextlib.suppress(trio.BrokenResourceError):  # by a connection that was cut already
            await client.start()
        forged = [("pillion-client-id", "spiffe://cluster.local/ns/shop/sa/admin")]
        if meshed and protocol == "opaque":  # the caller's sidecar carries opaque bytes, and those are none
            with contextlib.suppress(trio.BrokenResourceError):
                await client.request(more=forged)
            await client.pump()
            assert not [end for end in app.connections for event in end.events if isinstance(event, h2.events.RequestReceived)]
        else:
            nursery.start_soon(client.pump)
            number = await client.request(more=forged)
            assert (await client.answer(number))[0] == "200"
            head = dict(client.got(number, h2.events.ResponseReceived)[0].headers)
            assert head["x-name"] == (CART.uri if meshed else "nobody")
        nursery.cancel_scope.cancel()


async def test_either_side_may_end_its_half_first(autojump_clock: trio.testing.MockClock):
    async def sums(stream: trio.SocketStream, said: bytearray) -> None:
        if not said:
            await stream.send_all(b"\x00server's half")
            await stream.send_eof()
        async for data in stream:
            said += data

    async def counts(stream: trio.SocketStream, said: bytearray) -> None:
        async for data in stream:
            said += data
        await stream.send_all(b"%d bytes" % len(said))

    for app, expected in ((Recorded(sums), b"\x00server's half"), (Recorded(counts), b"300000 bytes")):
        async with mesh(app) as made:
            stream = await made.dial()
            await stream.send_all(b"\x00" * 100_000)
            if app._serve is sums:
                assert await read_all(stream) == expected  # their end is here, ours is open
            await stream.send_all(b"\x00" * 200_000)
            await stream.send_eof()
            assert await read_all(stream) == (b"" if app._serve is sums else expected)
            await app.over.wait()
            assert app.said == [b"\x00" * 300_000]
            await made.client.live.wait_none()
            await made.server.live.wait_none()
            assert made.client.relay.open_links == made.server.relay.open_links == 0


async def test_a_reset_by_the_app_is_a_reset_for_the_client():
    async def slam(stream: trio.SocketStream, said: bytearray) -> None:
        said += await stream.receive_some(100)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        stream.socket.close()

    async with mesh(Recorded(slam)) as made:
        stream = await made.dial()
        await stream.send_all(b"\x00")
        assert await _was_reset(stream)
        for side in (made.client, made.server):
            assert made.metric(side, "pillion_errors_total", error="opaque-reset") == 1


async def test_a_reset_by_the_client_is_a_reset_for_the_app():
    app = Recorded(_echo)
    async with mesh(app) as made:
        stream = await made.dial()
        await stream.send_all(b"\x00")
        await stream.receive_some(1)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        stream.socket.close()
        with trio.fail_after(PATIENCE_S):
            await app.over.wait()
        assert app.said == [b"\x00<reset>"]


async def test_ten_mebibytes_pass_both_ways_at_once():
    async with mesh(Recorded(_echo)) as made:
        stream = await made.dial()
        data = bytes(range(256)) * (10 * MIB // 256)
        got: list[bytes] = []
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(data)
                await stream.send_eof()

            nursery.start_soon(send)
            got.append(await read_all(stream))
        assert got[0] == data


async def test_a_port_with_routes_carries_nothing_opaque():
    app = Recorded(_echo)
    async with mesh(app, policy=_with_route()) as made:
        stream = await made.dial()
        await stream.send_all(b"\x00 past the rules")
        assert await _was_reset(stream)
        assert app.said == []
        assert made.metric(made.server, "pillion_inbound_tcp_authz_deny_total") == 1
        assert made.log("denied")[0]["detail"]


async def test_an_open_connection_is_cut_when_its_permit_is_withdrawn():
    app = Recorded(_echo)
    async with mesh(app) as made:
        stream = await made.dial()
        await stream.send_all(b"\x00")
        assert await stream.receive_some(1) == b"\x00"
        made.policy(inbound_policy(only(CART, WEB)))
        await stream.send_all(b"\x01")
        assert await stream.receive_some(1) == b"\x01"  # another policy, the same answer: not touched
        made.policy(inbound_policy(only(WEB)))
        assert await _was_reset(stream)
        assert made.metric(made.server, "pillion_inbound_tcp_authz_terminate_total") == 1
        assert CART.uri in str(made.log("terminated")[0]["reason"])


async def test_without_any_policy_a_connection_waits_and_is_then_refused(autojump_clock: trio.testing.MockClock):
    app = Recorded(_echo)
    async with mesh(app, policy=None, PILLION_POLICY_WAIT_MS="700") as made:
        for dial in (made.dial, made.dial_unmeshed):
            began = trio.current_time()
            stream = await dial()
            await stream.send_all(b"\x00")
            assert await _was_reset(stream)
            assert 0.7 <= trio.current_time() - began < 0.9
        assert app.said == []
        assert made.metric(made.server, "pillion_errors_total", error="policy-unknown") == 2


async def test_without_any_policy_requests_are_answered_with_503_and_the_connection_ends(autojump_clock: trio.testing.MockClock):
    app = Recorded(_echo)
    async with mesh(app, policy=None) as made:
        for meshed, dial in ((True, made.dial), (False, made.dial_unmeshed)):
            began = trio.current_time()
            stream = await dial()
            await stream.send_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
            answer = await read_all(stream) if not meshed else await read_until(stream, b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert (b"pillion-proxy-error: policy-unknown" in answer) is meshed
            assert 2 <= trio.current_time() - began < 2.5
            await stream.aclose()
        for dial in (made.dial, made.dial_unmeshed):
            stream = await dial()
            client = H2(stream, client=True)
            await client.start()
            await client.request()
            got = b""
            with trio.fail_after(PATIENCE_S):
                while b"\x08\x03503" not in got:  # :status
                    got += await stream.receive_some(65536) or b"<end>\x08\x03503"
            assert b"<end>" not in got
            await stream.aclose()
        assert app.said == []
        assert made.metric(made.server, "pillion_errors_total", error="policy-unknown") == 4
        with trio.fail_after(30):
            await made.server.live.wait_none()


async def test_a_connection_that_waits_is_served_as_soon_as_its_policy_arrives(autojump_clock: trio.testing.MockClock):
    app = Recorded(_echo)
    async with mesh(app, policy=None) as made:
        stream = await made.dial()
        await stream.send_all(b"\x00")
        await trio.sleep(1)
        made.policy(FOR_CART)
        assert await stream.receive_some(1) == b"\x00"


async def test_a_destination_that_nobody_knows_is_refused(autojump_clock: trio.testing.MockClock):
    async with mesh(Recorded(_echo)) as made:
        for dst in (OriginalDst(Addr("10.96.0.99", 80)), OriginalDst(made.app)):
            stream = await made.dial(dst)
            await stream.send_all(b"\x00")
            assert await _was_reset(stream)
        assert made.metric(made.client, "pillion_errors_total", error="policy-unknown") == 2


async def test_an_external_destination_is_reached_in_plaintext_as_dialled(autojump_clock: trio.testing.MockClock):
    app = Recorded(_mail)
    async with mesh(app) as made:
        outside = OriginalDst(made.app)
        made.client_controller.watch_destination(str(outside)).set(Destination("external", None, "detect"))
        began = trio.current_time()
        stream = await made.dial(outside)
        assert await read_until(stream, b"\r\n") == _BANNER
        assert trio.current_time() == began  # nothing to detect
        made.client.credentials.set(None)  # and nothing that needs a certificate
        assert await read_until(await made.dial(outside), b"\r\n") == _BANNER


async def test_a_service_without_endpoints_and_one_that_refuses_end_the_connection_at_once():
    async with mesh(Recorded(_echo)) as made:
        made.nowhere()
        first = await made.dial()
        await first.send_all(b"\x00")
        assert await _was_reset(first)
        made.destination(Endpoint("127.0.0.1:1", WEB.uri))
        second = await made.dial()
        await second.send_all(b"\x00")
        assert await _was_reset(second)
        for cause in ("no-endpoints", "connect-refused"):
            assert made.metric(made.client, "pillion_errors_total", error=cause) >= 1


@pytest.mark.needs("openssl")
@pytest.mark.parametrize(
    "options", [("-alpn", "h2", "-servername", "web.shop"), ("-noservername",), ("-tls1_2", "-servername", "web.shop")]
)
async def test_the_tls_of_an_app_passes_through_untouched(tmp_path: Path, options: tuple[str, ...]):
    authority = Authority("the app's own")
    credentials = authority.credentials(WEB, names=[x509.DNSName("web.shop")])
    (tmp_path / "cert").write_bytes(credentials.chain_pem)
    (tmp_path / "key").write_bytes(credentials.key_pem)
    (tmp_path / "anchor").write_bytes(authority.bundle_pem)
    app = Addr("127.0.0.1", unused_port())
    serve = (
        "openssl",
        "s_server",
        "-accept",
        str(app),
        "-cert",
        f"{tmp_path / 'cert'}",
        "-key",
        f"{tmp_path / 'key'}",
        "-rev",
        "-alpn",
        "h2",
    )
    async with program(*serve, ready=app), mesh(app) as made, made.entry() as entry:
        ask = ("-connect", str(entry), "-CAfile", str(tmp_path / "anchor"), "-verify_return_error", *options)
        ran = await run("openssl", "s_client", *ask, "-ign_eof", stdin=b"drawer\nCLOSE\n")
        assert (b"Verify return code: 0 (ok)" in ran.out, b"reward" in ran.out) == (True, True), ran
        assert (b"ALPN protocol: h2" in ran.out) is ("-alpn" in options)
        assert made.metric(made.server, "pillion_tcp_open_total", client_id=CART.uri) == 1  # and inside our own TLS


async def test_a_client_that_ends_its_half_without_a_word_still_hears_the_server(autojump_clock: trio.testing.MockClock):
    app = Recorded(_mail)
    async with mesh(app, policy=inbound_policy(ANYONE)) as made:
        for dial in (made.dial, made.dial_unmeshed):
            stream = await dial()
            await stream.send_eof()
            assert await read_all(stream) == _BANNER


async def test_an_unmeshed_endpoint_is_reached_in_plaintext():
    app = Recorded(_echo)
    async with mesh(app) as made:
        made.destination(Endpoint(str(made.app)))
        stream = await made.dial()
        await stream.send_all(b"\x00 plain")
        assert await read_until(stream, b"plain") == b"\x00 plain"
        assert made.metric(made.server, "pillion_tcp_open_total") == 0


async def test_a_policy_that_gains_routes_cuts_what_is_opaque():
    async with mesh(Recorded(_echo)) as made:
        stream = await made.dial()
        await stream.send_all(b"\x00")
        assert await stream.receive_some(1) == b"\x00"
        made.policy(_with_route())
        assert await _was_reset(stream)


async def test_a_service_port_that_is_not_defined_is_refused():
    async with mesh(Recorded(_echo)) as made:
        made.destination(kind="refused")
        stream = await made.dial()
        assert await _was_reset(stream)
        assert made.metric(made.client, "pillion_errors_total", error="service-port-undefined") == 1


async def test_a_finished_opaque_connection_is_a_line_of_the_access_log() -> None:
    lines: list[dict[str, object]] = []

    async def echo(stream: trio.SocketStream) -> None:
        async with stream:
            while data := await stream.receive_some():
                await stream.send_all(data)

    async with mesh(echo, PILLION_ACCESS_LOG="all") as made:
        for side in (made.client, made.server):
            side.recorder.access = lambda fields: lines.append(dict(fields))
        made.destination(protocol="opaque")
        client = await made.dial()
        await client.send_all(b"twelve bytes")
        assert await client.receive_some() == b"twelve bytes"
        await client.aclose()
        with trio.fail_after(PATIENCE_S):
            while len(lines) < 2:
                await trio.lowlevel.checkpoint()
            made.policy(inbound_policy(only(WEB)))
            denied = await made.dial()
            with contextlib.suppress(trio.BrokenResourceError):
                assert await denied.receive_some() == b""
            while len(lines) < 4:
                await trio.lowlevel.checkpoint()
    inbound = [line for line in lines if line["direction"] == "inbound"]
    assert [line["protocol"] for line in lines] == ["TCP"] * 4
    assert inbound[0]["request_bytes"] == inbound[0]["response_bytes"] == 12
    assert inbound[0]["client_id"] == CART.uri
    assert "error" not in inbound[0]
    assert inbound[1]["error"] == "denied"
    assert CART.uri in str(inbound[1]["reason"])


async def test_a_plaintext_connection_is_cut_once_discovery_names_an_identity_for_its_address() -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                while data := await stream.receive_some():
                    await stream.send_all(data)

    async with mesh(echo) as made:
        pod = OriginalDst(made.app)
        cell = made.client_controller.watch_destination(str(pod))
        cell.set(Destination("external", None, "detect"))
        client = await made.dial(pod)
        await client.send_all(b"plain")
        assert await client.receive_some() == b"plain"
        cell.set(Destination("pod", None, "detect", (Endpoint(str(pod)),)))
        await client.send_all(b"still")
        assert await client.receive_some() == b"still"  # known now, and not meshed
        cell.set(Destination("pod", None, "detect", (Endpoint(str(pod), WEB.uri),)))
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(PATIENCE_S):
            await client.receive_some()


FORGED = b"pillion-client-id: spiffe://cluster.local/ns/shop/sa/admin\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [b"\r\nGET / HTTP/1.1\r\nhost: web\r\n" + FORGED + b"\r\n"],
        [b"get / HTTP/1.1\r\nhost: web\r\n" + FORGED + b"\r\n"],
        [b"GET / HTTP/1.2\r\nhost: web\r\n" + FORGED + b"\r\n"],
        [b" GET / HTTP/1.1\r\nhost: web\r\n" + FORGED + b"\r\n"],
        [b"GET\xa0/\xa0HTTP/1.1\r\nhost: web\r\n" + FORGED + b"\r\n"],
        [b"GET /\r\nhost: web\r\n" + FORGED + b"\r\n"],
        [b"x", b"y / HTT", b"P/1.1\r\nhost: web\r\n" + FORGED, b"\r\n"],
        [b"\r\n", b"\r\nGET / HTTP/1.1\r\nhost: web\r\n" + FORGED, b"\r\n"],
        [b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\nGET / HTTP/1.1\r\nhost: web\r\n" + FORGED + b"\r\n"],
        [b"y" * 200 + b" / HTTP/1.1\r\nhost: web\r\n" + FORGED, b"\r\n"],
    ],
)
@pytest.mark.parametrize("meshed", [True, False])
@pytest.mark.parametrize("protocol", ["detect", "opaque"])
async def test_no_spelling_of_a_request_carries_a_forged_identity_to_the_app(
    autojump_clock: trio.testing.MockClock, pieces: list[bytes], meshed: bool, protocol: str
):
    """protocol: what the caller's own sidecar was told about the Service; the port itself is not marked."""
    app = Recorded(_listen)
    async with mesh(app, policy=inbound_policy(ANYONE)) as made:
        made.destination(protocol=protocol)
        stream = await made.dial() if meshed else await made.dial_unmeshed()
        with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(5):
            for piece in pieces:
                await stream.send_all(piece)
                await trio.sleep(0.01)
            await read_all(stream)
        assert not [said for said in app.said if b"admin" in said]


async def test_a_port_that_says_it_is_opaque_is_not_looked_into(autojump_clock: trio.testing.MockClock):
    app = Recorded(_echo)
    async with mesh(app, policy=inbound_policy(ANYONE, protocol="opaque")) as made:
        made.destination(protocol="opaque")
        stream = await made.dial()
        await stream.send_all(b"get / HTTP/1.1\r\n")
        assert await read_until(stream, b"\r\n") == b"get / HTTP/1.1\r\n"


async def _silent_until_ended(stream: trio.SocketStream) -> float:
    began = trio.current_time()
    with contextlib.suppress(trio.BrokenResourceError):
        assert await stream.receive_some(100) == b""
    return trio.current_time() - began


async def test_a_silent_client_that_no_policy_could_let_in_is_told_at_once(autojump_clock: trio.testing.MockClock):
    app = Recorded(_mail)
    async with mesh(app, policy=inbound_policy(only(WEB))) as made:
        assert await _silent_until_ended(await made.dial()) < _SILENCE_S + 0.1  # meshed, but somebody else
        unmeshed = await _silent_until_ended(await made.dial_unmeshed())
        assert 5 <= unmeshed < 5.5  # it had the time of a handshake to begin one
        made.policy(inbound_policy())
        assert await _silent_until_ended(await made.dial_unmeshed()) < _SILENCE_S + 0.1
        assert app.said == []
        assert made.metric(made.server, "pillion_inbound_tcp_authz_deny_total") == 3
