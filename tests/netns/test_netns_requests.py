"""A hostile caller writes requests: forged identities, two readings of one message, ways round a route rule. The app says what it saw.

Every message comes twice: from an unmeshed pod straight to the inbound sidecar, and from a meshed pod, whose own sidecar sees it first.
"""

from __future__ import annotations

import json

import h2.config
import h2.connection
import h2.events
import pytest
from arena import HTTP, HTTP2, OPAQUE, PLAIN, Arena, Reply

pytestmark = [pytest.mark.netns, pytest.mark.slow]

CLIENT = "spiffe://cluster.local/ns/arena/sa/client"
CALLERS = pytest.mark.parametrize("caller", ["stranger", "client"])
SECRET = b"GET /admin/secret HTTP/1.1\r\nhost: web\r\n\r\n"
POST = b"POST /public HTTP/1.1\r\nhost: web\r\n"

# --- forged identity ------------------------------------------------------------------------------------------------------------------

FORGED = {
    "as is": ("pillion-client-id: spiffe://cluster.local/ns/arena/sa/admin",),
    "capitals, twice": ("Pillion-Client-Id: a", "PILLION-CLIENT-ID: b"),
    "underscores": ("Pillion_Client_Id: a",),
    "one underscore": ("pillion-client_id: a",),
    "no space": ("pillion-client-id:a",),
    "nominated for removal": ("connection: close, pillion-client-id",),
    "nominated and given": ("connection: Pillion-Client-Id", "pillion-client-id: a"),
}


def identities(reply: Reply) -> list[str]:
    """Every field that a server may take for the mesh's identity header."""
    return [value for name, value in reply.told["fields"] if name.lower().replace("_", "-") == "pillion-client-id"]


@pytest.mark.parametrize("fields", FORGED.values(), ids=FORGED)
def test_an_app_sees_the_verified_identity_and_no_other(arena: Arena, fields: tuple[str, ...]) -> None:
    ip = arena.ip("web")
    assert identities(arena.ask("client", ip, HTTP, "/public", *fields)) == [CLIENT]
    assert identities(arena.ask("stranger", ip, HTTP, "/public", *fields)) == []
    assert identities(arena.ask("stranger", ip, PLAIN, "/", *fields)) == [], "on a port without a Server as well"


@CALLERS
def test_an_identity_cannot_come_in_trailers(arena: Arena, caller: str) -> None:
    chunks = b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nPillion_Client-id: a\r\n\r\n"
    before = len(arena.seen())
    assert arena.raw(caller, arena.ip("web"), PLAIN, POST + chunks, most=1)[0].status == 400
    assert saw(arena, before) == []


H2_FORGED = [
    [("pillion-client-id", "a")],
    [("pillion-client-id", "a"), ("pillion-client-id", "b")],
    [("pillion_client_id", "a")],
    [("pillion-client_id", "a"), ("pillion-client-id", "b")],
]


@pytest.mark.parametrize("fields", H2_FORGED, ids=str)
def test_the_same_in_http2(arena: Arena, fields: list[tuple[str, str]]) -> None:
    assert h2_identities(h2_ask(arena, "client", "/public", *fields)) == [CLIENT]
    assert h2_identities(h2_ask(arena, "stranger", "/public", *fields)) == []


@CALLERS
@pytest.mark.parametrize(
    "field", [("Pillion-Client-Id", "a"), ("connection", "pillion-client-id"), ("x", "a\r\npillion-client-id: b")], ids=str
)
def test_malformed_http2_fields_reset_their_stream(arena: Arena, caller: str, field: tuple[str, str]) -> None:
    assert h2_ask(arena, caller, "/public", field).status == 0


def h2_identities(reply: Reply) -> list[str]:
    assert reply.status == 200, reply
    return identities(reply)


def h2_ask(arena: Arena, caller: str, path: str, *fields: tuple[str, str], method: str = "GET", port: int = HTTP2) -> Reply:
    """One request on a connection of its own; status 0: the stream was reset or the connection ended."""
    settings = h2.config.H2Configuration(header_encoding="utf-8", validate_outbound_headers=False, normalize_outbound_headers=False)
    connection = h2.connection.H2Connection(settings)
    connection.initiate_connection()
    connection.send_headers(1, [(":method", method), (":scheme", "http"), (":authority", "web"), (":path", path), *fields], end_stream=True)
    reply = Reply(0)
    with arena.dial(caller, arena.ip("web"), port) as sock:
        sock.sendall(connection.data_to_send())
        while data := sock.recv(1 << 16):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    reply.headers = dict(event.headers)
                elif isinstance(event, h2.events.DataReceived):
                    reply.body += event.data
                elif isinstance(event, h2.events.StreamEnded):
                    reply.status = int(reply.headers[":status"])
                    return reply
                elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                    return Reply(0)
            sock.sendall(connection.data_to_send())
    return reply


# --- one message, two readings --------------------------------------------------------------------------------------------------------

