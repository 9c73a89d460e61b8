"""The trial that decides what a node may use: it passes with our programs, and sees what is wrong with others."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from lab import PATIENCE_S

from ebpf import loader, probe

pytestmark = pytest.mark.kernel


def test_our_programs_pass_and_nothing_is_left() -> None:
    found = find()
    assert found[:3] == ("", "", "")
    assert not found.to_app or "FIONREAD tells of 0 bytes where 100 wait" in found.to_app, "which kernels know of the queue differs"
    assert "pillion-probe-" not in Path("/proc/self/mounts").read_text()


def find(folder: Path | None = None) -> probe.Findings:
    return probe.find(folder, 4 * PATIENCE_S)


def _with(folder: Path, name: str, old: str, new: str) -> Path:
    source = (Path(loader.__file__).parent / "bpf" / name).read_text()
    assert old in source
    (folder / name).write_text(source.replace(old, new))
    return folder


def test_the_usual_program_does_not_pass() -> None:
    """It does not even know the target of what it captured."""
    found = find(Path(__file__).parent / "naive")
    assert "not told the original destination" in found.connect
    assert found.sockmap == found.connect


def test_a_missing_check_of_order_is_noticed(tmp_path: Path) -> None:
    found = find(_with(tmp_path, "redirect.bpf.c", "copied_seq != *(u32 *)(me + OFFSET_WRITE_SEQ))", "!copied_seq)"))
    assert "acceleration (order) does not work" in found.sockmap
    assert "overtook" in found.sockmap


def test_a_reader_left_sleeping_is_noticed(tmp_path: Path) -> None:
    found = find(_with(tmp_path, "redirect.bpf.c", " && reads_tcp(flow->peer_socket)", " && 0"))
    assert "MSG_WAITALL" in found.sockmap


def test_a_missing_bound_of_memory_is_noticed(tmp_path: Path) -> None:
    found = find(_with(tmp_path, "redirect.bpf.c", "unread > QUEUE_LIMIT", "unread < 0"))
    assert "acceleration (memory) does not work" in found.sockmap
    assert (found.connect, found.steer) == ("", "")


def test_a_capture_that_captures_nothing_is_noticed(tmp_path: Path) -> None:
    found = find(_with(tmp_path, "connect.bpf.c", "return TO_SIDECAR;", "return LEAVE;"))
    assert "capture of connect() does not work" in found.connect
    assert found.sockmap == found.connect


def test_a_program_that_never_redirects_is_noticed(tmp_path: Path) -> None:
    found = find(_with(tmp_path, "redirect.bpf.c", "if (!flow->peer_socket) {", "if (1) return SK_PASS;\n  if (!flow->peer_socket) {"))
    assert "0 of 40 messages" in found.sockmap


def test_without_privileges_the_reason_is_said() -> None:
    words = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", *probe.command()]
    done = subprocess.run(words, capture_output=True, timeout=4 * PATIENCE_S, check=False)
    assert done.returncode == 1
    assert "Operation not permitted" in probe.read_findings(done.stdout).connect
