"""The init container of a pod without agent: its ruleset is in place once it has ended, and the validator agrees."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
