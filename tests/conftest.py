"""Which tests can run here: one that needs root, a program or a cluster skips on a laptop with the reason, and fails in CI."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator

import hypothesis
import pytest

from local.search import search_path
from tests import traces

# CI tries the same examples in every run, a laptop others each time; how long one takes says how busy the machine is, so nothing is timed
hypothesis.settings.register_profile(
    "pillion",
    hypothesis.settings.get_profile("ci" if os.environ.get("CI") else "default"),
    max_examples=50,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("pillion")

_PACKAGES = {
    "ip": "iproute2",
    "nft": "nftables",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "newuidmap": "uidmap",
    "nghttp": "nghttp2-client",
    "h2load": "nghttp2-client",
    "nghttpd": "nghttp2-server",
    "go": "golang-go",
    "etcd": "etcd-server",
    "redis-cli": "redis-tools",
    "redis-benchmark": "redis-tools",
    "node": "nodejs",
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "apt-get": "apt",
}
"""Which Debian package has a program, where it is not the package of the same name."""


def _missing_programs(mark: pytest.Mark) -> str:
    """``@pytest.mark.needs("curl", "h2load")``: which packages to install."""
    packages = sorted({_PACKAGES.get(program, program) for program in mark.args if shutil.which(program) is None})
    return f"needs the Debian package {' and '.join(packages)}" if packages else ""


def _missing_for_netns(_: pytest.Mark) -> str:
    """Why no network namespaces can be made here, empty when they can."""
    return "needs root" if os.geteuid() != 0 else _missing_programs(pytest.mark.needs("ip", "nft", "unshare").mark)


def _missing_for_kernel(_: pytest.Mark) -> str:
    """Why no BPF programs can be loaded here. Only what is plain to see: a kernel that refuses them is a failure, not a skip."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.path.exists("/usr/lib/python3/dist-packages/bcc"):
        return "needs the Debian package python3-bpfcc"
    return _missing_programs(pytest.mark.needs("ip", "mount").mark)


def _missing_for_cluster(_: pytest.Mark) -> str:
    """Why no Kubernetes can be started here, empty when it can or when KUBECONFIG names one."""
    if os.environ.get("KUBECONFIG"):
        return ""
    if os.geteuid() != 0:
        return "needs root to start a Kubernetes here, or KUBECONFIG of one that runs"
    wanted = ("go", "containerd", "runc", "etcd", "iptables", "conntrack", "mmdebstrap", "buildah", "ip", "tcpdump")
    if not os.path.exists("/usr/lib/cni/bridge"):
        return "needs the Debian package containernetworking-plugins"
    return _missing_programs(pytest.mark.needs(*wanted).mark) or _old_go()


@functools.cache
def _old_go() -> str:
    """Kubernetes and its friends say in their go.mod which Go they want; a distribution's may be older."""
    said = subprocess.run(
        ["go", "env", "GOVERSION"], capture_output=True, text=True, check=False, env={**os.environ, "GOTOOLCHAIN": "local"}
    ).stdout
    found = re.match(r"go(\d+)\.(\d+)", said)
    return (
        ""
        if found and (int(found[1]), int(found[2])) >= (1, 26)
        else f"needs Go 1.26 or newer to build a Kubernetes, found {said.strip() or 'none'}"
    )


_MISSING = {"needs": _missing_programs, "netns": _missing_for_netns, "kernel": _missing_for_kernel, "cluster": _missing_for_cluster}


def pytest_configure() -> None:
    os.environ["PATH"] = search_path()  # a plain user's on Debian is without haproxy, nginx and nghttpd, and their tests would skip
    # a shell without job control starts what runs in its background (``make test &``) deaf to Ctrl-C, and so would our children be
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here; in CI a missing requirement is a failure, or the suite could shrink without anybody noticing."""
    for marker, missing in _MISSING.items():
        mark = item.get_closest_marker(marker)
        if mark is None:
            continue
        reason = missing(mark)
        if reason and os.environ.get("CI") == "true":
            pytest.fail(f"{marker}: {reason}, and CI runs everything", pytrace=False)
        if reason:
            pytest.skip(f"{marker}: {reason}")


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_in_the_kernel() -> Iterator[None]:
    """Programs, maps, links, pins, cgroups and namespaces: after everything else of the session, meshes and labs included, has ended."""
    yield
    assert traces.left(30) == {}


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A selection without a test is a mistake in CI; on a laptop (``make test-netns`` before there is one) it is only empty."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and os.environ.get("CI") != "true":
        session.exitstatus = pytest.ExitCode.OK
