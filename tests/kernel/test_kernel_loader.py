"""The loader on machines that lack something: which programs are there afterwards, and what is said about the others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hop_checks
import pytest
from lab import ACCELERATED, PATIENCE_S, Lab, LabPod

from ebpf import attach, bpfsys, layout, loader
from ebpf.layout import Counter

pytestmark = pytest.mark.kernel

KERNEL = os.uname().release


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    bpfsys.mount_bpffs(tmp_path)
    try:
        yield tmp_path / "pillion"
    finally:
        attach.remove(tmp_path / "pillion")
        bpfsys.unmount(tmp_path)


def _install_after(root: Path, *setup: str) -> loader.Report:
    """The loader in a mount namespace of its own, after these commands."""
    script = " && ".join([*setup, 'exec "$@"'])
    words = ["unshare", "--mount", "sh", "-c", script, "sh", *loader.command(root)]
    done = subprocess.run(words, capture_output=True, timeout=4 * PATIENCE_S, check=False)
    return loader.read_report(done.stdout)


def test_every_program_is_installed_and_listed(bpffs: Path) -> None:
    report = loader.install(bpffs, seconds=4 * PATIENCE_S)
    assert report == loader.Report(KERNEL, tuple(program.name for program in layout.PROGRAMS))
    assert report.why_not([program.name for program in layout.PROGRAMS]) == ""


def test_without_a_bpf_file_system_it_says_how_to_mount_one(tmp_path: Path) -> None:
    report = loader.install(tmp_path / "pillion")
    assert f"mount -t bpf bpf {tmp_path}" in report.problem
    assert report.why_not(["connect4"]) == report.problem
    assert not list(tmp_path.iterdir())


def test_a_bpf_file_system_is_mounted_where_there_is_none(tmp_path: Path) -> None:
    root = tmp_path / "bpf" / "pillion"
    assert attach.prepare(root)
    try:
        assert not attach.prepare(root), "only once"
        assert bpfsys.is_bpffs(root)
    finally:
        attach.remove(root)
        bpfsys.unmount(root.parent)


def test_without_privileges_it_names_the_capabilities(bpffs: Path) -> None:
    words = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", *loader.command(bpffs)]
    done = subprocess.run(words, capture_output=True, timeout=4 * PATIENCE_S, check=False)
    report = loader.read_report(done.stdout)
    assert done.returncode == 1
    assert not report.installed
    assert all(name in report.problem for name in ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON", "CAP_SYSLOG")), report
    assert KERNEL in report.problem


@pytest.mark.needs("setpriv")
def test_the_named_capabilities_are_enough(bpffs: Path) -> None:
    names = ["dac_override", *(name.removeprefix("CAP_").lower() for name in loader.CAPABILITIES)]
    keep = ",".join(["-all", *(f"+{name}" for name in names)])
    words = ["setpriv", f"--bounding-set={keep}", f"--inh-caps={keep}", *loader.command(bpffs)]
    done = subprocess.run(words, capture_output=True, timeout=4 * PATIENCE_S, check=False)
    report = loader.read_report(done.stdout)
    assert len(report.installed) == len(layout.PROGRAMS), report


def test_without_type_information_capture_works_and_nothing_is_accelerated(bpffs: Path) -> None:
    report = _install_after(bpffs, "mount -t tmpfs none /sys/kernel/btf")
    assert set(report.refused) == {"redirect"}
    assert "/sys/kernel/btf/vmlinux" in report.refused["redirect"]
    assert KERNEL in report.refused["redirect"]
    with attach.Node(attach.Pins(bpffs)) as node:
        pod = LabPod(node, f"ptk{os.getpid()}-nobtf")
        try:
            pod.attach(ACCELERATED, inbound=True)
            pod.run(hop_checks.run_check, "slow_accept")
            assert pod.counts()[Counter.CAPTURED] > 0
            assert pod.counts()[Counter.MESSAGES] == 0
        finally:
            pod.close()


def test_without_bcc_it_names_the_package(bpffs: Path) -> None:
    report = _install_after(bpffs, "mount -t tmpfs none /usr/lib/python3/dist-packages")
    assert "python3-bpfcc" in report.problem
    assert not bpffs.exists() or not list(bpffs.rglob("connect4"))


def test_a_refused_program_is_named_with_its_helper_and_the_kernel(bpffs: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A helper that sk_lookup does not have; the other programs are there all the same."""
    folder = tmp_path_factory.mktemp("programs")
    source = (Path(loader.__file__).parent / "bpf" / "inbound.bpf.c").read_text()
    (folder / "inbound.bpf.c").write_text(source.replace("u64 ns;", "u64 ns = bpf_get_netns_cookie(ctx);", 1))
    report = loader.install(bpffs, folder=folder, seconds=4 * PATIENCE_S)
    assert set(report.refused) == {"inbound"}
    said = report.refused["inbound"]
    assert said.startswith("program inbound (inbound.bpf.c), helper bpf_get_netns_cookie: kernel " + KERNEL)
    assert report.why_not(["connect4", "inbound"]) == said
    assert len(report.installed) == len(layout.PROGRAMS) - 1
    with attach.Node(attach.Pins(bpffs)) as node, pytest.raises(attach.NotInstalled, match="inbound"):
        node.link_netns(1, 0)


def test_programs_that_do_not_compile_are_a_problem_with_the_compilers_words(bpffs: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("programs")
    (folder / "redirect.bpf.c").write_text("int redirect(struct sk_msg_md *msg) { return nonsense; }")
    report = loader.install(bpffs, folder=folder, seconds=4 * PATIENCE_S)
    assert not report.installed
    assert "could not be compiled" in report.problem
    assert "nonsense" in report.problem


def test_another_layout_is_never_laid_over_old_maps(bpffs: Path) -> None:
    assert not loader.install(bpffs, {"PODS_MAX": 4}, seconds=4 * PATIENCE_S).problem
    (attach.Pins(bpffs).maps / "pods").unlink()
    fd = bpfsys.map_create(bpfsys.ARRAY, 4, 4, 1, "pods")
    bpfsys.pin(fd, attach.Pins(bpffs).maps / "pods")
    os.close(fd)
    assert "map pods: key and value have 4 and 4 bytes" in loader.install(bpffs, seconds=4 * PATIENCE_S).problem


def test_what_stays_in_memory_is_small(lab: Lab) -> None:
    """LLVM ends with the loader; whoever holds the maps afterwards needs none of it."""
    code = (
        f"import pathlib; from ebpf import attach; node = attach.Node(attach.Pins(pathlib.Path({str(lab.root)!r}))); node.pods();"
        "import sys; assert 'bcc' not in sys.modules;"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')][0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=Path(loader.__file__).parents[1])
    assert int(done.stdout) < 20 << 10
