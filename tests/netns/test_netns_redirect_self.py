"""The init container of a pod without agent: its ruleset is in place once it has ended, and the validator agrees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_lab import wait_until

pytestmark = [pytest.mark.netns, pytest.mark.needs("nft", "unshare", "ip")]

# a pod's view: a way out, so that there is something to capture
_LINK = """
ip link set lo up
ip link add pod type veth peer name node
ip addr add 10.9.8.7/24 dev pod
ip link set pod up
ip link set node up
ip route add default via 10.9.8.1
"""


def in_a_pod(script: str) -> subprocess.CompletedProcess[str]:
    words = ["unshare", "--net", "sh", "-ec", f"{_LINK}\n{script}"]
    return subprocess.run(words, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=60, check=False)


def test_capture_is_in_place_when_it_ends_and_the_validator_proves_it() -> None:
    done = in_a_pod(
        """
        export PILLION_VALIDATE_WITHIN_S=0.5
        setpriv --reuid=65532 --clear-groups "$PYTHON" -m ebpf.validator && exit 9
        "$PYTHON" -m ebpf.redirect_self --skip-inbound=9000 --skip-outbound=25,8000-8010
        "$PYTHON" -m ebpf.redirect_self --skip-inbound=9000 --skip-outbound=25,8000-8010
        nft list table inet pillion
        export PILLION_VALIDATE_WITHIN_S=10
        setpriv --reuid=65532 --clear-groups "$PYTHON" -m ebpf.validator
        """
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "redirect to :4140" in done.stdout and "8000-8010" in done.stdout and "4191, 9000" in done.stdout
    assert done.stdout.count("chain output") == 1, "a second run replaces the table"


def test_without_the_privilege_it_fails_and_says_what_is_missing() -> None:
    done = in_a_pod('setpriv --reuid=65532 --clear-groups "$PYTHON" -m ebpf.redirect_self')
    assert done.returncode == 1
    assert "nft refused the ruleset" in done.stderr and "NET_ADMIN" in done.stderr


_DIAL = """
import os, socket
listener = socket.create_server(("", 4140))
for uid in (65532, 2102):
    if not os.fork():
        os.setuid(uid)
        try:
            socket.create_connection(("10.9.8.1", 80), timeout=20)
            print(uid, "led", flush=True)
        except ConnectionRefusedError:
            print(uid, "let pass", flush=True)
        os._exit(0)
    os.wait()
"""


def test_in_a_user_namespace_the_sidecar_is_known_by_its_uid_there() -> None:
    """As in a pod with hostUsers: false. What gets out is refused by a wall, so that nobody waits for an answer."""
    script = f"""{_LINK}
        "$PYTHON" -m ebpf.redirect_self
        nft -f - <<< 'table inet wall {{ chain out {{ type filter hook output priority 0; tcp dport 80 reject with tcp reset; }}; }}'
        "$PYTHON" -c '{_DIAL}'
        """
    words = ["unshare", "--user", "bash", "-c", 'read && exec unshare --net bash -ec "$0"', script]
    environment = {**os.environ, "PYTHON": sys.executable}
    pod = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: os.readlink(f"/proc/{pod.pid}/ns/user") != os.readlink("/proc/self/ns/user"), "a user namespace")
        Path(f"/proc/{pod.pid}/uid_map").write_text("0 0 1\n2102 202102 1\n65532 265532 1\n")
        Path(f"/proc/{pod.pid}/gid_map").write_text("0 0 1\n")
        said, errors = pod.communicate("go\n", timeout=60)
    finally:
        pod.kill()
        pod.wait()
    assert said.splitlines()[-2:] == ["65532 led", "2102 let pass"], errors
