"""The real service over loopback HTTPS with real workloads: certify, rotate, restart, refuse."""

from __future__ import annotations

import contextlib
import json
import ssl
import time
from pathlib import Path

import h11
import pytest
import structlog
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client.parser import text_string_to_metric_families

from core.names import WorkloadId
from core.runtime import logs
from core.runtime.throttle import LINES_PER_S, Throttle
from core.runtime.tls import TlsStream, client_context, server_context
from identity.authority import Authority
from identity.bundle import Step
from identity.csr import make_csr
from identity.exchange import exchange
from identity.metrics import exposition
from identity.serve import Capacity, ServingCertificate
from identity.store import Store
from identity.tokens import Subject
from tests.identity.identity_lab import SERVICE, TRUST_DOMAIN, Lab, Workload, kept_certified, wait_until


def new_lab(directory: Path) -> Lab:
    return Lab(directory, Authority.self_made(TRUST_DOMAIN, Store(directory / "ca")))


def unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def test_a_workload_is_certified_for_the_identity_of_its_token(tmp_path: Path) -> None:
    lab = new_lab(tmp_path)
    async with lab.serving():
        cart = lab.workload("cart")
        async with kept_certified(cart):
            credentials = await cart.wait_certified()
    leaf = x509.load_pem_x509_certificates(credentials.chain_pem)[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == ["spiffe://cluster.local/ns/shop/sa/cart"]
    assert credentials.bundle_pem == lab.authority.trust.value.bundle_pem


async def test_a_rotation_reaches_running_workloads_step_by_step(tmp_path: Path) -> None:
    lab = new_lab(tmp_path)
    old = lab.authority.trust.value
    async with lab.serving():
        cart, web = lab.workload("cart"), lab.workload("web")
        async with kept_certified(cart, web):
            await cart.wait_certified()
            await web.wait_certified()
            assert lab.authority.rotate(Step.ADD) is None
            await wait_until(lambda: not lab.authority.blocking())
            assert lab.authority.rotate(Step.SWITCH) is None
            await wait_until(lambda: not lab.authority.blocking())
            assert lab.authority.rotate(Step.DROP) is None
            new = lab.authority.trust.value
            for workload in (cart, web):
                found = await workload.cell.wait_for(lambda value: value is not None and value.bundle_pem == new.bundle_pem)
                assert found is not None
                issuer = x509.load_pem_x509_certificates(found.chain_pem)[1]
                anchor = x509.load_pem_x509_certificate(new.bundle_pem)
                issuer.verify_directly_issued_by(anchor)
                assert len(workload.seen.certificates) == 2
                assert not workload.seen.failures
    assert len(new.anchors) == 1
    assert new.anchors[0].id != old.anchors[0].id


async def ask(
    lab: Lab, method: str, target: str, token: str | None, body: bytes = b"", *more: tuple[str, str], ip: str = "127.0.0.1"
) -> tuple[int, dict[str, object]]:
    context = client_context(None, lab.authority.trust.value.bundle_pem, (b"http/1.1",))
    transport = await trio.open_tcp_stream("127.0.0.1", lab.port, local_address=ip)
    stream = TlsStream.client(transport, context, SERVICE.server_name, SERVICE)
    headers = [("host", "identity"), ("content-length", str(len(body))), *more]
    if token is not None:
        headers.append(("authorization", f"Bearer {token}"))
    async with stream:
        await stream.do_handshake()
        request = h11.Request(method=method, target=target, headers=headers)
        status, answer = await exchange(stream, h11.Connection(h11.CLIENT), request, body, 100_000)
    return status, json.loads(answer) if answer.startswith(b"{") else {}


def request_for(service_account: str, namespace: str = "shop") -> bytes:
    csr = make_csr(ec.generate_private_key(ec.SECP256R1()), WorkloadId(TRUST_DOMAIN, namespace, service_account))
    return json.dumps({"csr": csr.decode()}).encode()


CART = request_for("cart")


@pytest.mark.parametrize(
    ("status", "sentence", "token", "body"),
    [
        pytest.param(401, "expected one header Authorization", None, CART, id="no token"),
        pytest.param(401, "not a token of this mesh", "nonsense", CART, id="nonsense token"),
        pytest.param(401, "longer than", "x" * 9000, CART, id="long token"),
        pytest.param(403, "the token is of spiffe://cluster.local/ns/shop/sa/cart", "cart", request_for("web"), id="another account"),
        pytest.param(403, "ns/bank/sa/cart", "cart", request_for("cart", "bank"), id="another namespace"),
        pytest.param(400, "not a CertifyRequest", "cart", b"{}", id="no request"),
        pytest.param(400, "not a CertifyRequest", "cart", b"\xff", id="no JSON"),
        pytest.param(400, "not a PKCS#10 request", "cart", b'{"csr": "AAAA"}', id="no CSR"),
        pytest.param(413, "longer than 16384 bytes", "cart", b" " * 20_000, id="long body"),
    ],
)
async def test_a_refusal_names_what_was_wrong(tmp_path: Path, status: int, sentence: str, token: str | None, body: bytes) -> None:
    lab = new_lab(tmp_path)
    async with lab.serving():
        bearer = lab.token("cart", "cart-0") if token == "cart" else token
        found, answer = await ask(lab, "POST", "/v1/certify", bearer, body)
    assert found == status
    assert sentence in str(answer["error"])
    assert list(lab.authority.ledger.live(0)) == []


@pytest.mark.parametrize(
    "query", ["", "?generation=1", "?issuer=a", "?generation=-1&issuer=a", "?generation=1&issuer=" + "a" * 65, "?generation=1&issuer=a/b"]
)
async def test_a_poll_that_reports_nonsense_is_refused(tmp_path: Path, query: str) -> None:
    lab = new_lab(tmp_path)
    async with lab.serving():
        status, answer = await ask(lab, "GET", f"/v1/bundle{query}", lab.token("cart", "cart-0"))
    assert (status, "expected the" in str(answer["error"])) == (400, True)


async def test_a_poll_needs_a_token_too(tmp_path: Path) -> None:
    lab = new_lab(tmp_path)
    async with lab.serving():
        assert (await ask(lab, "GET", "/v1/bundle?generation=0&issuer=a", None))[0] == 401
        assert (await ask(lab, "GET", "/v1/bundle?generation=0&issuer=a", "nonsense"))[0] == 401


@pytest.mark.parametrize(("method", "target", "status"), [("GET", "/v1/certify", 405), ("POST", "/v1/bundle", 405), ("GET", "/", 404)])
async def test_other_requests_are_not_found(tmp_path: Path, method: str, target: str, status: int) -> None:
    lab = new_lab(tmp_path)
    async with lab.serving():
        assert (await ask(lab, method, target, lab.token("cart", "cart-0")))[0] == status


async def test_a_head_that_is_too_long_is_refused(tmp_path: Path) -> None:
    lab = new_lab(tmp_path)
    async with lab.serving():
        assert (await ask(lab, "GET", "/v1/bundle", None, b"", ("x", "y" * 20_000)))[0] in (400, 431)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\nhttp2-settings: a\r\n\r\n", id="no base64"),
        pytest.param(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\nhttp2-settings: AAAA\r\n\r\n", id="no settings"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\5\2\0\0\0\0\1\0\0\0\1\0", id="a stream that depends on itself"),
    ],
)
async def test_what_a_stranger_says_instead_of_http_1_ends_the_strangers_connection_only(tmp_path: Path, head: bytes) -> None:
    lab = new_lab(tmp_path)
    async with lab.serving():
        transport = await trio.open_tcp_stream("127.0.0.1", lab.port)
        stream = trio.SSLStream(transport, unverified(), https_compatible=True)
        await stream.send_all(head)
        answer = bytearray()
        with trio.fail_after(30), contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(b"\0")
            while chunk := await stream.receive_some(4096):
                answer += chunk
        await trio.aclose_forcefully(stream)
        assert answer.startswith(b"HTTP/1.1 404 "), "HTTP/1.1 all the way: its connections cost little"
        assert (await ask(lab, "GET", "/", lab.token("cart", "cart-0")))[0] == 404