SMUGGLED = {
    "CL.TE": POST + b"content-length: 60\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SECRET,
    "TE.CL": POST + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n%x\r\n" % len(SECRET) + SECRET + b"\r\n0\r\n\r\n",
    "TE.TE": POST + b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n" + SECRET,
    "folded TE": POST + b"transfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + SECRET,
    "TE with a space": POST + b"transfer-encoding : chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n" + SECRET,
    "TE nominated": POST + b"connection: transfer-encoding\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SECRET,
    "TE in HTTP/1.0": b"POST /public HTTP/1.0\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SECRET,
    "two lengths": POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\n0\r\n\r\n" + SECRET,
    "listed length": POST + b"content-length: 5, 5\r\n\r\n0\r\n\r\n" + SECRET,
    "signed length": POST + b"content-length: +5\r\n\r\n0\r\n\r\n" + SECRET,
    "length nominated": POST + b"connection: content-length\r\ncontent-length: 5\r\n\r\n0\r\n\r\n" + SECRET,
    "folded field": POST + b"x: y\r\n content-length: 5\r\n\r\n" + SECRET,
    "bare line feeds": b"POST /public HTTP/1.1\nhost: web\ncontent-length: 5\n\n0\r\n\r\n" + SECRET,
    "bare return": POST + b"x: y\rcontent-length: 5\r\n\r\n" + SECRET,
    "zero byte": POST + b"x: y\0\r\ncontent-length: 5\r\n\r\n" + SECRET,
    "chunk extension ends with LF": POST + b"transfer-encoding: chunked\r\n\r\n2;\nxx\r\n0\r\n\r\n" + SECRET,
    "chunk size 0x2": POST + b"transfer-encoding: chunked\r\n\r\n0x2\r\nxx\r\n0\r\n\r\n" + SECRET,
    "chunk longer than said": POST + b"transfer-encoding: chunked\r\n\r\n2\r\nxxyy0\r\n\r\n" + SECRET,
    "chunk size overflows": POST + b"transfer-encoding: chunked\r\n\r\n10000000000000002\r\nxx\r\n0\r\n\r\n" + SECRET,
    "two hosts": b"GET /public HTTP/1.1\r\nhost: web\r\nhost: other\r\n\r\n",
    **{
        f"TE {coding!r}": POST + b"transfer-encoding: " + coding + b"\r\n\r\n0\r\n\r\n" + SECRET
        for coding in (
            b"xchunked",
            b"chunked, identity",
            b"identity, chunked",
            b"chunked\x0b",
            b"chunked;q=1",
            b"chunked, chunked",
            b"gzip, chunked",
        )
    },
}

HIDDEN = {
    "in a body with a length": POST.replace(b"POST", b"GET") + b"content-length: %d\r\n\r\n" % len(SECRET) + SECRET,
    "in a chunk": POST.replace(b"POST", b"GET") + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(SECRET) + SECRET + b"\r\n0\r\n\r\n",
    "behind a request": b"GET /public HTTP/1.1\r\nhost: web\r\n\r\n" + SECRET,
    "behind a refused request": SECRET + b"GET /public HTTP/1.1\r\nhost: web\r\n\r\n",
    "behind an upgrade": b"GET /public HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n" + SECRET,
    "behind expect": POST.replace(b"POST", b"GET") + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(SECRET) + SECRET,
    "behind CONNECT": b"CONNECT web:80 HTTP/1.1\r\nhost: web:80\r\n\r\n" + SECRET,
}


def saw(arena: Arena, before: int) -> list[str]:
    """Request lines that reached the app, but for the probe's."""
    return [head.split("\r\n")[0] for head in arena.seen()[before:] if "s3cret-of-the-probe" not in head]


@CALLERS
@pytest.mark.parametrize("message", SMUGGLED.values(), ids=SMUGGLED)
def test_a_message_with_two_readings_is_refused_whole(arena: Arena, caller: str, message: bytes) -> None:
    before = len(arena.seen())
    assert [reply.status for reply in arena.raw(caller, arena.ip("web"), HTTP, message, 0.25)] == [400]
    assert saw(arena, before) == []


@CALLERS
@pytest.mark.parametrize("message", HIDDEN.values(), ids=HIDDEN)
def test_a_request_hidden_behind_or_inside_another_is_decided_on_its_own(arena: Arena, caller: str, message: bytes) -> None:
    before = len(arena.seen())
    replies = arena.raw(caller, arena.ip("web"), HTTP, message, 0.25)
    assert {reply.status for reply in replies} <= {200, 403, 400} and b"/admin/secret" not in b"".join(reply.body for reply in replies)
    assert not [line for line in saw(arena, before) if line.startswith("GET /admin/secret")]


# --- ways round a route rule ----------------------------------------------------------------------------------------------------------

