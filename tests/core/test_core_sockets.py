"""Sockets before the relay has them: connecting, and what accepted connections inherit."""

from __future__ import annotations

import errno
import socket

import pytest
import trio

from core.addrs import Addr
from core.runtime.sockets import Connecting, tune, tune_within_pod
from tests.ports import unused_port


def option(sock: socket.socket, name: int) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, name)


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


async def test_a_connection_within_the_machine_is_made_without_waiting(listener):
    connecting = Connecting(Addr(*listener.getsockname()))
    assert connecting.done
    stream = connecting.stream()
    accepted, _ = listener.accept()
    with accepted:
        await stream.send_all(b"hello")
        assert accepted.recv(5) == b"hello"
    stream.close()


async def test_nobody_listening_is_an_error_at_once_that_leaves_no_socket_open():
    with pytest.raises(OSError) as refused:
        Connecting(Addr("127.0.0.1", unused_port()))
    assert refused.value.errno == errno.ECONNREFUSED


async def test_a_connection_that_is_not_answered_at_once_can_be_waited_for_and_given_up():
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        addr = Addr(*full.getsockname())
        queued = [Connecting(addr)]  # the queue of accepted connections holds one; then the kernel ignores new ones
        while queued[-1].done and len(queued) < 16:
            queued.append(Connecting(addr))
        assert not queued[-1].done
        with trio.move_on_after(0) as scope:
            await queued[-1].wait()
        assert scope.cancelled_caught
        assert queued[-1].sock.fileno() == -1
        for connecting in queued[:-1]:
            connecting.sock.close()


async def test_an_accepted_connection_has_the_listeners_options(listener):
    tune(listener)
    with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
        assert option(accepted, socket.TCP_NODELAY) == 1
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert (option(accepted, socket.TCP_KEEPIDLE), option(accepted, socket.TCP_KEEPINTVL), option(accepted, socket.TCP_KEEPCNT)) == (
            10,
            10,
            3,
        )
        assert option(accepted, socket.TCP_USER_TIMEOUT) == 30_000


async def test_a_connection_within_the_pod_is_not_paced_whatever_the_node_uses(listener):
    tune_within_pod(listener)
    with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
