"""What another process of the same user may see of one that holds keys."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from core.runtime import secrecy

SOURCE = Path(secrecy.__file__).read_text(encoding="utf-8")  # the other user may not be let into this folder


@pytest.mark.slow
@pytest.mark.parametrize("private", [False, True])
def test_memory_and_environment_are_for_nobody_else_of_the_same_user(private: bool) -> None:
    def as_nobody(*words: str) -> list[str]:
        drop = ["--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"]
        return ["setpriv", *drop, *words] if os.geteuid() == 0 else list(words)

    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("needs the Debian package util-linux")
    python = os.path.realpath(sys.executable)
    program = f"{SOURCE}\n{'keep_memory_private()' if private else ''}\nprint('up', flush=True)\ninput()"
    with subprocess.Popen(as_nobody(python, "-c", program), cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "up\n"
        for name in ("environ", "maps"):
            read = subprocess.run(
                as_nobody(python, "-c", f"open('/proc/{holder.pid}/{name}', 'rb')"), cwd="/", capture_output=True, check=False
            )
            assert (b"PermissionError" in read.stderr) is private
        holder.communicate("\n")
