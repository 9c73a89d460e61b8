"""Logs: structlog, as JSON or for a console, to standard error; the level can change while the process runs.

Every program calls `configure` once when it starts; every module takes a `logger` and logs events (a few words, the same ones each
time) with fields. What comes from outside is made printable and bounded here, so that no caller has to remember it. Nothing secret is
ever logged: that is the callers' duty, and fields named like one are blanked out as a second line.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Literal

import msgspec


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Let an import do without modules it names but we never reach.

    structlog imports asyncio for its ``ainfo`` methods and rich for coloured tracebacks. Together they are 6 MB in every sidecar,
    ten times structlog itself. Modules that are loaded already stay as they are.
    """
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        sys.modules[name] = types.ModuleType(name)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


with _without("asyncio", "rich"):
    import structlog
    import structlog.dev

Level = Literal["debug", "info", "warning", "error"]
Event = MutableMapping[str, Any]
Logger = structlog.typing.FilteringBoundLogger

LEVELS: dict[str, int] = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_METHODS = {**LEVELS, "exception": 40, "warn": 30, "critical": 50}
_TEXT_CHARS_MAX = 2048
_SECRET_FIELDS = frozenset({"token", "password", "authorization", "cookie", "key", "key_pem", "private_key", "secret"})
_ACCESS = "access"  # in these records ``authorization`` is the policy that let a request in (docs/access-log.md), never a header


class _Threshold:
    """The process has one level; a plain attribute, because it is read for every event."""

    number = LEVELS["info"]


def configure(level: str = "info", style: str = "json", write: Callable[[str], object] | None = None) -> None:
    """Set up logging for this process. level: a key of LEVELS. style: ``json`` or ``console``. write: takes a line; default stderr."""
    set_level(level)
    colors = write is None and sys.stderr.isatty()
    render: Any = (
        structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback, pad_event_to=0)
        if style == "console"
        else _render_json
    )
    sink = write or _write_stderr
    structlog.configure(
        processors=[
            _drop_below_threshold,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if style == "console" else [structlog.processors.format_exc_info]),
            _make_safe,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(0),
        logger_factory=lambda *_: _LineLogger(sink),
        cache_logger_on_first_use=False,
    )


def logger(component: str) -> Logger:
    """The logger of a component (``inbound``, ``identity`` ...), which becomes a field."""
    found: Logger = structlog.get_logger(component=component)
    return found


def level() -> str:
    """The level now."""
    return next(name for name, number in LEVELS.items() if number == _Threshold.number)


def set_level(name: str) -> None:
    """Change the level of the process from the next event on; raises ValueError for a name that is not in LEVELS."""
    if name not in LEVELS:
        raise ValueError(f"log level {name!r}: expected {', '.join(LEVELS)}")
    _Threshold.number = LEVELS[name]


class _LineLogger:
    """The end of structlog's chain: hands a finished line to the sink, whatever the level was."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write

    def msg(self, line: str) -> None:
        self._write(line + "\n")

    debug = info = warning = warn = error = exception = critical = fatal = log = msg


def _write_stderr(line: str) -> None:
    # found at each call: tests and redirections replace sys.stderr
    sys.stderr.write(line)
    sys.stderr.flush()


def _drop_below_threshold(_: object, method: str, event: Event) -> Event:
    if _METHODS.get(method, 50) < _Threshold.number:
        raise structlog.DropEvent
    return event


def _make_safe(_: object, __: str, event: Event) -> Event:
    for name, value in event.items():
        if name in _SECRET_FIELDS and not (name == "authorization" and event["event"] == _ACCESS):
            event[name] = "(not logged)"
        elif isinstance(value, str):
            if name != "exception" and not (value.isprintable() and len(value) <= _TEXT_CHARS_MAX):
                event[name] = _printable(value)
        elif isinstance(value, (bytes, bytearray, memoryview)):
            event[name] = _printable(bytes(value[:_TEXT_CHARS_MAX]).decode("latin-1"))
    return event


def _printable(value: str) -> str:
    """Without control characters: an escape sequence from a peer must not reach somebody's terminal."""
    short = value if len(value) <= _TEXT_CHARS_MAX else value[:_TEXT_CHARS_MAX] + "..."
    return short if short.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def _render_json(_: object, __: str, event: Event) -> str:
    ordered = {"timestamp": event.pop("timestamp"), "level": event.pop("level"), "event": event.pop("event"), **event}
    return msgspec.json.encode(ordered, enc_hook=str).decode("utf-8", "replace")
