"""Messages of HTTP/1.1 that are unusual and sound: their bytes pass both sidecars as they are, and so do those of their answers."""

from __future__ import annotations

import pytest
import trio

from policy.wire import HttpMatch, InboundPolicy, PathMatch, Route, Rule
from tests.scenarios.mesh import CART, FOR_CART, inbound_policy, mesh
from tests.scenarios.peers import PATIENCE_S

_EVERYTHING = Rule((HttpMatch(PathMatch("PathPrefix", "/")),))
ROUTED = inbound_policy(routes=(Route(FOR_CART.server, "http", (), (_EVERYTHING,), FOR_CART.authorizations),))
_TOLD = b"\r\npillion-client-id: " + CART.uri.encode() + b"\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nHost: web.shop\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


def request(line: bytes, *fields: bytes, body: bytes = b"", host: bytes = b"web.shop") -> bytes:
    return b"\r\n".join((line, b"Host: " + host, *fields, b"", body))


REQUESTS: dict[str, bytes] = {
    "spelling and white space of fields": request(
        b"GET / HTTP/1.1", b"X-MiXeD: a  ", b"x-y:b", b"X-Empty:", b"x-tab:\ta\tb", b"X-MiXeD: 2"
    ),
    "bytes above 127 in a value": request(b"GET / HTTP/1.1", b"X: caf\xe9 \xc3\xa4"),
    "every character of a name": request(b"GET / HTTP/1.1", b"X!#$%&'*+-.^`|~9: 1"),
    "WebDAV": request(b"PROPFIND /a HTTP/1.1", b"Depth: 1", b"Content-Length: 4", body=b"<x/>"),
    "a method with a hyphen": request(b"M-SEARCH /a HTTP/1.1"),
    "a method in lower case": request(b"get /a HTTP/1.1"),
    "TRACE": request(b"TRACE /a HTTP/1.1", b"Max-Forwards: 0"),
    "characters that no URI has": request(b'GET /a|b{c}"d"^`[e]?a[]=1&b=<c> HTTP/1.1'),
    "an IPv6 host": request(b"GET / HTTP/1.1", host=b"[::1]:8080"),
    "a host with port, capitals and final dot": request(b"GET / HTTP/1.1", host=b"WEB.shop.:80"),
    "an empty host": request(b"GET / HTTP/1.1", host=b""),
    "an absolute target": request(b"GET http://web.shop/x?y HTTP/1.1"),
    "a long target": request(b"GET /" + b"a" * 8000 + b" HTTP/1.1"),
    "a long field": request(b"GET / HTTP/1.1", b"Cookie: " + b"a" * 60_000),
    "POST without": request(b"POST / HTTP/1.1"),
    "chunks with extensions and trailers": request(
        b"POST / HTTP/1.1",
        b"Transfer-Encoding: chunked",
        b"Trailer: X-T",
        body=b'0004;ext=1;q="a;\\"b"\r\nbody\r\n000\r\nX-T: 1\r\n\r\n',
    ),
    "an expectation other than 100": request(b"POST / HTTP/1.1", b"Expect: x", b"Content-Length: 4", body=b"body"),
    "TE": request(b"GET / HTTP/1.1", b"TE: trailers"),
}

ANSWERS: dict[str, bytes] = {
    "statuses nobody registered": b"HTTP/1.1 299 Ok\r\nContent-Length: 2\r\n\r\nhi",
    "the last status": b"HTTP/1.1 999 x\r\nContent-Length: 2\r\n\r\nhi",
    "no reason": b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi",
    "an empty reason": b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nhi",
    "a reason in UTF-8": b"HTTP/1.1 200 \xc3\xa4\xc3\xb6\r\nContent-Length: 2\r\n\r\nhi",
    "cookies in their order": b"HTTP/1.1 200 OK\r\nSet-Cookie: b\r\nX: \xe9\r\nset-cookie: a\r\nSet-Cookie: c\r\nContent-Length: 0\r\n\r\n",
    "early hints": b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + OK,
    "a 100 that nobody asked for": b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    "a partial answer": b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-1/10\r\nContent-Length: 2\r\n\r\nhi",
    "204 that says 0": b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
    "304 with the length of what it stands for": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 100\r\nETag: x\r\n\r\n",
    "chunks with extensions and trailers": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\nTrailer: X-S\r\n\r\n00000004;x=y\r\nbody\r\n0000\r\nX-S: 1\r\n\r\n"
    ),
    "hundreds of fields": b"HTTP/1.1 200 OK\r\n" + b"".join(b"X%d: 1\r\n" % i for i in range(900)) + b"Content-Length: 0\r\n\r\n",
    "a long field": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 60_000 + b"\r\nContent-Length: 0\r\n\r\n",
}

