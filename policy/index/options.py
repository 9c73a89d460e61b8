"""Reading the ``config.pillion.dev/*`` annotations that the controller obeys. Pure; a wrong entry is reported, never guessed at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from core.k8s.objects import ContainerPort

PREFIX = "config.pillion.dev/"
DEFAULT_INBOUND_POLICY = PREFIX + "default-inbound-policy"
OPAQUE_PORTS = PREFIX + "opaque-ports"
SKIP_INBOUND_PORTS = PREFIX + "skip-inbound-ports"
REQUIRE_IDENTITY_PORTS = PREFIX + "require-identity-ports"
UNCHECKED_PATH_PORTS = PREFIX + "unchecked-path-ports"
PORT_LISTS = (OPAQUE_PORTS, REQUIRE_IDENTITY_PORTS, SKIP_INBOUND_PORTS, UNCHECKED_PATH_PORTS)
STATUS = "pillion.dev/status"
INJECTED = "injected"

_ENTRIES_MAX = 1000
_CHARS_MAX = 16 * 1024  # so many entries, each a range of five digits
_USUAL_CHARS = 256
_WRONG_SHOWN = 10


@dataclass(frozen=True)
class PortList:
    """A list such as ``25,8000-8010,postgres``. wrong: entries that are neither a port, a range nor a name."""

    ranges: tuple[tuple[int, int], ...] = ()
    names: frozenset[str] = frozenset()
    wrong: tuple[str, ...] = ()

    def holds(self, port: int, declared: Iterable[ContainerPort] = (), name: str = "") -> bool:
        """Is ``port`` in the list, by number, by its own ``name`` or by the name a container declares for it?"""
        if any(first <= port <= last for first, last in self.ranges):
            return True
        if not self.names:
            return False
        return name in self.names or any(entry.container_port == port and entry.name in self.names for entry in declared)


def read_port_list(text: str) -> PortList:
    """Numbers, ranges and port names separated by commas; spaces do not matter. A text beyond all reason is wrong as a whole.

    Remembered, because it is asked for with each endpoint. Somebody may write a quarter of a megabyte, and another one every second, so it
    is few long texts that are.
    """
    if len(text) <= _USUAL_CHARS:
        return _usual(text)
    return _long(text) if len(text) <= _CHARS_MAX else PortList(wrong=(text[:80],))


def _read(text: str) -> PortList:
    ranges: list[tuple[int, int]] = []
    names: set[str] = set()
    wrong: list[str] = []
    for entry in (part.strip() for part in text.split(",", _ENTRIES_MAX)[:_ENTRIES_MAX]):
        first, dash, last = entry.partition("-")
        if not entry:
            continue
        if _is_port(first) and (not dash or (_is_port(last) and int(first) <= int(last))):
            ranges.append((int(first), int(last or first)))
        elif len(entry) <= 63 and entry.replace("-", "").isalnum() and entry.isascii() and not entry.replace("-", "").isdigit():
            names.add(entry)
        elif len(wrong) < _WRONG_SHOWN:
            wrong.append(entry[:80])
    return PortList(tuple(ranges), frozenset(names), tuple(wrong))


_usual = lru_cache(maxsize=4096)(_read)
_long = lru_cache(maxsize=64)(_read)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535


def nearest(key: str, *annotations: Mapping[str, str]) -> str | None:
    """The first of the annotation sets that has ``key`` decides, also when its value is wrong."""
    return next((found[key] for found in annotations if key in found), None)
