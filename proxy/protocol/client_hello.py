"""Reading just enough of a TLS ClientHello to know whom it is addressed to: server name and application protocols.

Nothing is verified here; the bytes are handed to OpenSSL, or passed on, exactly as they came.
"""

from __future__ import annotations

from typing import NamedTuple

HELLO_MAX = 16 * 1024  # a ClientHello with post-quantum shares is about 1.8 KiB; beyond this nobody is served
_RECORDS_MAX = 64  # libraries use one to three; what comes byte by byte is read anew for every byte
_RECORD_HANDSHAKE = 22
_CLIENT_HELLO = 1
_EXT_SERVER_NAME = 0
_EXT_ALPN = 16


class ClientHello(NamedTuple):
    """server_name: lower case, empty when absent. alpn: names offered, in order."""

    server_name: str
    alpn: tuple[bytes, ...]


class NotTls(ValueError):
    """These bytes are not the beginning of a ClientHello that we can read."""


def read_client_hello_untrusted(data: bytes) -> ClientHello | None:
    """The ClientHello at the start of ``data``; None while more bytes are needed; raises NotTls."""
    hello = _handshake(data)
    if hello is None:
        return None
    try:
        return _parse(hello)
    except IndexError:
        raise NotTls("truncated ClientHello") from None


def _handshake(data: bytes) -> bytes | None:
    """The body of the first handshake message, which may be split over records (RFC 8446 section 5.1)."""
    body = bytearray()
    offset = 0
    for _ in range(_RECORDS_MAX):
        prefix = data[offset : offset + 3]
        if (prefix and prefix[0] != _RECORD_HANDSHAKE) or (len(prefix) > 1 and prefix[1] != 3):
            raise NotTls("not a TLS handshake record")
        if len(data) < offset + 5:
            if offset > HELLO_MAX:
                raise NotTls("ClientHello is too long")
            return None
        length = int.from_bytes(data[offset + 3 : offset + 5], "big")
        if not 0 < length <= 16384:
            raise NotTls("bad record length")
        body += data[offset + 5 : offset + 5 + length]
        if body and body[0] != _CLIENT_HELLO:
            raise NotTls("not a ClientHello")
        if len(body) >= 4:
            size = int.from_bytes(body[1:4], "big")
            if size > HELLO_MAX:
                raise NotTls("ClientHello is too long")
            if len(body) >= 4 + size:
                return bytes(body[4 : 4 + size])
        if len(data) < offset + 5 + length:
            return None
        offset += 5 + length
    raise NotTls("ClientHello in too many records")


class _Reader:
    """A cursor over one vector; reading past its end raises IndexError."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, n: int) -> bytes:
        end = self.at + n
        if end > len(self.data):
            raise IndexError
        part = self.data[self.at : end]
        self.at = end
        return part

    def vector(self, length_bytes: int) -> _Reader:
        return _Reader(self.take(int.from_bytes(self.take(length_bytes), "big")))

    @property
    def more(self) -> bool:
        return self.at < len(self.data)


def _parse(hello: bytes) -> ClientHello:
    """Runs for every connection, so the dozen extensions of no interest are stepped over without a reader for each."""
    at = 2 + 32  # legacy_version, random
    at += 1 + hello[at]  # legacy_session_id
    at += 2 + _u16(hello, at)  # cipher_suites
    at += 1 + hello[at]  # legacy_compression_methods
    name = ""
    alpn: tuple[bytes, ...] = ()
    if at == len(hello):
        return ClientHello(name, alpn)
    end = at + 2 + _u16(hello, at)
    at += 2
    if end > len(hello):
        raise IndexError
    while at < end:
        kind, stop = _u16(hello, at), at + 4 + _u16(hello, at + 2)
        if stop > end:
            raise IndexError
        if kind == _EXT_SERVER_NAME:
            name = _server_name(_Reader(hello[at + 4 : stop]))
        elif kind == _EXT_ALPN:
            alpn = _alpn(_Reader(hello[at + 4 : stop]))
        at = stop
    return ClientHello(name, alpn)


def _u16(data: bytes, at: int) -> int:
    return data[at] << 8 | data[at + 1]


def _server_name(content: _Reader) -> str:
    names = content.vector(2)
    while names.more:
        kind = names.take(1)[0]
        value = names.vector(2).data
        if kind == 0:
            return value.decode("ascii", "replace").lower()
    return ""


def _alpn(content: _Reader) -> tuple[bytes, ...]:
    names = content.vector(2)
    found = []
    while names.more:
        found.append(names.vector(1).data)
    return tuple(found)