REFUSED: dict[str, tuple[bytes, bytes]] = {
    "a space before the colon": (request(b"GET / HTTP/1.1", b"X : a"), b"400"),
    "a field that goes on in the next line": (request(b"GET / HTTP/1.1", b"X: a\r\n b"), b"400"),
    "lines that end in LF": (b"GET / HTTP/1.1\nHost: web.shop\n\n", b"400"),
    "bytes above 127 in the target": (request("GET /ä HTTP/1.1".encode()), b"400"),
    "a fragment": (request(b"GET /a#b HTTP/1.1"), b"400"),
    "two lengths that agree": (request(b"POST / HTTP/1.1", b"Content-Length: 2", b"Content-Length: 2", body=b"hi"), b"400"),
    "a coding besides chunked": (request(b"POST / HTTP/1.1", b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), b"400"),
    "HTTP/0.9": (b"GET /\r\n\r\n", b"400"),
    "HTTP/1.2": (request(b"GET / HTTP/1.2"), b"400"),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", b"400"),
    "a target for another host": (request(b"GET http://other.shop/ HTTP/1.1"), b"400"),
    "a target beyond 8 KiB": (request(b"GET /" + b"a" * 8192 + b" HTTP/1.1"), b"414"),
    "more than 100 fields": (request(b"GET / HTTP/1.1", *[b"X: 1"] * 100), b"431"),
}
"""docs/http.md lists the same, with the reasons."""

BROKEN: dict[str, bytes] = {
    "a space before the colon": b"HTTP/1.1 200 OK\r\nX : a\r\nContent-Length: 2\r\n\r\nhi",
    "lines that end in LF": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi",
    "two lengths that agree": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi",
    "a length beside chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "a coding besides chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "204 with a body": b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a 101 that nobody asked for": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "a head beyond 64 KiB": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 65_536 + b"\r\nContent-Length: 0\r\n\r\n",
    "another protocol": b"ICY 200 OK\r\n\r\nhi",
}


async def exchange(asked: bytes, answer: bytes, policy: InboundPolicy = FOR_CART) -> tuple[bytes, bytes]:
    """What the app got of a request and the client of its answer."""
    got = b""

    async def app(stream: trio.SocketStream) -> None:
        nonlocal got
        got = await _read(stream, len(asked) + len(_TOLD) - 4)
        await stream.send_all(answer)
        await trio.sleep_forever()

    async with mesh(app, policy=policy) as made:
        client = await made.dial()
        await client.send_all(asked)
        answered = await _read(client, len(answer))
        return got, answered


async def _read(stream: trio.SocketStream, size: int) -> bytes:
    """So many bytes, fewer if the connection ends or an answer of a sidecar is all there is."""
    data = b""
    with trio.fail_after(PATIENCE_S):
        while len(data) < size and b"pillion-proxy-error" not in data and (more := await stream.receive_some(65536)):
            data += more
    return data


@pytest.mark.parametrize("policy", [FOR_CART, ROUTED], ids=["by-port", "by-route"])
@pytest.mark.parametrize("asked", REQUESTS.values(), ids=REQUESTS)
async def test_a_request_arrives_as_it_was_sent_and_says_who_sent_it(asked: bytes, policy: InboundPolicy):
    assert await exchange(asked, OK, policy) == (asked.replace(b"\r\n\r\n", _TOLD, 1), OK)


@pytest.mark.parametrize("policy", [FOR_CART, ROUTED], ids=["by-port", "by-route"])
async def test_a_body_without_meaning_arrives_as_the_last_that_its_connection_carries(policy: InboundPolicy):
    asked = request(b"GET / HTTP/1.1", b"Content-Length: 4", body=b"body")
    assert await exchange(asked, OK, policy) == (asked.replace(b"\r\n\r\n", _TOLD[:-2] + b"connection: close\r\n\r\n", 1), OK)


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_an_answer_arrives_as_it_was_sent(answer: bytes):
    assert (await exchange(GET, answer))[1] == answer


@pytest.mark.parametrize(("asked", "status"), REFUSED.values(), ids=REFUSED)
async def test_a_request_that_could_be_read_in_two_ways_never_arrives(asked: bytes, status: bytes):
    got, answer = await exchange(asked, b" " * 1000)
    assert (got, answer[:13]) == (b"", b"HTTP/1.1 " + status + b" ")


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
async def test_an_answer_that_could_be_read_in_two_ways_is_a_502(answer: bytes):
    assert (await exchange(GET, answer + b" " * 1000))[1].startswith(b"HTTP/1.1 502 ")