async def test_bodies_that_do_not_come_keep_nobody_from_a_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("identity.service._SIGNATURES_AT_ONCE", 1)
    lab = new_lab(tmp_path)
    async with lab.serving():
        stranger = trio.SSLStream(await trio.open_tcp_stream("127.0.0.1", lab.port), unverified(), https_compatible=True)
        head = b"POST /v1/certify HTTP/1.1\r\nhost: a\r\nauthorization: Bearer x\r\ncontent-length: 9\r\nexpect: 100-continue\r\n\r\n"
        await stranger.send_all(head)
        assert (await stranger.receive_some()).startswith(b"HTTP/1.1 100")  # it is being read
        assert (await ask(lab, "POST", "/v1/certify", lab.token("cart", "cart-0"), CART))[0] == 200
        await trio.aclose_forcefully(stranger)


class Slow:
    """A reviewer that gets no answer about some tokens, and counts what it is asked."""

    def __init__(self, lab: Lab, *unanswered: str) -> None:
        assert lab.service is not None
        self._real = lab.service._reviewer
        self._unanswered = unanswered
        self.asked = 0
        lab.service._reviewer = self

    async def review(self, token: str) -> Subject:
        self.asked += 1
        if token in self._unanswered:
            await trio.sleep_forever()
        return await self._real.review(token)


