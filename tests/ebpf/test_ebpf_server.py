"""The agent's loop: requests on its socket, the admin port, bounds of both."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ebpf.server
from ebpf import client
from ebpf.server import BadRequest, Delayed, HttpRequest, Server, parse_http_untrusted
from ebpf.wire import BadMessage, PodFacts, Register, Status, Steer


class Application:
    """Answers with what it was asked."""

    def __init__(self) -> None:
        self.ready = False
        self.inodes: list[int] = []

    def asked(self, request, fds):
        self.inodes += [os.fstat(fd).st_ino for fd in fds]
        if isinstance(request, Steer):
            seconds = 0.2 if request.id == "late" else 30
            return Delayed(lambda: {"ok": True} if self.ready else None, seconds, {"ok": False, "error": "late"})
        if isinstance(request, Status):
            raise BadMessage("not today")
        return {"ok": True, "pod": request.pod.name, "text": "x" * 300_000}

    def got(self, request: HttpRequest):
        return 200, "text/plain", f"{request.method} {request.path} " + "y" * 200_000

    def tick(self) -> float:
        return 0.05


@pytest.fixture
def served(tmp_path: Path):
    application = Application()
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "agent.sock"))
    unix.listen()
    admin = socket.create_server(("127.0.0.1", 0))
    server = Server(application, [(unix, False), (admin, True)])
    thread = threading.Thread(target=server.run)
    thread.start()
    yield application, tmp_path / "agent.sock", admin.getsockname()
    server.stop()
    thread.join(30)
    assert not thread.is_alive()
    server.close()
    unix.close()
    admin.close()


def get(address, data: bytes) -> bytes:
    with socket.create_connection(address, timeout=30) as sock:
        sock.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := sock.recv(65536):
                answer += chunk
        return answer


def test_a_request_with_a_descriptor_is_answered_whole_and_the_descriptor_is_closed(served):
    application, path, _ = served
    before = len(os.listdir("/proc/self/fd"))
    with open("/proc/self/ns/net", "rb") as netns:
        for _ in range(5):
            answer = client.ask(path, Register(PodFacts("a", "b", "c")), (netns.fileno(),))
            assert answer["pod"] == "c" and len(answer["text"]) == 300_000
        assert application.inodes == [os.fstat(netns.fileno()).st_ino] * 5
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_several_requests_on_one_connection_are_answered_in_order(served):
    _, path, _ = served
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b'{"op":"nonsense"}\n{"op":"status"}\nno json\n')
        file = sock.makefile("rb")
        assert b"expected register" in file.readline()
        assert b"not today" in file.readline()
        assert b"no JSON" in file.readline()


def test_an_answer_may_wait_for_its_condition_and_not_for_ever(served):
    application, path, _ = served
    threading.Timer(0.1, lambda: setattr(application, "ready", True)).start()
    assert client.ask(path, Steer("soon")) == {"ok": True}
    application.ready = False
    assert client.ask(path, Steer("late")) == {"ok": False, "error": "late"}


def test_a_line_without_end_is_cut_off(served):
    _, path, _ = served
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.settimeout(30)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            sock.sendall(b"x" * 64_000_000)


def test_the_admin_port_answers_and_closes(served):
    _, _, address = served
    answer = get(address, b"GET /metrics?x=1 HTTP/1.1\r\nhost: x\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and body.startswith(b"GET /metrics y") and len(body) > 200_000
    assert get(address, b"\x16\x03\x01\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert get(address, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 3000).startswith((b"HTTP/1.1 431 ", b""))


def test_who_holds_too_many_admin_connections_loses_the_oldest_and_keeps_nobody_from_the_socket(served):
    _, path, address = served
    held = [socket.create_connection(address, timeout=30) for _ in range(64)]
    assert get(address, b"GET /live HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert held[0].recv(1) == b""
    held[-1].sendall(b"GET /live HTTP/1.1\r\n\r\n")
    assert held[-1].recv(20).startswith(b"HTTP/1.1 200")
    assert client.ask(path, Register(PodFacts("a", "b", "c")))["ok"]
    for sock in held:
        sock.close()


def test_who_is_turned_away_and_has_left_already_ends_nothing(served, monkeypatch: pytest.MonkeyPatch):
    _, path, _ = served
    left, trusts = threading.Event(), [False, True]
    monkeypatch.setattr(ebpf.server, "trusted", lambda _: left.wait(30) and trusts.pop(0))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
    left.set()
    assert client.ask(path, Register(PodFacts("a", "b", "c")))["ok"]
    assert trusts == []


def test_nobody_at_the_socket_is_said_so(tmp_path: Path):
    with pytest.raises(client.NoAgent, match="no agent answers at"):
        client.ask(tmp_path / "nowhere.sock", Status())


@given(st.binary(max_size=200))
def test_any_bytes_give_a_request_nothing_yet_or_the_one_error(data):
    try:
        found = parse_http_untrusted(data)
    except BadRequest as error:
        assert str(error)[:3].isdigit()
        return
    assert found is None or found.path.startswith("/")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"GET / HTTP/1.1\r\n", None),
        (b"GET /a?b=c HTTP/1.0\r\n\r\n", HttpRequest("GET", "/a")),
        (b"POST /x HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc", HttpRequest("POST", "/x")),
    ],
)
def test_requests_are_read(data, found):
    assert parse_http_untrusted(data) == found


@pytest.mark.parametrize("data", [b"GET http://x/ HTTP/1.1\r\n\r\n", b"GET  / HTTP/1.1\r\n\r\n", b"GET / HTTP/2\r\n\r\n", b"a" * 9000])
def test_what_is_no_request_is_refused(data):
    with pytest.raises(BadRequest):
        parse_http_untrusted(data)
