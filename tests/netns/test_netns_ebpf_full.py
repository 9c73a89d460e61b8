"""No room in a map that the agent writes: the pod falls to nftables, or stays shut until there is room, and the status says why."""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from agent_lab import Lab, wait_for

from ebpf import bpfsys, layout
from ebpf.layout import PortKind
from ebpf.plan import CONNECT, NFT
from ebpf.wire import Unregister

pytestmark = [pytest.mark.netns, pytest.mark.kernel]

_numbers = itertools.count()
_NOBODY = range(1 << 40, (1 << 40) + 4 * layout.PODS_MAX)
"""Cookies that no namespace of this machine has."""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    found = Lab(tmp_path, f"pf{os.getpid() % 100000}{next(_numbers)}")
    try:
        yield found
    finally:
        found.close()


@contextmanager
def _opened(lab: Lab, name: str) -> Iterator[int]:
    fd = bpfsys.pinned(lab.pins / layout.VERSION / "maps" / name)
    try:
        yield fd
    finally:
        os.close(fd)


def _fill(lab: Lab, name: str) -> int:
    """Entries of pods that do not exist; returns how many there was room for."""
    values = {
        "pods": (layout.pack_cookie, bytes(layout.POD_BYTES), bpfsys.map_update),
        "counters": (layout.pack_cookie, layout.zero_counters(), bpfsys.map_update_per_cpu),
        "port_sets": (lambda cookie: layout.pack_port_set_key(cookie, PortKind.SKIP_INBOUND), bytes(8192), bpfsys.map_update),
    }
    key, value, update = values[name]
    with _opened(lab, name) as fd:
        for made, cookie in enumerate(_NOBODY):
            try:
                update(fd, key(cookie), value, bpfsys.ANY)
            except OSError:
                return made
    raise AssertionError(f"{name} has no bound")


@pytest.mark.parametrize("name", ["pods", "counters", "port_sets"])
def test_a_pod_without_room_in_a_map_is_captured_by_nftables(lab: Lab, name: str) -> None:
    lab.start()
    assert _fill(lab, name) >= layout.PODS_MAX
    one, two = lab.meshed()
    for pod in (one, two):
        status = pod.status()
        assert status["level"] == NFT
        assert f"map {name} is full" in status["message"]
        assert "redirect to :4143" in pod.rules()
    assert one.call(two.ips[0], count=3)[-1]["error"] == ""
    with _opened(lab, name) as fd:
        for key in [key for key in bpfsys.map_keys(fd, bpfsys.map_info(fd).key_bytes) if layout.unpack_cookie(key[:8]) in _NOBODY]:
            bpfsys.map_delete(fd, key)
    assert lab.ask(Unregister(one.id)) == {"ok": True}
    assert one.register()["pod"]["level"] == CONNECT, "the next one finds room"
    assert "redirect" not in one.rules()
    assert one.call(two.ips[0])[0]["error"] == ""


def test_a_sidecar_without_room_for_its_listener_is_not_reached_and_is_led_to_as_soon_as_there_is(lab: Lab) -> None:
    lab.start()
    one, two = lab.pods
    one.register()
    one.relay()
    assert one.steer() == {"ok": True}
    with socket.create_server(("127.0.0.1", 0)) as filler:
        with _opened(lab, "listeners") as fd:
            for cookie in _NOBODY:
                try:
                    bpfsys.map_update(fd, layout.pack_listener_key(cookie, only_v6=False), struct.pack("=Q", filler.fileno()), bpfsys.ANY)
                except OSError:
                    break
            else:
                raise AssertionError("listeners has no bound")
        assert two.register()["pod"]["level"] == CONNECT
        two.relay()
        two.app()
        wait_for(lambda: "map listeners is full" in two.status()["message"], "the agent tried and says why it failed")
        assert one.call(two.ips[0])[0]["error"], "refused, and not led around the sidecar"
        assert two.status()["counters"]["refused_inbound"] > 0
    assert two.steer() == {"ok": True}, "the kernel forgets a listener with its last descriptor"
    assert one.call(two.ips[0])[0]["error"] == ""
