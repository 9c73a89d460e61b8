"""Sockets of control: never anybody else's, and never in the place of a file that is something else."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from core.runtime.private_socket import listen_privately


def test_a_private_socket_is_its_owners_from_the_first_moment_on(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with listen_privately(tmp_path / "control.sock", 4):
            assert (tmp_path / "control.sock").stat().st_mode & 0o777 == 0o600
            assert os.umask(0) == 0
    finally:
        os.umask(before)


def test_the_socket_of_a_dead_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    listen_privately(path, 4).close()
    with listen_privately(path, 4), socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))


def test_a_file_in_the_place_of_a_socket_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "control.sock").write_text("kept")
    with pytest.raises(OSError, match="in use"):
        listen_privately(tmp_path / "control.sock", 4)
    assert (tmp_path / "control.sock").read_text() == "kept"
