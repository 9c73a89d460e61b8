"""Compiles the programs, loads them, pins them below a folder of the bpf file system, and exits: ``python -m ebpf.loader --pins DIR``.

The only module that imports bcc (Debian's python3-bpfcc; the package of that name on PyPI is something else), and only in the child
process that ``main`` is: LLVM costs 130 MB of memory, which must not stay. Compiles against headers of our own, so no kernel headers are
needed; offsets of kernel fields come from BTF. Running it again loads the programs anew over the maps that are there, so that connections
and pods live on; ``attach.Node.upgrade`` then exchanges them in the links.

The agent runs ``command()`` as a child and reads its output with ``read_report``; tests and tools call ``install``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

from ebpf import attach, bpfsys, btf, layout

_HERE = Path(__file__).resolve().parent
_BCC = Path("/usr/lib/python3/dist-packages/bcc")
_CAPABILITY_BITS = {"CAP_BPF": 39, "CAP_NET_ADMIN": 12, "CAP_PERFMON": 38, "CAP_SYSLOG": 34}
_SYS_ADMIN_BIT = 21  # contains BPF and PERFMON
CAPABILITIES = tuple(_CAPABILITY_BITS)
"""What the child needs. SYSLOG: without kallsyms bcc silently replaces bpf_probe_read_kernel, which sk_msg may not call then."""


class LoaderFailed(RuntimeError):
    """The child said nothing that can be understood; the text is what it wrote last."""


class Report(NamedTuple):
    """What came of it. installed: names of pinned programs. refused: name of a program -> sentence (program, helper, kernel, reason).

    problem: one sentence when nothing at all could be done (no bcc, no privileges, no bpf file system), else "".
    """

    kernel: str
    installed: tuple[str, ...] = ()
    refused: Mapping[str, str] = MappingProxyType({})
    problem: str = ""

    def why_not(self, names: Sequence[str]) -> str:
        """The first reason why not all of these programs are there, "" when they are."""
        if self.problem:
            return self.problem
        return next((self.refused.get(name, f"program {name} was not loaded") for name in names if name not in self.installed), "")


def command(root: Path = attach.DEFAULT_ROOT, limits: Mapping[str, int] | None = None, folder: Path | None = None) -> list[str]:
    """The child's command line. For tests: limits, other values for PODS_MAX, PAIRS_MAX, SOCKS_MAX, QUEUE_LIMIT of mesh.h;
    folder, where sources lie that replace ours."""
    words = [sys.executable, "-m", "ebpf.loader", "--pins", str(root)]
    if folder is not None:
        words += ["--sources", str(folder)]
    return words + [word for name, value in (limits or {}).items() for word in ("--limit", f"{name}={value}")]


def read_report(output: bytes) -> Report:
    """The child's last line of standard output; raises LoaderFailed."""
    try:
        fields = json.loads(output.strip().splitlines()[-1])
        return Report(fields["kernel"], tuple(fields["installed"]), dict(fields["refused"]), fields["problem"])
    except (IndexError, KeyError, TypeError, ValueError):
        raise LoaderFailed(output.decode(errors="replace").strip()[-2000:] or "the loader ended without a word") from None


def install(
    root: Path = attach.DEFAULT_ROOT, limits: Mapping[str, int] | None = None, *, folder: Path | None = None, seconds: float = 60.0
) -> Report:
    """Run the child (see ``command``) and wait for it; raises LoaderFailed, subprocess.TimeoutExpired."""
    done = subprocess.run(command(root, limits, folder), capture_output=True, timeout=seconds, cwd=_HERE.parent, check=False)
    try:
        return read_report(done.stdout)
    except LoaderFailed as error:
        raise LoaderFailed(f"{error}\n{done.stderr.decode(errors='replace')[-2000:]}") from None


# --- in the child -------------------------------------------------------------------------------------------------------------------


def sources(programs: Sequence[layout.Program], folder: Path | None = None) -> str:
    """One translation unit of mesh.h and every needed file: bcc rewrites map accesses only in its main file, and maps are shared.

    folder: what lies there replaces ours.
    """
    parts = []
    for name in ("mesh.h", *dict.fromkeys(program.source for program in programs)):
        path = _HERE / "bpf" / name
        if folder is not None and (folder / name).exists():
            path = folder / name
        text = path.read_text(encoding="utf-8").replace('#include "mesh.h"', "")
        parts.append(f'#line 1 "{name}"\n{text}')
    return "\n".join(parts)


