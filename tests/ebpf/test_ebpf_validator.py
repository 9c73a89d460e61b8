"""The validator takes only its own connection for a proof. The way there is tested in namespaces (tests/netns)."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time

import pytest

from ebpf import validator
from tests.ports import unused_port


@pytest.fixture
def port(monkeypatch):
    """A port for the sidecar's; addresses of nobody become ones of this machine, where nothing is captured."""
    monkeypatch.setattr(validator, "NOBODY", {socket.AF_INET: "127.0.0.2", socket.AF_INET6: "::1"})
    return unused_port()


def test_a_connection_that_arrives_is_the_proof(port, monkeypatch):
    monkeypatch.setattr(validator, "NOBODY", {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"})
    validator.prove(socket.AF_INET, port)
    validator.prove(socket.AF_INET6, port)


def test_somebody_else_who_answers_for_the_address_proves_nothing(port):
    with socket.create_server(("127.0.0.2", port)) as rogue:
        taken: list[socket.socket] = []
        threading.Thread(target=lambda: taken.append(rogue.accept()[0])).start()
        with pytest.raises(validator.NotProven, match="did not arrive at the sidecar's port"):
            validator.prove(socket.AF_INET, port)
        taken[0].close()


def test_a_refusal_proves_nothing(port):
    with pytest.raises(validator.NotProven, match="refused"):
        validator.prove(socket.AF_INET, port)


def test_somebody_elses_connection_is_not_taken_for_our_own(port):
    """A process that floods the sidecar's port, with the right length of words, while the probe goes astray."""
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=0.2) as sock:
                    sock.sendall(b"\0" * 16)
            except OSError:
                time.sleep(0.001)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        with socket.create_server(("127.0.0.2", port)), pytest.raises(validator.NotProven):
            validator.prove(socket.AF_INET, port)
    finally:
        stop.set()
        thread.join()


def test_a_taken_port_says_that_the_sidecar_was_first(port):
    with socket.create_server(("127.0.0.1", port)), pytest.raises(validator.NotProven, match="must run before the sidecar"):
        validator.prove(socket.AF_INET, port)


def test_a_wrong_original_destination_is_no_proof(port, monkeypatch):
    monkeypatch.setattr(validator, "NOBODY", {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"})
    monkeypatch.setattr(validator, "original_dst", lambda sock: ("10.0.0.9", 1))
    with pytest.raises(validator.NotProven, match=r"says 10\.0\.0\.9 port 1 instead"):
        validator.prove(socket.AF_INET, port)


def test_a_family_that_the_pod_does_not_have_is_not_missed_and_one_has_to_be_proven(port, monkeypatch):
    def prove(family, port):
        if family in absent:
            raise validator.NoWayOut("no route")

    monkeypatch.setattr(validator, "prove", prove)
    absent = {socket.AF_INET6}
    assert validator.validate(port, 0) == []
    absent = {socket.AF_INET, socket.AF_INET6}
    assert validator.validate(port, 0) == ["no route", "no route"]


def test_the_sidecars_own_user_cannot_prove_anything(monkeypatch, capsys):
    monkeypatch.setattr(validator.os, "geteuid", lambda: validator.SIDECAR_UID)
    assert validator.main({}) == 2 and "which capture lets pass" in capsys.readouterr().err


def test_wrong_settings_are_named(capsys):
    assert validator.main({"PILLION_VALIDATE_WITHIN_S": "soon"}) == 2
    assert "PILLION_VALIDATE_WITHIN_S" in capsys.readouterr().err


def test_without_capture_it_says_what_to_look_at(port, capsys):
    assert validator.main({"PILLION_VALIDATE_WITHIN_S": "0", "PILLION_OUTBOUND_PORT": str(port)}) == 1
    said = capsys.readouterr().err
    assert "its containers do not start" in said and "pillion check" in said


def test_it_imports_nothing_of_ours_and_little_else():
    """A pod's start waits for it; the local runner starts the file itself, without site-packages."""
    script = "import sys; sys.argv=['v']; import runpy; runpy.run_path(sys.stdin.read()); print(len(sys.modules), 'ebpf' in sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-E", "-c", script], input=validator.__file__, capture_output=True, text=True, check=True)
    count, ours = done.stdout.split()
    assert int(count) < 80 and ours == "False"
