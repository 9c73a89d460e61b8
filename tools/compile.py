"""Make a copy of the sidecar whose hottest modules are compiled with mypyc: the same source, the same tests, less time per request.

    python tools/compile.py OUT      makes OUT, or leaves it alone when it is current; prints what it did

The copy is complete: run it with OUT as the working directory (``python -m proxy``). The work tree itself is never compiled, so what
is edited is what runs. Exit code 3 when there is no C compiler or no Python headers: everything works without, only slower.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("core", "proxy", "policy", "identity")
NO_COMPILER = 3

# What runs for every request or every read. Pure computation and the relay loop; nothing that is configuration or waits.
MODULES = (
    "policy/authorize.py",
    "policy/match.py",
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
    "proxy/protocol/http1/parse.py",
    "proxy/protocol/http1/responses.py",
    "proxy/protocol/http1/upstream.py",
    "proxy/protocol/http2/blocks.py",
    "proxy/protocol/http2/client.py",
    "proxy/protocol/http2/connection.py",
    "proxy/protocol/http2/flow.py",
    "proxy/protocol/http2/frames.py",
    "proxy/protocol/http2/hpack_codec.py",
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
    stamp = _stamp()
    if (out / "stamp").exists() and (out / "stamp").read_text() == stamp:
        print(f"compiled copy is current: {out}")
        return 0
    missing = _missing()
    if missing:
        print(f"not compiled, everything runs interpreted: {missing}", file=sys.stderr)
        return NO_COMPILER
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = _compile(Path(scratch))
        if made is None:
            return 1
        (made / "stamp").write_text(stamp)
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)
    print(f"compiled {len(MODULES)} modules: {out}")
    return 0


def _stamp() -> str:
    digest = hashlib.sha256(f"{sys.version}{sysconfig.get_platform()}".encode())
    for path in (Path(__file__), *sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _missing() -> str:
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers are not installed (Debian: python3-dev)"
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    return "" if shutil.which(compiler) else f"there is no C compiler {compiler!r} (Debian: gcc)"


def _compile(scratch: Path) -> Path | None:
    """The compiled copy, or None after printing what the compiler said."""
    made = scratch / "made"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, made / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "setup.cfg", made)
    (made / "build.py").write_text(_BUILD)
    done = subprocess.run([sys.executable, "build.py", *MODULES], cwd=made, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        return None
    shutil.rmtree(made / "build")
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
