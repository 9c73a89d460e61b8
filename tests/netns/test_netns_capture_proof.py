"""The sidecar proves capture by its own connection, as its own user, under every way of capture; without one it cannot."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_lab import ROOT, SIDECAR_UID, Lab, TestPod
from test_netns_redirect_self import in_a_pod

from ebpf.plan import CONNECT, NFT, NFT_SOCKMAP

_numbers = itertools.count()

# the sidecar's own listener, its own proof, and nothing else of it
PROVE = """
import socket, sys, trio
from contextlib import suppress
from core.addrs import Addr, ListenAddr
from core.runtime import logs
from core.runtime.listen import listen
from proxy.capture_proof import CaptureProof
from proxy.rescue import Failure
from proxy.transport.accept import Accepted, ClientAddr, from_sockaddr, original_dst
from core.runtime.sockets import RawStream

async def main():
    proof = CaptureProof(4140)
    listener = listen(ListenAddr(Addr("::", 4140)))
    async def take(accepted):
        with accepted.stream.sock, suppress(Failure):
            if proof.concerns(accepted):
                await proof.take(accepted)
    async def accept(nursery):
        while True:
            await trio.lowlevel.wait_readable(listener)
            sock, peer = listener.accept()
            nursery.start_soon(take, Accepted(RawStream(sock), ClientAddr(from_sockaddr(peer)), original_dst(sock)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept, nursery)
        with trio.move_on_after(float(sys.argv[1])):
            await proof.prove()
        nursery.cancel_scope.cancel()
    print(proof.problem or "proven")

logs.configure("error", "json")
trio.run(main)
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    found = Lab(tmp_path, f"pc{os.getpid() % 100000}{next(_numbers)}")
    try:
        yield found
    finally:
        found.close()


def proved(pod: TestPod, within_s: float = 10.0) -> str:
    """``proven``, or what is missing."""
    process = pod.spawn(SIDECAR_UID, sys.executable, "-c", PROVE, str(within_s), env={**os.environ, "PYTHONPATH": str(ROOT)})
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return out.strip().splitlines()[-1]


@pytest.mark.netns
@pytest.mark.kernel
@pytest.mark.parametrize(
    ("options", "level"),
    [((), CONNECT), (("--capture", "nft"), NFT_SOCKMAP), (("--pins", "/proc/pillion-nowhere/pillion"), NFT)],
    ids=["connect", "nft-sockmap", "nft"],
)
def test_the_sidecar_proves_what_the_agent_does(lab: Lab, options: tuple[str, ...], level: int) -> None:
    lab.start(*options)
    pod = lab.pods[0]
    assert "192.0.2.1" in proved(pod, 1.5), "nobody captures it yet"
    assert pod.register()["pod"]["level"] == level
    assert proved(pod) == "proven"


@pytest.mark.netns
@pytest.mark.needs("nft", "unshare", "ip")
def test_the_sidecar_proves_what_the_init_container_does(tmp_path: Path) -> None:
    program = tmp_path / "prove.py"
    program.write_text(PROVE)
    program.chmod(0o644)
    tmp_path.chmod(0o755)
    run = f'PYTHONPATH="{ROOT}" setpriv --reuid={SIDECAR_UID} --clear-groups "$PYTHON" - '
    done = in_a_pod(
        f"""
        {run} 1.5 < "{program}"
        "$PYTHON" -m ebpf.redirect_self
        {run} 10 < "{program}"
        """
    )
    assert done.returncode == 0, done.stderr + done.stdout
    first, second = (line for line in done.stdout.splitlines() if "proven" in line or "arrive" in line)
    assert "192.0.2.1" in first and second == "proven"
