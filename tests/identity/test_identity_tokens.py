"""TokenReview against an API server that speaks real HTTPS."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from core.k8s.api import Api
from core.k8s.http import Access
from core.names import WorkloadId
from identity.issuer import make_root
from identity.tokens import KubernetesReviewer, ReviewUnavailable, Subject, TokenRefused, subject_of
from identity.wire import AUDIENCE

GOOD: dict[str, Any] = {
    "authenticated": True,
    "audiences": [AUDIENCE],
    "user": {
        "username": "system:serviceaccount:shop:cart",
        "uid": "x",
        "groups": ["system:serviceaccounts"],
        "extra": {
            "authentication.kubernetes.io/pod-name": ["cart-0"],
            "authentication.kubernetes.io/pod-uid": ["uid-1"],
            "authentication.kubernetes.io/node-name": ["n"],
        },
    },
}


class FakeApiServer(ThreadingHTTPServer):
    """Answers every request with ``answer`` and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 201
        self.answer: bytes = review(GOOD)
        self.asked: list[tuple[str, dict[str, str], Any]] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that refuses our certificate is part of a test."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeApiServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(self.server.answer)))
        self.end_headers()
        self.wfile.write(self.server.answer)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


def review(status: object) -> bytes:
    return json.dumps({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status}).encode()


@pytest.fixture(scope="module")
def server_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("api")
    root = make_root("api", time.time())
    key = ec.generate_private_key(ec.SECP256R1())
    made = x509.CertificateBuilder(root.certificate.subject, x509.Name([]), key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(root.certificate.not_valid_before_utc).not_valid_after(root.certificate.not_valid_after_utc)
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=True)
    made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key()), critical=False)
    certificate = made.sign(root.key, hashes.SHA256())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM)
    (directory / "server.pem").write_bytes(pem)
    (directory / "ca.crt").write_bytes(root.certificate_pem)
    (directory / "other.crt").write_bytes(make_root("api", time.time()).certificate_pem)
    return directory


@pytest.fixture
def api(server_files: Path) -> Iterator[FakeApiServer]:
    server = FakeApiServer()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_files / "server.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def reviewer(api: FakeApiServer, server_files: Path) -> KubernetesReviewer:
    return KubernetesReviewer(reached(api, server_files / "ca.crt"), "cluster.local")


def reached(server: FakeApiServer, ca_file: Path) -> Api:
    tls = ssl.create_default_context(cafile=str(ca_file))
    return Api(lambda: Access("127.0.0.1", server.server_address[1], tls=tls, authorization=lambda: "Bearer own-token"))


async def test_the_api_server_is_asked_with_our_audience_and_our_own_token(api: FakeApiServer, reviewer: KubernetesReviewer) -> None:
    assert await reviewer.review("pod-token") == Subject(WorkloadId("cluster.local", "shop", "cart"), "cart-0", "uid-1")
    [(path, headers, body)] = api.asked
    assert path == "/apis/authentication.k8s.io/v1/tokenreviews"
    assert headers["authorization"] == "Bearer own-token"
    assert body == {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": "pod-token", "audiences": ["identity.pillion.dev"]},
    }


def user(**overrides: Any) -> dict[str, Any]:
    return GOOD | {"user": GOOD["user"] | overrides}


def extra(**names: Any) -> dict[str, Any]:
    return user(extra={f"authentication.kubernetes.io/{name.replace('_', '-')}": value for name, value in names.items()})


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        pytest.param({"authenticated": False, "error": "token audiences do not match"}, "token audiences do not match", id="refused"),
        pytest.param({}, "not authenticated", id="empty status"),
        pytest.param(GOOD | {"audiences": []}, "not meant for", id="no audience"),
        pytest.param(GOOD | {"audiences": ["https://kubernetes.default.svc"]}, "not meant for", id="another audience"),
        pytest.param(user(username="system:node:n1"), "not to a service account", id="a node"),
        pytest.param(user(username="admin"), "not to a service account", id="a person"),
        pytest.param(user(username="system:serviceaccount:a:b:c"), "not to a service account", id="five parts"),
        pytest.param(user(username="system:serviceaccount:A_:b"), "not a valid name", id="no label"),
        pytest.param(user(extra={}), "no pod name", id="not bound"),
        pytest.param(extra(pod_name=["cart-0"]), "no pod uid", id="no uid"),
        pytest.param(extra(pod_name=["cart-0"], pod_uid=["a", "b"]), "no pod uid", id="two uids"),
        pytest.param(extra(pod_name=["cart-0"], pod_uid=["a\n"]), "no pod uid", id="a uid with a line end"),
    ],
)
async def test_what_the_review_does_not_prove_is_refused_without_a_second_try(
    api: FakeApiServer, reviewer: KubernetesReviewer, status: dict[str, Any], expected: str
) -> None:
    api.answer = review(status)
    with pytest.raises(TokenRefused, match=expected):
        await reviewer.review("pod-token")
    assert len(api.asked) == 1


@pytest.mark.parametrize(
    ("status", "answer", "expected"),
    [
        pytest.param(403, b"{}", "may this service account create tokenreviews", id="forbidden"),
        pytest.param(500, review(GOOD), "tokenreviews", id="an error with a good body"),
        pytest.param(200, b"nonsense", "not an object", id="no JSON"),
        pytest.param(200, review([]), "not a TokenReview", id="another shape"),
    ],
)
async def test_an_api_server_that_cannot_say_is_no_refusal_of_the_token(
    api: FakeApiServer, reviewer: KubernetesReviewer, status: int, answer: bytes, expected: str
) -> None:
    api.status, api.answer = status, answer
    with pytest.raises(ReviewUnavailable, match=expected):
        await reviewer.review("pod-token")


async def test_an_api_server_below_another_ca_is_not_told_the_token(api: FakeApiServer, server_files: Path) -> None:
    with pytest.raises(ReviewUnavailable, match="not trusted"):
        await KubernetesReviewer(reached(api, server_files / "other.crt"), "cluster.local").review("pod-token")
    assert api.asked == []


async def test_a_token_that_is_too_long_is_refused_here(api: FakeApiServer, reviewer: KubernetesReviewer) -> None:
    with pytest.raises(TokenRefused, match="too long"):
        await reviewer.review("x" * 9000)
    assert api.asked == []


@given(st.text(max_size=40), st.none() | st.text(max_size=10), st.none() | st.text(max_size=10))
def test_any_username_gives_a_service_account_or_the_refusal(username: str, name: str | None, uid: str | None) -> None:
    try:
        subject_of("cluster.local", f"system:serviceaccount:{username}", name, uid)
    except TokenRefused:
        pass
