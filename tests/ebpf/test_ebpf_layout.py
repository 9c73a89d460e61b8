"""The Python side of the maps: bytes and back, and bytecode that is made to fit one process and one pod."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.addrs import Addr
from core.capture import CALLER_LEVEL, CALLER_OPTION, caller_option
from ebpf import layout
from ebpf.layout import Counter, Pod, PodFlag, PortKind

BPF = Path(layout.__file__).parent / "bpf"
HEADER = (BPF / "mesh.h").read_text()
POD = Pod(2102, PodFlag.CAPTURE | PodFlag.ACCELERATE, 4140, 4143, ("10.1.2.3", "fd00::3"))


def _defined(prefix: str, text: str = HEADER) -> dict[str, int]:
    return {name: int(value, 0) for name, value in re.findall(rf"#define {prefix}(\w+) (\w+)", text)}


def test_flags_kinds_and_counters_are_those_of_the_header() -> None:
    assert _defined("POD_") == {flag.name: flag.value for flag in PodFlag}
    assert _defined("PORTS_") == {kind.name: kind.value for kind in PortKind}
    block = re.search(r"enum counter \{(.*?)\}", HEADER, re.DOTALL)
    assert block
    assert re.findall(r"COUNT_(\w+)", block[1]) == [counter.name for counter in Counter]
    assert sorted(Counter) == list(range(len(Counter)))


def test_the_limits_are_those_of_the_header() -> None:
    assert _defined("PODS_") == {"MAX": layout.PODS_MAX}
    assert _defined("PAIRS_") == {"MAX": layout.PAIRS_MAX}
    assert _defined("SOCKS_") == {"MAX": layout.SOCKS_MAX}
    assert f"#define QUEUE_LIMIT ({layout.QUEUE_LIMIT >> 20} << 20)" in HEADER
    assert layout.QUEUE_LIMIT == 2 << 20


def test_the_callers_option_is_the_one_the_sidecar_sets() -> None:
    text = (BPF / "sockopt.bpf.c").read_text()
    assert _defined("CALLER_", text) == {"LEVEL": CALLER_LEVEL, "OPTION": CALLER_OPTION}
    assert len(caller_option(Addr("10.0.0.1", 1))) == 20


def test_every_program_is_in_its_file() -> None:
    for program in layout.PROGRAMS:
        assert re.search(rf"^int {program.name}\(struct \w+ \*\w+\)", (BPF / program.source).read_text(), re.MULTILINE), program
    assert {path.name for path in BPF.glob("*.c")} == {program.source for program in layout.PROGRAMS}


def test_a_pod_survives_packing() -> None:
    assert len(layout.pack_pod(POD)) == layout.POD_BYTES == layout.MAPS["pods"][1]
    assert layout.unpack_pod(layout.pack_pod(POD)) == POD


def test_a_pod_without_addresses_owns_loopback_alone() -> None:
    packed = layout.pack_pod(Pod(1, PodFlag(0), 1, 1))
    assert packed[16:] == bytes((127, 0, 0, 1)) * 4 + (bytes(15) + b"\1") * 4
    assert layout.unpack_pod(packed).ips == ()


def test_more_addresses_than_fit_are_refused_by_name() -> None:
    ips = tuple(f"10.0.0.{host}" for host in range(1, 6))
    with pytest.raises(ValueError, match=r"at most 4 addresses of a family.*10\.0\.0\.5"):
        layout.pack_pod(Pod(1, PodFlag(0), 1, 1, ips))


@given(st.lists(st.tuples(st.integers(1, 65535), st.integers(0, 300)), max_size=5))
def test_a_set_of_ports_has_one_bit_a_port(spans: list[tuple[int, int]]) -> None:
    ranges = [(low, min(65535, low + more)) for low, more in spans]
    packed = layout.pack_port_set(ranges)
    assert len(packed) == layout.PORT_SET_BYTES == layout.MAPS["port_sets"][1]
    words = struct.unpack("=1024Q", packed)
    ports = {port for port in range(65536) if words[port >> 6] >> (port & 63) & 1}  # as in_port_set() reads it
    assert ports == {port for low, high in ranges for port in range(low, high + 1)}


@pytest.mark.parametrize("wrong", [(0, 1), (2, 1), (1, 65536), (-1, 5)])
def test_what_is_no_range_of_ports_is_refused(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="is no range of ports"):
        layout.pack_port_set([wrong])


def test_keys_begin_with_the_cookie_and_have_the_maps_sizes() -> None:
    cookie = 0x1122334455667788
    keys = {
        "pods": layout.pack_cookie(cookie),
        "port_sets": layout.pack_port_set_key(cookie, PortKind.SKIP_INBOUND),
        "listeners": layout.pack_listener_key(cookie, only_v6=True),
    }
    for name, key in keys.items():
        assert len(key) == layout.MAPS[name][0]
        assert layout.unpack_cookie(key) == cookie


def test_counters_of_all_processors_are_added() -> None:
    one = struct.pack(f"={len(Counter)}Q", *range(len(Counter)))
    assert layout.unpack_counters([one, one, layout.zero_counters()]) == {counter: 2 * counter.value for counter in Counter}


def _load(source: int, low: int, high: int = 0) -> bytes:
    """A 64-bit load, two instructions."""
    return bytes([0x18, source << 4 | 1, 0, 0]) + struct.pack("=I", low) + bytes(4) + struct.pack("=I", high)


def test_maps_are_renumbered_and_nothing_else() -> None:
    other = bytes([0xB7, 1, 0, 0]) + struct.pack("=i", 7)
    code = _load(1, 7) + other + _load(0, 7) + _load(1, 9)
    assert layout.relocate_maps(code, {7: 100, 9: 200}) == _load(1, 100) + other + _load(0, 7) + _load(1, 200)
    with pytest.raises(KeyError):
        layout.relocate_maps(code, {7: 100})


def test_the_cookie_takes_its_place() -> None:
    placeholder = _load(0, layout.COOKIE_PLACEHOLDER & 0xFFFFFFFF, layout.COOKIE_PLACEHOLDER >> 32)
    code = _load(0, 5) + placeholder + _load(1, 3)
    assert layout.relocate_cookie(code, 0xAABBCCDD11223344) == _load(0, 5) + _load(0, 0x11223344, 0xAABBCCDD) + _load(1, 3)
    for wrong in (b"", _load(0, 5), placeholder * 2):
        with pytest.raises(ValueError, match="placeholders"):
            layout.relocate_cookie(wrong, 1)
