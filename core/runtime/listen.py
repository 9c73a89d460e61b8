"""Listening sockets, bound before anything else starts so that a taken port is an error at start, not later.

Called by the programs' app modules; the sockets go to trio (`trio_listener`) or to an acceptor of one's own.
"""

from __future__ import annotations

import errno
import os
import socket

import trio

from core.addrs import ListenAddr

_BACKLOG = 4096  # the kernel clips it to net.core.somaxconn, 4096 since Linux 5.4


class CannotListen(OSError):
    """The address cannot be bound; the text names it and the likely next step."""


def listen(addr: ListenAddr, backlog: int = _BACKLOG) -> socket.socket:
    """A bound, listening, non-blocking TCP socket; raises CannotListen.

    ``[::]`` takes IPv4 too, and where the host has no IPv6 it means ``0.0.0.0``.
    """
    try:
        return _bind(addr.ip, addr.port, backlog)
    except OSError as error:
        if addr.ip == "::" and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return listen(ListenAddr(addr._replace(ip="0.0.0.0")), backlog)
        hint = {errno.EADDRINUSE: "; another process listens there", errno.EACCES: "; ports below 1024 need a privilege"}
        text = f"cannot listen on {addr}: {os.strerror(error.errno or 0)}{hint.get(error.errno or 0, '')}"
        raise CannotListen(error.errno, text) from None


def _bind(ip: str, port: int, backlog: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(ip != "::"))
        sock.bind((ip, port))
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def trio_listener(sock: socket.socket) -> trio.SocketListener:
    """The same socket for `trio.serve_listeners`."""
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
