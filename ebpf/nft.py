"""Puts a ruleset into a network namespace by the program nft, and finds out whether that works here. Called by ebpf.pods and ebpf.agent."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading

from ebpf import procs
from ebpf.redirect import TABLE, capture

_TIMEOUT_S = 15
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class RulesFailed(RuntimeError):
    """The program is missing or refused the ruleset; the text has its words."""


def apply(netns: int, text: str) -> None:
    """Load ``text`` in a namespace, in one transaction; raises RulesFailed."""
    try:
        procs.inside(netns, lambda: apply_here(text))
    except OSError as error:
        raise RulesFailed(f"the pod's network namespace cannot be entered: {error}") from None


def captures(netns: int) -> bool:
    """Is our table in a namespace already, put there by somebody before us? False too when nft cannot say."""
    command = ["nft", "list", "table", "inet", TABLE]
    try:
        done = procs.inside(netns, lambda: subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False))
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and b"redirect to" in done.stdout


def apply_here(text: str) -> None:
    """Load ``text`` in the calling thread's namespace; raises RulesFailed."""
    try:
        done = subprocess.run(["nft", "-f", "-"], input=text.encode(), capture_output=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise RulesFailed("the program nft is not installed (package nftables)") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RulesFailed(f"nft: {error}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise RulesFailed(f"nft: {said}")


def problem() -> str:
    """Why capture by nftables does not work here, "" when it does: tried in a namespace that is gone afterwards."""
    found: list[str] = []

    def trial() -> None:
        if _libc.unshare(_CLONE_NEWNET):
            found.append(f"a network namespace cannot be made: {os.strerror(ctypes.get_errno())}")
            return
        try:
            apply_here(capture([(22, 22)], [(25, 25)]))
        except RulesFailed as error:
            found.append(str(error))

    thread = threading.Thread(target=trial)  # namespaces belong to threads: this one takes its own with it
    thread.start()
    thread.join()
    return found[0] if found else ""
