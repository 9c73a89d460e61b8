"""The ClientHello as a real TLS library writes it, cut anywhere, split into records, and any other bytes."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.client_hello import HELLO_MAX, ClientHello, NotTls, read_client_hello_untrusted


def hello(name: str | None = "web.shop.sa.pillion.cluster.local", alpn: tuple[str, ...] = ("pillion-http/1.1", "h2")) -> bytes:
    """What OpenSSL sends first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(list(alpn))
    out = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


HELLO = hello()


def in_records(record: bytes, size: int) -> bytes:
    """The same handshake message in records of at most ``size`` bytes."""
    body = record[5:]
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(record[:3] + len(piece).to_bytes(2, "big") + piece for piece in pieces)


def test_a_real_one_says_whom_it_is_for_and_what_it_speaks() -> None:
    assert read_client_hello_untrusted(HELLO) == ClientHello("web.shop.sa.pillion.cluster.local", (b"pillion-http/1.1", b"h2"))


def test_one_without_name_or_protocols_is_read_too() -> None:
    assert read_client_hello_untrusted(hello(None, ())) == ClientHello("", ())


def test_every_beginning_of_one_asks_for_more() -> None:
    for length in range(len(HELLO)):
        assert read_client_hello_untrusted(HELLO[:length]) is None, length


@given(st.integers(len(HELLO) // 50, len(HELLO)))
def test_the_split_into_records_does_not_matter(size: int) -> None:
    assert read_client_hello_untrusted(in_records(HELLO, size)) == read_client_hello_untrusted(HELLO)


def test_one_in_records_of_a_byte_is_refused_before_it_costs_more_than_it_is_worth() -> None:
    bait = in_records(HELLO, 1)
    assert read_client_hello_untrusted(bait[: 60 * 6]) is None
    with pytest.raises(NotTls, match="too many records"):
        read_client_hello_untrusted(bait[: 70 * 6])


@given(st.binary(max_size=400))
def test_any_bytes_give_a_hello_or_the_one_error_or_a_wish_for_more(data: bytes) -> None:
    for attempt in (data, b"\x16\x03\x01" + data, HELLO[:9] + data):
        try:
            found = read_client_hello_untrusted(attempt)
        except NotTls:
            continue
        assert found is None or isinstance(found, ClientHello)


@given(st.integers(0, len(HELLO) - 1), st.integers(0, 255))
def test_one_changed_byte_never_escapes(at: int, value: int) -> None:
    changed = HELLO[:at] + bytes([value]) + HELLO[at + 1 :]
    try:
        found = read_client_hello_untrusted(changed)
    except NotTls:
        return
    assert found is None or isinstance(found, ClientHello)


@given(st.integers(HELLO_MAX + 1, 0xFFFFFF))
def test_one_that_announces_more_than_anybody_sends_is_refused_by_its_length(size: int) -> None:
    with pytest.raises(NotTls, match="too long"):
        read_client_hello_untrusted(b"\x16\x03\x01\x40\x00\x01" + size.to_bytes(3, "big"))
