"""gRPC through both sidecars, with grpcio on either end: every kind of call, its end, and what failures look like."""

from __future__ import annotations

import queue

import grpc
import pytest
import trio

from core.addrs import Addr
from policy.wire import Endpoint, GrpcMatch, Route, Rule
from tests.scenarios.grpc_peers import Cart, Client, calling, grpc_server, status_of
from tests.scenarios.mesh import CART, FOR_CART, WEB, Mesh, inbound_policy, mesh, only
from tests.scenarios.peers import MIB, PATIENCE_S

Status = grpc.StatusCode


@pytest.fixture
def cart() -> Cart:
    return Cart()


@pytest.fixture
def app(cart: Cart):
    with grpc_server(cart) as addr:
        yield addr


async def _talk(made: Mesh, talk):
    async with made.entry() as entry:
        with trio.fail_after(2 * PATIENCE_S):
            return await trio.to_thread.run_sync(calling, entry, talk)


async def test_every_kind_of_call_works(app: Addr):
    def talk(client: Client) -> None:
        assert client.echo(b"one", timeout=PATIENCE_S) == b"one"
        assert [int(number) for number in client.count(b"1000", timeout=PATIENCE_S)] == list(range(1000))
        assert client.sum((b"%d" % number for number in range(500)), timeout=PATIENCE_S) == b"%d" % sum(range(500))
        chat = client.chat(iter([b"a", b"b", b"c"]), timeout=PATIENCE_S)
        assert list(chat) == [b"hello", b"A", b"B", b"C"]

    async with mesh(app) as made:
        await _talk(made, talk)
        assert made.metric(made.server, "pillion_response_total", status_code="200", client_id=CART.uri) == 4
        assert made.metric(made.server, "pillion_request_total") == 4


async def test_a_bidirectional_stream_answers_while_it_is_open(app: Addr):
    def talk(client: Client) -> None:
        lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        chat = client.chat(iter(lines.get, None), timeout=PATIENCE_S)
        assert next(chat) == b"hello"  # the server speaks before we do
        for line in (b"one", b"two"):
            lines.put(line)
            assert next(chat) == line.upper()
        lines.put(None)
        assert list(chat) == []
        assert chat.code() is Status.OK

    async with mesh(app) as made:
        await _talk(made, talk)


async def test_metadata_and_trailers_pass_both_ways_and_the_app_learns_the_proven_name(app: Addr):
    def talk(client: Client) -> None:
        sent = (("x-one", "1"), ("x-bytes-bin", bytes(range(256))), ("pillion-client-id", "spiffe://cluster.local/ns/a/sa/liar"))
        _, call = client.echo.with_call(b"", metadata=sent, timeout=PATIENCE_S)
        initial = dict(call.initial_metadata())
        assert (initial["x-saw-x-one"], initial["x-saw-pillion-client-id"]) == ("1", CART.uri)
        trailing = dict(call.trailing_metadata())
        assert (trailing["x-end"], trailing["x-bytes-bin"]) == ("here", bytes(range(256)))

    async with mesh(app) as made:
        await _talk(made, talk)


async def test_a_deadline_reaches_the_app_and_ends_the_call(app: Addr, cart: Cart):
    def talk(client: Client) -> None:
        client.echo(b"", timeout=PATIENCE_S)
        assert status_of(lambda: client.wait(b"", timeout=2))[0] is Status.DEADLINE_EXCEEDED  # enough to get there on a busy machine
        assert cart.cancelled.wait(PATIENCE_S)

    async with mesh(app) as made:
        await _talk(made, talk)
    assert cart.left_s is not None
    assert PATIENCE_S / 2 < cart.left_s < PATIENCE_S + 5  # what the app sees is rounded up on the way


async def test_a_cancelled_call_is_cancelled_at_the_app_and_others_go_on(app: Addr, cart: Cart):
    def talk(client: Client) -> None:
        waiting = client.wait.future(b"")
        assert cart.waiting.wait(PATIENCE_S)
        waiting.cancel()
        assert cart.cancelled.wait(PATIENCE_S)
        assert client.echo(b"still here", timeout=PATIENCE_S) == b"still here"

    async with mesh(app) as made:
        await _talk(made, talk)


async def test_a_status_of_the_app_arrives_with_its_message(app: Addr):
    def talk(client: Client) -> None:
        assert status_of(lambda: client.fail("lost: ä%".encode())) == (Status.DATA_LOSS, "lost: ä%")
        assert status_of(lambda: client.missing(b""))[0] is Status.UNIMPLEMENTED

    async with mesh(app) as made:
        await _talk(made, talk)