def refusal(program: layout.Program, error: OSError, kernel: str) -> str:
    """A sentence with the program, the helper when the verifier named one, and the kernel version."""
    log = error.log if isinstance(error, bpfsys.VerifierRefused) else ""
    found = re.search(r"(?:unknown func|cannot use helper|helper call is not allowed in probe|helper) (bpf_\w+)(?:#\d+)?", log)
    helper = f", helper {found[1]}" if found else ""
    noise = ("processed ", "verification time", "stack depth", "peak_states")
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith(noise)]
    said = lines[-1] if lines else os.strerror(error.errno or 0)
    if error.errno == 1:
        said = f"not permitted; needs {', '.join(CAPABILITIES)}"
    return f"program {program.name} ({program.source}){helper}: kernel {kernel} refused it: {said}"


def missing_capabilities(status: str) -> list[str]:
    """Which of CAPABILITIES a process lacks, from its /proc/PID/status. Without SYSLOG all but acceleration works, which says so itself."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    effective = int(found[1], 16) if found else 0
    admin = effective >> _SYS_ADMIN_BIT & 1
    has = {name: effective >> bit & 1 or (admin and name != "CAP_NET_ADMIN") for name, bit in _CAPABILITY_BITS.items()}
    return [name for name, there in has.items() if not there and name != "CAP_SYSLOG"]


def _import_bcc() -> Any:
    """Debian's bcc alone: the whole of dist-packages would bring other versions of our own dependencies."""
    os.environ["BCC_KERNEL_SOURCE"] = str(_HERE)
    spec = importlib.util.find_spec("bcc")
    if spec is None or not (spec.origin or "").endswith("bcc/__init__.py") or not (Path(spec.origin or "").parent / "libbcc.py").exists():
        spec = importlib.util.spec_from_file_location("bcc", _BCC / "__init__.py", submodule_search_locations=[str(_BCC)])
    if spec is None or spec.loader is None or not Path(spec.origin or "").exists():
        raise ModuleNotFoundError("bcc is not installed; install the Debian package python3-bpfcc")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bcc"] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


class Compiled:
    """bcc's result: bytecode with map indices in place of descriptors, and the maps that bcc made on the way."""

    def __init__(self, text: str, macros: Mapping[str, int]) -> None:
        bcc = _import_bcc()
        with _stderr() as words:
            try:
                self._bpf = bcc.BPF(
                    text=text.encode(),
                    cflags=[f"-D{name}={value:#x}ull" if value >> 32 else f"-D{name}={value}" for name, value in macros.items()],
                )
            except Exception as error:  # bcc raises plain Exceptions, and lets clang say why
                words.seek(0)
                raise LoaderFailed(
                    f"the programs could not be compiled ({error}): {words.read().decode(errors='replace')[-2000:]}"
                ) from None
        self.maps = {name: int(bcc.lib.bpf_table_fd(self._bpf.module, name.encode())) for name in layout.MAPS}
        missing = [name for name, fd in self.maps.items() if fd < 0]
        if missing:
            raise LoaderFailed(f"the programs declare no map {', '.join(missing)}")

    def code(self, name: str) -> bytes:
        """The bytecode of one program."""
        numbers = {fd: number for number, fd in enumerate(self.maps.values())}
        return layout.relocate_maps(bytes(self._bpf.dump_func(name.encode())), numbers)


