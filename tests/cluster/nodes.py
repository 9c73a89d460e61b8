"""A real Kubernetes on this machine: every node is a network namespace with a containerd, kubelet and kube-proxy of its own.

Node 1 also runs etcd and the control plane. The nodes hang on one bridge; the machine itself reaches the API server at node 1's address,
so a plain kubeconfig works. All state lies in one folder and one cgroup a node, and `down` removes both, whoever started it. Needs root
and the Debian packages containerd runc containernetworking-plugins etcd-server iptables conntrack iproute2.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import configs, kit, pki
from tests.cluster.machine import (
    CannotStart,
    alive,
    end_all,
    hierarchies,
    ip,
    make_cgroups,
    make_mounts,
    make_private,
    remove_cgroup,
    unified,
    unmount_below,
    wait_for,
)

SERVICES = "10.96.0.0/16"
API_SERVICE = "10.96.0.1"
DNS_SERVICE = "10.96.0.10"
PAUSE_IMAGE = "localhost/pause:1"


@dataclass(frozen=True)
class Node:
    """One node: ``number`` from 1; its network namespace and cgroup have the same name."""

    cluster: str
    number: int
    address: str
    folder: Path

    @property
    def namespace(self) -> str:
        return f"{self.cluster}{self.number}"

    @property
    def pods(self) -> str:
        return f"10.244.{self.number}.0/24"

    @property
    def mounts(self) -> Path:
        return self.folder.parent / "mounts" / self.namespace

    @property
    def socket(self) -> Path:
        return self.folder / "containerd.sock"

    def inside(self, *command: str) -> list[str]:
        """The command in the node's network and mounts (nsenter, because `ip netns exec` hides /sys/fs/cgroup)."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", f"--mount={self.mounts}", f"--wd={self.folder.parent}", *command]


