"""The sidecar takes only its own connection, led to it, for a proof of capture. Real capture is tested in namespaces (tests/netns)."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from core.addrs import Addr, ClientAddr, OriginalDst, from_sockaddr
from core.capture import NOBODY
from core.runtime.sockets import RawStream
from ebpf import validator
from ebpf.redirect import capture
from proxy import capture_proof
from proxy.capture_proof import CaptureProof, NotCaptured, NoWayOut
from proxy.rescue import Failure
from proxy.transport.accept import Accepted
from tests.ports import unused_port

LOOPBACK = ("127.0.0.1", "::1")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's addresses become ones of this machine, where what is dialled arrives; attempts that cannot succeed end soon."""
    monkeypatch.setattr(capture_proof, "NOBODY", LOOPBACK)
    monkeypatch.setattr(capture_proof, "_ATTEMPT_S", 0.05)
    monkeypatch.setattr(capture_proof, "_PAUSE_S", 0.001)


Led = Callable[[Accepted], Accepted]


@asynccontextmanager
async def sidecar(led: Led = lambda accepted: accepted, *families: socket.AddressFamily) -> AsyncIterator[CaptureProof]:
    """The outbound listeners of a sidecar. led: what the kernel says about a connection that arrives."""
    port = unused_port()
    listeners = [socket.create_server(("127.0.0.1", port))]
    if socket.AF_INET6 in families:
        listeners.append(socket.create_server(("::1", port), family=socket.AF_INET6))
    proof = CaptureProof(port)

    async def serve(listener: socket.socket) -> None:
        listener.setblocking(False)
        while True:
            await trio.lowlevel.wait_readable(listener)
            sock, peer = listener.accept()
            accepted = led(Accepted(RawStream(sock), ClientAddr(from_sockaddr(peer)), OriginalDst(from_sockaddr(sock.getsockname()))))
            with accepted.stream.sock, suppress(Failure):
                if proof.concerns(accepted):
                    await proof.take(accepted)
                else:
                    await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(serve, listener)
        yield proof
        nursery.cancel_scope.cancel()
    for listener in listeners:
        listener.close()


def meant(proof: CaptureProof, ip: str = LOOPBACK[0]) -> OriginalDst:
    return OriginalDst(Addr(ip, proof._port))


async def test_capture_is_proven_when_both_families_arrive() -> None:
    async with sidecar(lambda accepted: accepted, socket.AF_INET6) as proof:
        assert proof.problem and not proof.proven.value
        with trio.fail_after(30):
            await proof.prove()
        assert proof.proven.value and not proof.problem


async def test_one_family_alone_is_no_proof_while_the_other_has_a_way_out() -> None:
    async with sidecar() as proof, trio.open_nursery() as nursery:
        nursery.start_soon(proof.prove)
        with trio.fail_after(30):
            while "::1" not in proof.problem or "127.0.0.1" in proof.problem:  # noqa: ASYNC110  (a word wakes nobody)
                await trio.sleep(0.001)
        assert not proof.proven.value
        nursery.cancel_scope.cancel()


async def test_a_family_that_the_pod_does_not_have_is_not_missed_but_one_has_to_be_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = CaptureProof.attempt
    absent = {"::1"}

    async def maybe(self: CaptureProof, dst: OriginalDst) -> None:
        if dst.ip in absent:
            raise NoWayOut(f"no route to {dst.ip}")
        await attempt(self, dst)

    monkeypatch.setattr(CaptureProof, "attempt", maybe)
    async with sidecar() as proof:
        with trio.fail_after(30):
            await proof.prove()
    absent.add("127.0.0.1")
    async with sidecar() as proof:
        with trio.move_on_after(0.1):
            await proof.prove()
        assert not proof.proven.value


async def test_somebody_who_answers_for_the_address_proves_nothing() -> None:
    async with sidecar(lambda accepted: Accepted(accepted.stream, accepted.client, OriginalDst(Addr("10.0.0.9", 1)))) as proof:
        with pytest.raises(NotCaptured, match="did not arrive"):
            await proof.attempt(meant(proof))


async def test_a_refusal_proves_nothing() -> None:
    proof = CaptureProof(unused_port())
    with pytest.raises(NotCaptured, match="did not arrive"):
        await proof.attempt(meant(proof))


async def test_the_right_word_from_another_socket_proves_nothing() -> None:
    """Somebody on the network took the connection and made one of his own out of it."""
    async with sidecar(lambda accepted: Accepted(accepted.stream, ClientAddr(Addr("10.0.0.9", 40000)), accepted.dst)) as proof:
        with pytest.raises(NotCaptured, match=r"did not arrive|broke"):
            await proof.attempt(meant(proof))


async def test_an_apps_connection_to_the_address_goes_nowhere() -> None:
    async with sidecar() as proof:
        theirs, ours = socket.socketpair()
        theirs.send(b"x" * 16)
        accepted = Accepted(RawStream(ours), ClientAddr(Addr("10.0.0.1", 40000)), meant(proof))
        assert proof.concerns(accepted)
        with theirs, ours, pytest.raises(Failure, match="nothing is there"):
            await proof.take(accepted)


def test_other_ports_and_addresses_are_not_concerned() -> None:
    proof, client = CaptureProof(4140), ClientAddr(Addr("10.0.0.1", 40000))
    with socket.socket() as sock:
        for dst in (Addr(LOOPBACK[0], 80), Addr("10.0.0.1", 4140)):
            assert not proof.concerns(Accepted(RawStream(sock), client, OriginalDst(dst)))


def test_everybody_means_the_same_addresses() -> None:
    assert set(validator.NOBODY.values()) == set(NOBODY)
    rules = capture()
    assert all(rules.index(f"daddr {ip} tcp dport 4140") < rules.index("skuid 2102 return") for ip in NOBODY)
