from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from core.k8s.folder import FolderSource
from core.k8s.objects import read_core_object
from core.k8s.source import Apply, Delete, Event

LATER_NS = 10**18 * 4  # every file was written long before


def _source(folder: Path) -> FolderSource:
    return FolderSource(folder, read_core_object, now_ns=lambda: LATER_NS)


def _account(name: str, **labels: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "labels": labels}}


def _write(folder: Path, name: str, *objects: dict[str, Any]) -> None:
    """Replace atomically, as the local runner does."""
    text = json.dumps(objects[0]) if name.endswith(".json") else "\n---\n".join(json.dumps(found) for found in objects)
    (folder / ".new").write_text(text)
    os.replace(folder / ".new", folder / name)


def _told(events: Sequence[Event]) -> list[str]:
    told = []
    for event in events:
        match event:
            case Apply(object=found):
                told.append(f"+{found.ref.name}{''.join(found.metadata.labels.values())}")
            case Delete(ref=ref):
                told.append(f"-{ref.name}")
    return told


def test_every_manifest_is_applied_once(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", _account("a"), _account("b"))
    _write(tmp_path, "c.json", _account("c"))
    (tmp_path / "notes.txt").write_text("kind: x")
    (tmp_path / ".hidden.yaml").write_text("kind: x")
    source = _source(tmp_path)
    assert _told(source.look()) == ["+a", "+b", "+c"]
    assert source.look() == []
    assert source.refusals == ()


def test_an_edit_applies_what_changed_only(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", _account("a"), _account("b"))
    source = _source(tmp_path)
    source.look()
    _write(tmp_path, "a.yaml", _account("a"), _account("b", x="2"))
    assert _told(source.look()) == ["+b2"]


@pytest.mark.parametrize("how", ["removed from the file", "file removed"])
def test_nothing_is_deleted_before_two_looks_agree(tmp_path: Path, how: str) -> None:
    _write(tmp_path, "a.yaml", _account("a"), _account("b"))
    source = _source(tmp_path)
    source.look()
    if how == "file removed":
        (tmp_path / "a.yaml").unlink()
    else:
        _write(tmp_path, "a.yaml", _account("a"))
    assert source.look() == []
    assert _told(source.look()) == (["-a", "-b"] if how == "file removed" else ["-b"])
    assert source.look() == []


def test_a_file_that_is_truncated_and_rewritten_deletes_nothing(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", _account("a"))
    source = _source(tmp_path)
    source.look()
    (tmp_path / "a.yaml").write_text("")
    assert source.look() == []
    _write(tmp_path, "a.yaml", _account("a", x="2"))
    assert _told(source.look()) == ["+a2"]
    assert source.look() == []


def test_a_refused_version_leaves_the_last_good_one_in_force_and_says_where(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", _account("a"), _account("b"))
    source = _source(tmp_path)
    source.look()
    broken = _account("a")
    broken["metadata"]["labels"] = {"x": 1}
    _write(tmp_path, "a.yaml", broken, _account("b", y="2"))
    assert _told(source.look()) == ["+b2"]
    assert [str(found) for found in source.refusals] == [
        'a.yaml (serviceaccount default/a): metadata.labels[...]: expected str in quotes, found {"x": 1};'
        " the last good version stays in force"
    ]
    assert source.look() == []
    _write(tmp_path, "a.yaml", _account("a", x="3"), _account("b", y="2"))
    assert _told(source.look()) == ["+a3"]
    assert source.refusals == ()


def test_a_file_that_cannot_be_parsed_keeps_all_its_objects(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", _account("a"))
    source = _source(tmp_path)
    source.look()
    (tmp_path / "a.yaml").write_text("{")
    assert (source.look(), source.look()) == ([], [])
    assert source.refusals[0].kept


def test_an_object_of_two_files_is_the_first_files_and_is_reported(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", _account("x", v="1"))
    _write(tmp_path, "b.yaml", _account("x", v="2"))
    source = _source(tmp_path)
    assert _told(source.look()) == ["+x1"]
    assert [str(found) for found in source.refusals] == [
        "b.yaml (serviceaccount default/x): also defined in a.yaml; the last good version stays in force"
    ]
    (tmp_path / "a.yaml").unlink()
    assert source.look() == []
    assert _told(source.look()) == ["+x2"]
    assert source.refusals == ()


def test_a_file_written_while_it_was_read_is_read_again(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", _account("a", x="1"))
    stamp = os.stat(tmp_path / "a.yaml")
    source = FolderSource(tmp_path, read_core_object, now_ns=lambda: stamp.st_mtime_ns)
    assert _told(source.look()) == ["+a1"]
    with open(tmp_path / "a.yaml", "r+") as file:  # same inode, same size, same timestamp
        text = file.read()
        file.seek(0)
        file.write(text.replace('"1"', '"2"'))
    os.utime(tmp_path / "a.yaml", ns=(stamp.st_mtime_ns, stamp.st_mtime_ns))
    assert _told(source.look()) == ["+a2"]


def test_a_missing_folder_is_reported_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    source = _source(folder)
    assert source.look() == []
    assert "expected a readable folder" in str(source.refusals[0])
    folder.mkdir()
    _write(folder, "a.json", _account("a"))
    assert _told(source.look()) == ["+a"]
    os.rename(folder, tmp_path / "moved")
    assert (source.look(), source.look()) == ([], [])


async def test_run_emits_the_first_state_before_it_has_started_and_edits_later(tmp_path: Path) -> None:
    _write(tmp_path, "a.json", _account("a"))
    told: list[str] = []
    edited = trio.Event()

    def emit(events: Sequence[Event]) -> None:
        told.extend(_told(events))
        if "+b" in told:
            edited.set()

    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[None]) -> None:
            await FolderSource(tmp_path, read_core_object).run(emit, task_status=task_status)

        await nursery.start(run)
        assert told == ["+a"]
        _write(tmp_path, "b.json", _account("b"))
        with trio.fail_after(30):
            await edited.wait()
        nursery.cancel_scope.cancel()


def test_a_misspelt_name_or_kind_does_not_delete_what_it_stands_for(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", _account("a"), _account("b"))
    source = _source(tmp_path)
    source.look()
    _write(tmp_path, "a.yaml", {"apiVersion": "v1", "metadata": {"name": "a"}}, _account("c"))
    assert _told([*source.look(), *source.look()]) == ["+c"]
    _write(tmp_path, "a.yaml", _account("c"))
    assert _told([*source.look(), *source.look()]) == ["-a", "-b"]


def test_a_pipe_or_device_among_the_manifests_is_refused_and_holds_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").symlink_to("/dev/zero")
    _write(tmp_path, "c.yaml", _account("c"))
    source = _source(tmp_path)
    assert _told(source.look()) == ["+c"]
    assert [(refusal.where, refusal.reason) for refusal in source.refusals] == [
        ("a.yaml", "expected a file, found something else"),
        ("b.yaml", "expected a file, found something else"),
    ]
