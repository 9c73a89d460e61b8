"""Make a copy of the sidecar whose hottest modules are compiled with mypyc: the same source, the same tests, less time per request.

    python tools/compile.py OUT      makes OUT, or leaves it alone when it is current; prints what it did

The copy is complete: run it with OUT as the working directory (``python -m proxy``). The work tree itself is never compiled, so what
is edited is what runs. Exit code 3 when there is no C compiler or no Python headers: everything works without, only slower.

Compiling takes two minutes, so libraries are kept in ~/.cache/pillion/compiled (PILLION_CACHE changes the folder), for every tree whose
compiled modules, and modules that these import, are the same.
"""

from __future__ import annotations

import ast
import configparser
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("PILLION_CACHE") or Path.home() / ".cache" / "pillion") / "compiled"
PACKAGES = ("core", "proxy", "policy", "identity")
NO_COMPILER = 3
_KEPT = 6  # libraries of this many states, of 4 MB each

# What runs for every request or every read. Pure computation and the relay loop; nothing that is configuration or waits.
MODULES = (
    "policy/authorize.py",
    "policy/match.py",
    "policy/networks.py",
    "policy/paths.py",
    "proxy/balance.py",
    "proxy/inbound/authorize.py",
    "proxy/inbound/gate.py",
    "proxy/outbound/gate.py",
    "proxy/outbound/pool.py",
    "proxy/protocol/http1/body.py",
    "proxy/protocol/http1/client.py",
    "proxy/protocol/http1/connection.py",
    "proxy/protocol/http1/edits.py",
    "proxy/protocol/http1/heads.py",
    "proxy/protocol/http1/limits.py",
    "proxy/protocol/http1/parse.py",
    "proxy/protocol/http1/responses.py",
    "proxy/protocol/http1/upstream.py",
    "proxy/protocol/http2/blocks.py",
    "proxy/protocol/http2/client.py",
    "proxy/protocol/http2/connection.py",
    "proxy/protocol/http2/exchanges.py",
    "proxy/protocol/http2/flow.py",
    "proxy/protocol/http2/frames.py",
    "proxy/protocol/http2/hpack_codec.py",
    "proxy/protocol/http2/lifetime.py",
    "proxy/protocol/http2/limits.py",
    "proxy/protocol/http2/messages.py",
    "proxy/protocol/http2/streams.py",
    "proxy/protocol/http2/upstream.py",
    "proxy/protocol/opaque.py",
    "proxy/protocol/requests.py",
    "proxy/routing.py",
    "proxy/telemetry/record.py",
    "proxy/transport/link.py",
    "proxy/transport/listener.py",
    "proxy/transport/relay.py",
    "proxy/transport/tls_bio.py",
    "proxy/transport/tls_link.py",
    "proxy/transport/turn.py",
)

_BUILD = """
import sys
from mypyc.build import mypycify
from setuptools import setup
setup(name="pillion-compiled", packages=[], py_modules=[], script_args=["build_ext", "--inplace"],
      ext_modules=mypycify(["--config-file", "setup.cfg", *sys.argv[1:]], opt_level="3", debug_level="0"))
"""


def main(arguments: list[str]) -> int:
    """Exit codes: 0 current, 1 failed, 2 usage, 3 no compiler."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(arguments[0]).resolve()
    libraries = CACHE / key(ROOT)
    stamp = _digest(ROOT, _sources(ROOT), libraries.name)
    if (out / "stamp").exists() and (out / "stamp").read_text() == stamp:
        print(f"compiled copy is current: {out}")
        return 0
    if libraries.exists():
        said = f"took {len(MODULES)} compiled modules from {libraries}"
        libraries.touch()
    else:
        missing = _missing()
        if missing:
            print(f"not compiled, everything runs interpreted: {missing}", file=sys.stderr)
            return NO_COMPILER
        said = f"compiled {len(MODULES)} modules"
        if not _compile(libraries):
            return 1
    _copy(libraries, out, stamp)
    print(f"{said}: {out}")
    return 0


# --- what decides --------------------------------------------------------------------------------------------------------------------


def needed(root: Path) -> list[Path]:
    """The compiled modules and what they import, and that imports, of our own: all whose types the compiler sees."""
    found: set[Path] = set()
    waiting = [root / module for module in MODULES]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported(root, path)
    return sorted(found)


def _imported(root: Path, path: Path) -> Iterator[Path]:
    """Files of our packages that this one names in an import, packages above them included."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{each.name}" for each in node.names]
    for parts in {tuple(name.split(".")) for name in names}:
        if parts[0] in PACKAGES:
            places = [root.joinpath(*parts[:length]) for length in range(1, len(parts) + 1)]
            yield from (file for place in places for file in (place.with_suffix(".py"), place / "__init__.py") if file.exists())


def key(root: Path) -> str:
    """Of libraries that can stand for those compiled from this tree."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(root / "setup.cfg")
    types = [(name, *settings[name].items()) for name in settings if name.startswith("mypy")]
    return _digest(root, needed(root), f"{sys.version}{sysconfig.get_platform()}{version('mypy')}{types}{MODULES}{_BUILD}")[:16]


def _sources(root: Path) -> list[Path]:
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def _digest(root: Path, files: list[Path], *more: str) -> str:
    digest = hashlib.sha256("\0".join(more).encode())
    for path in files:
        digest.update(b"\0" + str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _missing() -> str:
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers are not installed (Debian: python3-dev)"
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    return "" if shutil.which(compiler) else f"there is no C compiler {compiler!r} (Debian: gcc)"


# --- making --------------------------------------------------------------------------------------------------------------------------


def _compile(libraries: Path) -> bool:
    """Make that folder; False after printing what the compiler said. Only what decides is there, so what is missed is an error."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as scratch:
        work, made = Path(scratch) / "work", Path(scratch) / "made"
        for path in [*needed(ROOT), ROOT / "setup.cfg"]:
            (work / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, work / path.relative_to(ROOT))
        (work / "build.py").write_text(_BUILD)
        done = subprocess.run([sys.executable, "build.py", *MODULES], cwd=work, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
            return False
        shutil.rmtree(work / "build")
        _take_libraries(work, made)
        shutil.rmtree(libraries, ignore_errors=True)  # somebody else's, made meanwhile
        made.rename(libraries)
    for old in sorted(CACHE.iterdir(), key=os.path.getmtime)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return True


def _copy(libraries: Path, out: Path, stamp: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = Path(scratch) / "made"
        for package in PACKAGES:
            shutil.copytree(ROOT / package, made / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        shutil.copy(ROOT / "setup.cfg", made)
        _take_libraries(libraries, made)
        (made / "stamp").write_text(stamp)
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)


def _take_libraries(origin: Path, target: Path) -> None:
    for library in origin.rglob("*.so"):
        place = target / library.relative_to(origin)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, place)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
