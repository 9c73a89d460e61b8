"""``python -m tests.cluster up|down|code|install|times|conformance|kubectl``: the test cluster for people who want to look around in it.

up [--nodes N]     a Kubernetes on this machine with DNS and the Gateway API, Pillion's images in its nodes; prints how to use it
code               the newest code into the images and the nodes (seconds); pods that start afterwards run it
times [ROUNDS]     how long pods take to be Ready, with and without a sidecar
kubectl ARGS...    kubectl on this cluster
down               end it and remove everything
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cluster import images, kit
from tests.cluster.kube import CONTROL_PLANE
from tests.cluster.machine import CannotStart
from tests.cluster.nodes import Cluster

STATE = Path(os.environ.get("PILLION_CLUSTER") or "/run/pillion-cluster")
MANIFESTS = Path(__file__).parent / "manifests"


def bring_up(cluster: Cluster) -> None:
    """Nodes, DNS, Gateway API, and the images that tests use: made while the nodes start, and loaded while the rest is set up."""
    gateway = kit.have("gateway")
    with ThreadPoolExecutor() as aside:
        made = aside.submit(_images)
        cluster.up([images.pause(), images.coredns()])
        loaded = aside.submit(lambda: _load(cluster, made.result()))
        for arguments in (
            ("apply", "-f", str(MANIFESTS / "coredns.yaml")),
            ("apply", "--server-side", "-f", str(gateway / "crds" / "standard")),
        ):
            done = cluster.kubectl(*arguments)
            if done.returncode:
                raise CannotStart(f"kubectl {' '.join(arguments)}: {done.stderr[-2000:]}")
        loaded.result()
    kit.say("images loaded")


def _images() -> list[Path]:
    """Pillion with the code as it is, and the tests' app."""
    return [*images.pillion(), images.app()]


def _load(cluster: Cluster, archives: list[Path]) -> None:
    for archive in archives:
        cluster.load(archive)


def install(cluster: Cluster, settings: list[str]) -> None:
    """As the README does it, with the images that are in the nodes."""
    from tools import image

    command = [sys.executable, "-m", "cli.main", "install", "--image", image.image(), "--agent-image", image.image(agent=True), *settings]
    manifests = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kubectl = [str(cluster.binaries / "kubectl"), f"--kubeconfig={cluster.kubeconfig}", "-n", "pillion"]
    subprocess.run([*kubectl, "apply", "-f", "-"], input=manifests, text=True, check=True, stdout=subprocess.DEVNULL)
    for workload in CONTROL_PLANE:
        subprocess.run([*kubectl, "rollout", "status", workload, "--timeout=120s"], check=True, stdout=subprocess.DEVNULL)
    kit.say("Pillion is installed")


def conform(cluster: Cluster, report: Path) -> int:
    """Exit code 1 when a test of the suite failed."""
    from tests.cluster import conformance
    from tools import image

    for archive in images.conformance():
        cluster.load(archive)
    outcome = conformance.run(str(cluster.kubeconfig), report)
    log = image.ROOT / ".cache" / "conformance.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text(outcome.output)
    print(f"passed: {', '.join(outcome.passed) or 'none'}\nfailed: {', '.join(outcome.failed) or 'none'}\nreport: {report}, log: {log}")
    return 1 if outcome.failed else 0


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in ("up", "down", "code", "install", "times", "conformance", "kubectl"):
        print(__doc__, file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("the test cluster needs root: its nodes are network namespaces with a containerd each", file=sys.stderr)
        return 1
    what, *rest = arguments
    running = Cluster.opened(STATE)
    if what == "up":
        running = Cluster(STATE, nodes=int(rest[1]) if rest[:1] == ["--nodes"] else 2)
        bring_up(running)
        print(f"export KUBECONFIG={running.kubeconfig} PATH=$PATH:{running.binaries}")
    elif what == "down":
        (running or Cluster(STATE)).down()
    elif running is None:
        print("no cluster runs here: make cluster", file=sys.stderr)
        return 1
    elif what == "code":
        _load(running, _images())
    elif what == "install":
        install(running, rest)
    elif what == "times":
        from tests.cluster import times
        from tests.cluster.kube import Kube

        times.show(Kube(str(running.binaries / "kubectl"), str(running.kubeconfig)), int(rest[0]) if rest else 10)
    elif what == "conformance":
        return conform(running, Path(rest[0] if rest else "docs/conformance/report.yaml"))
    else:
        os.execv(running.binaries / "kubectl", ["kubectl", f"--kubeconfig={running.kubeconfig}", *rest])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (CannotStart, kit.CannotBuild) as error:
        sys.exit(f"cluster: {error}")
