"""h2spec (HTTP/2 and HPACK, 145 cases) against nghttpd directly and through both sidecars: the sidecars may not make anything worse.

h2spec is built once from the Go modules that h2spec/go.sum pins, and kept in the user's cache folder.
"""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from core.addrs import Addr
from tests.conformance.go_tools import go_tool
from tests.ports import unused_port
from tests.scenarios.mesh import mesh
from tests.scenarios.peers import program, run

pytestmark = [pytest.mark.slow, pytest.mark.needs("nghttpd", "go")]

_MODULES = Path(__file__).parent / "h2spec"
_PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"

Case = tuple[str, str]  # section, what is sent

WORSE: dict[Case, str] = {
    ("generic/5", "Sends a dynamic table size update"): (
        "h2spec acknowledges our SETTINGS_HEADER_TABLE_SIZE of 0 and then announces 128; RFC 7541 section 6.3 makes that a decoding error"
    ),
    ("generic/5", "Sends multiple dynamic table size update"): (
        "the same with 128 and 4096; nghttpd does not lower the size, so there the update is allowed"
    ),
    ("hpack/5.2", "Sends a Huffman-encoded string literal representation padded by zero"): (
        "the compiled decoder forgives the padding; nothing of it goes on, because header blocks are encoded anew without Huffman coding"
    ),
}
"""What fails through the sidecars although nghttpd passes it, with the reason. docs/conformance.md lists the same."""


@pytest.fixture(scope="session")
def h2spec() -> str:
    return go_tool("h2spec-2.2.1", _MODULES, "github.com/summerwind/h2spec/cmd/h2spec")


async def _failed(h2spec: str, server: Addr, report: Path) -> tuple[int, set[Case]]:
    """How many cases ran and which of them failed."""
    await run(h2spec, "-h", server.ip, "-p", str(server.port), "-o", "5", "-j", str(report), patience_s=300)
    cases = ET.parse(report).getroot().findall(".//testcase")
    failed = {(case.get("package", ""), case.get("classname", "")) for case in cases if len(case)}
    return len(cases), failed


async def test_the_sidecars_fail_no_case_that_the_server_passes(h2spec: str, tmp_path: Path):
    (tmp_path / "index.html").write_text("hello")
    server = Addr("127.0.0.1", unused_port())
    nghttpd = shutil.which("nghttpd") or "nghttpd"
    async with program(nghttpd, "--no-tls", "-a", server.ip, "-d", str(tmp_path), str(server.port), ready=server):
        total, alone = await _failed(h2spec, server, tmp_path / "alone.xml")
        async with mesh(server) as made, made.entry() as entry:
            total_through, through = await _failed(h2spec, entry, tmp_path / "through.xml")
    assert total == total_through == 145
    assert through - alone == set(WORSE), "a new failure, or one that is mended and still excused"
    page = _PAGE.read_text()
    assert f"| through both sidecars | {total - len(through)} | {len(through)} |" in page
    assert [case for case in WORSE if case[1] not in page] == []