class Installation:
    """One run: maps kept or pinned anew, programs loaded over them and pinned."""

    def __init__(self, pins: attach.Pins, limits: Mapping[str, int], folder: Path | None, kernel: str) -> None:
        self._pins = pins
        self._folder = folder
        self._limits = limits
        self._kernel = kernel
        self.installed: list[str] = []
        self.refused: dict[str, str] = {}

    def run(self) -> None:
        """Raises OSError when not even maps can be made or pinned."""
        programs = list(layout.PROGRAMS)
        macros = dict(self._limits)
        try:
            macros |= btf.offsets() | {"BLOCKED_READER": btf.blocked_reader()}
        except btf.NoTypes as error:
            programs = [program for program in programs if program.name != "redirect"]
            self.refused["redirect"] = f"program redirect (redirect.bpf.c): kernel {self._kernel}: {error}"
        compiled = Compiled(sources(programs, self._folder), macros)
        for folder in (self._pins.maps, self._pins.programs, self._pins.cgroups, self._pins.pods):
            folder.mkdir(parents=True, exist_ok=True)
        maps = self._keep_maps(compiled.maps)
        numbers = dict(enumerate(maps.values()))
        for program in programs:
            self._install(program, compiled.code(program.name), numbers, maps)

    def _keep_maps(self, made: Mapping[str, int]) -> dict[str, int]:
        maps = {}
        for name, own in made.items():
            fd = own
            with contextlib.suppress(FileNotFoundError):
                fd = bpfsys.pinned(self._pins.maps / name)
            info = bpfsys.map_info(fd)
            if (info.key_bytes, info.value_bytes) != layout.MAPS[name]:
                raise LoaderFailed(f"map {name}: key and value have {info.key_bytes} and {info.value_bytes} bytes, not {layout.MAPS[name]}")
            maps[name] = fd
        for name, fd in maps.items():
            if fd == made[name]:
                bpfsys.pin(fd, self._pins.maps / name)
        path = self._pins.maps / layout.INBOUND_CODE
        if not path.exists():
            bpfsys.pin(bpfsys.map_create(bpfsys.ARRAY, 4, layout.INBOUND_CODE_BYTES, 1, layout.INBOUND_CODE), path)
        return maps

    def _install(self, program: layout.Program, code: bytes, numbers: Mapping[int, int], maps: Mapping[str, int]) -> None:
        try:
            fd = bpfsys.prog_load(
                program.name, program.prog_type, layout.relocate_maps(code, numbers), program.attach_type if program.expected else 0
            )
            if program.target == "netns":
                self._keep_code(code)
            else:
                self._pin_program(program.name, fd)
            if program.target == "sockets":
                bpfsys.prog_attach(maps["socks"], fd, program.attach_type)
            os.close(fd)
        except OSError as error:
            self.refused[program.name] = refusal(program, error, self._kernel)
        else:
            self.installed.append(program.name)

    def _keep_code(self, code: bytes) -> None:
        fd = bpfsys.pinned(self._pins.maps / layout.INBOUND_CODE)
        bpfsys.map_update(fd, bytes(4), (struct.pack("=Q", len(code)) + code).ljust(layout.INBOUND_CODE_BYTES, b"\0"))
        os.close(fd)

    def _pin_program(self, name: str, fd: int) -> None:
        fresh = self._pins.programs / f"{name}_new"
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        bpfsys.pin(fd, fresh)
        fresh.rename(self._pins.programs / name)


@contextlib.contextmanager
def _stderr() -> Iterator[IO[bytes]]:
    """What libraries write to standard error, as a file."""
    kept = os.dup(2)
    with os.fdopen(os.memfd_create("stderr"), "w+b") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """bcc and clang write where they like; the last line of standard output is ours."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def load(root: Path, limits: Mapping[str, int], folder: Path | None = None) -> Report:
    """In this process: everything, and what came of it. Never raises for what a kernel or a machine may lack."""
    kernel = os.uname().release
    installation = Installation(attach.Pins(root), limits, folder, kernel)
    problem = ""
    try:
        if not bpfsys.is_bpffs(root.parent):
            raise FileNotFoundError(f"{root.parent} is no bpf file system; mount one: mount -t bpf bpf {root.parent}")
        missing = missing_capabilities(Path("/proc/self/status").read_text(encoding="ascii"))
        if missing:
            raise PermissionError(f"this process lacks {', '.join(missing)}")
        root.mkdir(mode=0o700, exist_ok=True)
        installation.run()
    except PermissionError as error:
        problem = f"kernel {kernel} does not permit it ({error}); needs {', '.join(CAPABILITIES)}"
    except (OSError, LoaderFailed, ImportError) as error:
        problem = f"kernel {kernel}: {error}"
    return Report(kernel, tuple(installation.installed), installation.refused, problem)


def main(words: Sequence[str] | None = None) -> int:
    """Exit code 0 when every program is installed; the report is the last line of standard output, JSON."""
    arguments = argparse.ArgumentParser(prog="ebpf.loader", description=__doc__.partition("\n")[0])
    arguments.add_argument("--pins", type=Path, default=attach.DEFAULT_ROOT, metavar="DIR", help="a folder of a bpf file system")
    arguments.add_argument("--limit", action="append", default=[], metavar="NAME=NUMBER", help="another size of a map")
    arguments.add_argument("--sources", type=Path, default=None, metavar="DIR", help="programs that replace ours, for tests")
    options = arguments.parse_args(words)
    limits = {name: int(value) for name, _, value in (word.partition("=") for word in options.limit)}
    with _quiet_stdout():
        report = load(options.pins, limits, options.sources)
    print(json.dumps(report._asdict() | {"refused": dict(report.refused)}), flush=True)
    return 1 if report.problem or report.refused else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # without LLVM's destructors
