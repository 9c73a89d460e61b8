"""Random scripts of well-formed frames, verdicts, stalls, timers and losses: the books stay balanced and the wire stays legal."""

from __future__ import annotations

import random
import struct

import pytest

from proxy.protocol.http2 import Http2Limits
from proxy.protocol.http2.connection import Connection
from proxy.protocol.http2.hpack_codec import encode
from proxy.protocol.requests import Answer, Forward, HeadEdit, ResponseRule, Verdict
from proxy.rescue import Cause, http2_answer
from tests.proxy.http2_fakes import DATA, GOAWAY, HEADERS, RST_STREAM, SETTINGS, WINDOW_UPDATE, Chain, FakeSink, frame, split


def fields(**pseudo: str) -> bytes:
    return encode([(name.replace("_", ":").encode(), value.encode(), False) for name, value in pseudo.items()])


GET = fields(_method="GET", _scheme="http", _path="/", _authority="a")
POST = fields(_method="POST", _scheme="http", _path="/", _authority="a")
TUNNEL = fields(_method="CONNECT", _authority="a:1")
UNREACHED = encode([(name, value, False) for name, value in http2_answer(Cause.CONNECT_REFUSED, grpc=False, explain=True)])
OK, BUSY, EARLY, TRAILERS = fields(_status="200"), fields(_status="503"), fields(_status="103"), fields(x="0")


class Wire:
    """What a peer would object to in the frames it is sent: DATA beyond its windows, frames after the end of a stream."""

    def __init__(self, sink: FakeSink) -> None:
        self.sink = sink
        self.initial = 65535
        self.granted: dict[int, int] = {0: 65535}
        self.ended: set[int] = set()
        self.reset: set[int] = set()

    def grant(self, stream: int, size: int) -> None:
        self.granted[stream] = self.granted.get(stream, 0) + size

    def check(self) -> None:
        for kind, flags, stream, payload in split(self.sink.take()):
            if kind in (DATA, HEADERS, RST_STREAM, WINDOW_UPDATE) and stream:
                assert stream not in self.reset, "a frame after RST_STREAM"
            if kind in (DATA, HEADERS):
                assert stream not in self.ended, "a frame after END_STREAM"
                if flags & 1:
                    self.ended.add(stream)
            if kind == DATA:
                self.grant(0, -len(payload))
                self.grant(stream, -len(payload))
                assert self.granted[0] >= 0
                assert not payload or self.granted[stream] + self.initial >= 0
            elif kind == RST_STREAM:
                self.reset.add(stream)