class Cluster:
    """``name`` becomes the prefix of namespaces, links and cgroups; ``net`` the first three bytes of the nodes' addresses."""

    def __init__(self, state: Path, name: str = "pillion", nodes: int = 2, net: str = "10.98.0") -> None:
        self.state = state
        self.name = name
        self.net = net
        self.nodes = [Node(name, i, f"{net}.1{i}", state / f"{name}{i}") for i in range(1, nodes + 1)]
        self.bridge = f"{name}-br"
        self.kubeconfig = state / "admin.kubeconfig"
        self.binaries = kit.folder("kubernetes")

    @staticmethod
    def opened(state: Path) -> Cluster | None:
        """The cluster that runs with this state folder, if one does."""
        try:
            facts = json.loads((state / "cluster.json").read_text())
        except FileNotFoundError:
            return None
        return Cluster(state, facts["name"], facts["nodes"], facts["net"])

    # --- up and down -----------------------------------------------------------------------------------------------------------------

    def up(self, images: Sequence[Path] = ()) -> None:
        """Start everything and wait until all nodes are Ready; what an earlier run of this name left is removed first."""
        started = time.monotonic()
        self.binaries = kit.have("kubernetes")
        self.down()
        for folder in ("pki", "log", "run", "etcd"):
            (self.state / folder).mkdir(parents=True, exist_ok=True)
        (self.state / "cluster.json").write_text(json.dumps({"name": self.name, "nodes": len(self.nodes), "net": self.net}))
        pki.write(self.state / "pki", [node.address for node in self.nodes], API_SERVICE)
        self._connect()
        self._start_control_plane()
        for node in self.nodes:
            self._start_node(node, images)
        wait_for("nodes ready", self._ready, 90)
        kit.say(f"{len(self.nodes)} nodes ready after {time.monotonic() - started:.0f} s")

    def down(self) -> None:
        """End and remove everything; safe to call for what is half there or not there at all."""
        for cgroup in self._cgroups():
            end_all(cgroup)
        unmount_below(self.state)
        for node in self.nodes:
            subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True, check=False)
        for cgroup in self._cgroups():
            remove_cgroup(cgroup)
        shutil.rmtree(self.state, ignore_errors=True)

    # --- programs --------------------------------------------------------------------------------------------------------------------

    def start(self, node: Node, name: str, *command: str) -> None:
        """Start a program in a node's network and cgroup, its output in log/; it outlives this process. Remembered for `restart`."""
        remembered = self.state / "run" / f"{node.namespace}-{name}.json"
        remembered.write_text(json.dumps(command))
        log = self.state / "log" / f"{node.namespace}-{name}.log"
        # in the background of a shell that ends: the program is init's child, not ours, and lives on after us
        enter = 'echo $$ > "$0/cgroup.procs" && { setsid "$@" & echo $!; }'
        with log.open("ab") as output:
            command_line = ["sh", "-c", enter, str(self._daemons(node)), "sh", "-c", 'exec "$@" >&2', "-", *node.inside(*command)]
            done = subprocess.run(
                command_line, cwd=self.state, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output, text=True, check=True
            )
        (self.state / "run" / f"{node.namespace}-{name}.pid").write_text(done.stdout.strip())

    def stop(self, node: Node, name: str, *, kill: bool = False, patience_s: float = 10) -> None:
        """End a program that `start` started, here or in another process, and wait until it is gone; killed when it takes long."""
        pid = int((self.state / "run" / f"{node.namespace}-{name}.pid").read_text())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
        end = time.monotonic() + patience_s
        while alive(pid):
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def again(self, node: Node, name: str) -> None:
        """Start once more what `stop` ended."""
        self.start(node, name, *json.loads((self.state / "run" / f"{node.namespace}-{name}.json").read_text()))

    def kubectl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.binaries / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def load(self, archive: Path) -> None:
        """Import an image archive into every node."""
        commands = [["ctr", "-a", str(node.socket), "-n", "k8s.io", "images", "import", str(archive)] for node in self.nodes]
        imports = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for command in commands]
        for process in imports:
            _, errors = process.communicate()
            if process.returncode:
                raise CannotStart(f"importing {archive.name} failed: {errors[-2000:]}")

    # --- parts of up -----------------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Bridge, namespaces, addresses, routes between the nodes' pod networks, cgroups."""
        ip(f"link add {self.bridge} type bridge", f"addr add {self.net}.1/24 dev {self.bridge}", f"link set {self.bridge} up")
        make_private(self.state / "mounts")
        for node in self.nodes:
            make_mounts(node.mounts)
            ns, up = node.namespace, f"{node.namespace}-up"
            ip(f"netns add {ns}", f"-n {ns} link set lo up", f"link add {up} type veth peer name eth0 netns {ns}")
            ip(f"link set {up} master {self.bridge} up", f"-n {ns} addr add {node.address}/24 dev eth0", f"-n {ns} link set eth0 up")
            ip(f"-n {ns} route add default via {self.net}.1")
            for other in self.nodes:
                if other != node:
                    ip(f"-n {ns} route add {other.pods} via {other.address}")
            forward = "net.ipv4.ip_forward=1 net.ipv4.conf.all.route_localnet=1 net.ipv6.conf.all.forwarding=1"
            subprocess.run(node.inside("sysctl", "-qw", *forward.split()), check=False, stderr=subprocess.DEVNULL)
            make_cgroups(ns)
            self._daemons(node).mkdir(parents=True, exist_ok=True)

    def _daemons(self, node: Node) -> Path:
        """A leaf of its own: the unified hierarchy allows processes only in leaves, and kubelet makes its pods' folders beside it."""
        return unified() / node.namespace / "daemons"

    def _start_control_plane(self) -> None:
        first, pair = self.nodes[0], f"{self.state}/pki"
        for user in ("admin", "controller-manager", "scheduler", "kube-proxy", *(f"node{node.number}" for node in self.nodes)):
            text = configs.KUBECONFIG.format(server=f"https://{first.address}:6443", pki=pair, user=user)
            (self.state / f"{user}.kubeconfig").write_text(text)
        (self.state / "audit.yaml").write_text(configs.AUDIT)
        self.start(first, "etcd", "etcd", *configs.flags(configs.ETCD))
        flags = configs.flags(configs.API_SERVER, services=SERVICES, address=first.address)
        self.start(first, "apiserver", f"{self.binaries}/kube-apiserver", *flags)
        wait_for("API server", lambda: self.kubectl("get", "--raw", "/readyz").returncode == 0, 90)
        for name, text in (("controller-manager", configs.CONTROLLER_MANAGER), ("scheduler", configs.SCHEDULER)):
            self.start(first, name, f"{self.binaries}/kube-{name}", *configs.flags(text))

    def _start_node(self, node: Node, images: Sequence[Path]) -> None:
        (node.folder / "cni").mkdir(parents=True)
        values = {"folder": node.folder, "state": self.state, "cgroup": node.namespace, "number": node.number, "pods": node.pods}
        (node.folder / "containerd.toml").write_text(configs.CONTAINERD.format(pause=PAUSE_IMAGE, **values))
        (node.folder / "cni" / "10-bridge.conflist").write_text(json.dumps(configs.CNI(node.folder, node.pods)))
        (node.folder / "kubelet.yaml").write_text(configs.KUBELET.format(dns=DNS_SERVICE, **values))
        self.start(node, "containerd", "containerd", "-c", f"{node.folder}/containerd.toml")
        wait_for(f"containerd of node {node.number}", node.socket.exists, 90)
        for archive in images:
            command = ["ctr", "-a", str(node.socket), "-n", "k8s.io", "images", "import", str(archive)]
            subprocess.run(command, check=True, capture_output=True)
        kubelet = configs.flags(configs.KUBELET_FLAGS, folder=node.folder, number=node.number, address=node.address)
        self.start(node, "kubelet", f"{self.binaries}/kubelet", *kubelet)
        self.start(node, "kube-proxy", f"{self.binaries}/kube-proxy", *configs.flags(configs.KUBE_PROXY, number=node.number))

    def _ready(self) -> bool:
        ready = self.kubectl("get", "nodes", "--no-headers").stdout.count(" Ready")
        return ready == len(self.nodes) and self.kubectl("-n", "default", "get", "serviceaccount", "default").returncode == 0

    def _cgroups(self) -> list[Path]:
        return [cgroup for node in self.nodes for top in hierarchies() if (cgroup := top / node.namespace).is_dir()]
