"""TLS records for the relay loop: from ciphertext to plaintext and back, through OpenSSL's memory BIOs, without waiting for anything.

The relay reads a socket once into `RECEIVE_BUFFER` and asks `decrypt` for what was inside; it asks `encrypt` for the records of
what is to be sent. Two implementations with one behaviour:

* `FastRecords` calls the library functions below pyOpenSSL's methods, which allocate a buffer of the maximum size for each call.
  Measured on the HTTP/1.1 pair: 0.88x the requests per second without it.
* `PortableRecords` uses pyOpenSSL's public methods only. It is what runs when the names below are gone from a later pyOpenSSL.

A connection arrives here after its handshake. Bytes that came with the handshake's last flight are still in the BIO: callers ask
`decrypt(0)` once.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from OpenSSL import SSL
from OpenSSL import _util as _openssl

READ_MAX: Final = 256 * 1024
"""The most that one read of a socket takes; also the most plaintext that one `encrypt` accepts."""

RECORD_OVERHEAD: Final = 22  # header 5, content type 1, tag 16 (RFC 8446 section 5.2)
_RECORD_PLAINTEXT: Final = 16384
_PLAIN_BYTES: Final = READ_MAX + 2 * _RECORD_PLAINTEXT  # of one read, and of a record whose beginning came with the read before
_SEND_BYTES: Final = READ_MAX + (READ_MAX // _RECORD_PLAINTEXT + 2) * RECORD_OVERHEAD

_SSL_ERROR_WANT_READ: Final = 2
_SSL_ERROR_ZERO_RETURN: Final = 6


class TlsBroken(Exception):
    """A record that does not verify, an alert, or a call on a dead connection: nothing more can be read or written."""


class Records(Protocol):
    """One connection's records. ``ended`` is True once the peer's close_notify was read."""

    ended: bool

    def decrypt(self, length: int) -> bytes:
        """The plaintext of everything readable now, given that ``length`` new bytes lie in RECEIVE_BUFFER; raises TlsBroken."""
        ...

    def encrypt(self, data: bytes | memoryview) -> bytes | memoryview:
        """The records that carry ``data`` (at most READ_MAX bytes). The result is valid until the next call; raises TlsBroken."""
        ...

    def close_notify(self) -> bytes:
        """The record that ends our direction."""
        ...

    def output(self) -> bytes:
        """What OpenSSL wants sent by itself (answers to key updates, alerts); mostly nothing."""
        ...

    def slim(self) -> None:
        """Give back what buffers hold beyond their contents; for connections that have fallen silent."""
        ...


# All Final: compiled code then loads them without a look-up in the module's dictionary.
_ffi: Final[Any] = _openssl.ffi
_lib: Final[Any] = _openssl.lib
_receive: Final[Any] = _ffi.new("char[]", READ_MAX)
_plain: Final[Any] = _ffi.new("char[]", _PLAIN_BYTES)
_send: Final[Any] = _ffi.new("char[]", _SEND_BYTES)
_plain_view: Final[Any] = _ffi.buffer(_plain, _PLAIN_BYTES)

RECEIVE_BUFFER: Final[memoryview] = memoryview(_ffi.buffer(_receive, READ_MAX))
_SEND_VIEW: Final[memoryview] = memoryview(_ffi.buffer(_send, _SEND_BYTES))

# Bound once: attribute look-ups on cffi's lib object cost as much as the calls.
_SSL_read: Final[Any] = _lib.SSL_read
_SSL_write: Final[Any] = _lib.SSL_write
_SSL_get_error: Final[Any] = _lib.SSL_get_error
_SSL_shutdown: Final[Any] = _lib.SSL_shutdown
_BIO_read: Final[Any] = _lib.BIO_read
_BIO_write: Final[Any] = _lib.BIO_write
_ERR_clear_error: Final[Any] = _lib.ERR_clear_error


class FastRecords:
    """Records by direct calls of SSL_read, SSL_write, BIO_read and BIO_write on process-wide buffers.

    Keeps OpenSSL's object only: pyOpenSSL's around it costs an idle connection 1 KB, and nothing calls back into it after a handshake.
    """

    __slots__ = ("_into", "_out", "_ssl", "ended")

    def __init__(self, connection: SSL.Connection) -> None:
        raw: Any = connection
        self._ssl = raw._ssl  # owns what the other two point to
        self._into, self._out = raw._into_ssl, raw._from_ssl
        self.ended = False
        self.slim()

    def decrypt(self, length: int) -> bytes:
        ssl = self._ssl
        if length:
            _BIO_write(self._into, _receive, length)
        n: int = _SSL_read(ssl, _plain, _PLAIN_BYTES)
        if n > 0 and n + RECORD_OVERHEAD == length:
            return _plain_view[:n]  # type: ignore[no-any-return]  # exactly one record: another read would only say "want read"
        size = 0
        while n > 0:  # a call gives at most one record
            size += n
            n = _SSL_read(ssl, _plain + size, _PLAIN_BYTES - size)
        error = _SSL_get_error(ssl, n)
        if error == _SSL_ERROR_ZERO_RETURN:
            self.ended = True
        elif error != _SSL_ERROR_WANT_READ:
            _ERR_clear_error()
            if not size:
                raise TlsBroken("TLS record refused")
        return _plain_view[:size]  # type: ignore[no-any-return]

    def encrypt(self, data: bytes | memoryview) -> bytes | memoryview:
        source = data if isinstance(data, bytes) else _ffi.from_buffer(data)
        if _SSL_write(self._ssl, source, len(data)) <= 0:
            _ERR_clear_error()
            raise TlsBroken("TLS connection takes no more data")
        n = _BIO_read(self._out, _send, _SEND_BYTES)
        return _SEND_VIEW[:n]

    def close_notify(self) -> bytes:
        if _SSL_shutdown(self._ssl) < 0:
            _ERR_clear_error()
            return b""  # already broken: RST or FIN says the rest
        return self.output()

    def output(self) -> bytes:
        n = _BIO_read(self._out, _send, _SEND_BYTES)
        return bytes(_SEND_VIEW[:n]) if n > 0 else b""

    def slim(self) -> None:
        """Fresh memory BIOs: one never gives back what it once held, a handshake's flight or 256 KiB of a body. Contents move along."""
        self._into, self._out = _moved(self._into), _moved(self._out)
        _lib.SSL_set_bio(self._ssl, self._into, self._out)  # takes ownership, frees the old ones


