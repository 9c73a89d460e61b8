"""What /proc says about pods, read from real processes and from a /proc of our own making."""

from __future__ import annotations

import os
import socket

import pytest

from ebpf import procs


def test_our_own_namespace_is_found_by_its_inode():
    inode = os.stat("/proc/self/ns/net").st_ino
    assert procs.netns_inode(os.getpid()) == inode
    assert os.getpid() in procs.members(inode)
    assert procs.netns_inode(2**22 + 1) == 0


def test_a_listener_is_found_by_port_and_user_and_taken_as_the_same_socket():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, uid = listener.getsockname()[1], os.geteuid()
        assert procs.listening(os.getpid(), port, uid)
        assert not procs.listening(os.getpid(), port, uid + 1)
        cookie = procs.cookie_of(listener)
        (copy,) = procs.take_listeners(os.getpid(), port, uid, cookie)
        with copy, socket.create_connection(("127.0.0.1", port)):
            accepted, _ = copy.accept()
            accepted.close()
        assert procs.take_listeners(os.getpid(), port, uid, cookie + 1) == [], "a socket of another namespace is never taken"


def test_a_connection_that_is_no_listener_is_not_taken():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        assert procs.take_listeners(os.getpid(), client.getsockname()[1], os.geteuid(), procs.cookie_of(client)) == []


@pytest.mark.parametrize(
    "cgroup",
    [
        "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1a2b_3c.slice/cri-containerd-ff.scope\n",
        "0::/kubepods/besteffort/pod1a2b-3c/ff\n",
        "12:memory:/kubepods/pod1a2b-3c/ff\n0::/\n",
    ],
)
def test_processes_of_a_pod_are_found_in_every_layout_of_cgroups(tmp_path, monkeypatch, cgroup):
    for pid, text in ((10, cgroup), (11, "0::/kubepods/besteffort/pod1a2b-4d/ff\n"), (12, "0::/\n")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text(text)
    (tmp_path / "13").mkdir()  # ended while we looked
    (tmp_path / "self").mkdir()
    monkeypatch.setattr(procs, "PROC", str(tmp_path))
    assert procs.members_of_pods(["1a2b-3c", "1a2b-4d", "9z"]) == {"1a2b-3c": [10], "1a2b-4d": [11], "9z": []}


def test_the_oldest_process_of_a_pod_comes_first_though_pids_came_around(tmp_path, monkeypatch):
    for pid, name, ticks in ((10, "app) R 1 2 (", 700), (11, "app", 800), (4000, "pause", 300), (12, "gone", None)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text("0::/kubepods/podu1/ff\n")
        if ticks is not None:
            (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name}) S {' '.join(['0'] * 18)} {ticks} 0\n")
    monkeypatch.setattr(procs, "PROC", str(tmp_path))
    assert procs.members_of_pods(["u1"]) == {"u1": [4000, 10, 11, 12]}
    monkeypatch.setattr(procs, "PROC", "/proc")
    assert procs.started(1) < procs.started(os.getpid())