class Script:
    """One random history."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        choice = self.pick.choice
        self.chain = chain = Chain(
            Http2Limits(
                max_streams=5, connection_window=65535 + choice((0, 1000)), held_bytes=choice((0, 30000, 1 << 20)), backlog_bytes=500,
                stall_timeout_s=10, reset_budget=50, replay_bytes=choice((0, 200, 1 << 20)),
            )
        )  # fmt: skip
        if choice((True, False)):
            chain.add_server(meshed=True)
            chain.run()
        if choice((True, False)):
            chain.gate.edit = HeadEdit(response=ResponseRule(retry_on=frozenset((503,))))
            chain.gate.rule_retries = choice((1, 1000))
        chain.gate.decide = chain.gate.again = lambda _head, token: self.verdict(token)
        self.next_id = 1
        self.ends: list[tuple[Connection, FakeSink, Wire]] = [(chain.near, chain.client_sink, Wire(chain.client_sink))]
        self.ends += [(upstream, sink, Wire(sink)) for _, sink, upstream in chain.servers]
        for conn, sink, wire in self.ends:
            sink.take()
            if choice((True, False)):
                wire.initial = choice((0, 10, 5000, 100_000))
                conn.received(frame(SETTINGS, 0, 0, struct.pack(">HIHI", 4, wire.initial, 3, choice((0, 1, 2, 100)))))
        self.steps = (self.request, self.request, self.client_frame, self.client_frame, self.server_frame, self.server_frame,
                      self.server_frame, self.stall, self.proceed, self.proceed, self.tick, self.loss, self.drain, self.late,
                      self.review)  # fmt: skip

    def verdict(self, token: int) -> Verdict | None:
        forward = Forward(self.pick.choice(self.chain.gate.upstreams), self.chain.gate.edit, token)
        return self.pick.choice((None, Answer(Cause.DENIED, True, token), forward, forward))

    def window_update(self, wire: Wire, stream: int) -> bytes:
        stream, size = self.pick.choice((0, stream)), self.pick.choice((1, 5000, 65535))
        wire.grant(stream, size)
        return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", size))

    def request(self) -> None:
        if not self.chain.client_sink.fate:
            self.chain.near.received(frame(HEADERS, 4 | self.pick.randrange(2), self.next_id, self.pick.choice((GET, POST, TUNNEL))))
            self.next_id += 2

    def client_frame(self) -> None:
        if self.chain.client_sink.fate or self.next_id == 1:
            return
        stream = self.pick.randrange(1, self.next_id, 2)
        make = self.pick.choice(
            (
                lambda: frame(DATA, self.pick.choice((0, 0, 1)), stream, b"x" * self.pick.choice((1, 100, 16000))),
                lambda: frame(HEADERS, 5, stream, TRAILERS) if stream in self.chain.near.streams_by_id else frame(0xEE, 0, 0),
                lambda: frame(RST_STREAM, 0, stream, struct.pack(">I", self.pick.randrange(14))),
                lambda: self.window_update(self.ends[0][2], stream),
            )
        )
        data = make()
        if data[3] == RST_STREAM:
            self.ends[0][2].reset.discard(stream)
        self.chain.near.received(data)

    def server_frame(self) -> None:
        conn, sink, wire = self.pick.choice(self.ends[1:])
        if sink.fate or not conn.streams_by_id:
            return
        stream = self.pick.choice(list(conn.streams_by_id))
        makes = [
            lambda flags=flags, block=block: frame(HEADERS, flags, stream, block)
            for flags, block in ((4, OK), (5, OK), (5, TRAILERS), (4, EARLY), (4, BUSY), (5, BUSY), (5, UNREACHED))
        ]
        makes += [lambda fin=fin, size=size: frame(DATA, fin, stream, b"y" * size) for fin, size in ((0, 1), (0, 500), (0, 16000), (1, 1))]
        makes.append(lambda: frame(RST_STREAM, 0, stream, struct.pack(">I", self.pick.choice((0, 7, 8)))))
        makes += [lambda: self.window_update(wire, stream)] * 2
        if self.pick.random() < 0.03:
            makes = [lambda: frame(GOAWAY, 0, 0, struct.pack(">II", self.pick.choice((0, stream)), 0))]
        conn.received(self.pick.choice(makes)())

    def stall(self) -> None:
        conn, sink, _ = self.pick.choice(self.ends)
        sink.blocked = not sink.blocked
        if not sink.blocked and not sink.fate:
            conn.drained()

    def proceed(self) -> None:
        verdict = self.verdict(1)
        if self.next_id > 1 and verdict is not None and not self.chain.client_sink.fate:
            self.chain.near.proceed(self.pick.randrange(1, self.next_id, 2), verdict)

    def late(self) -> None:
        if self.next_id > 1 and not self.chain.client_sink.fate:
            self.chain.near.expire(self.pick.randrange(1, self.next_id, 2), Cause.ROUTE_TIMEOUT)

    def review(self) -> None:
        self.chain.gate.no_tunnel = self.pick.choice((None, Cause.TERMINATED))
        if not self.chain.client_sink.fate:
            self.chain.near.review()

    def tick(self) -> None:
        for conn, sink, _ in self.ends:
            if not sink.fate and self.pick.random() < 0.3:
                conn.expired()

    def loss(self) -> None:
        conn, sink, _ = self.pick.choice(self.ends[1:])
        if not sink.fate and self.pick.random() < 0.1:
            self.pick.choice((lambda: conn.lost(True), conn.ended, self.chain.far.drain))()

    def drain(self) -> None:
        if not self.chain.client_sink.fate and self.pick.random() < 0.1:
            self.chain.near.drain()

    def check(self) -> None:
        near, upstreams = self.chain.near, self.chain.gate.upstreams
        for conn, _, wire in self.ends:
            wire.check()
            for end in conn.streams_by_id.values():
                assert not end.over
                assert end.conn is conn
                assert end.held_bytes == sum(map(len, end.held or ()))
            assert set(conn.holding) <= set(conn.streams_by_id.values())
        waiting = sum(end.other.held_bytes for end in near.streams_by_id.values())
        left = sum(end.held_bytes for up in upstreams for end in up.streams_by_id.values() if end.other.over)
        assert near.held_from == waiting + left
        for up in upstreams:
            assert up.held_from == sum(end.other.held_bytes for end in up.streams_by_id.values()) + sum(
                end.held_bytes for end in near.streams_by_id.values() if end.other.over and end.other.conn is up
            )


@pytest.mark.parametrize("seed", range(0, 400, 50))
def test_random_histories_keep_the_books_and_the_wire(seed: int) -> None:
    for number in range(seed, seed + 50):
        script = Script(number)
        for _ in range(script.pick.randint(1, 60)):
            script.pick.choice(script.steps)()
            script.check()
        for conn, sink, _ in script.ends:
            if not sink.fate:
                conn.lost(False)
        assert script.chain.near.held_from == 0
        for conn, _, _ in script.ends:
            assert not conn.streams_by_id
            assert not conn.holding
        assert all(up.streams == up.held_from == 0 for up in script.chain.gate.upstreams)
        told = script.chain.gate.told("finished") + script.chain.gate.told("cancelled")
        assert len(told) == len(script.chain.gate.seen)
