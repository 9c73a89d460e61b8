"""Capture: where connections go, what both ends are told, and that nothing gets around a sidecar that is not there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from typing import Any

import hop_checks
import pytest
from lab import ACCELERATED, APP_UID, CAPTURED, IN_PORT, OUT_PORT, PATIENCE_S, SIDECAR_UID, TARGET, Failed, Lab, LabPod, join

from core.addrs import Addr
from core.capture import CALLER_LEVEL, CALLER_OPTION, caller_option
from ebpf import bpfsys
from ebpf.layout import Counter, PodFlag, PortKind
from ebpf.redirect import capture as capture_rules
from proxy.transport.original_dst import original_dst

pytestmark = pytest.mark.kernel

TARGETS = ((socket.AF_INET, TARGET), (socket.AF_INET6, "fd99::9"), (socket.AF_INET6, f"::ffff:{TARGET}"))
MPTCP = 262


def _connect(family: int, ip: str, port: int, bind: str = "") -> tuple[Any, Any] | int | None:
    """(own address, peer's address), or the errno."""
    with socket.socket(family) as sock:
        sock.settimeout(PATIENCE_S)
        try:
            if bind:
                sock.bind((bind, 0))
            sock.connect((ip, port))
            return sock.getsockname()[:2], sock.getpeername()[:2]
        except OSError as error:
            return error.errno


def _sidecar(number: int, tell: Callable[..., None]) -> None:
    """Accept so many connections at the outbound port, then say what each was dialled for."""
    listener = socket.create_server(("::", OUT_PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    seen = []
    for _ in range(number):
        sock, _ = listener.accept()
        seen.append(str(original_dst(sock)))
        sock.close()
    tell(seen)
    time.sleep(3600)


def _listen(host: str, port: int, tell: Callable[..., None]) -> None:
    """Accept and greet with the address that accept() and getpeername() gave."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")
    tell(None)
    while True:
        sock, accepted = listener.accept()
        with contextlib.suppress(OSError):
            sock.sendall(f"{accepted[0]} {accepted[1]} {sock.getpeername()[0]} {sock.getsockname()[0]}".encode())
        sock.close()


def _ask(family: int, ip: str, port: int, caller: tuple[str, int] | None = None) -> list[str]:
    """What `_listen` greets with."""
    with socket.socket(family) as sock:
        sock.settimeout(PATIENCE_S)
        if caller:
            sock.setsockopt(CALLER_LEVEL, CALLER_OPTION, caller_option(Addr(*caller)))
        sock.connect((ip, port))
        return [*sock.recv(200).decode().split(), str(sock.getpeername()[0])]


# --- outbound -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [CAPTURED, ACCELERATED])
def test_connections_lead_to_the_sidecar_with_their_target(pod: LabPod, flags: PodFlag) -> None:
    pod.attach(flags)
    sidecar = pod.start(_sidecar, 3, uid=SIDECAR_UID)
    pod.wait_port(OUT_PORT)  # not captured: it is loopback, and takes the first of the three
    for family, ip in TARGETS[:2]:
        own, peer = pod.run(_connect, family, ip, 8080)
        assert own[0] in ("127.0.0.1", "::1")
        assert peer == (ip, 8080), "the app sees whom it asked for"
    assert sidecar.result() == [f"127.0.0.1:{OUT_PORT}", f"{TARGET}:8080", "[fd99::9]:8080"]
    assert pod.counts()[Counter.ORIGINAL_DST] == 2


def test_mapped_addresses_lead_to_the_sidecar_as_ipv4(pod: LabPod) -> None:
    pod.attach(CAPTURED)
    sidecar = pod.start(_sidecar, 2, uid=SIDECAR_UID)
    pod.wait_port(OUT_PORT)
    _, peer = pod.run(_connect, socket.AF_INET6, f"::ffff:{TARGET}", 8080)
    assert peer == (f"::ffff:{TARGET}", 8080)
    assert sidecar.result()[1] == f"{TARGET}:8080"


@pytest.mark.parametrize(("family", "ip"), TARGETS)
def test_without_a_sidecar_nothing_leaves(pod: LabPod, family: int, ip: str) -> None:
    pod.attach(CAPTURED)
    assert pod.run(_connect, family, ip, 80) == errno.ECONNREFUSED
    assert pod.run(_connect, family, ip, 80, uid=0) == errno.ECONNREFUSED, "root in the pod is captured like everybody"


def test_a_pod_that_nothing_captures_is_refused(lab: Lab) -> None:
    pod, other = lab.pod(), lab.pod()
    join(pod, other, 1)
    pod.attach(PodFlag.REFUSE, ("10.98.1.1",), inbound=True)
    pod.start(_listen, "0.0.0.0", 8080).result()
    other.start(_listen, "0.0.0.0", 8080).result()
    assert pod.run(_connect, socket.AF_INET, "10.98.1.2", 8080) == errno.ECONNREFUSED
    assert other.run(_connect, socket.AF_INET, "10.98.1.1", 8080) == errno.ECONNREFUSED
    assert isinstance(pod.run(_connect, socket.AF_INET, "127.0.0.1", 8080), tuple), "loopback stays the pod's own"
    assert isinstance(pod.run(_connect, socket.AF_INET, "10.98.1.2", 8080, uid=SIDECAR_UID), tuple)
    counts = pod.counts()
    assert counts[Counter.REFUSED_OUTBOUND] == 1
    assert counts[Counter.REFUSED_INBOUND] >= 1  # one lookup or two, by kernel


def test_data_in_the_syn_is_captured_too(pod: LabPod) -> None:
    """MSG_FASTOPEN connects inside sendto(2)."""
    pod.attach(CAPTURED)

    def fast_open() -> int | None:
        with socket.socket() as sock:
            try:
                sock.sendto(b"x", 0x20000000, (TARGET, 80))
                sock.settimeout(PATIENCE_S)
                sock.recv(1)
                return 0
            except OSError as error:
                return error.errno

    assert pod.run(fast_open) == errno.ECONNREFUSED
    assert pod.counts()[Counter.CAPTURED] == 1


def test_mptcp_sockets_cannot_be_made_in_a_registered_pod(lab: Lab) -> None:
    """They never meet connect hooks; the control shows that they would leave otherwise."""
    pod, other = lab.pod(), lab.pod()
    join(pod, other, 2)
    other.start(_listen, "0.0.0.0", 8080).result()

    def dial() -> int | None:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM, MPTCP) as sock:
                sock.settimeout(PATIENCE_S)
                sock.connect(("10.98.2.2", 8080))
                return 0
        except OSError as error:
            return error.errno

    control = pod.run(dial)
    if control == errno.EPROTONOSUPPORT:
        pytest.skip("this kernel has no MPTCP")
    assert control == 0
    pod.attach(CAPTURED)
    assert pod.run(dial) == errno.EPROTONOSUPPORT
    assert pod.counts()[Counter.REFUSED_SOCKETS] == 1


def test_exempt_are_the_sidecar_loopback_own_addresses_and_skipped_ports(lab: Lab) -> None:
    pod, other = lab.pod(), lab.pod()
    join(pod, other, 3)
    pod.node.write_ports(pod.cookie, PortKind.SKIP_OUTBOUND, [(9000, 9001)])
    pod.attach(CAPTURED, ("10.98.3.1", "fd98:3::1"))
    for port in (8080, 9001):
        other.start(_listen, "::", port).result()
    pod.start(_listen, "::", 8080).result()
    reached = [
        pod.run(_ask, socket.AF_INET, "10.98.3.2", 8080, uid=SIDECAR_UID),
        pod.run(_ask, socket.AF_INET, "10.98.3.2", 9001),
        *(pod.run(_ask, socket.AF_INET, ip, 8080) for ip in ("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.98.3.1")),
        *(pod.run(_ask, socket.AF_INET6, ip, 8080) for ip in ("::1", "::", "fd98:3::1", "::ffff:127.0.0.1", "::ffff:10.98.3.1")),
    ]
    assert len(reached) == 11
    assert pod.run(_connect, socket.AF_INET, "10.98.3.2", 8080) == errno.ECONNREFUSED
    assert pod.run(_connect, socket.AF_INET, "10.98.3.2", 9002) == errno.ECONNREFUSED
    assert pod.counts()[Counter.CAPTURED] == 2


def test_a_bound_socket_is_captured(lab: Lab) -> None:
    pod, other = lab.pod(), lab.pod()
    join(pod, other, 4)
    pod.attach(CAPTURED, ("10.98.4.1", "fd98:4::1"))
    sidecar = pod.start(_sidecar, 3, uid=SIDECAR_UID)
    pod.wait_port(OUT_PORT)
    assert pod.run(_connect, socket.AF_INET, "10.98.4.2", 80, "10.98.4.1")[1] == ("10.98.4.2", 80)
    assert pod.run(_connect, socket.AF_INET6, "fd98:4::2", 80, "fd98:4::1")[1] == ("fd98:4::2", 80)
    assert sidecar.result()[1:] == ["10.98.4.2:80", "[fd98:4::2]:80"]


def test_the_app_finds_its_pods_address_on_what_it_dialled(pod: LabPod) -> None:
    """By what getsockname() says apps tell others where they are; what they dial on loopback is where it is."""
    pod.attach(CAPTURED, ("10.98.6.1", "fd98:6::1"))
    sidecar = pod.start(_sidecar, 4, uid=SIDECAR_UID)
    pod.wait_port(OUT_PORT)
    own = [pod.run(_connect, family, ip, 80)[0][0] for family, ip in TARGETS]
    assert own == ["10.98.6.1", "fd98:6::1", "::ffff:10.98.6.1"]
    assert pod.run(_connect, socket.AF_INET, "127.0.0.1", OUT_PORT)[0][0] == "127.0.0.1"
    assert sidecar.result()


def test_who_proves_capture_sees_its_connection_as_it_arrives(pod: LabPod) -> None:
    pod.attach(CAPTURED, ("10.98.7.1", "fd98:7::1"))
    sidecar = pod.start(_sidecar, 2, uid=SIDECAR_UID)
    pod.wait_port(OUT_PORT)
    own = [pod.run(_connect, family, ip, OUT_PORT)[0][0] for family, ip in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "100::1"))]
    assert own == ["127.0.0.1", "::1"]
    assert sidecar.result()


def test_a_socket_that_connects_again_forgets_its_first_target(pod: LabPod) -> None:
    pod.attach(CAPTURED)
    sidecar = pod.start(_sidecar, 4, uid=SIDECAR_UID)
    pod.wait_port(OUT_PORT)

    def again() -> tuple[Any, Any]:
        with socket.socket() as sock:
            sock.connect((TARGET, 80))
            first = sock.getpeername()
            unspecified = ctypes.create_string_buffer(16)
            ctypes.CDLL(None).connect(sock.fileno(), unspecified, 16)
            sock.connect((TARGET, 81))
            second = sock.getpeername()
            ctypes.CDLL(None).connect(sock.fileno(), unspecified, 16)
            sock.connect(("127.0.0.1", OUT_PORT))
            return (first, second), sock.getpeername()

    assert pod.run(again) == (((TARGET, 80), (TARGET, 81)), ("127.0.0.1", OUT_PORT))
    assert sidecar.result()[1:] == [f"{TARGET}:80", f"{TARGET}:81", f"127.0.0.1:{OUT_PORT}"], "a direct dial has no target to show"


def test_other_namespaces_below_the_cgroup_are_left_alone(lab: Lab) -> None:
    """One attachment may serve a whole node; who is not registered pays one lookup and is not captured."""
    pod, other = lab.pod(), lab.pod()
    join(pod, other, 5)
    pod.attach(CAPTURED)
    lab.node.forget(pod.cookie)
    other.start(_listen, "0.0.0.0", 8080).result()
    assert isinstance(pod.run(_connect, socket.AF_INET, "10.98.5.2", 8080), tuple)


# --- inbound --------------------------------------------------------------------------------------------------------------------------


def _inbound_sidecar(tell: Callable[..., None]) -> None:
    listener = socket.create_server(("::", IN_PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    tell(listener.fileno())
    while True:
        sock, _ = listener.accept()
        with contextlib.suppress(OSError):
            dialled = original_dst(sock)
            sock.sendall(f"sidecar took {dialled}".encode())
        sock.close()


def _greeting(family: int, ip: str, port: int) -> str | int | None:
    with socket.socket(family) as sock:
        sock.settimeout(PATIENCE_S)
        try:
            sock.connect((ip, port))
            return sock.recv(200).decode()
        except OSError as error:
            return error.errno


def _serve_inbound(pod: LabPod) -> Any:
    """A sidecar whose listener is known to the programs, as the agent does it: with a copy that is closed at once."""
    sidecar = pod.start(_inbound_sidecar, uid=SIDECAR_UID)
    number = sidecar.result()
    pidfd = os.pidfd_open(sidecar.pid)
    copy = bpfsys.take_fd(pidfd, number)
    pod.node.set_listener(pod.cookie, copy)
    os.close(copy)
    os.close(pidfd)
    return sidecar


def test_what_arrives_is_led_to_the_sidecar_or_refused(lab: Lab) -> None:
    pod, caller = lab.pod(), lab.pod()
    join(pod, caller, 6)
    pod.node.write_ports(pod.cookie, PortKind.SKIP_INBOUND, [(7000, 7000)])
    for port in (8080, 7000):
        pod.start(_listen, "::", port).result()
    both = ((socket.AF_INET, "10.98.6.1", "10.98.6.1"), (socket.AF_INET6, "fd98:6::1", "[fd98:6::1]"))
    assert "10.98.6.2" in caller.run(_greeting, socket.AF_INET, "10.98.6.1", 8080), "the control: the app answers by itself"

    pod.attach(CAPTURED, ("10.98.6.1", "fd98:6::1"), inbound=True)
    for family, ip, _ in both:
        assert caller.run(_greeting, family, ip, 8080) == errno.ECONNREFUSED, "no sidecar yet"
        assert caller.run(_greeting, family, ip, 7000).startswith(("::ffff:10.98.6.2", "fd98:6::2")), "a skipped port"

    sidecar = _serve_inbound(pod)
    assert lab.node.has_listener(pod.cookie)
    for family, ip, shown in both:
        for port in (8080, 1, 65535, IN_PORT):
            assert caller.run(_greeting, family, ip, port) == f"sidecar took {shown}:{port}"
        for uid in (APP_UID, SIDECAR_UID):
            assert not str(pod.run(_greeting, family, ip, 8080, uid=uid)).startswith("sidecar"), (
                "the pod's own calls are not led round again"
            )

    sidecar.kill()
    assert not lab.node.has_listener(pod.cookie)
    assert caller.run(_greeting, socket.AF_INET, "10.98.6.1", 8080) == errno.ECONNREFUSED, "the sidecar is gone, the app stays out of reach"
    assert pod.counts()[Counter.STEERED] == 8


def test_an_app_that_takes_the_sidecars_port_gets_nothing(lab: Lab) -> None:
    pod, caller = lab.pod(), lab.pod()
    join(pod, caller, 7)
    pod.attach(CAPTURED, ("10.98.7.1",), inbound=True)
    pod.start(_listen, "0.0.0.0", IN_PORT).result()
    assert caller.run(_greeting, socket.AF_INET, "10.98.7.1", 8080) == errno.ECONNREFUSED
    assert caller.run(_greeting, socket.AF_INET, "10.98.7.1", IN_PORT) == errno.ECONNREFUSED


# --- captured by nftables, accelerated by us ------------------------------------------------------------------------------------------


def _echo_dialled(tell: Callable[..., None]) -> None:
    listener = socket.create_server(("::", OUT_PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    tell(None)
    while True:
        sock, _ = listener.accept()
        said = str(original_dst(sock)).encode()
        while hop_checks.receive(sock):
            sock.sendall(said)
        sock.close()


def _say(family: int, ip: str, number: int) -> set[str]:
    with socket.socket(family) as sock:
        sock.connect((ip, 8080))
        said = set()
        for _ in range(number):
            sock.sendall(b"x" * 1000)
            said.add(hop_checks.receive(sock).decode())
        return said


@pytest.mark.needs("nft")
def test_translated_connections_are_paired_and_accelerated(lab: Lab) -> None:
    """The two ends see other addresses; their sequence numbers are the same. Conntrack's answer for the target stays."""
    pod, other = lab.pod(), lab.pod()
    join(pod, other, 10)
    pod.attach(PodFlag.TRANSLATED | PodFlag.ACCELERATE, ("10.98.10.1", "fd98:10::1"))
    with contextlib.ExitStack() as stack:
        netns = os.open(f"/run/netns/{pod.name}", os.O_RDONLY)
        stack.callback(os.close, netns)
        with bpfsys.in_netns(netns):
            subprocess.run(["nft", "-f", "-"], input=capture_rules().encode(), check=True)
    pod.start(_echo_dialled, uid=SIDECAR_UID).result()
    assert pod.run(_say, socket.AF_INET, "10.98.10.2", 50) == {"10.98.10.2:8080"}
    assert pod.run(_say, socket.AF_INET6, "fd98:10::2", 50) == {"[fd98:10::2]:8080"}
    counts = pod.counts()
    assert counts[Counter.CAPTURED] == 0
    assert counts[Counter.ACCELERATED] == 2
    assert counts[Counter.MESSAGES] == 200, counts


# --- callers --------------------------------------------------------------------------------------------------------------------------

V4, V6 = ("203.0.113.7", 4321), ("2001:db8::7", 99)


@pytest.mark.parametrize("flags", [CAPTURED, ACCELERATED])
@pytest.mark.parametrize(
    ("listening", "family", "dialled", "caller", "shown"),
    [
        ("0.0.0.0", socket.AF_INET, "127.0.0.1", V4, "203.0.113.7"),
        ("0.0.0.0", socket.AF_INET, "10.98.8.1", V4, "203.0.113.7"),
        ("::", socket.AF_INET, "127.0.0.1", V4, "::ffff:203.0.113.7"),
        ("::", socket.AF_INET6, "::1", V6, "2001:db8::7"),
        ("::", socket.AF_INET6, "fd98:8::1", V6, "2001:db8::7"),
        ("::", socket.AF_INET6, "::1", V4, "::ffff:203.0.113.7"),
        ("0.0.0.0", socket.AF_INET, "127.0.0.1", V6, "127.0.0.1"),  # an IPv4 socket has no room for it
    ],
)
def test_the_app_sees_the_caller(
    lab: Lab, flags: PodFlag, listening: str, family: int, dialled: str, caller: tuple[str, int], shown: str
) -> None:
    pod, other = lab.pod(), lab.pod()
    join(pod, other, 8)
    pod.attach(flags, ("10.98.8.1", "fd98:8::1"))
    pod.start(_listen, listening, 8080).result()
    accepted, port, peername, own, sidecars_peer = pod.run(_ask, family, dialled, 8080, caller, uid=SIDECAR_UID)
    assert (accepted, peername) == (shown, shown)
    if shown != "127.0.0.1":
        assert int(port) == caller[1]
    assert own.removeprefix("::ffff:") == dialled
    assert sidecars_peer == dialled, "the sidecar itself keeps seeing the app"
    plain = pod.run(_ask, family, dialled, 8080, uid=SIDECAR_UID)
    assert plain[0].removeprefix("::ffff:") == dialled, "a connection that names nobody is as always"


@pytest.mark.parametrize("uid", [APP_UID, 0])
def test_only_the_sidecar_may_name_callers(pod: LabPod, uid: int) -> None:
    pod.attach(CAPTURED)
    pod.start(_listen, "0.0.0.0", 8080).result()
    with pytest.raises(Failed, match="PermissionError"):
        pod.run(_ask, socket.AF_INET, "127.0.0.1", 8080, V4, uid=uid)
    assert pod.counts()[Counter.REFUSED_CALLERS] == 1
    assert pod.counts()[Counter.CALLERS] == 0


def test_callers_can_be_switched_off(pod: LabPod) -> None:
    pod.attach(PodFlag.CAPTURE)
    with pytest.raises(Failed, match="PermissionError"):
        pod.run(_ask, socket.AF_INET, "127.0.0.1", 8080, V4, uid=SIDECAR_UID)


def test_a_namespace_that_is_not_registered_has_no_such_option(pod: LabPod) -> None:
    pod.attach(CAPTURED)
    pod.node.forget(pod.cookie)
    with pytest.raises(Failed, match="Protocol not available"):
        pod.run(_ask, socket.AF_INET, "127.0.0.1", 8080, V4, uid=SIDECAR_UID)


def test_malformed_callers_are_refused(pod: LabPod) -> None:
    pod.attach(CAPTURED)

    def offer(value: bytes, option: int) -> int | None:
        with socket.socket() as sock:
            try:
                sock.setsockopt(CALLER_LEVEL, option, value)
                return 0
            except OSError as error:
                return error.errno

    good = caller_option(Addr(*V4))
    assert pod.run(offer, good, CALLER_OPTION, uid=SIDECAR_UID) == 0
    for value, option in ((good[:-1], 1), (b"", 1), (struct.pack("=H", 1) + good[2:], 1), (good, 2)):
        assert pod.run(offer, value, option, uid=SIDECAR_UID) == errno.EPERM


def test_large_socket_options_pass_untouched(pod: LabPod) -> None:
    """The kernel shows a program one page of them; answering for the rest would make the call fail."""
    pod.attach(CAPTURED)

    def large() -> tuple[int, bytes]:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, struct.pack("=i", 65536).ljust(8192, b"\0"))
            value, length = ctypes.create_string_buffer(8192), ctypes.c_uint(8192)
            return ctypes.CDLL(None).getsockopt(
                sock.fileno(), socket.IPPROTO_TCP, socket.TCP_CONGESTION, value, ctypes.byref(length)
            ), value.value

    code, congestion = pod.run(large)
    assert code == 0
    assert congestion in (b"cubic", b"reno", b"bbr")
