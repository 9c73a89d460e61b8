"""The programs are loaded once for the session; every test has pods of its own, and leaves the kernel as it found it.

The suite in the emulated machine takes minutes of one processor. It begins with the session, behind everything else that runs, and the
test that waits for it comes last, before those of a cluster.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import ACCELERATED, PATIENCE_S, Lab, LabPod
from second_kernel import PROGRAMS, Guest

from ebpf import probe
from ebpf.layout import PodFlag

ROOT = Path(__file__).parents[2]
_AGENT = [
    f"tests/netns/test_netns_ebpf_agent.py::test_{name}"
    for name in (
        "the_app_sees_the_real_caller_and_the_caller_sees_what_it_dialled[v4]",
        "a_killed_agent_leaves_capture_as_it_is_and_a_new_one_takes_over_without_loading_anything",
        "removal_brings_pods_to_nftables_without_a_gap_and_leaves_nothing[agent running]",
    )
]
"""The agent there: it loads, tries and attaches, leads pods' connections, dies, is followed, and goes without a trace."""
_LEFT_OUT = "not resuming and not second and not node and not grpc and not go_net and not wrk"
_SCALE = 0.05
"""A twentieth of the rounds: what the suite looks for shows in the first of them, and emulation is ten times slower."""
_GUEST = pytest.StashKey[Guest]()


def _in_the_guest(item: pytest.Item) -> bool:
    return "guest" in getattr(item, "fixturenames", ())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable: every other test stays where it was."""
    items.sort(key=lambda item: 2 if item.get_closest_marker("cluster") else int(_in_the_guest(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin, if the test was selected and will not be skipped."""
    wanted = any(map(_in_the_guest, session.items)) and not session.config.option.collectonly
    if wanted and os.geteuid() == 0 and all(map(shutil.which, PROGRAMS)):
        words = [sys.executable, "-m", "pytest", "tests/kernel", *_AGENT, "-q", "--no-header", "-p", "no:cacheprovider", "-k", _LEFT_OUT]
        session.config.stash[_GUEST] = Guest(["env", f"PILLION_KERNEL_SCALE={_SCALE}", "CI=", *words], 2400, folder=ROOT)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Also when the session was interrupted."""
    if (guest := session.config.stash.get(_GUEST, None)) is not None:
        guest.end()


@pytest.fixture
def guest(pytestconfig: pytest.Config) -> Guest:
    """This suite under Debian's kernel, begun with the session."""
    return pytestconfig.stash[_GUEST]


@pytest.fixture(scope="session")
def findings() -> probe.Findings:
    """What the agent would find out about this kernel."""
    return probe.find(seconds=4 * PATIENCE_S)


@pytest.fixture(scope="session")
def accelerated(findings: probe.Findings) -> PodFlag:
    """What the agent would give a pod on this kernel."""
    return ACCELERATED | (PodFlag.ONE_WAY if findings.to_app else PodFlag(0))


@pytest.fixture(scope="session")
def loaded() -> Iterator[Lab]:
    """The real programs."""
    lab = Lab()
    try:
        assert not lab.report.problem, lab.report.problem
        assert not lab.report.refused, lab.report.refused
        yield lab
    finally:
        lab.close()


@pytest.fixture
def lab(loaded: Lab) -> Iterator[Lab]:
    """The same, without pods."""
    try:
        yield loaded
    finally:
        loaded.close_pods()


@pytest.fixture
def pod(lab: Lab) -> LabPod:
    """A pod with nothing attached."""
    return lab.pod()


@pytest.fixture(scope="session")
def naive() -> Iterator[Lab]:
    """The program that one finds everywhere: redirect always, find the peer by addresses."""
    lab = Lab(folder=Path(__file__).parent / "naive")
    try:
        assert not lab.report.problem, lab.report.problem
        yield lab
    finally:
        lab.close()