async def test_who_has_most_requests_in_work_loses_its_oldest_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("identity.service._SIGNATURES_AT_ONCE", 2)
    monkeypatch.setattr("identity.service._FEW_AT_ONCE", 1)
    lab, told = new_lab(tmp_path), list[int]()
    async with lab.serving(), trio.open_nursery() as nursery:
        stuck = lab.token("web", "web-0")
        slow = Slow(lab, stuck)

        async def ask_in_vain() -> None:
            told.append((await ask(lab, "POST", "/v1/certify", stuck, request_for("web"), ip="127.0.0.2"))[0])

        nursery.start_soon(ask_in_vain)
        nursery.start_soon(ask_in_vain)
        await wait_until(lambda: slow.asked == 2)
        assert (await ask(lab, "POST", "/v1/certify", lab.token("cart", "cart-0"), CART))[0] == 200
        await wait_until(lambda: told == [503])
        nursery.cancel_scope.cancel()


async def test_a_pod_gets_so_many_certificates_in_a_minute_and_nobody_is_asked_about_it_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("identity.service._A_MINUTE", 2)
    lab = new_lab(tmp_path)
    async with lab.serving() as service:
        reviewer, token = Slow(lab), lab.token("cart", "cart-0")
        assert [(await ask(lab, "POST", "/v1/certify", token, CART))[0] for _ in range(4)] == [200, 200, 429, 429]
        assert reviewer.asked == 2
        _, answer = await ask(lab, "POST", "/v1/certify", token, CART)
        assert str(answer["error"]).startswith("pod shop/cart-0 had 2 certificates within a minute, try again in ")
        assert (await ask(lab, "POST", "/v1/certify", lab.token("cart", "cart-1"), CART))[0] == 200
    assert service.counters.certified == 3


async def test_who_finds_no_room_to_wait_for_news_is_told_to_come_back(tmp_path: Path) -> None:
    lab = new_lab(tmp_path)
    target = f"/v1/bundle?generation=1&issuer={lab.authority.issuer.ref.id}"
    async with lab.serving() as service, trio.open_nursery() as nursery:
        service._polls_max = 1
        nursery.start_soon(ask, lab, "GET", target, lab.token("cart", "cart-0"))
        await wait_until(lambda: len(service._polls) == 1)
        assert (await ask(lab, "GET", target, lab.token("cart", "cart-1")))[0] == 503
        nursery.cancel_scope.cancel()


def test_as_many_may_connect_as_memory_and_descriptors_are_there_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("identity.serve.most_memory", lambda: 256 << 20)
    monkeypatch.setattr("identity.serve.most_files", lambda: 1 << 20)
    assert (Capacity.of_process().connections, Capacity.of_process().polls) == (1536, 1228)
    monkeypatch.setattr("identity.serve.most_files", lambda: 1024)
    assert Capacity.of_process().connections == 768


