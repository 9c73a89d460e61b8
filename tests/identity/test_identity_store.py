"""What is kept on disk: privately, whole, and readable again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from identity.authority import Authority
from identity.bundle import Step
from identity.ledger import Holding, Leaf
from identity.store import Store, StoreUnsafe, replace_file
from identity.tokens import Subject
from tests.identity.identity_lab import SERVICE, TRUST_DOMAIN


def authority(directory: Path) -> Authority:
    return Authority.self_made(TRUST_DOMAIN, Store(directory))


def modes(directory: Path) -> dict[str, int]:
    return {path.suffix: path.stat().st_mode & 0o777 for path in directory.iterdir()}


def test_the_first_start_makes_a_root_and_an_issuer_that_only_the_owner_may_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = authority(tmp_path / "ca")
    finally:
        os.umask(before)
    assert (tmp_path / "ca").stat().st_mode & 0o777 == 0o700
    assert modes(tmp_path / "ca") == {".key": 0o600, ".json": 0o600, ".jsonl": 0o600, ".pem": 0o644}
    assert len(list((tmp_path / "ca").glob("*.key"))) == 2
    assert (tmp_path / "ca" / "bundle.pem").read_bytes() == made.trust.value.bundle_pem


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_restart_finds_the_rotation_where_it_was(tmp_path: Path, steps: int) -> None:
    first = authority(tmp_path / "ca")
    for step in (Step.ADD, Step.SWITCH, Step.DROP)[:steps]:
        assert first.rotate(step) is None
    second = authority(tmp_path / "ca")
    assert second.trust.value == first.trust.value
    assert second.issuer.pair.key_pem == first.issuer.pair.key_pem
    for step in (Step.ADD, Step.SWITCH, Step.DROP)[steps:]:
        assert second.rotate(step) is None
    assert len(list((tmp_path / "ca").glob("*.key"))) == 2  # those of the old anchor are gone


def test_a_restart_remembers_who_would_be_broken(tmp_path: Path) -> None:
    first = authority(tmp_path / "ca")
    first.report(Subject(SERVICE, "cart-0", "uid-1"), 1, first.issuer.ref.id)
    assert first.rotate(Step.ADD) is None
    refusal = authority(tmp_path / "ca").rotate(Step.SWITCH)
    assert refusal is not None
    assert "pillion/cart-0" in refusal.sentence


def test_a_key_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    authority(tmp_path / "ca")
    key = next((tmp_path / "ca").glob("issuer-*.key"))
    key.chmod(0o640)
    with pytest.raises(StoreUnsafe, match=f"{key.name} has mode 0640.*chmod 600"):
        authority(tmp_path / "ca")


def test_a_directory_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "ca").mkdir()
    (tmp_path / "ca").chmod(0o770)
    with pytest.raises(StoreUnsafe, match="chmod 700"):
        Store(tmp_path / "ca")


def test_a_lost_key_stops_the_start_with_the_next_step(tmp_path: Path) -> None:
    authority(tmp_path / "ca")
    next((tmp_path / "ca").glob("issuer-*.key")).unlink()
    with pytest.raises(StoreUnsafe, match="restore it"):
        authority(tmp_path / "ca")


def test_a_damaged_state_stops_the_start_instead_of_making_a_new_mesh(tmp_path: Path) -> None:
    authority(tmp_path / "ca")
    (tmp_path / "ca" / "state.json").write_bytes(b"{")
    with pytest.raises(StoreUnsafe, match="damaged"):
        authority(tmp_path / "ca")


def test_another_trust_domain_stops_the_start(tmp_path: Path) -> None:
    authority(tmp_path / "ca")
    with pytest.raises(StoreUnsafe, match=r"cluster\.local, the setting says other\.org"):
        Authority.self_made("other.org", Store(tmp_path / "ca"))


def holding(instance: str) -> Holding:
    return Holding(instance, "spiffe://a/ns/b/sa/c", "b/c-0", 1, (Leaf("i", "r", 9e9),), 1.0)


def test_a_journal_line_that_a_crash_cut_short_costs_only_itself(tmp_path: Path) -> None:
    store = Store(tmp_path / "ca")
    store.append_journal(holding("one"))
    with (tmp_path / "ca" / "ledger.jsonl").open("ab") as file:
        file.write(b'{"instance": "tw')
    again = Authority.self_made(TRUST_DOMAIN, Store(tmp_path / "ca"))
    again.report(Subject(SERVICE, "three-0", "three"), 1, again.issuer.ref.id)
    assert [entry.instance for entry in Store(tmp_path / "ca").load_journal()] == ["one", "three"]


def test_a_long_journal_is_written_anew(tmp_path: Path) -> None:
    store = Store(tmp_path / "ca")
    for _ in range(5000):
        store.append_journal(holding("one"))
    assert store.journal_is_long(1)
    store.compact_journal([holding("one")])
    assert not store.journal_is_long(1)
    assert len(Store(tmp_path / "ca").load_journal()) == 1


def test_a_replaced_file_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        replace_file(tmp_path / "x", content, 0o600)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"two"
