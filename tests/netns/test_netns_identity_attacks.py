"""Who is not who it says: certificates, tokens and subscriptions of others, from hostile pods; and what an app can reach in its own pod.

The test is root and holds the issuer's key, so that it can make what no attacker should have, and see that only that gets in.
"""

from __future__ import annotations

import json
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from arena import HTTP, OPAQUE, Arena, Reply, read_replies
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from local_lab import PATIENCE_S

from core.credentials import Credentials
from policy import wire
from tests.certs import Authority

pytestmark = [pytest.mark.netns, pytest.mark.slow]

CLIENT = "spiffe://cluster.local/ns/arena/sa/client"
WEB_NAME = "web.arena.sa.pillion.cluster.local"
HTTP1 = "pillion-http/1.1"


class Genuine(Authority):
    """The mesh's own issuer, as only the identity service has it."""

    def __init__(self, arena: Arena) -> None:
        folder = arena.state / "identity" / "ca"
        issuer = json.loads((folder / "state.json").read_text())["issuer"]
        key = serialization.load_pem_private_key((folder / f"issuer-{issuer['id']}.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self.key, self.chain = key, issuer["chain"].encode()
        self.certificate = x509.load_pem_x509_certificates(self.chain)[0]

    def credentials(self, identity: Any, **more: Any) -> Credentials:
        found = super().credentials(identity, bundle_pem=b"-", **more)
        return Credentials(found.identity, found.key_pem, found.chain_pem + self.chain, b"", found.not_before, found.not_after)


@pytest.fixture(scope="module")
def genuine(arena: Arena) -> Genuine:
    return Genuine(arena)


@pytest.fixture(scope="module")
def foreign() -> Authority:
    return Authority("mesh of somebody else")


def shake(
    arena: Arena,
    credentials: Credentials | None,
    *,
    ip: str = "",
    port: int = HTTP,
    name: str = WEB_NAME,
    alpn: str = HTTP1,
    at_most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    caller: str = "stranger",
) -> ssl.SSLSocket:
    """TLS from a pod straight to a sidecar; raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode, context.maximum_version = False, ssl.CERT_NONE, at_most
    context.set_alpn_protocols([alpn])
    if credentials is not None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(credentials.key_pem + credentials.chain_pem)
            file.flush()
            context.load_cert_chain(file.name)
    sock = arena.dial(caller, ip or arena.ip("web"), port)
    try:
        return context.wrap_socket(sock, server_hostname=name)
    except BaseException:
        sock.close()
        raise


def ask(arena: Arena, credentials: Credentials | None, path: str = "/", **more: Any) -> Reply:
    """A request over such a connection; status 0: refused in the handshake, or cut (TLS 1.3 tells a client only afterwards)."""
    try:
        with shake(arena, credentials, **more) as tls:
            tls.sendall(f"GET {path} HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n".encode())
            return (read_replies(tls, 1) or [Reply(0)])[0]
    except OSError:
        return Reply(0)


# --- certificates ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_a_genuine_certificate_is_let_in(arena: Arena, genuine: Genuine, family: int) -> None:
    """Or nothing below would mean anything."""
    assert ask(arena, genuine.credentials(CLIENT), ip=arena.ip("web", family)).saw("pillion-client-id") == [CLIENT]


@pytest.mark.parametrize(
    "identity", ["ns/arena/sa/stranger", "ns/other/sa/client", "ns/arena/sa/web", "ns/arena/sa/clien", "ns/arena/sa/client.x"]
)
def test_a_genuine_certificate_of_somebody_else_is_denied_by_policy(arena: Arena, genuine: Genuine, identity: str) -> None:
    assert ask(arena, genuine.credentials(f"spiffe://cluster.local/{identity}")).status == 403


URI = x509.UniformResourceIdentifier
WRONG: dict[str, Callable[[Genuine, Authority], Credentials | None]] = {
    "none": lambda _, __: None,
    "expired": lambda genuine, _: genuine.credentials(CLIENT, starts_in=-7200, ends_in=-60),
    "not yet valid": lambda genuine, _: genuine.credentials(CLIENT, starts_in=3600, ends_in=7200),
    "foreign authority": lambda _, foreign: foreign.credentials(CLIENT),
    "foreign authority of the same name": lambda genuine, _: Authority(genuine.certificate.subject.rfc4514_string()[3:]).credentials(
        CLIENT
    ),
    "foreign leaf behind the genuine chain": lambda genuine, foreign: _with_chain(foreign.credentials(CLIENT), genuine.chain),
    "foreign trust domain": lambda genuine, _: genuine.credentials("spiffe://other.mesh/ns/arena/sa/client"),
    "two identities": lambda genuine, _: genuine.credentials(CLIENT, names=[URI(CLIENT), URI(CLIENT + "2")]),
    "an identity and a DNS name": lambda genuine, _: genuine.credentials(
        CLIENT, names=[x509.DNSName("client"), URI(CLIENT), URI("spiffe://x")]
    ),
    "no identity": lambda genuine, _: genuine.credentials(CLIENT, names=[]),
    "a DNS name": lambda genuine, _: genuine.credentials(CLIENT, names=[x509.DNSName("client.arena")]),
    "an identity of no workload": lambda genuine, _: genuine.credentials(CLIENT, names=[URI("spiffe://cluster.local/admin")]),
    "signed by a workload": lambda genuine, _: _signed_by_a_leaf(genuine),
}


def _namesake(genuine: Genuine) -> Authority:
    found = Authority()
    found.certificate = genuine.certificate
    return found


def _with_chain(credentials: Credentials, chain: bytes) -> Credentials:
    return Credentials(credentials.identity, credentials.key_pem, credentials.chain_pem + chain, b"", 0, 0)


def _signed_by_a_leaf(genuine: Genuine) -> Credentials:
    """What the holder of a workload's key could sign for itself."""
    leaf = genuine.credentials("spiffe://cluster.local/ns/arena/sa/stranger")
    key = serialization.load_pem_private_key(leaf.key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    forger = Authority("forger", key)
    forger.certificate = x509.load_pem_x509_certificates(leaf.chain_pem)[0]
    return _with_chain(forger.credentials(CLIENT), leaf.chain_pem)


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_a_wrong_certificate_is_refused_in_the_handshake(
    arena: Arena, genuine: Genuine, foreign: Authority, make: Callable[[Genuine, Authority], Credentials | None]
) -> None:
    before = len([head for head in arena.seen() if "/forged" in head])
    assert ask(arena, make(genuine, foreign), "/public/forged").status == 0, "not even what is open to everybody"
    assert len([head for head in arena.seen() if "/forged" in head]) == before


def test_only_tls_1_3_is_spoken(arena: Arena, genuine: Genuine) -> None:
    assert ask(arena, genuine.credentials(CLIENT), at_most=ssl.TLSVersion.TLSv1_2).status == 0


@pytest.mark.parametrize("name", ["client.arena.sa.pillion.cluster.local", "web", "WEB.other.sa.pillion.cluster.local"])
def test_tls_for_somebody_else_is_not_terminated(arena: Arena, genuine: Genuine, name: str) -> None:
    assert ask(arena, genuine.credentials(CLIENT), name=name).status == 0


def test_opaque_bytes_in_genuine_tls_do_not_pass_a_port_with_routes(arena: Arena, genuine: Genuine) -> None:
    before = len(arena.seen())
    assert ask(arena, genuine.credentials(CLIENT), "/admin/opaque", alpn="pillion-tcp").status == 0
    assert not [head for head in arena.seen()[before:] if "opaque" in head]


def test_a_wrong_certificate_opens_no_opaque_port(arena: Arena, genuine: Genuine, foreign: Authority) -> None:
    def echoed(credentials: Credentials) -> bytes:
        try:
            with shake(arena, credentials, port=OPAQUE, alpn="pillion-tcp") as tls:
                tls.sendall(b"marker")
                return tls.recv(10)
        except OSError:
            return b""

    assert echoed(genuine.credentials(CLIENT)) == b"marker"
    assert echoed(foreign.credentials(CLIENT)) == b""
    assert echoed(genuine.credentials("spiffe://cluster.local/ns/arena/sa/admin")) == b""


# --- tokens ---------------------------------------------------------------------------------------------------------------------------


def token_of(arena: Arena, workload: str) -> str:
    """As only root and the pod's own sidecar can read it."""
    return Path(f"/proc/{arena.sidecar(workload)}/root/run/secrets/pillion.dev/token/token").read_text()


def csr(uri: str) -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([URI(uri)])
    request = (
        x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=True).sign(key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM).decode()


def certify(arena: Arena, token: str | None, uri: str) -> tuple[int, str]:
    """What the identity service answers to an unmeshed pod."""

    def work() -> tuple[int, str]:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token is not None else {})
        body = json.dumps({"csr": csr(uri)}).encode()
        request = urllib.request.Request("https://10.142.0.1:8080/v1/certify", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S, context=ssl._create_unverified_context()) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return arena.inside(arena.pid("stranger"), work)


def test_a_token_certifies_its_own_service_account_only(arena: Arena) -> None:
    token = token_of(arena, "client")
    assert certify(arena, token, CLIENT)[0] == 200
    status, said = certify(arena, token, "spiffe://cluster.local/ns/arena/sa/admin")
    assert status == 403 and "sa/admin" in said and "sa/client" in said
    assert certify(arena, token, "spiffe://other.mesh/ns/arena/sa/client")[0] == 403


@pytest.mark.parametrize("token", [None, "", "x", "a.b.c", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0."])
def test_what_is_no_token_certifies_nobody(arena: Arena, token: str | None) -> None:
    assert certify(arena, token, CLIENT)[0] == 401


def test_a_token_for_another_audience_is_refused(arena: Arena, tmp_path: Path) -> None:
    """A pod that asks for a token of the API server must not be able to use it here."""
    mounted = "volumeMounts: [{name: t, mountPath: /var/tmp/arena-token}]"
    source = "projected: {sources: [{serviceAccountToken: {path: token, audience: somebody-else}}]}"
    (tmp_path / "pod.yaml").write_text(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: other-audience, namespace: arena, annotations: {pillion.dev/inject: disabled}}\n"
        "spec: {serviceAccountName: client, terminationGracePeriodSeconds: 0,"
        f" containers: [{{name: a, command: [sleep, '600'], {mounted}}}], volumes: [{{name: t, {source}}}]}}\n"
    )
    assert arena.run("apply", "-f", str(tmp_path / "pod.yaml")).returncode == 0
    try:
        token = ""
        for _ in range(50):
            found = arena.run("exec", "-n", "arena", "other-audience", "--", "cat", "/var/tmp/arena-token/token")
            token = found.stdout
            if token:
                break
        assert token.count(".") == 2
        status, said = certify(arena, token, CLIENT)
        assert status == 401 and "not meant for identity.pillion.dev" in said
    finally:
        arena.run("delete", "-f", str(tmp_path / "pod.yaml"))


# --- the policy controller ------------------------------------------------------------------------------------------------------------


def subscribe(arena: Arena, credentials: Credentials | None, caller: str, pod: str) -> str:
    """What the controller says to a hello and a subscription: its words, "" when it cuts the connection."""
    hello = wire.encode(wire.Hello("arena", pod, "0")) + wire.encode(wire.WatchPort(HTTP))
    try:
        name = "pillion-policy.pillion.sa.pillion.cluster.local"
        with shake(arena, credentials, ip="10.142.0.1", port=8090, name=name, alpn="pillion-policy/1", caller=caller) as tls:
            tls.sendall(hello)
            return tls.recv(1 << 16).decode()
    except OSError:
        return ""


def test_a_sidecar_subscribes_as_itself_only(arena: Arena, genuine: Genuine, foreign: Authority) -> None:
    client, web = arena.pod("client"), arena.pod("web")
    credentials = genuine.credentials(CLIENT)
    assert '"port-policy"' in subscribe(arena, credentials, "client", client)
    assert "sa/web, not" in subscribe(arena, credentials, "client", web), "another pod's policy"
    assert "has no address" in subscribe(arena, credentials, "stranger", client), "with a stolen key from another pod"
    assert subscribe(arena, foreign.credentials(CLIENT), "client", client) == ""
    assert subscribe(arena, None, "client", client) == ""


def test_the_control_plane_has_no_open_door(arena: Arena) -> None:
    """Its admin ports look only; its diagnostics and its rotation are on sockets that pods cannot reach."""
    for port in (9990, 9991):
        assert arena.ask("stranger", "10.142.0.1", port, "/metrics").status == 200
        assert arena.ask("stranger", "10.142.0.1", port, "/shutdown", method="POST", body=b"x").status in (403, 404)
        for path in ("/v1/policy", "/policy", "/rotate", "/v1/rotate", "/authz"):
            assert arena.ask("stranger", "10.142.0.1", port, path).status == 404


# --- inside the pod -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trick",
    [
        "cat /proc/{sidecar}/environ",
        "head -c1 /proc/{sidecar}/mem",
        "ls /proc/{sidecar}/fd/",
        "ls /proc/{sidecar}/root/var",
        "kill -TERM {sidecar}",
        "cat /var/run/secrets/pillion.dev/token/token",
        "cat {state}/pods/*/*/volumes/*/token",
        "cat {state}/identity/ca/*.key",
        "cat {state}/api/*",
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect(\"{state}/control.sock\")'",
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect(\"{state}/identity/admin.sock\")'",
        "python3 -c 'import os; os.setuid(2102)'",
        "setpriv --reuid 2102 true",
        "nft list ruleset",
        "nft flush ruleset",
        "ip link set eth0 down",
        "ip route add 192.0.2.0/24 dev lo",
        "mount -t tmpfs none /mnt",
        "python3 -c 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)'",
        "nsenter -t 1 -n true",
        "unshare -Urn nsenter -t 1 -n true",
        "unshare -Ur nft flush ruleset",
        "python3 -c 'import socket; socket.create_server((\"\", 4143))'",
    ],
)
def test_an_app_cannot(arena: Arena, trick: str) -> None:
    status = Path(f"/proc/{arena.sidecar('client')}/status").read_text()
    sidecar = status.partition("NSpid:")[2].split("\n")[0].split()[-1]
    script = trick.replace("{state}", str(arena.state)).replace("{sidecar}", sidecar)
    in_sight = f"test -d /proc/{sidecar} || exit 0"
    found = arena.run("exec", "-n", "arena", "client", "--", "sh", "-c", f"{in_sight}; {script}")
    assert found.returncode != 0, found.stdout
    assert "KEY" not in found.stdout and "eyJ" not in found.stdout


@pytest.mark.parametrize("uid", [2102, 2103, 2104])
def test_no_app_gets_a_user_of_the_mesh(arena: Arena, tmp_path: Path, uid: int) -> None:
    """2102 passes capture, 2103 owns the authority's keys, 2104 the policy."""
    (tmp_path / "pod.yaml").write_text(
        f"apiVersion: v1\nkind: Pod\nmetadata: {{name: impostor-{uid}, namespace: arena}}\n"
        f"spec: {{containers: [{{name: a, command: [sleep, '600'], securityContext: {{runAsUser: {uid}}}}}]}}\n"
    )
    refused = arena.run("apply", "-f", str(tmp_path / "pod.yaml"))
    if refused.returncode == 0:
        arena.run("delete", "-f", str(tmp_path / "pod.yaml"))
    assert refused.returncode == 1 and "runAsUser" in refused.stderr