async def test_strangers_cannot_write_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("identity.service", "core.k8s.https"):
        monkeypatch.setattr(f"{place}.Throttle", lambda _: Throttle(lambda: 0.0))

    async def failing(event: h11.Request) -> None:
        if any(name == b"upgrade" for name, _ in event.headers):
            raise ValueError("what a stranger could find one day")

    monkeypatch.setattr("core.k8s.https._stay_http1", failing)
    lab, lines = new_lab(tmp_path), list[str]()
    logs.configure("info", "json", lines.append)
    try:
        async with lab.serving():
            for _ in range(LINES_PER_S + 5):
                assert (await ask(lab, "GET", "/v1/bundle?generation=0&issuer=a", None))[0] == 401
                stranger = trio.SSLStream(await trio.open_tcp_stream("127.0.0.1", lab.port), unverified(), https_compatible=True)
                await stream_out(stranger, b"GET / HTTP/1.1\r\nhost: a\r\nupgrade: h2c\r\n\r\n")
    finally:
        structlog.reset_defaults()
    assert sum('"refused"' in line for line in lines) == LINES_PER_S
    assert sum('"connection failed"' in line for line in lines) == LINES_PER_S


async def stream_out(stream: trio.SSLStream[trio.SocketStream], data: bytes) -> None:
    """Say this and hear everything until the end."""
    await stream.send_all(data)
    with trio.fail_after(30), contextlib.suppress(trio.BrokenResourceError):
        while await stream.receive_some(4096):
            pass
    await trio.aclose_forcefully(stream)


async def test_a_newer_poll_of_an_instance_ends_its_earlier_one(tmp_path: Path) -> None:
    lab = new_lab(tmp_path)
    target = f"/v1/bundle?generation=1&issuer={lab.authority.issuer.ref.id}"
    answers: list[int] = []
    async with lab.serving() as service, trio.open_nursery() as nursery:

        async def poll() -> None:
            answers.append((await ask(lab, "GET", target, lab.token("cart", "cart-0")))[0])

        nursery.start_soon(poll)
        await wait_until(lambda: service.counters.polls == 1)
        nursery.start_soon(poll)
        await wait_until(lambda: answers == [204])
        service.drain()
        await wait_until(lambda: answers == [204, 204])
        assert (await ask(lab, "GET", target, lab.token("cart", "cart-0")))[0] == 503


async def test_an_issuer_at_its_end_is_a_503_that_says_so(tmp_path: Path) -> None:
    now = [time.time()]
    lab = Lab(tmp_path, Authority.self_made(TRUST_DOMAIN, None, clock=lambda: now[0]))
    async with lab.serving():
        token = lab.token("cart", "cart-0")
        now[0] += 365 * 86400
        status, answer = await ask(lab, "POST", "/v1/certify", token, CART)
    assert status == 503
    assert "renew the issuer" in str(answer["error"])


async def test_the_service_speaks_tls_1_3_and_aes_128_only_to_those_who_prefer_it(tmp_path: Path) -> None:
    lab = new_lab(tmp_path)
    async with lab.serving():
        context = client_context(None, lab.authority.trust.value.bundle_pem, (b"http/1.1",))
        stream = TlsStream.client(await trio.open_tcp_stream("127.0.0.1", lab.port), context, "any.name", SERVICE)
        async with stream:
            await stream.do_handshake()
            assert stream.peer == SERVICE
            assert stream.alpn == b"http/1.1"
            assert stream.connection.get_protocol_version_name() == "TLSv1.3"
            assert stream.connection.get_cipher_name() == "TLS_AES_128_GCM_SHA256"
        old = ssl.create_default_context(cafile=str(lab.anchors_file))
        old.maximum_version, old.check_hostname = ssl.TLSVersion.TLSv1_2, False
        refused = trio.SSLStream(await trio.open_tcp_stream("127.0.0.1", lab.port), old)
        with pytest.raises(trio.BrokenResourceError):
            await refused.do_handshake()
        await trio.aclose_forcefully(refused)


