"""An operator's files: followed live, step by step, and never into a broken state."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric import ec

from core.names import WorkloadId
from identity.authority import Authority
from identity.bundle import Step
from identity.given import GivenFiles, follow_files
from identity.issuer import Issuer, IssuerInvalid, Pair, make_issuer, make_root
from identity.store import Store
from identity.tokens import Subject
from tests.identity.identity_lab import TRUST_DOMAIN

NOW = time.time()
CART = Subject(WorkloadId(TRUST_DOMAIN, "shop", "cart"), "cart-0", "uid-1")
OLD, NEW = make_root(TRUST_DOMAIN, NOW), make_root(TRUST_DOMAIN, NOW)
OLD_ISSUER, NEW_ISSUER = make_issuer(TRUST_DOMAIN, OLD, NOW), make_issuer(TRUST_DOMAIN, NEW, NOW)

KEY = ec.generate_private_key(ec.SECP256R1()).public_key()


def write(directory: Path, issuer: Issuer, *anchors: Pair) -> GivenFiles:
    """As kubelet does: a new directory, then one symlink swapped."""
    version = directory / f"..{len(list(directory.iterdir()))}"
    version.mkdir()
    (version / "tls.crt").write_bytes(issuer.pair.certificate_pem)
    key = os.open(version / "tls.key", os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(key, "wb") as file:
        file.write(issuer.pair.key_pem)
    (version / "ca.crt").write_bytes(b"".join(anchor.certificate_pem for anchor in anchors))
    swap = directory / "..next"
    swap.symlink_to(version.name)
    swap.rename(directory / "..data")
    for name in ("tls.crt", "tls.key", "ca.crt"):
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(f"..data/{name}")
    return GivenFiles.in_directory(directory)


def given(files: GivenFiles, store: Store | None = None) -> Authority:
    return Authority.given(TRUST_DOMAIN, *files.read(NOW), store)


def anchors_of(authority: Authority) -> bytes:
    return authority.trust.value.bundle_pem


def test_the_files_are_what_signs_and_what_is_trusted(tmp_path: Path) -> None:
    authority = given(write(tmp_path, OLD_ISSUER, OLD))
    assert authority.issuer.pair.certificate == OLD_ISSUER.pair.certificate
    assert anchors_of(authority) == OLD.certificate_pem


def test_files_that_change_all_at_once_break_nobody(tmp_path: Path) -> None:
    authority = given(write(tmp_path, OLD_ISSUER, OLD))
    authority.certify(KEY, CART)
    authority.report(CART, 1, OLD_ISSUER.ref.id)
    files = write(tmp_path, NEW_ISSUER, NEW)
    [waiting] = authority.converge(*files.read(NOW))
    assert "shop/cart-0" in waiting
    assert anchors_of(authority) == OLD.certificate_pem + NEW.certificate_pem
    assert authority.issuer.pair.certificate == OLD_ISSUER.pair.certificate
    authority.report(CART, 2, OLD_ISSUER.ref.id)
    [waiting] = authority.converge(*files.read(NOW))
    assert "below the old anchor" in waiting
    assert authority.issuer.pair.certificate == NEW_ISSUER.pair.certificate
    authority.certify(KEY, CART)
    assert len(authority.converge(*files.read(NOW))) == 1  # handed out is not yet in use
    authority.report(CART, 2, NEW_ISSUER.ref.id)
    assert authority.converge(*files.read(NOW)) == []
    assert anchors_of(authority) == NEW.certificate_pem
    assert authority.trust.value.generation == 3


def test_an_anchor_that_the_files_keep_stays(tmp_path: Path) -> None:
    authority = given(write(tmp_path, OLD_ISSUER, OLD))
    assert authority.converge(*write(tmp_path, OLD_ISSUER, OLD, NEW).read(NOW)) == []
    assert authority.converge(*write(tmp_path, OLD_ISSUER, OLD, NEW).read(NOW)) == []
    assert (anchors_of(authority), authority.trust.value.generation) == (OLD.certificate_pem + NEW.certificate_pem, 2)


def test_a_new_issuer_below_the_same_anchor_is_used_at_once(tmp_path: Path) -> None:
    authority = given(write(tmp_path, OLD_ISSUER, OLD))
    authority.report(CART, 0, OLD_ISSUER.ref.id)
    renewed = make_issuer(TRUST_DOMAIN, OLD, NOW)
    assert authority.converge(*write(tmp_path, renewed, OLD).read(NOW)) == []
    assert authority.issuer.pair.certificate == renewed.pair.certificate
    assert authority.trust.value.generation == 1


def test_a_restart_in_mid_rotation_still_signs_with_what_everybody_trusts(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    authority = given(write(tmp_path / "given", OLD_ISSUER, OLD), Store(tmp_path / "ca"))
    authority.report(CART, 1, OLD_ISSUER.ref.id)
    files = write(tmp_path / "given", NEW_ISSUER, NEW)
    authority.converge(*files.read(NOW))
    again = given(files, Store(tmp_path / "ca"))
    assert again.issuer.pair.certificate == OLD_ISSUER.pair.certificate
    assert anchors_of(again) == OLD.certificate_pem + NEW.certificate_pem
    assert len(again.blocking()) == 1


def test_an_issuer_that_has_expired_is_left_without_waiting(tmp_path: Path) -> None:
    now = [NOW]
    files = write(tmp_path, OLD_ISSUER, OLD)
    authority = Authority.given(TRUST_DOMAIN, *files.read(NOW), None, clock=lambda: now[0])
    now[0] = OLD_ISSUER.not_after + 1
    late = make_issuer(TRUST_DOMAIN, NEW, now[0])
    authority.report(CART, 1, OLD_ISSUER.ref.id)
    authority.converge(*write(tmp_path, late, OLD, NEW).read(now[0]))
    assert authority.issuer.pair.certificate == late.pair.certificate


def test_steps_by_hand_are_for_self_made_authorities(tmp_path: Path) -> None:
    refusal = given(write(tmp_path, OLD_ISSUER, OLD)).rotate(Step.ADD)
    assert refusal is not None
    assert "the issuer is given" in refusal.sentence


async def test_a_swapped_secret_is_noticed_and_a_bad_one_changes_nothing(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write(tmp_path, OLD_ISSUER, OLD)
    authority = given(files)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow_files, files, authority)
        await trio.sleep(5)
        before = authority.trust.value
        write(tmp_path, OLD_ISSUER, NEW)  # the issuer does not fit the anchors
        await trio.sleep(5)
        assert authority.trust.value == before
        write(tmp_path, NEW_ISSUER, NEW)
        await trio.sleep(5)
        assert anchors_of(authority) == NEW.certificate_pem
        nursery.cancel_scope.cancel()
    assert capsys.readouterr().out.count("does not end in any of the trust anchors") == 1


async def test_a_full_disk_stops_nothing_and_is_tried_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given").mkdir()
    files = write(tmp_path / "given", OLD_ISSUER, OLD)
    authority = given(files, Store(tmp_path / "ca"))
    write(tmp_path / "given", NEW_ISSUER, NEW)
    async with trio.open_nursery() as nursery:
        with monkeypatch.context() as full:
            full.setattr(Store, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            nursery.start_soon(follow_files, files, authority)
            await trio.sleep(10)
            assert anchors_of(authority) == OLD.certificate_pem
        await trio.sleep(10)
        assert anchors_of(authority) == NEW.certificate_pem
        nursery.cancel_scope.cancel()


def test_a_key_that_everybody_may_read_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path, OLD_ISSUER, OLD)
    files.key.resolve().chmod(0o644)
    with pytest.raises(IssuerInvalid, match="defaultMode"):
        files.read(NOW)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IssuerInvalid, match=r"tls\.crt cannot be read"):
        GivenFiles.in_directory(tmp_path).read(NOW)
