"""What the loader says and how it puts sources together, without loading anything."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest

from ebpf import btf, layout, loader
from ebpf.bpfsys import VerifierRefused

SOCKOPS = next(program for program in layout.PROGRAMS if program.name == "sockops")


def test_importing_the_loader_does_not_bring_bcc() -> None:
    assert "bcc" not in sys.modules


def test_one_unit_has_the_header_once_and_each_file_once() -> None:
    text = loader.sources(layout.PROGRAMS)
    assert '#include "mesh.h"' not in text
    for name in ("mesh.h", *{program.source for program in layout.PROGRAMS}):
        assert text.count(f'#line 1 "{name}"') == 1


def test_programs_that_are_left_out_bring_no_source() -> None:
    assert '#line 1 "redirect.bpf.c"' not in loader.sources([SOCKOPS])


def test_other_sources_replace_ours(tmp_path: Path) -> None:
    (tmp_path / "sockops.bpf.c").write_text("int other;")
    text = loader.sources(layout.PROGRAMS, tmp_path)
    assert "int other;" in text
    assert "int redirect(" in text


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            "0: (85) call bpf_get_netns_cookie#122\nunknown func bpf_get_netns_cookie#122\nprocessed 1 insns",
            "unknown func bpf_get_netns_cookie#122",
        ),
        ("program of this type cannot use helper bpf_sk_assign#124", "program of this type cannot use helper bpf_sk_assign#124"),
    ],
)
def test_a_refusal_names_program_helper_and_kernel(log: str, said: str) -> None:
    text = loader.refusal(SOCKOPS, VerifierRefused(errno.EINVAL, "sockops", log), "5.4.0")
    assert text.startswith("program sockops (sockops.bpf.c), helper bpf_")
    assert text.endswith(f": kernel 5.4.0 refused it: {said}")


def test_a_refusal_without_a_log_gives_the_kernels_error() -> None:
    text = loader.refusal(SOCKOPS, VerifierRefused(errno.EINVAL, "sockops", ""), "5.4.0")
    assert text == "program sockops (sockops.bpf.c): kernel 5.4.0 refused it: Invalid argument"
    assert "CAP_BPF" in loader.refusal(SOCKOPS, PermissionError(errno.EPERM, "no"), "5.4.0")


def test_reports_are_read_back() -> None:
    fields = {"kernel": "6.1", "installed": ["connect4"], "refused": {"redirect": "no"}, "problem": ""}
    report = loader.read_report(b"chatter\n" + json.dumps(fields).encode() + b"\n")
    assert report == loader.Report("6.1", ("connect4",), {"redirect": "no"})
    assert report.why_not(["connect4"]) == ""
    assert report.why_not(["connect4", "redirect"]) == "no"
    assert "inbound" in report.why_not(["inbound"])


@pytest.mark.parametrize("output", [b"", b"Killed\n", b"[]\n", b'{"kernel": 1}\n', b"\xff\xfe"])
def test_what_is_no_report_is_an_error(output: bytes) -> None:
    with pytest.raises(loader.LoaderFailed):
        loader.read_report(output)


def test_missing_capabilities_are_named() -> None:
    assert loader.missing_capabilities("CapEff:\t0000000000000000\n") == ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"]
    assert loader.missing_capabilities("CapEff:\t000001ffffffffff\n") == []
    assert loader.missing_capabilities(f"CapEff:\t{1 << 21:016x}\n") == ["CAP_NET_ADMIN"]
    enough_to_capture = 1 << 39 | 1 << 12 | 1 << 38
    assert loader.missing_capabilities(f"CapEff:\t{enough_to_capture:016x}\n") == []


def test_a_kernel_without_types_says_what_it_was_built_without(tmp_path: Path) -> None:
    with pytest.raises(btf.NoTypes, match="CONFIG_DEBUG_INFO_BTF"):
        btf.offsets(tmp_path / "vmlinux")


def test_the_headers_and_programs_are_where_the_loader_looks() -> None:
    folder = Path(loader.__file__).parent
    for name in ("linux/types.h", "linux/version.h", "linux/kconfig.h", "asm/page.h", "uapi/linux/bpf.h"):
        assert (folder / "include" / name).is_file(), "BCC_KERNEL_SOURCE is the package's folder"
