"""Which connections are open: counted until they are gone, also when they are gone before they are counted."""

from __future__ import annotations

import socket

import trio

from proxy.live import Live
from proxy.transport.link import NO_RECEIVER
from proxy.transport.relay import Relay


async def test_a_connection_that_died_before_it_was_counted_is_not_waited_for() -> None:
    relay, closed = Relay(lambda error: None), []
    live = Live(relay)
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        link = relay.adopt(near, NO_RECEIVER)
        link.abort()
        live.add(link, None, lambda: closed.append(True))
    with trio.fail_after(5):
        await live.wait_none()
    assert (len(live), closed) == (0, [True])
    relay.epoll.close()


async def test_a_connection_is_counted_until_its_socket_is_closed() -> None:
    relay, closed = Relay(lambda error: None), []
    live = Live(relay)
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        link = relay.adopt(near, NO_RECEIVER)
        live.add(link, None, lambda: closed.append(True))
        assert (len(live), closed) == (1, [])
        link.abort()
    assert (len(live), closed) == (0, [True])
    relay.epoll.close()
