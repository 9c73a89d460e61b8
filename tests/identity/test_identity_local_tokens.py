"""The local runner's tokens: what is issued is accepted, anything else is refused by name."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from core.names import WorkloadId
from identity.local_tokens import ISSUER, LocalReviewer, LocalSigner
from identity.tokens import Subject, TokenRefused
from identity.wire import AUDIENCE

SIGNER = LocalSigner.generate()
REVIEWER = LocalReviewer(SIGNER.public_pem, "cluster.local")


def issued(**overrides: Any) -> str:
    return SIGNER.issue("shop", "cart", "cart-0", "uid-1", time.time(), **overrides)


def claims(**overrides: Any) -> dict[str, Any]:
    found: dict[str, Any] = jwt.decode(issued(), options={"verify_signature": False})
    found.update(overrides)
    return {name: value for name, value in found.items() if value is not None}


def signed(**overrides: Any) -> str:
    return jwt.encode(claims(**overrides), SIGNER._key, algorithm="ES256")


def part(value: object) -> bytes:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")


def hs256_with_the_public_key() -> str:
    body = part({"alg": "HS256", "typ": "JWT"}) + b"." + part(claims())
    return (body + b"." + base64.urlsafe_b64encode(hmac.digest(SIGNER.public_pem, body, hashlib.sha256)).rstrip(b"=")).decode()


def bound(**overrides: Any) -> dict[str, Any]:
    return {"namespace": "shop", "pod": {"name": "cart-0", "uid": "u"}, "serviceaccount": {"name": "cart"}} | overrides


async def test_an_issued_token_stands_for_its_workload_and_pod() -> None:
    assert await REVIEWER.review(issued()) == Subject(WorkloadId("cluster.local", "shop", "cart"), "cart-0", "uid-1")


def test_an_issued_token_has_the_claims_of_kubernetes() -> None:
    found = claims()
    assert (found["iss"], found["aud"], found["sub"]) == (ISSUER, [AUDIENCE], "system:serviceaccount:shop:cart")
    assert found["kubernetes.io"] == {"namespace": "shop", "pod": {"name": "cart-0", "uid": "uid-1"}, "serviceaccount": {"name": "cart"}}
    assert found["exp"] - found["iat"] == 600
    assert jwt.get_unverified_header(issued())["alg"] == "ES256"


REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "another audience": (lambda: issued(audience="https://kubernetes.default.svc"), "not meant for identity.pillion.dev"),
    "no audience": (lambda: signed(aud=None), "not meant for|MissingRequiredClaim"),
    "expired": (lambda: SIGNER.issue("shop", "cart", "cart-0", "u", time.time() - 700), "has expired"),
    "no expiry": (lambda: signed(exp=None), "MissingRequiredClaim"),
    "from the future": (lambda: SIGNER.issue("shop", "cart", "cart-0", "u", time.time() + 700), "ImmatureSignature"),
    "another key": (lambda: LocalSigner.generate().issue("shop", "cart", "cart-0", "u", time.time()), "not signed with the key"),
    "alg none": (lambda: jwt.encode(claims(), "", algorithm="none"), "InvalidAlgorithm"),
    "alg None in odd case": (lambda: (part({"alg": "nOnE"}) + b"." + part(claims()) + b".").decode(), "InvalidAlgorithm"),
    "HS256 with the public key": (hs256_with_the_public_key, "InvalidAlgorithm"),
    "ES384": (lambda: jwt.encode(claims(), ec.generate_private_key(ec.SECP384R1()), algorithm="ES384"), "InvalidAlgorithm"),
    "another issuer": (lambda: signed(iss="https://kubernetes.default.svc"), "InvalidIssuer"),
    "no subject": (lambda: signed(sub=None), "MissingRequiredClaim"),
    "a user": (lambda: signed(sub="admin"), "not to a service account"),
    "a node": (lambda: signed(sub="system:node:shop:cart"), "not to a service account"),
    "a namespace with a colon": (lambda: signed(sub="system:serviceaccount:shop:cart:x"), "not to a service account"),
    "a namespace that is no label": (lambda: signed(sub="system:serviceaccount:../x:cart"), "not a valid name"),
    "a foreign namespace in the binding": (lambda: signed(**{"kubernetes.io": bound(namespace="bank")}), "disagree about namespace"),
    "a foreign account in the binding": (lambda: signed(**{"kubernetes.io": bound(serviceaccount={"name": "web"})}), "disagree about"),
    "no pod": (lambda: signed(**{"kubernetes.io": bound(pod=None)}), "not bound to a pod"),
    "a pod without uid": (lambda: signed(**{"kubernetes.io": bound(pod={"name": "cart-0"})}), "no pod uid"),
    "a pod uid that is a list": (lambda: signed(**{"kubernetes.io": bound(pod={"name": "cart-0", "uid": ["u"]})}), "no pod uid"),
    "no binding": (lambda: signed(**{"kubernetes.io": None}), "not bound to a pod"),
    "a binding that is a text": (lambda: signed(**{"kubernetes.io": "shop"}), "not bound to a pod"),
    "too long": (lambda: signed(padding="x" * 9000), "empty or too long"),
    "empty": (lambda: "", "empty or too long"),
    "not a token": (lambda: "a.b.c", "not a token of this mesh"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_refusal_says_why_and_never_repeats_the_token(case: str) -> None:
    make, expected = REFUSED[case]
    token = make()
    with pytest.raises(TokenRefused, match=expected) as refused:
        REVIEWER.review_untrusted(token)
    assert not token or token not in refused.value.reason


@given(st.text(max_size=300) | st.binary(max_size=200).map(lambda data: base64.urlsafe_b64encode(data).decode()))
def test_any_text_is_refused(token: str) -> None:
    with pytest.raises(TokenRefused):
        REVIEWER.review_untrusted(token)


@given(st.integers(0, 500), st.sampled_from("abcXYZ019-_.="))
def test_a_token_changed_anywhere_is_refused_or_means_the_same(at: int, letter: str) -> None:
    token = issued()
    changed = token[: at % len(token)] + letter + token[at % len(token) + 1 :]
    try:
        # The last digit of base64 has spare bits: several letters spell the same signature.
        assert REVIEWER.review_untrusted(changed) == REVIEWER.review_untrusted(token)
    except TokenRefused:
        pass


def test_the_private_key_is_written_for_its_owner_only_and_never_over_another(tmp_path: Path) -> None:
    path = tmp_path / "token.key"
    SIGNER.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert LocalSigner.load(path).public_pem == SIGNER.public_pem
    with pytest.raises(FileExistsError):
        LocalSigner.generate().save(path)
    path.chmod(0o640)
    with pytest.raises(PermissionError, match="chmod 600"):
        LocalSigner.load(path)


@pytest.mark.parametrize("pem", [b"", b"nonsense"])
def test_a_reviewer_needs_a_p256_key(pem: bytes) -> None:
    with pytest.raises(ValueError):
        LocalReviewer(pem, "cluster.local")