async def test_the_status_of_a_call_is_in_metrics_and_access_log_of_both_sidecars(app: Addr):
    def talk(client: Client) -> None:
        assert client.echo(b"four", timeout=PATIENCE_S) == b"four"
        assert status_of(lambda: client.fail(b"why", timeout=PATIENCE_S))[0] is Status.DATA_LOSS
        assert status_of(lambda: client.missing(b"", timeout=PATIENCE_S))[0] is Status.UNIMPLEMENTED  # no body: the status is in the head

    async with mesh(app, PILLION_ACCESS_LOG="all") as made:
        await _talk(made, talk)
        for side in (made.client, made.server):
            for code, classification in ((0, "success"), (15, "failure"), (12, "success")):
                assert made.metric(side, "pillion_response_total", grpc_status=str(code), classification=classification) == 1
        lines = [(line["path"], line["grpc_status"], line["request_bytes"], line["response_bytes"]) for line in made.log("access")]
        assert lines.count(("/shop.Cart/Echo", 0, 5 + 4, 5 + 4)) == 2  # five bytes before each message
        assert [line[1] for line in lines].count(15) == [line[1] for line in lines].count(12) == 2
        made.policy(inbound_policy(only(WEB)))
        assert (await _talk(made, lambda client: status_of(lambda: client.echo(b"", timeout=PATIENCE_S))))[0] is Status.PERMISSION_DENIED
        assert made.metric(made.server, "pillion_response_total", grpc_status="7", classification="failure") == 1


async def test_big_messages_pass_both_ways(app: Addr):
    message = bytes(range(256)) * (10 * MIB // 256)
    async with mesh(app) as made:
        assert await _talk(made, lambda client: client.echo(message, timeout=PATIENCE_S)) == message


async def test_hundreds_of_calls_at_once_share_a_connection(app: Addr, cart: Cart):
    def talk(client: Client) -> None:
        calls = [client.echo.future(b"%d" % number, timeout=PATIENCE_S) for number in range(300)]
        assert [call.result() for call in calls] == [b"%d" % number for number in range(300)]

    async with mesh(app) as made:
        await _talk(made, talk)
        assert made.metric(made.server, "pillion_tcp_open_total", client_id=CART.uri) <= 3


async def test_a_denied_call_is_permission_denied_at_once(app: Addr, cart: Cart):
    async with mesh(app, policy=inbound_policy(only(WEB))) as made:
        answered = await _talk(made, lambda client: status_of(lambda: client.echo(b"", timeout=PATIENCE_S)))
        assert answered == (Status.PERMISSION_DENIED, "denied")
        streamed = await _talk(made, lambda client: status_of(lambda: list(client.chat(iter([b"a"]), timeout=PATIENCE_S))))
        assert streamed[0] is Status.PERMISSION_DENIED
        assert cart.calls == 0


async def test_a_route_lets_one_method_through_and_denies_the_rest(app: Addr):
    echo = Rule((GrpcMatch(service="shop.Cart", method="Echo"),))
    route = Route(FOR_CART.server, "grpc", (), (echo,), FOR_CART.authorizations)

    def talk(client: Client) -> None:
        assert client.echo(b"x", timeout=PATIENCE_S) == b"x"
        assert status_of(lambda: client.fail(b"", timeout=PATIENCE_S))[0] is Status.UNIMPLEMENTED  # no route: Gateway API has it so

    async with mesh(app, policy=inbound_policy(routes=(route,))) as made:
        await _talk(made, talk)


async def test_no_endpoint_and_a_refusing_one_are_unavailable_at_once(app: Addr):
    async with mesh(app) as made:
        made.nowhere()
        answered = await _talk(made, lambda client: status_of(lambda: client.echo(b"", timeout=PATIENCE_S)))
        assert answered == (Status.UNAVAILABLE, "no-endpoints")
        made.destination(Endpoint("127.0.0.1:1", WEB.uri))
        answered = await _talk(made, lambda client: status_of(lambda: client.echo(b"", timeout=PATIENCE_S)))
        assert answered == (Status.UNAVAILABLE, "connect-refused")


async def test_an_app_that_is_not_there_is_unavailable_at_once():
    async with mesh(Addr("127.0.0.1", 1)) as made:
        answered = await _talk(made, lambda client: status_of(lambda: client.echo(b"", timeout=PATIENCE_S)))
        assert answered == (Status.UNAVAILABLE, "connect-refused")
