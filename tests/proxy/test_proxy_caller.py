"""Telling the kernel who really calls: what it is told, and that a kernel without an ear is asked once."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from core.addrs import Addr, ClientAddr
from core.capture import caller_option
from proxy.transport.caller import CallerTeller


class Socket:
    """Takes the option, or refuses it as kernels do that have no such program."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.told = code, []

    def setsockopt(self, level, option, value):
        self.told.append((level, option, value))
        if self.code:
            raise OSError(self.code, "refused")


@pytest.mark.parametrize(("ip", "family"), [("203.0.113.7", socket.AF_INET), ("fd00::7", socket.AF_INET6)])
def test_the_option_has_the_callers_family_port_and_address(ip, family):
    value = caller_option(Addr(ip, 4321))
    found, port, raw = struct.unpack("=HH16s", value)
    assert len(value) == 20
    assert (found, socket.ntohs(port)) == (family, 4321)
    assert socket.inet_ntop(family, raw[: 4 if family == socket.AF_INET else 16]) == ip


def test_every_caller_is_told_while_the_kernel_listens():
    teller, sock = CallerTeller(), Socket()
    for port in (1, 2):
        teller.tell(sock, ClientAddr(Addr("203.0.113.7", port)))
    assert teller.heard and [value for _, _, value in sock.told] == [caller_option(Addr("203.0.113.7", port)) for port in (1, 2)]


@pytest.mark.parametrize("code", [errno.ENOPROTOOPT, errno.EPERM])
def test_a_kernel_that_refuses_is_asked_once(code):
    teller, sock = CallerTeller(), Socket(code)
    for _ in range(3):
        teller.tell(sock, ClientAddr(Addr("203.0.113.7", 1)))
    assert not teller.heard and len(sock.told) == 1


def test_a_kernel_without_our_programs_refuses_the_option():
    teller = CallerTeller()
    with socket.socket() as sock:
        teller.tell(sock, ClientAddr(Addr("203.0.113.7", 1)))
    assert not teller.heard
