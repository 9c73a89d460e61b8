"""HTTP/1.1 exchanges between one client and its upstreams: keep-alive, pipelining, bodies, endings."""

from __future__ import annotations

from proxy.rescue import Cause
from tests.proxy.http1_fakes import HEAD, OK, Pair


def test_a_get_and_its_response_pass_untouched_in_one_write_each() -> None:
    pair = Pair()
    for turn in range(1, 4):
        pair.client.received(HEAD)
        assert pair.up.take() == HEAD
        pair.upstream.received(OK)
        assert pair.down.take() == OK
        assert pair.gate.log[-1] == ("finished", turn, 200, None)
        assert pair.idle == [pair.upstream] * turn
    assert pair.up.writes == pair.down.writes == 3
    assert not pair.gone and pair.upstream.reusable


def test_an_answer_of_the_gate_keeps_the_connection_when_its_effect_does() -> None:
    pair = Pair()
    pair.answer_with(Cause.DENIED, explain=True)
    pair.client.received(HEAD + HEAD)
    one = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\npillion-proxy-error: denied\r\n\r\n"
    assert pair.down.take() == one * 2
    assert pair.gate.log == [("finished", "answered", 403, Cause.DENIED)] * 2
    assert pair.down.fate == "" and pair.up.out == b""
