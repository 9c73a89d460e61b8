"""What this machine needs for `pillion local`, and what of it is missing: each a sentence and a next step. Called by local.commands."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from local import exposure, userns
from local.search import search_path

_PROGRAMS = {
    "ip": "iproute2",
    "nft": "nftables",
    "setpriv": "util-linux",
    "mount": "mount",
    "sleep": "coreutils",
    "env": "coreutils",
}


@dataclass(frozen=True)
class Finding:
    """One need. missing: "" when it is met, else what is missing and what to do about it."""

    name: str
    missing: str


def check() -> list[Finding]:
    """Everything, cheapest first; the last ones try for real, in namespaces that are gone afterwards."""
    rootless = os.geteuid() != 0
    findings = [Finding("Linux", "" if sys.platform == "linux" else "namespaces are a Linux feature: use a Linux machine or VM")]
    findings += [_program(name, package) for name, package in _PROGRAMS.items()]
    if rootless:
        findings += [_program("newuidmap", "uidmap"), _program("newgidmap", "uidmap"), _ranges()]
    findings.append(_readable())
    if not any(finding.missing for finding in findings):
        findings += [_try("namespaces", []), _try("nftables with redirect", ["nft", "-f", "-"]), _ipv6()]
    return findings


def _program(name: str, package: str) -> Finding:
    missing = "" if shutil.which(name, path=search_path()) else f"the program {name} is not installed: apt-get install {package}"
    return Finding(f"program {name}", missing)


def _ranges() -> Finding:
    try:
        userns.own_ranges()
    except userns.NoUserNamespace as error:
        return Finding("subordinate ids", str(error))
    return Finding("subordinate ids", "")


def _readable() -> Finding:
    paths = exposure.unreadable(exposure.own_paths(), lambda path: os.stat(path).st_mode)
    command = f"chmod -R o+rX {shlex.join(paths)}"
    missing = f"sidecars run as another user, who cannot read {' and '.join(paths)}: {command}" if paths else ""
    return Finding("code readable by other users", missing)


def _try(name: str, command: list[str]) -> Finding:
    """Do it in a child of its own: namespaces cannot be left again."""
    from ebpf import redirect

    words = [sys.executable, "-P", "-m", "local.trial", *command]
    done = subprocess.run(words, input=redirect.capture([(22, 22)], [(25, 25)]), capture_output=True, text=True, timeout=30, check=False)
    said = done.stderr.strip().splitlines()
    return Finding(name, "" if done.returncode == 0 else (said[-1] if said else f"the trial ended with {done.returncode}"))


def _ipv6() -> Finding:
    on = Path("/proc/sys/net/ipv6").exists()
    return Finding("IPv6", "" if on else "the kernel has no IPv6: pods get IPv4 only (boot without ipv6.disable=1 to have both)")


def is_fatal(finding: Finding) -> bool:
    """IPv6 is the one thing that a mesh does without."""
    return bool(finding.missing) and finding.name != "IPv6"
