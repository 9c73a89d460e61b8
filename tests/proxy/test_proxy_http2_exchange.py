"""Requests through the HTTP/2 engine, with the h2 package as client and as server."""

from __future__ import annotations

import h2.events
import pytest

from core.spelling import Spellings
from proxy.protocol.http1 import Http1Limits
from proxy.protocol.http1.parse import request_untrusted
from proxy.protocol.requests import Forward, HeadEdit
from tests.proxy.http2_fakes import GRPC, OK, Chain


@pytest.mark.parametrize("chunk", [0, 1, 7])
def test_a_unary_call_passes_with_trailers_whole_or_split(chunk: int) -> None:
    chain = Chain(chunk=chunk)
    stream = chain.ask(GRPC, b"ping")
    assert chain.server.headers(1, h2.events.RequestReceived) == dict(GRPC)
    assert chain.server.body(1) == b"ping"
    assert chain.server.of(h2.events.StreamEnded, 1)
    chain.server.h2.send_headers(1, OK)
    chain.server.h2.send_data(1, b"pong")
    chain.server.h2.send_headers(1, [("grpc-status", "0")], end_stream=True)
    chain.run()
    assert chain.client.headers(stream, h2.events.ResponseReceived) == dict(OK)
    assert chain.client.body(stream) == b"pong"
    assert chain.client.headers(stream, h2.events.TrailersReceived) == {"grpc-status": "0"}
    assert chain.client.of(h2.events.StreamEnded, stream)
    assert chain.gate.log == [("finished", stream, 200, None)]
    assert chain.far.streams == 0
    assert chain.idle == [chain.far]
    assert not chain.near.streams_by_id


def test_the_gate_sees_what_decisions_need() -> None:
    chain = Chain()
    chain.ask([(":method", "GET"), (":scheme", "http"), (":path", "/p?q=1"), (":authority", "a.test"), ("x-a", "1"), ("x-a", "2")])
    [head] = chain.gate.seen
    assert (head.method, head.target, head.authority, head.grpc, head.bodiless) == (b"GET", b"/p?q=1", b"a.test", False, True)
    assert head.values((b"x-b", b"user-agent", b":path")) == (None, None, b"/p?q=1")


def test_several_fields_of_a_name_are_all_given_to_decisions() -> None:
    chain = Chain()
    fields = [("x-role", "user"), ("cookie", "a=1"), ("x-role", "admin"), ("cookie", "b=2"), ("x-b", "3")]
    chain.ask([(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a.test"), *fields])
    [head] = chain.gate.seen
    assert head.values((b"x-role", b"cookie", b"x-b", b"x-c")) == (b"user\nadmin", b"a=1; b=2", b"3", None)
    assert head.values((b"x-b",)) == (b"3",)


def test_names_that_decided_do_not_pass_in_trailers_however_they_are_spelled() -> None:
    chain = Chain()
    chain.gate.edit = HeadEdit((b"pillion-client-id",), (), trailers=(b"x-role",))
    stream = chain.ask([*GRPC, ("x-role", "user")], b"x", end=False)
    assert ("x-role", "user") in chain.server.of(h2.events.RequestReceived, 1)[0].headers
    chain.client.h2.send_headers(stream, [("x_role", "admin"), ("x-role", "admin"), ("x-sum", "2")], end_stream=True)
    chain.run()
    assert chain.server.headers(1, h2.events.TrailersReceived) == {"x-sum": "2"}


def test_trailers_that_came_before_the_verdict_are_stripped_by_it() -> None:
    chain = Chain()
    chain.gate.decide = lambda _head, _token: None
    for trailers, expected in (
        ([("pillion_client-id", "forged"), ("x-role", "admin"), ("x-sum", "2")], {"x-sum": "2"}),
        ([("x-role", "a")], None),
    ):
        stream = chain.ask(GRPC, b"x", end=False)
        chain.client.h2.send_headers(stream, trailers, end_stream=True)
        chain.run()
        assert not chain.server.of(h2.events.RequestReceived, stream)
        edit = HeadEdit((b"pillion-client-id",), (), trailers=(b"x-role",))
        chain.near.proceed(stream, Forward(chain.far, edit, "late"))
        chain.run()
        assert chain.server.body(stream) == b"x" and chain.server.of(h2.events.StreamEnded, stream)
        assert [dict(event.headers) for event in chain.server.of(h2.events.TrailersReceived, stream)] == ([expected] if expected else [])


@pytest.mark.parametrize("name", ["x-user", "x_user", "x-us_er", "x-users"])
def test_both_engines_find_other_spellings_of_a_name(name: str) -> None:
    names = Spellings((b"x-user",))
    chain = Chain()
    chain.ask([(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a.test"), (name, "1")])
    [head] = chain.gate.seen
    other = request_untrusted(f"GET / HTTP/1.1\r\nHost: a.test\r\n{name.title()}: 1\r\n\r\n".encode(), Http1Limits())
    assert other is not None
    assert head.respelled(names) == head.respelled(names) == other.respelled(names) == (name == "x_user")
    assert not head.respelled(Spellings((b"x-other",)))


@pytest.mark.parametrize("spelling", [b"x-user", b"x_user"])
def test_a_field_is_stripped_however_a_rule_and_the_client_spell_it(spelling: bytes) -> None:
    chain = Chain()
    chain.gate.edit = HeadEdit((spelling,), ((spelling, b"set"),))
    stream = chain.ask([*GRPC, ("x-user", "forged"), ("x_user", "also")], b"x", end=False)
    got = chain.server.of(h2.events.RequestReceived, 1)[0].headers
    assert [(n, v) for n, v in got if "user" in n] == [(spelling.decode(), "set")]
    chain.client.h2.send_headers(stream, [("x_user", "forged"), ("x-user", "also"), ("x-sum", "2")], end_stream=True)
    chain.run()
    assert chain.server.headers(1, h2.events.TrailersReceived) == {"x-sum": "2"}


def test_fields_are_stripped_and_added() -> None:
    chain = Chain()
    chain.gate.edit = HeadEdit((b"pillion-client-id",), ((b"pillion-client-id", b"spiffe://a/ns/b/sa/c"),))
    stream = chain.ask([*GRPC, ("pillion-client-id", "forged"), ("pillion_client-id", "also"), ("x-last", "1")], b"x", end=False)
    got = chain.server.of(h2.events.RequestReceived, 1)[0].headers
    assert [v for n, v in got if "client" in n] == ["spiffe://a/ns/b/sa/c"]
    assert ("x-last", "1") in got
    chain.client.h2.send_headers(stream, [("pillion-client-id", "forged"), ("x-sum", "2")], end_stream=True)
    chain.run()
    assert chain.server.headers(1, h2.events.TrailersReceived) == {"x-sum": "2"}
