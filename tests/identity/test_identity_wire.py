"""The messages of the service: any bytes are a message or the one error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.wire import WireError, bundle_untrusted, certified_untrusted, certify_request_untrusted


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_the_one_error(data: bytes) -> None:
    for read in (certify_request_untrusted, certified_untrusted, bundle_untrusted):
        try:
            read(data)
        except WireError:
            pass


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"csr": 1}', b'{"csr": "a", "more": 1}', b'{"csr": null}', b"[" * 10_000, b'{"csr":"\xff"}']
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        certify_request_untrusted(data)
