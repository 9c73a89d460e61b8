"""Typed settings from a mapping such as the environment: every setting is declared once, and all errors are reported at once.

A component declares its settings as the fields of a frozen dataclass and calls `load` when it starts (and for ``--check-config``):

    @dataclass(frozen=True)
    class Config:
        listen: ListenAddr = setting("PILLION_LISTEN", listen_addr, default="[::]:4143", reason="where meshed peers connect")

    config = load(Config, os.environ)

Reading only: nothing here looks at the process or changes it. Unknown variables are not errors, because Kubernetes adds
``PILLION_IDENTITY_PORT`` and the like to every pod of a namespace with a Service of that name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from core.addrs import InvalidAddr, ListenAddr, parse_addr

T = TypeVar("T")

_SHOWN_CHARS = 80  # of a wrong value: enough to recognise it, bounded because it goes into a log
_METADATA = "setting"


class Setting(NamedTuple):
    """The declaration of one setting. default: its text, None when it must be given. unit: of a number, else empty."""

    name: str
    parse: Callable[[str], object]
    default: str | None
    unit: str
    reason: str


class InvalidSettings(ValueError):
    """Everything that is wrong with the settings, one sentence for each in ``problems``."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class HostPort(NamedTuple):
    """Where to dial: an IP address (without brackets) or a DNS name, and a port, 1 to 65535."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def setting(name: str, parse: Callable[[str], T], *, default: str | None = None, unit: str = "", reason: str) -> T:
    """Declare a field of a settings dataclass.

    parse: from the text to the value; raises ValueError that says what it expected. default: as text, so that documentation shows what
    a person would write; None makes the setting required. reason: what it is for, in a few words.
    """
    field: Any = dataclasses.field(metadata={_METADATA: Setting(name, parse, default, unit, reason)})
    typed: T = field
    return typed


def settings_of(cls: type[Any]) -> list[Setting]:
    """The declarations of a settings class, in order: for documentation and ``--help``."""
    return [field.metadata[_METADATA] for field in dataclasses.fields(cls) if _METADATA in field.metadata]


def load(cls: type[T], values: Mapping[str, str]) -> T:
    """Read every setting of ``cls``; raises InvalidSettings naming each one that is missing or wrong.

    A variable that is set but empty counts as not set, as an orchestrator's templates often leave it so.
    """
    found: dict[str, object] = {}
    problems: list[str] = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # a dataclass, which a TypeVar cannot say
        declared: Setting = field.metadata[_METADATA]
        text = values.get(declared.name) or declared.default
        if text is None:
            problems.append(f"{declared.name} is not set: {declared.reason}")
            continue
        try:
            found[field.name] = declared.parse(text)
        except ValueError as error:
            problems.append(f"{declared.name}={_shown(text)}: {error}")
    if problems:
        raise InvalidSettings(tuple(problems))
    return cls(**found)


def describe(cls: type[Any]) -> str:
    """A line for each setting: name, default or ``(required)``, unit, reason."""
    rows = [(s.name, "(required)" if s.default is None else repr(s.default), s.unit, s.reason) for s in settings_of(cls)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")


# --- parsers -------------------------------------------------------------------------------------------------------------------------


def text(value: str) -> str:
    """Any text, surrounding white space removed."""
    return value.strip()


def one_of(*choices: str) -> Callable[[str], str]:
    """One of the given words, in any case."""

    def parse(value: str) -> str:
        word = value.strip().lower()
        if word not in choices:
            raise ValueError(f"expected {', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else f"expected {choices[0]}")
        return word

    return parse


def boolean(value: str) -> bool:
    """``true`` or ``false``; nothing else, because a typo must not mean false."""
    return one_of("true", "false")(value) == "true"


def integer(least: int, most: int) -> Callable[[str], int]:
    """A decimal number within bounds, both included."""

    def parse(value: str) -> int:
        digits = value.strip()
        # isdigit bounds what int() sees; 18 digits is more than any bound of ours and far below int()'s own limit
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 18) or not least <= int(digits) <= most:
            raise ValueError(f"expected a whole number from {least} to {most}")
        return int(digits)

    return parse


def number(least: float, most: float) -> Callable[[str], float]:
    """A decimal number within bounds, both included; fractions allowed."""

    def parse(value: str) -> float:
        try:
            found = float(value)
        except ValueError:
            found = float("nan")
        if not least <= found <= most:  # also false for NaN
            raise ValueError(f"expected a number from {least:g} to {most:g}")
        return found

    return parse


def milliseconds(least: int, most: int) -> Callable[[str], float]:
    """A whole number of milliseconds, returned in seconds: what timers take."""
    parse_whole = integer(least, most)
    return lambda value: parse_whole(value) / 1000


def comma_list(parse: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Values between commas; empty parts are skipped."""

    def parse_all(value: str) -> tuple[T, ...]:
        return tuple(parse(part.strip()) for part in value.split(",") if part.strip())

    return parse_all


port = integer(1, 65535)


def listen_addr(value: str) -> ListenAddr:
    """``[::]:4143`` or ``127.0.0.1:4143``; port 0 lets the kernel choose."""
    try:
        return ListenAddr(parse_addr(value.strip()))
    except InvalidAddr as error:
        raise ValueError(str(error).partition(": ")[2] or "expected IP:PORT, with an IPv6 address in brackets") from None


def host_port(value: str) -> HostPort:
    """``identity.pillion.svc:8080``, ``10.0.0.1:8080`` or ``[fd00::1]:8080``."""
    host, colon, digits = value.strip().rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in host and bare is host) or any(c.isspace() or c == "/" for c in bare):
        raise ValueError("expected HOST:PORT, with an IPv6 address in brackets")
    try:
        return HostPort(bare, port(digits))
    except ValueError:
        raise ValueError("expected a port from 1 to 65535 behind the colon") from None


def json_object(value: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("expected a JSON object; this is not JSON") from None
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object")
    return found
