"""A command under another kernel: Debian's own, in qemu without hardware virtualization, with this machine's files read-only below it.

The guest sees the host's root folder through 9p with a memory overlay on top, so the interpreter, the virtual environment and the
repository are the host's; nothing that it writes comes back. Boots in seconds, runs about ten times slower than the machine. `Guest` runs
a command there while this process does something else: ``second_kernel.py INITRD FOLDER WORD...`` is what it starts.
"""

from __future__ import annotations

import gzip
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pillion" / "kernel"
PROGRAMS = ("qemu-system-x86_64", "busybox", "cpio", "depmod", "apt-get", "dpkg-deb", "setpriv")
_MODULES = [
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("netfs", "fscache", "9pnet", "9pnet_virtio", "9p", "overlay", "veth"),
]
_INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc none /proc; $b mount -t devtmpfs none /dev
for m in {modules}; do [ -f /lib/$m.ko ] && $b insmod /lib/$m.ko; done
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=loose,ro root /ro || $b poweroff -f
$b mount -t tmpfs none /up; $b mkdir /up/u /up/w
$b mount -t overlay -o lowerdir=/ro,upperdir=/up/u,workdir=/up/w,index=off,metacopy=off none /new || $b poweroff -f
$b mkdir -p /new/lib/modules/{release}; $b mount -o bind /ro{tree} /new/lib/modules/{release}
for d in proc sys dev tmp run; do $b mkdir -p /new/$d; done
$b mount -t proc none /new/proc; $b mount -t sysfs none /new/sys; $b mount -t devtmpfs none /new/dev
for d in run tmp dev/shm; do $b mkdir -p /new/$d; $b mount -t tmpfs none /new/$d; done
[ -d /new{folder} ] || {{ $b mkdir -p /new{folder}; $b mount -o bind /ro{folder} /new{folder}; }}
$b mkdir -p /new/dev/pts; $b mount -t devpts none /new/dev/pts
$b mount -t cgroup2 none /new/sys/fs/cgroup
$b ip link set lo up
echo; echo "=== up $($b uname -r)"
$b cp /.command /new/.command
$b chroot /new /bin/sh /.command
echo "=== exit code $?"
$b poweroff -f
"""


def fetch() -> tuple[Path, str]:
    """The unpacked kernel package of this Debian release, downloaded once; (folder, kernel release)."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not any(CACHE.glob("lib/modules/*")):
        names = subprocess.run(["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True, check=True).stdout
        package = re.search(r"Depends: (linux-image-\S+)", names)
        if package is None:
            raise LookupError("apt knows no linux-image-amd64; run apt-get update")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["apt-get", "download", package[1]], cwd=folder, capture_output=True, check=True)
            subprocess.run(["dpkg-deb", "-x", *(str(path) for path in Path(folder).glob("*.deb")), str(CACHE)], check=True)
    modules = next(CACHE.glob("lib/modules/*"))
    if not (modules / "modules.dep").exists():
        subprocess.run(["depmod", "-b", str(CACHE), modules.name], capture_output=True, check=True)
    return CACHE, modules.name


def _archive(folder: Path) -> bytes:
    names = subprocess.run(["find", "."], cwd=folder, capture_output=True, check=True).stdout
    made = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=folder, input=names, capture_output=True, check=True).stdout
    return gzip.compress(made, 1)


def _initrd(kernel: Path, release: str, command: str, seen: Path) -> bytes:
    """seen: a folder that the guest sees also when it lies below one that is the guest's own, like /tmp."""
    tree = kernel / "lib" / "modules" / release
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for made in ("bin", "sbin", "proc", "sys", "dev", "lib", "ro", "up", "new"):
            (folder / made).mkdir()
        shutil.copy("/bin/busybox", folder / "bin" / "busybox")
        for module in _MODULES:
            for path in tree.glob(f"kernel/**/{module}.ko"):
                shutil.copy(path, folder / "lib" / path.name)
        (folder / "init").write_text(_INIT.format(modules=" ".join(_MODULES), release=release, tree=tree, folder=seen))
        (folder / "init").chmod(0o755)
        (folder / "sbin" / "modprobe").write_text('#!/bin/busybox sh\nexec /bin/busybox chroot /new /sbin/modprobe "$@"\n')
        (folder / "sbin" / "modprobe").chmod(0o755)
        (folder / ".command").write_text(command)
        return _archive(folder)


class Guest:
    """A command in the guest, which begins at once and yields to whatever else this machine does. `end` in every case.

    folder: the command's working folder. The kernel ends the guest when the thread that made it ends, however that comes about.
    """

    def __init__(self, words: Sequence[str], seconds: float, *, folder: Path) -> None:
        self._own = Path(tempfile.mkdtemp(prefix="pillion-guest-"))
        self._log = self._own / "console"
        self._end = time.monotonic() + seconds
        before = ["setpriv", "--pdeathsig", "KILL", "nice", "-n", "10"]
        argv = [*before, sys.executable, __file__, str(self._own / "initrd"), str(folder), *words]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait(self) -> tuple[int, str]:
        """Exit code (99: the command came to none) and console output, once it has ended or its seconds are over."""
        late = ""
        try:
            self._process.wait(max(0.0, self._end - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = "\n=== out of time\n"
        text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\x1bc|\r", "", self._log.read_text(errors="replace")) + late
        text = text[max(text.find("=== up"), 0) :]
        code = re.search(r"=== exit code (\d+)", text)
        return (int(code[1]) if code else 99), text

    def end(self) -> None:
        """Nothing is left of it."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._own)


def _become_guest(initrd: Path, folder: Path, words: Sequence[str], megabytes: int = 2048) -> None:
    """Replace this process by the machine that runs the command."""
    kernel, release = fetch()
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    command = f"export PATH={path} HOME=/root PYTHONDONTWRITEBYTECODE=1 LANG=C.UTF-8\ncd {shlex.quote(str(folder))}\n{shlex.join(words)}\n"
    initrd.write_bytes(_initrd(kernel, release, command, folder))
    qemu = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", str(megabytes), "-nographic"]
    qemu += ["-no-reboot", "-nic", "none", "-kernel", str(kernel / "boot" / f"vmlinuz-{release}"), "-initrd", str(initrd)]
    qemu += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]
    qemu += ["-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"]
    os.execvp(qemu[0], qemu)


if __name__ == "__main__":
    _become_guest(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
