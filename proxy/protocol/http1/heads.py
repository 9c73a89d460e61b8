"""Heads of HTTP/1.1 messages as values: what was read of them, and the bytes to send on.

Theory of operation. A head is never taken apart and put together again. What is sent on is the received byte string: fields that end at
this hop are cut out of it (`without`), fields of ours are inserted before its last CRLF (edits.py). Most heads need neither, and go on as
the very bytes that came. Pure; made by parse.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from core.spelling import Spellings
from proxy.protocol.requests import IDEMPOTENT
from proxy.rescue import Cause

CHUNKED: Final = -1
"""Length of a body framed by chunks."""
UNTIL_CLOSE: Final = -2
"""Length of a response body that ends with its connection."""

_SEARCHED: Final = 8  # so many names are searched for one by one

TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
FIELD: Final = TOKEN + rb"++:[\t\x20-\x7e\x80-\xff]*+\r\n"


class HeadError(Exception):
    """A head that is refused. cause: what the peer is answered; the text: which rule, for the log."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail


class RequestHead:
    """A request head as decisions see it (requests.RequestHead), with what the engine itself needs to know.

    size: bytes it took on the wire. wire: the bytes to send on, without the fields that ended at this hop. length: bytes of body, or
    CHUNKED. keep: the client wants its connection kept. old: HTTP/1.0. expects: the client waits for a 100. upgrades: a 101 may follow.
    plain: nothing about it changes how a response is read or sent on. ordinary: after Host comes no field that decides anything, and none
    of the names that are ours (pillion-).
    """

    # Defaults of the class, not of each instance: most heads differ from few of them, and making one is on the path of every request.
    length = 0
    keep = True
    bodiless = True
    plain = True
    grpc = False
    old = False
    expects = False
    upgrades = False
    connects = False
    ordinary = False
    _lower: bytes | None = None

    def __init__(self, size: int, method: bytes, target: bytes, authority: bytes, wire: bytes) -> None:
        self.size = size
        self.method = method
        self.target = target
        self.authority = authority
        self.wire = wire

    @property
    def lower(self) -> bytes:
        """`wire` in lower case, made when it is first asked for."""
        if self._lower is None:
            self._lower = self.wire.lower()
        return self._lower

    def replace(self, wire: bytes) -> None:
        """These are the bytes to send on, instead of the others."""
        self.wire = wire
        self._lower = None

    @property
    def replayable(self) -> bool:
        """Whether it can be sent twice: its method is idempotent, and it has no body that would be used up by the first time."""
        return self.bodiless and not self.upgrades and self.method in IDEMPOTENT

    def values(self, names: tuple[bytes, ...]) -> tuple[bytes | None, ...]:
        """See requests.RequestHead. Fields that end at this hop are not seen."""
        return tuple(map(self._value, names)) if len(names) <= _SEARCHED else self._values(names)

    def respelled(self, names: Spellings) -> bool:
        """See requests.RequestHead."""
        return names.search_head(self.lower) is not None

    def _values(self, names: tuple[bytes, ...]) -> tuple[bytes | None, ...]:
        """The same for many names, in one pass over the fields: a search through all of the head for each would take milliseconds."""
        wanted = frozenset(names)
        found: dict[bytes, bytes] = {}
        for line in self.wire[self.wire.index(b"\n") + 1 :].split(b"\r\n"):
            field, _, value = line.partition(b":")
            name = field.lower()
            if name in wanted:
                value = value.strip(b" \t")
                found[name] = found[name] + (b"; " if name == b"cookie" else b"\n") + value if name in found else value
        if self.authority:
            found.setdefault(b"host", self.authority)
        return tuple([found.get(name) for name in names])

    def _value(self, name: bytes) -> bytes | None:
        key = b"\n" + name + b":"
        lower = self.lower
        at = lower.find(key)
        if at < 0:
            return (self.authority or None) if name == b"host" else None  # HTTP/1.0 may say it in its target only
        end = self.wire.index(b"\r", at)
        value = self.wire[at + len(key) : end].strip(b" \t")
        while (at := lower.find(key, end)) >= 0:
            end = self.wire.index(b"\r", at)
            value += (b"; " if name == b"cookie" else b"\n") + self.wire[at + len(key) : end].strip(b" \t")
        return value


class ResponseHead:
    """A response head. size: bytes it took on the wire; received: those bytes. wire: those to send on but for its Connection field.

    length: bytes of body if there is one at all (HEAD, 204 and 304 have none), CHUNKED or UNTIL_CLOSE. keep: the upstream keeps the
    connection. old: HTTP/1.0. connection: its Connection field, lower case. plain: can be sent on as received, ends by its length.
    error: why a sidecar says that it answered itself, None when it does not.
    """

    length = UNTIL_CLOSE
    keep = True
    plain = True
    old = False
    connection = b""
    error: bytes | None = None

    def __init__(self, size: int, status: int, wire: bytes) -> None:
        self.size = size
        self.status = status
        self.wire = self.received = wire


def without(head: bytes, names: Iterable[bytes]) -> bytes:
    """``head`` with every field of these lower-case names cut out."""
    lower = head.lower()
    cuts: list[tuple[int, int]] = []
    for name in names:
        key = b"\n" + name + b":"
        end = 0
        while (at := lower.find(key, end)) >= 0:
            end = lower.index(b"\n", at + 1)
            cuts.append((at, end))
    if not cuts:
        return head
    cuts.sort()
    kept, before = [], 0
    for at, end in cuts:
        kept.append(head[before:at])
        before = end
    return b"".join(kept) + head[before:]
