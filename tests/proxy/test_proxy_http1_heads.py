"""Heads: what is refused and why, what is read, what is cut; and that whatever is accepted h11 and httptools read the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import h11
import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.protocol.http1.edits import editor, response_editor
from proxy.protocol.http1.heads import CHUNKED, UNTIL_CLOSE, HeadError, RequestHead, ResponseHead
from proxy.protocol.http1.limits import Http1Limits
from proxy.protocol.http1.parse import request_untrusted, response_untrusted
from proxy.protocol.requests import HeadEdit, ResponseRule
from proxy.rescue import Cause

LIMITS = Http1Limits()


def request(*lines: bytes) -> RequestHead:
    head = request_untrusted(b"\r\n".join(lines) + b"\r\n\r\n", LIMITS)
    assert head is not None
    return head


def response(*lines: bytes) -> ResponseHead:
    head = response_untrusted(b"\r\n".join(lines) + b"\r\n\r\n", 65536)
    assert head is not None
    return head


def fields(*lines: bytes) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: a\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


REFUSED_REQUESTS = {
    "CL and TE": fields(b"Content-Length: 5", b"Transfer-Encoding: chunked"),
    "TE and CL": fields(b"Transfer-Encoding: chunked", b"content-length: 5"),
    "CL twice, different": fields(b"Content-Length: 5", b"Content-Length: 6"),
    "CL twice, equal": fields(b"Content-Length: 5", b"Content-Length: 5"),
    "CL list": fields(b"Content-Length: 5, 5"),
    "CL plus": fields(b"Content-Length: +5"),
    "CL minus": fields(b"Content-Length: -5"),
    "CL hex": fields(b"Content-Length: 0x5"),
    "CL underscore": fields(b"Content-Length: 1_0"),
    "CL inner space": fields(b"Content-Length: 1 0"),
    "CL empty": fields(b"Content-Length:"),
    "CL huge": fields(b"Content-Length: 1000000000000000000000"),
    "CL not ASCII digits": fields(b"Content-Length: \xb2"),
    "TE identity": fields(b"Transfer-Encoding: identity"),
    "TE gzip": fields(b"Transfer-Encoding: gzip"),
    "TE gzip, chunked": fields(b"Transfer-Encoding: gzip, chunked"),
    "TE chunked, identity": fields(b"Transfer-Encoding: chunked, identity"),
    "TE chunked twice": fields(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "TE xchunked": fields(b"Transfer-Encoding: xchunked"),
    "TE quoted": fields(b'Transfer-Encoding: "chunked"'),
    "TE vertical tab": fields(b"Transfer-Encoding: \x0bchunked"),
    "TE empty": fields(b"Transfer-Encoding:"),
    "TE with parameter": fields(b"Transfer-Encoding: chunked;a=b"),
    "TE in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    "obs-fold": fields(b"X: a", b" b"),
    "obs-fold with tab": fields(b"Transfer-Encoding: chunked", b"\tx"),
    "fold after the request line": b"GET / HTTP/1.1\r\n X: a\r\nHost: a\r\n\r\n",
    "bare LF in value": fields(b"X: a\nTransfer-Encoding: chunked"),
    "bare LF ends": b"GET / HTTP/1.1\nHost: a\n\n",
    "bare CR in value": fields(b"X: a\rb"),
    "CR CR LF": fields(b"X: a\r"),
    "NUL in value": fields(b"X: a\x00b"),
    "NUL in name": fields(b"X\x00: a"),
    "DEL in value": fields(b"X: a\x7f"),
    "ESC in value": fields(b"X: \x1b[0m"),
    "space before colon": fields(b"Transfer-Encoding : chunked"),
    "tab before colon": fields(b"Content-Length\t: 5"),
    "no colon": fields(b"Content-Length"),
    "empty name": fields(b": x"),
    "non-token name": fields(b"X(Y): x"),
    "high byte in name": fields(b"\xe9: x"),
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "Host twice": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "Host twice, equal": b"GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n",
    "Host twice in HTTP/1.0": b"GET / HTTP/1.0\r\nHost: a\r\nX: y\r\nHost: b\r\n\r\n",
    "Host list": b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n",
    "Host with path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "Host with user": b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n",
    "Host with space": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "Host with two ports": b"GET / HTTP/1.1\r\nHost: a:1:2\r\n\r\n",
    "Host with bad port": b"GET / HTTP/1.1\r\nHost: a:x\r\n\r\n",
    "Host differs from target": b"GET http://a/ HTTP/1.1\r\nHost: b\r\n\r\n",
    "Host without a port that is no default": b"GET http://a:8080/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "Host without the port of another scheme": b"GET http://a:443/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "Host with another default port": b"CONNECT a:443 HTTP/1.1\r\nHost: a:80\r\n\r\n",
    "target without Host": b"GET http://a/ HTTP/1.1\r\n\r\n",
    "empty Host, absolute target": b"GET http://a/ HTTP/1.1\r\nHost:\r\n\r\n",
    "userinfo in target": b"GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "other scheme": b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "relative target": b"GET a HTTP/1.1\r\nHost: a\r\n\r\n",
    "asterisk for GET": b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    "fragment": b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n",
    "high byte in target": b"GET /\xe9 HTTP/1.1\r\nHost: a\r\n\r\n",
    "control in target": b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
    "space in target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "tab as space": b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "space before method": b" GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "space after version": b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
    "non-token method": b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n",
    "no target": b"GET HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "HTTP/1.10": b"GET / HTTP/1.10\r\nHost: a\r\n\r\n",
    "http/1.1": b"GET / http/1.1\r\nHost: a\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\n",
    "CONNECT to a path": b"CONNECT / HTTP/1.1\r\nHost: a:1\r\n\r\n",
    "CONNECT without port": b"CONNECT a HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT elsewhere": b"CONNECT a:1 HTTP/1.1\r\nHost: b:1\r\n\r\n",
    "CONNECT with body": b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 1\r\n\r\n",
    "Connection names Host": fields(b"Connection: host"),
    "Connection names CL": fields(b"Connection: close, Content-Length", b"Content-Length: 4"),
    "Connection names TE": fields(b"Connection: transfer-encoding", b"Transfer-Encoding: chunked"),
    "Connection is no token": fields(b"Connection: a b"),
    "expectation twice": fields(b"Expect: 100-continue", b"Expect: x", b"Content-Length: 1"),
}


@pytest.mark.parametrize("data", REFUSED_REQUESTS.values(), ids=REFUSED_REQUESTS.keys())
def test_requests_with_two_readings_or_bad_grammar_are_refused_with_400(data: bytes) -> None:
    with pytest.raises(HeadError) as caught:
        request_untrusted(data, LIMITS)
    assert caught.value.cause is Cause.BAD_REQUEST and caught.value.detail


REFUSED_RESPONSES = {
    "CL and TE": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    "CL twice": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "CL twice and kept": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\n",
    "CL list": b"HTTP/1.1 200 OK\r\nContent-Length: 1, 1\r\n\r\n",
    "CL sign": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    "TE other": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
    "TE in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "204 with a body": b"HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\n",
    "100 with a body": b"HTTP/1.1 100 Continue\r\nTransfer-Encoding: chunked\r\n\r\n",
    "two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "status zero": b"HTTP/1.1 099 OK\r\n\r\n",
    "version": b"HTTP/2 200 OK\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\nContent-Length: 1\n\n",
    "fold": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
    "space before colon": b"HTTP/1.1 200 OK\r\nContent-Length : 1\r\n\r\n",
    "NUL": b"HTTP/1.1 200 O\x00K\r\n\r\n",
    "not HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
}


@pytest.mark.parametrize("data", REFUSED_RESPONSES.values(), ids=REFUSED_RESPONSES.keys())
def test_responses_with_two_readings_or_bad_grammar_are_refused(data: bytes) -> None:
    with pytest.raises(HeadError):
        response_untrusted(data, 65536)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"GET /" + b"a" * 8192 + b" HTTP/1.1\r\nHost: a\r\n\r\n", Cause.TARGET_TOO_LONG),
        (b"GET /" + b"a" * 9000, Cause.TARGET_TOO_LONG),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 65536 + b"\r\n\r\n", Cause.HEAD_TOO_LARGE),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 65536, Cause.HEAD_TOO_LARGE),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:\r\n" * 100 + b"\r\n", Cause.HEAD_TOO_LARGE),
    ],
)
def test_limits_have_their_own_status(data: bytes, cause: Cause) -> None:
    with pytest.raises(HeadError) as caught:
        request_untrusted(data, LIMITS)
    assert caught.value.cause is cause


def test_exactly_the_limit_is_allowed() -> None:
    assert request(b"GET /" + b"a" * 8191 + b" HTTP/1.1", b"Host: a").target == b"/" + b"a" * 8191
    assert request(b"GET / HTTP/1.1", b"Host: a", *[b"a:"] * 99)


def test_bare_line_ends_are_refused_before_the_head_is_complete() -> None:
    for data in (b"GET / HTTP/1.1\nHost: a", b"GET / HTTP/1.1\r\nHost: a\rX", b"GET /\x00"):
        with pytest.raises(HeadError):
            request_untrusted(data, LIMITS)
    assert request_untrusted(b"GET / HTTP/1.1\r\nHost: a\r", LIMITS) is None


def test_targets_are_reduced_for_decisions_and_sent_on_as_received() -> None:
    for target, reduced in (
        (b"http://A.test:80/x?y", b"/x?y"),
        (b"HTTP://a.test:80", b"/"),
        (b"http://a.test:80?q=/", b"/?q=/"),
        (b"/plain?a=%20", b"/plain?a=%20"),
    ):
        head = request(b"GET " + target + b" HTTP/1.1", b"Host: a.test:80")
        assert head.target == reduced
        assert head.wire.startswith(b"GET " + target + b" HTTP/1.1\r\n")
    assert request(b"OPTIONS * HTTP/1.1", b"Host: a").target == b"*"
    assert request(b"CONNECT a:1 HTTP/1.1", b"Host: a:1").connects
    assert request(b"GET http://a/ HTTP/1.0").authority == b"a"
    assert request(b"GET / HTTP/1.0").authority == b""


@pytest.mark.parametrize(
    ("line", "host"),
    [
        (b"GET http://a:80/ HTTP/1.1", b"A"),  # Java's HttpURLConnection through an HTTP proxy
        (b"GET HTTP://A/ HTTP/1.1", b"a:80"),
        (b"GET https://[::1]:443/ HTTP/1.1", b"[::1]"),
        (b"CONNECT www.example.com:80 HTTP/1.1", b"www.example.com"),  # the example of RFC 9112 3.2.3
        (b"CONNECT a:443 HTTP/1.1", b"a"),
    ],
)
def test_a_host_may_leave_out_the_schemes_port_or_the_target_may(line: bytes, host: bytes) -> None:
    head = request(line, b"Host: " + host)
    assert head.wire == line + b"\r\nHost: " + host + b"\r\n\r\n"
    assert head.authority in line


@pytest.mark.parametrize("host", [b"a", b"A.b-c_d:8080", b"[::1]:80", b"[fe80::1]", b"127.0.0.1", b""])
def test_authority_is_the_host_as_received(host: bytes) -> None:
    assert request(b"GET / HTTP/1.1", b"Host: " + host).authority == host
    assert request(b"GET / HTTP/1.1", b"X: y", b"hOST:\t" + host + b" ").authority == host


def test_values_gives_the_value_of_a_name_without_padding() -> None:
    head = request(b"GET / HTTP/1.1", b"Host: a", b"X-One:  Some Value\t", b"X-Empty:")
    assert head.values((b"x-one", b"x-empty", b"x-none", b"host")) == (b"Some Value", b"", None, b"a")


def test_several_fields_of_a_name_are_all_given_to_decisions() -> None:
    head = request(
        b"GET / HTTP/1.1", b"X-Role: user", b"Host: a", b"Cookie: a=1", b"x-role:\tadmin ", b"cookie: b=2", b"X-ROLE:", b"X-Roles: no"
    )
    assert head.values((b"x-role", b"cookie")) == (b"user\nadmin\n", b"a=1; b=2")


SAID = [
    "X-Role: user",
    "x-role:\tadmin ",
    "X-ROLE:",
    "x-roles: no",
    "Cookie: a=1",
    "cookie: b=2",
    "X: x-role: no",
    "Connection: x-role",
    "Host: b:80",
]


@given(st.lists(st.sampled_from(SAID), max_size=8), st.booleans())
@example(["X-Role: user", "Cookie: a=1", "x-role:\tadmin ", "cookie: b=2", "Host: b:80"], True)
def test_many_names_have_the_values_that_each_has_alone(said: list[str], old: bool) -> None:
    hosts = [line for line in said if line.startswith("Host")][:1] or ([] if old else ["Host: a"])
    lines = [line for line in said if not line.startswith("Host")] + hosts
    head = request(b"GET / HTTP/1.0" if old else b"GET / HTTP/1.1", *(line.encode() for line in lines))
    names = (b"x-role", b"host", b"cookie", b"x", b"x-roles", b"connection", *(b"x-%d" % number for number in range(9)))
    assert head.values(names) == tuple(head.values((name,))[0] for name in names)


def test_a_connection_field_of_many_options_is_refused_before_any_is_looked_for() -> None:
    assert request(b"GET / HTTP/1.1", b"Host: a", b"Connection: " + b",".join(b"x%d" % n for n in range(64))).keep
    with pytest.raises(HeadError, match="more than 64 options"):
        request(b"GET / HTTP/1.1", b"Host: a", b"Connection: " + b"a," * 40, b"Connection: " + b"," * 40)


@pytest.mark.parametrize("protocol", [b"h2c", b"H2C-14", b"websocket, h2", b"HTTP/2.0", b"websocket,\tTLS/1.3"])
def test_a_protocol_that_would_carry_requests_past_decisions_is_not_passed_on(protocol: bytes) -> None:
    head = request(b"GET / HTTP/1.1", b"Host: a", b"Connection: upgrade", b"Upgrade: " + protocol)
    assert (head.upgrades, b"pgrade" in head.wire) == (False, False)


def test_values_does_not_see_fields_that_end_at_this_hop() -> None:
    head = request(b"GET / HTTP/1.1", b"Host: a", b"Connection: x-role", b"X-Role: admin")
    assert head.values((b"x-role",)) == (None,)
    assert b"admin" not in head.wire


def test_grpc_is_known_by_its_content_type() -> None:
    assert request(b"POST / HTTP/1.1", b"Host: a", b"Content-Type: application/grpc+proto").grpc
    assert not request(b"POST / HTTP/1.1", b"Host: a", b"Content-Type: application/json").grpc


HOPS = [
    # fields as received, fields as sent on, keep
    ([b"Connection: keep-alive"], [b"Connection: keep-alive"], True),
    ([b"Connection: close"], [], False),
    ([b"Connection: Close, X-A", b"X-a: 1", b"X-B: 2"], [b"X-B: 2"], False),
    ([b"Connection: keep-alive, X-A", b"Connection: x-b", b"X-a: 1", b"X-B: 2"], [], True),
    ([b"Keep-Alive: timeout=5", b"X: y", b"Proxy-Connection: keep-alive"], [b"X: y"], True),
    ([b"TE: gzip"], [], True),
    ([b"TE: trailers", b"Connection: te"], [b"TE: trailers"], True),
    ([b"TE: gzip, trailers"], [b"te: trailers"], True),
    ([b"Connection: Upgrade", b"Upgrade: websocket"], [b"Connection: Upgrade", b"Upgrade: websocket"], True),
    ([b"Connection: keep-alive, Upgrade", b"Upgrade: websocket"], [b"Upgrade: websocket", b"connection: upgrade"], True),
    ([b"Upgrade: websocket"], [], True),
    ([b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AA"], [], True),
    ([b"Connection: Upgrade", b"Upgrade: websocket, h2c"], [], True),
    ([b"Connection: Upgrade", b"Upgrade: TLS/1.0"], [], True),
]


@pytest.mark.parametrize(("received", "sent", "keep"), HOPS)
def test_hop_by_hop_fields_are_cut_or_translated(received: list[bytes], sent: list[bytes], keep: bool) -> None:
    head = request(b"GET / HTTP/1.1", b"Host: a", *received)
    assert head.wire == b"\r\n".join([b"GET / HTTP/1.1", b"Host: a", *sent, b"", b""])
    assert head.keep is keep
    assert head.upgrades == any(b"websocket" in line for line in sent)


def test_http10_is_kept_alive_by_its_field_only_and_knows_no_upgrade_or_expectation() -> None:
    assert not request(b"GET / HTTP/1.0").keep
    assert request(b"GET / HTTP/1.0", b"Connection: keep-alive").keep
    assert not request(b"GET / HTTP/1.0", b"Connection: upgrade", b"Upgrade: websocket").upgrades
    assert not request(b"POST / HTTP/1.0", b"Content-Length: 1", b"Expect: 100-continue").expects
    assert request(b"POST / HTTP/1.1", b"Host: a", b"Content-Length: 1", b"Expect: 100-Continue").expects


def test_the_host_is_a_value_wherever_it_is_said() -> None:
    for wire in (b"GET http://a.test/ HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"):
        head = request_untrusted(wire, Http1Limits())
        assert head is not None and head.values((b"host", b"x")) == (b"a.test", None)
    head = request_untrusted(b"GET / HTTP/1.0\r\n\r\n", Http1Limits())
    assert head is not None and head.values((b"host",)) == (None,)


DECIDING = ["Content-Length: 0", "Content-Type: application/grpc", "Connection: close", "Expect: x", "Keep-Alive: 5", "TE: trailers"]
DECIDING += [
    "Proxy-Connection: close",
    "Upgrade: x",
    "Host: a",
    "Transfer-Encoding: chunked",
    "Pillion-Client-Id: x",
    "pillion_client_id: x",
]


@pytest.mark.parametrize("field", DECIDING)
@pytest.mark.parametrize("spelled", [str, str.lower, str.upper, str.swapcase])
def test_no_field_that_decides_something_or_is_named_like_ours_looks_ordinary(field: str, spelled: Callable[[str], str]) -> None:
    name, value = field.split(":")
    line = f"{spelled(name)}:{value}".encode()
    for lines in ([line], [line, b"X: y"], [b"X: y", b"Traceparent: 00-1", line, b"X: y"]):
        try:
            assert not request(b"GET / HTTP/1.1", b"Host: a", *lines).ordinary
        except HeadError:
            assert field.startswith("Host")


def test_fields_of_everyday_requests_look_ordinary() -> None:
    names = b"user-agent accept accept-encoding cookie cache-control pragma referer priority traceparent tracestate authorization x-tenant"
    lines = [spelled + b": x" for name in names.split() for spelled in (name, name.title(), name.upper())]
    assert request(b"GET / HTTP/1.1", b"Host: a", *lines).ordinary


def test_edits_strip_every_spelling_and_add_before_the_end() -> None:
    edit = editor(HeadEdit((b"pillion-client-id",), ((b"pillion-client-id", b"spiffe://x"),)))
    head = request(b"GET / HTTP/1.1", b"Pillion-Client-Id: evil", b"Host: a", b"PILLION_client-ID: evil", b"X: pillion-client-id: y")
    want = b"GET / HTTP/1.1\r\nHost: a\r\nX: pillion-client-id: y\r\npillion-client-id: spiffe://x\r\n\r\n"
    assert edit(head) == want
    with pytest.raises(ValueError):
        editor(HeadEdit((), ((b"x", b"a\r\nb: c"),)))


@pytest.mark.parametrize(
    ("lines", "length", "keep", "plain"),
    [
        ([b"HTTP/1.1 200 OK", b"Content-Length: 5"], 5, True, True),
        ([b"HTTP/1.1 200", b"content-length:5 ", b"connection: Keep-Alive"], 5, True, True),
        ([b"HTTP/1.1 200 OK", b"Content-Length: 5", b"Connection: close"], 5, False, False),
        ([b"HTTP/1.1 200 OK", b"Content-Length: 5", b"Keep-Alive: timeout=5"], 5, True, False),
        ([b"HTTP/1.1 200 OK", b"Transfer-Encoding: Chunked"], CHUNKED, True, False),
        ([b"HTTP/1.1 200 OK"], UNTIL_CLOSE, True, False),
        ([b"HTTP/1.0 200 OK", b"Content-Length: 5"], 5, False, False),
        ([b"HTTP/1.0 200 OK", b"Content-Length: 5", b"Connection: keep-alive"], 5, True, False),
        ([b"HTTP/1.1 304 Not Modified", b"Content-Length: 5"], 5, True, False),
    ],
)
def test_response_framing(lines: list[bytes], length: int, keep: bool, plain: bool) -> None:
    head = response(*lines)
    assert (head.length, head.keep, head.plain) == (length, keep, plain)


# Properties.

TOKENS = st.text("abcXYZ019-_!~", min_size=1, max_size=6).map(str.encode)
VALUES = st.binary(max_size=8)
NAMES = st.sampled_from([b"Content-Length", b"transfer-encoding", b"Host", b"Connection", b"Expect", b"Upgrade", b"X-A", b"TE"])
USUAL = st.sampled_from([b"5", b"chunked", b"a.test", b"close", b"keep-alive", b"x-a", b"100-continue", b"websocket", b"", b"0"])
LINES = st.builds(
    lambda name, gap, value, end: name + gap + value + end,
    NAMES | TOKENS,
    st.sampled_from([b": ", b":", b":\t", b" :", b""]) | st.just(b": "),
    USUAL | VALUES,
    st.sampled_from([b"\r\n"] * 8 + [b"\n", b"\r"]),
)
HEADS = st.builds(
    lambda method, target, version, lines: method + b" " + target + b" HTTP/" + version + b"\r\n" + b"".join(lines) + b"\r\n",
    st.sampled_from([b"GET", b"POST", b"HEAD", b"CONNECT", b"OPTIONS"]) | TOKENS,
    st.sampled_from([b"/", b"/a?b", b"http://a.test/x", b"a.test:5", b"*"]) | st.binary(max_size=4),
    st.sampled_from([b"1.1"] * 6 + [b"1.0", b"2.0"]),
    st.lists(st.just(b"Host: a.test\r\n"), max_size=1).flatmap(lambda host: st.lists(LINES, max_size=5).map(lambda rest: host + rest)),
)


@given(st.binary(max_size=200) | HEADS)
def test_any_bytes_are_a_head_or_the_declared_error(data: bytes) -> None:
    for read in (lambda: request_untrusted(data, LIMITS), lambda: response_untrusted(data, 65536)):
        try:
            read()
        except HeadError as error:
            assert error.cause in (Cause.BAD_REQUEST, Cause.HEAD_TOO_LARGE, Cause.TARGET_TOO_LONG)


class Seen:
    """What httptools reads."""

    def __init__(self, data: bytes) -> None:
        self.url = b""
        self.fields: list[tuple[bytes, bytes]] = []
        self.parser: Any = httptools.HttpRequestParser(self)
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value))


def _lines(wire: bytes) -> list[tuple[bytes, bytes]]:
    split = (line.split(b":", 1) for line in wire.split(b"\r\n")[1:-2])
    return [(name.lower(), value.strip(b" \t")) for name, value in split]


@given(HEADS)
@example(b"GET /a HTTP/1.1\r\nHost: a.test\r\nX-A: 1\r\n\r\n")
@example(b"POST /a HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\n")
@example(b"POST /a HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n")
def test_what_is_accepted_others_read_the_same_way(data: bytes) -> None:
    try:
        head = request_untrusted(data, LIMITS)
    except HeadError:
        return
    assert head is not None and head.size == len(data)
    if head.method not in (b"CONNECT",) and head.wire.split(b" ")[0] in (b"GET", b"POST", b"HEAD", b"OPTIONS"):
        try:
            seen = Seen(head.wire)
        except httptools.HttpParserUpgrade:
            return
        assert seen.url == head.wire.split(b" ")[1]
        assert seen.fields == _lines(head.wire)
    peer = h11.Connection(h11.SERVER)
    peer.receive_data(head.wire)
    event = peer.next_event()
    assert isinstance(event, h11.Request)
    assert event.method == head.method
    assert event.target == head.wire.split(b" ")[1]
    assert [(bytes(name), bytes(value)) for name, value in event.headers] == [
        (name, value.lower() if name == b"transfer-encoding" else value) for name, value in _lines(head.wire)
    ]
    after = peer.next_event()
    assert isinstance(after, h11.EndOfMessage) == head.bodiless


def sent(edit: HeadEdit, *lines: bytes) -> bytes:
    return editor(edit)(request(*lines))


def test_a_rewritten_head_differs_in_its_target_and_host_only():
    edit = HeadEdit(host=b"inner", retarget=lambda target: b"/new" + target)
    lines = (b"GET /a?b HTTP/1.1", b"X-One: 1", b"hOsT: outer:80", b"x-two:2")
    assert sent(edit, *lines) == b"GET /new/a?b HTTP/1.1\r\nhost: inner\r\nX-One: 1\r\nx-two:2\r\n\r\n"
    assert sent(edit._replace(host=b""), *lines) == b"GET /new/a?b HTTP/1.1\r\nX-One: 1\r\nhOsT: outer:80\r\nx-two:2\r\n\r\n"
    assert sent(edit._replace(retarget=None), *lines) == b"GET /a?b HTTP/1.1\r\nhost: inner\r\nX-One: 1\r\nx-two:2\r\n\r\n"


def test_a_rewrite_goes_with_other_changes():
    edit = HeadEdit((b"x-gone",), ((b"x-new", b"1"),), b"inner", lambda _: b"/new")
    assert sent(edit, b"GET / HTTP/1.1", b"Host: a", b"X-Gone: 1") == b"GET /new HTTP/1.1\r\nhost: inner\r\nx-new: 1\r\n\r\n"


def test_an_absolute_target_is_rewritten_into_a_path_and_none_is_left_alone():
    edit = HeadEdit(host=b"inner", retarget=lambda target: b"/new" + target)
    assert sent(edit, b"GET http://a/b?c HTTP/1.1", b"Host: a").startswith(b"GET /new/b?c HTTP/1.1\r\nhost: inner\r\n")
    assert sent(HeadEdit(host=b"inner"), b"GET http://a/b HTTP/1.1", b"Host: a").startswith(b"GET /b HTTP/1.1\r\nhost: inner\r\n")
    assert sent(edit, b"OPTIONS * HTTP/1.1", b"Host: a").startswith(b"OPTIONS * HTTP/1.1\r\nhost: inner\r\n")
    assert sent(edit, b"CONNECT a:1 HTTP/1.1", b"Host: a:1") == b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n"
    assert sent(edit, b"GET /b HTTP/1.0") == b"GET /new/b HTTP/1.0\r\nhost: inner\r\n\r\n"


def test_an_edited_answer_differs_in_these_fields_only():
    wire = b"HTTP/1.1 200 OK\r\nServer: x\r\nX-Set: 1\r\nx-set: 2\r\nX-Settled: 3\r\n\r\n"
    edit = ResponseRule((b"server", b"x-set"), ((b"x-set", b"new"), (b"x-set", b"too")))
    assert response_editor(edit)(wire) == b"HTTP/1.1 200 OK\r\nX-Settled: 3\r\nx-set: new\r\nx-set: too\r\n\r\n"
    assert response_editor(ResponseRule((), ((b"a", b"b"),)))(wire) == wire[:-2] + b"a: b\r\n\r\n"
    assert response_editor(ResponseRule((b"absent",)))(wire) == wire