SAME_PLACE = ["/admin", "/admin/", "/admin/x", "/admin?x", "/%61dmin", "/admi%6e", "/%61%64min/x", "http://web/admin", "HTTP://web/admin"]
TWO_READINGS = [
    "/admin%2f..",
    "/admin%2Fx",
    "//admin",
    "/.//admin",
    "/./admin",
    "/x/../admin",
    "/public/../admin",
    "/public/%2e%2e/admin",
    "/public/.%2e/admin",
    "/public/..%2fadmin",
    "/public/..;/admin",
    "/;/admin",
    "/admin;x",
    "/x%2f..%2fadmin",
    "/public%5c..%5cadmin",
    "/public\\..\\admin",
    "/admin%00",
    "/%c0%afadmin",
    "/%zz/admin",
    "/public#/../admin",
    "/public//../admin",
    "http://web//admin",
    "http://other/admin",
]


@pytest.mark.parametrize("path", SAME_PLACE)
def test_a_rule_holds_for_every_spelling_of_its_path(arena: Arena, path: str) -> None:
    ip = arena.ip("web")
    assert [arena.ask(who, ip, HTTP, path).status for who in ("stranger", "client", "admin")] == [403, 403, 200]
    if path.startswith("/"):
        assert [h2_ask(arena, who, path).status for who in ("stranger", "client", "admin")] == [403, 403, 200]


@pytest.mark.parametrize("path", TWO_READINGS)
def test_a_path_with_two_readings_is_refused_to_everybody(arena: Arena, path: str) -> None:
    ip, before = arena.ip("web"), len(arena.seen())
    assert [arena.ask(who, ip, HTTP, path).status for who in ("stranger", "client", "admin")] == [400, 400, 400]
    if path.startswith("/"):
        assert {h2_ask(arena, who, path).status for who in ("stranger", "client", "admin")} <= {400, 0}
    assert saw(arena, before) == []


@CALLERS
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "TRACE", "PROPFIND", "QQQ"])
def test_no_method_opens_a_closed_path(arena: Arena, caller: str, method: str) -> None:
    assert arena.ask(caller, arena.ip("web"), HTTP, "/admin", method=method).status == 403


@pytest.mark.parametrize(
    "field", ["x-http-method-override: POST", "x-original-url: /admin", "x-rewrite-url: /admin", "x-forwarded-prefix: /admin"]
)
def test_headers_that_some_apps_obey_decide_nothing(arena: Arena, field: str) -> None:
    assert arena.ask("stranger", arena.ip("web"), HTTP, "/admin", field).status == 403
    assert arena.ask("stranger", arena.ip("web"), HTTP, "/public", field, method="POST").status == 403, "public is open to GET only"


@CALLERS
@pytest.mark.parametrize("target", ["/admin", "web:8080", "127.0.0.1:9999"])
def test_connect_is_no_tunnel(arena: Arena, caller: str, target: str) -> None:
    assert arena.ask(caller, arena.ip("web"), HTTP, target, method="CONNECT").status == 400
    assert h2_ask(arena, caller, target, (":protocol", "websocket"), method="CONNECT").status in (0, 400, 403)


@CALLERS
def test_http2_on_a_port_declared_http1_keeps_its_rules(arena: Arena, caller: str) -> None:
    assert h2_ask(arena, caller, "/admin", port=HTTP).status == 403


@CALLERS
@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x00\x05hello", b"HELLO THERE\r\n\r\n", b"\0\0\0\0\0\0\0\0", b"*1\r\n$4\r\nINFO\r\n"], ids=repr
)
def test_opaque_bytes_do_not_pass_a_port_with_routes(arena: Arena, caller: str, data: bytes) -> None:
    before = len(arena.seen())
    assert {reply.status for reply in arena.raw(caller, arena.ip("web"), HTTP, data, most=1, wait_s=1)} <= {0, 400}
    assert saw(arena, before) == []


def test_an_unmeshed_caller_gets_what_policy_gives_to_everybody_and_no_more(arena: Arena) -> None:
    ip = arena.ip("web")
    answers = {path: arena.ask("stranger", ip, HTTP, path).status for path in ("/public", "/public/x", "/publics", "/", "/admin")}
    assert answers == {"/public": 200, "/public/x": 200, "/publics": 403, "/": 403, "/admin": 403}
    assert arena.raw("stranger", ip, OPAQUE, b"hello") == [Reply(0)]
    denied = arena.ask("stranger", ip, HTTP, "/")
    assert "pillion-proxy-error" not in denied.headers, "who is not meshed learns no reason"
    assert arena.ask("client", ip, HTTP, "/admin").headers["pillion-proxy-error"] == "denied"


def test_what_the_app_remembers_is_what_this_suite_looks_at(arena: Arena) -> None:
    """Or every assertion above that it saw nothing would be empty."""
    before = len(arena.seen())
    assert arena.ask("client", arena.ip("web"), HTTP, "/noted").status == 200
    assert saw(arena, before) == ["GET /noted HTTP/1.1"]
    before = len(arena.seen())
    h2_ask(arena, "client", "/noted")
    (head,) = saw(arena, before)
    assert json.loads(head.removeprefix("h2 "))[0] == [":method", "GET"]