def _moved(old: Any) -> Any:
    """A new BIO with what is left in the old one, which mostly is nothing: OpenSSL takes all that it is given."""
    bio = _lib.BIO_new(_lib.BIO_s_mem())
    _lib.BIO_set_mem_eof_return(bio, -1)
    while (n := _BIO_read(old, _receive, READ_MAX)) > 0:
        _BIO_write(bio, _receive, n)
    return bio


class PortableRecords:
    """Records by pyOpenSSL's public methods."""

    __slots__ = ("_connection", "ended")

    def __init__(self, connection: SSL.Connection) -> None:
        self._connection = connection
        self.ended = False

    def decrypt(self, length: int) -> bytes:
        if length:
            self._connection.bio_write(bytes(RECEIVE_BUFFER[:length]))
        parts: list[bytes] = []
        try:
            while True:
                parts.append(self._connection.recv(READ_MAX))
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            self.ended = True
        except SSL.Error as error:
            if not parts:
                raise TlsBroken("TLS record refused") from error
        return b"".join(parts)

    def encrypt(self, data: bytes | memoryview) -> bytes | memoryview:
        try:
            self._connection.sendall(bytes(data))
        except SSL.Error as error:
            raise TlsBroken("TLS connection takes no more data") from error
        return self.output()

    def close_notify(self) -> bytes:
        try:
            self._connection.shutdown()
        except SSL.Error:
            return b""  # already broken: RST or FIN says the rest
        return self.output()

    def output(self) -> bytes:
        try:
            return self._connection.bio_read(_SEND_BYTES)
        except SSL.WantReadError:
            return b""

    def slim(self) -> None:
        """Nothing public does it."""


class _NoRecords:
    """Replaces the records of a closed connection, so that its OpenSSL object (34 KB) is freed at once, not by the cycle collector."""

    __slots__ = ()
    ended = False

    def decrypt(self, length: int) -> bytes:
        raise TlsBroken("the connection is closed")

    def encrypt(self, data: bytes | memoryview) -> bytes | memoryview:
        raise TlsBroken("the connection is closed")

    def close_notify(self) -> bytes:
        return b""

    def output(self) -> bytes:
        return b""

    def slim(self) -> None:
        """Nothing is left."""


NO_RECORDS: Final[Records] = _NoRecords()


def records(connection: SSL.Connection) -> Records:
    """The records of an established connection, by the fastest way this pyOpenSSL offers."""
    try:
        return FastRecords(connection)
    except AttributeError:
        return PortableRecords(connection)
