"""Prepare .venv: choose the interpreter, install what the lock file names, then Pillion itself. Called by make, safe to call again.

Runs under any Python 3.6 or newer and imports only the standard library, because it is what a fresh machine runs first. When nothing
changed since the last time it needs neither the network nor a second. Settings: PILLION_PYTHON names the interpreter to use.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".prepared"
LOCK_FILE = ROOT / "requirements.lock"
DEBIAN_PACKAGES = (ROOT / "tools" / "debian-packages.txt", ROOT / "tools" / "debian-packages-cluster.txt")
MINORS = (14, 13, 12, 11)

PROBE = """
import json, os, sys, sysconfig
try:
    import ensurepip, venv
    missing = ""
except ImportError as error:
    missing = str(error)
args = sysconfig.get_config_var("CONFIG_ARGS") or ""
distribution = os.path.realpath(sys.executable).startswith("/usr/bin/") and os.path.exists("/etc/debian_version")
print(json.dumps({
    "version": list(sys.version_info[:3]),
    "base": os.path.realpath(sys.executable),
    "cpython": sys.implementation.name == "cpython",
    "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "configured": "--enable-optimizations" in args,
    "distribution": distribution,
    "missing": missing,
}))
"""


def say(text):
    print("prepare: " + text, flush=True)


def stop(text):
    sys.exit("prepare: " + text)


# --- Debian packages -----------------------------------------------------------------------------------------------------------------


def wanted_packages(listed):
    lines = listed.read_text(encoding="utf-8").splitlines()
    return [name for name in (line.partition("#")[0].strip() for line in lines) if name]


def missing_packages(listed):
    """The listed packages that dpkg does not report as installed; none when this is not a Debian."""
    if not shutil.which("dpkg-query"):
        return []
    wanted = wanted_packages(listed)
    command = ["dpkg-query", "-W", "-f=${Package} ${Status}\n", *wanted]
    shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
    installed = {line.split()[0] for line in shown.stdout.splitlines() if line.endswith(" installed")}
    return [name for name in wanted if name not in installed]


def install_packages():
    """Install what is missing when root, else say what would be; never fatal: tests and commands name what they miss."""
    for listed in DEBIAN_PACKAGES:
        missing = missing_packages(listed)
        if not missing:
            continue
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            say(f"not installed, tests that need them will skip; as root: apt-get install {' '.join(missing)}")
            continue
        say("installing Debian packages: " + " ".join(missing))
        environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        # --no-remove: Debian's containerd would replace the one of a Docker that is installed here
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-remove", "--no-install-recommends", *missing]):
            done = subprocess.run(["apt-get", *command], env=environment, stdout=subprocess.DEVNULL)
            if done.returncode:
                say(f"apt-get {command[0]} failed with {done.returncode}; going on without")


# --- the interpreter -----------------------------------------------------------------------------------------------------------------


def candidates():
    """Paths of interpreters worth asking, the explicit one alone if there is one."""
    chosen = os.environ.get("PILLION_PYTHON")
    if chosen:
        return [shutil.which(chosen) or chosen]
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/bin", "/usr/bin"]
    homes = [Path(os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))) / "versions", Path.home() / ".local/share/uv/python"]
    folders += [str(path) for home in homes if home.is_dir() for path in sorted(home.glob("*/bin"))]
    names = [*(f"python3.{minor}" for minor in MINORS), "python3"]
    found = []
    for folder in folders:
        if not folder or Path(folder) == VENV / "bin" or Path(folder).name == "shims":
            continue  # shims only forward to what is found anyway
        found += [os.path.join(folder, name) for name in names if os.access(os.path.join(folder, name), os.X_OK)]
    return found


def probe(path):
    """What an interpreter says about itself, or None when it does not run or is of no use here."""
    try:
        shown = subprocess.run([path, "-I", "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30)
        facts = json.loads(shown.stdout.decode())
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    facts["path"] = path
    usable = facts["cpython"] and not facts["free_threaded"] and facts["version"][0] == 3 and facts["version"][1] in MINORS
    return facts if usable else None


def reason(facts):
    if facts["configured"]:
        return "an optimised build (configured with --enable-optimizations)"
    if facts["distribution"]:
        return "an optimised build (Debian and Ubuntu build theirs profile-guided, though CONFIG_ARGS does not say so)"
    chosen = "you chose it" if os.environ.get("PILLION_PYTHON") else "there is no better one here"
    return f"not an optimised build: slower, and no measurement made with it counts; {chosen}"


def rank(facts):
    return (bool(facts["configured"] or facts["distribution"]), facts["version"])


def choose():
    """The best interpreter here: an optimised build first, then the newest version."""
    seen = {}
    for path in candidates():
        base = os.path.realpath(path)
        if base not in seen:
            seen[base] = probe(path)
    usable = [facts for facts in seen.values() if facts]
    ready = [facts for facts in usable if not facts["missing"]]
    if not ready:
        for facts in usable:
            say(f"{facts['path']} cannot make a virtual environment ({facts['missing']})")
        if usable:
            stop("as root: apt-get install python3-venv")
        chosen = os.environ.get("PILLION_PYTHON")
        if chosen:
            stop(f"PILLION_PYTHON={chosen} does not run as CPython 3.11 to 3.14; name one that does by its path, or unset it")
        stop("no CPython 3.11 to 3.14 found; install one (Ubuntu 22.04: apt-get install python3.11-venv) or set PILLION_PYTHON to its path")
    return max(ready, key=rank)


# --- the virtual environment ---------------------------------------------------------------------------------------------------------


def venv_facts():
    """What the interpreter of the present .venv says, None when there is none that works."""
    python = VENV / "bin" / "python"
    facts = probe(str(python)) if python.exists() else None
    return facts if facts and (VENV / "bin" / "pip").exists() else None


def make_venv(interpreter):
    command = [interpreter, "-m", "venv", "--clear", str(VENV)]
    done = subprocess.run(command)
    if done.returncode:
        stop(f"`{' '.join(command)}` failed with {done.returncode}; see above. If the disk is not full, remove {VENV} and try again")


def pip(*arguments):
    command = [str(VENV / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, cwd=str(ROOT))
    if done.returncode:
        stop(f"`{' '.join(command)}` failed with {done.returncode}; see above. The first run needs the package index, later ones do not.")


def digest(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def fingerprints(facts):
    """What .venv depends on: the lock file, and how Pillion is installed into it (metadata and the list of packages)."""
    packages = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    metadata = (ROOT / "setup.cfg").read_text(encoding="utf-8").partition("\n[mypy]")[0]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    python = facts["base"] + str(facts["version"])
    return {
        "requirements": digest(python, LOCK_FILE.read_text(encoding="utf-8")),
        "project": digest(python, metadata, project, " ".join(packages), str(ROOT)),
    }


def recorded():
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def prepare():
    install_packages()
    present = venv_facts()
    if not os.environ.get("PILLION_PYTHON") and present and recorded() == fingerprints(present):
        return
    best = choose()
    keep = present is not None and present["base"] == best["base"]
    say(f"Python {'.'.join(map(str, best['version']))}, {best['path']}: {reason(best)}")
    if not keep:
        make_venv(best["path"])
    facts = venv_facts() or stop(f"{best['path']} made a .venv that does not work; remove it and try again")
    wanted, done = fingerprints(facts), recorded() if keep else {}
    if done.get("requirements") != wanted["requirements"]:
        say(f"installing the packages of {LOCK_FILE.name}")
        pip("install", "--require-hashes", "--no-deps", "--requirement", str(LOCK_FILE))
    if done != wanted:
        pip("install", "--no-index", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    STAMP.write_text(json.dumps(wanted), encoding="utf-8")
    say("ready: .venv/bin/pillion")


def check_writable():
    """After `sudo make`, what it made belongs to root: said here once, instead of by whatever fails first."""
    for path in (ROOT, ROOT / ".cache", VENV):
        if path.exists() and not os.access(str(path), os.W_OK):
            stop(
                f"you may not write to {path}: run make as its owner, take it over (sudo chown -R $USER {ROOT}), or use a clone of your own"
            )


def main():
    check_writable()
    os.umask(0o022)  # under a stricter one the sidecars, which run as other users, could not read .venv
    # two makes at once (demo in one terminal, test in another) must not install into each other's feet
    (ROOT / ".cache").mkdir(exist_ok=True)
    with contextlib.closing(open(str(ROOT / ".cache" / "prepare.lock"), "w")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("prepare: interrupted; the next run goes on from here")