async def test_a_workload_that_lags_is_named_and_blocks_the_step(tmp_path: Path) -> None:
    lab = new_lab(tmp_path)
    async with lab.serving():
        cart, web = lab.workload("cart"), lab.workload("web")
        async with kept_certified(cart):
            async with kept_certified(web):
                await cart.wait_certified()
                await web.wait_certified()
            assert lab.authority.rotate(Step.ADD) is None
            await wait_until(lambda: len(lab.authority.blocking()) == 1)
            refusal = lab.authority.rotate(Step.SWITCH)
            assert refusal is not None
            assert "shop/web-0 (spiffe://cluster.local/ns/shop/sa/web)" in refusal.sentence
            assert "cart" not in refusal.sentence
            async with kept_certified(web):
                await wait_until(lambda: not lab.authority.blocking())
                assert lab.authority.rotate(Step.SWITCH) is None


@pytest.mark.slow
async def test_a_restart_in_mid_rotation_goes_on_where_it_was(tmp_path: Path) -> None:
    lab = new_lab(tmp_path)
    async with trio.open_nursery() as nursery:
        cart = None
        for step in (Step.ADD, Step.SWITCH, Step.DROP):
            async with lab.serving():
                if cart is None:
                    cart = lab.workload("cart")
                    await nursery.start(in_background, cart)
                await wait_until(lambda: not lab.authority.blocking())
                assert lab.authority.rotate(step) is None
            lab.authority = Authority.self_made(TRUST_DOMAIN, Store(tmp_path / "ca"))
        async with lab.serving():
            assert cart is not None
            await cart.cell.wait_for(lambda value: value is not None and value.bundle_pem == lab.authority.trust.value.bundle_pem)
        nursery.cancel_scope.cancel()
    assert {reason for reason, _ in cart.seen.failures} <= {"connection-lost", "connect-failed", "tls-failed", "status-503"}
    assert len(lab.authority.trust.value.anchors) == 1


async def in_background(workload: Workload, task_status: trio.TaskStatus[None]) -> None:
    async with kept_certified(workload):
        await workload.wait_certified()
        task_status.started()
        await trio.sleep_forever()


@pytest.mark.slow
async def test_workloads_keep_speaking_to_each_other_through_every_step(tmp_path: Path) -> None:
    """Each pair handshakes with whatever it holds at the moment, all the time, while the trust is rotated twice."""
    lab = new_lab(tmp_path)
    handshakes = 0
    async with lab.serving():
        pair = [lab.workload("cart"), lab.workload("web")]
        async with kept_certified(*pair):
            for workload in pair:
                await workload.wait_certified()
            for step in (Step.ADD, Step.SWITCH, Step.DROP) * 2:
                with trio.fail_after(30):
                    while lab.authority.blocking():
                        await both_handshakes(*pair)
                        handshakes += 2
                assert lab.authority.rotate(step) is None
                await both_handshakes(*pair)
            issuers = {x509.load_pem_x509_certificates(c.chain_pem)[1].subject.rfc4514_string() for c in pair[0].seen.certificates}
    assert handshakes >= 8
    assert len(issuers) == 3


async def both_handshakes(one: Workload, other: Workload) -> None:
    for client, server in ((one, other), (other, one)):
        near, far = trio.testing.memory_stream_pair()
        mine, theirs = await client.wait_certified(), await server.wait_certified()
        dialled = TlsStream.client(near, client_context(mine, mine.bundle_pem, (b"x",)), "n", server.settings.identity)
        accepted = TlsStream.server(far, server_context(theirs, client="required", alpn=(b"x",)), TRUST_DOMAIN)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dialled.do_handshake)
            nursery.start_soon(accepted.do_handshake)
        assert (dialled.peer, accepted.peer) == (server.settings.identity, client.settings.identity)


async def test_what_the_service_did_is_in_its_metrics(tmp_path: Path) -> None:
    lab = new_lab(tmp_path)
    async with lab.serving() as service:
        cart = lab.workload("cart")
        async with kept_certified(cart):
            await cart.wait_certified()
            await ask(lab, "POST", "/v1/certify", None, CART)
        text = exposition(lab.authority, service, ServingCertificate(lab.authority, SERVICE)).decode()
    samples = {
        (sample.name, tuple(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["pillion_identity_certified_total", ()] == 1
    assert samples["pillion_identity_refused_total", (("status", "401"),)] == 1
    assert samples["pillion_identity_workloads", ()] == 1
    assert samples["pillion_identity_issuer_expiry_timestamp_seconds", ()] == lab.authority.issuer.not_after
