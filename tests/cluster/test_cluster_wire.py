"""What is on the wire between the nodes and on each node: TLS 1.3 from the first byte to the last, and the app's words nowhere."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.demo.wire import Connection, check_tls13_untrusted, connections, read_pcap_untrusted
from tests.cluster.conftest import Ground
from tests.cluster.kube import OUTSIDE, Space, container, pod, pod_spec, service, until
from tests.cluster.nodes import Cluster
from tests.cluster.test_cluster_workloads import caller, identity

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.needs("tcpdump")]

_ETHERNET = 14


class Capture:
    """Everything on one link while it was watched."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def connections(self) -> list[Connection]:
        return connections(packet[_ETHERNET:] for packet in read_pcap_untrusted(self.path.read_bytes()))

    def to(self, address: str, port: int) -> list[Connection]:
        return [each for each in self.connections() if each.server == (address, port) and each.sent.data()[0]]


@contextmanager
def watching(command: list[str], path: Path) -> Iterator[Capture]:
    """tcpdump on a link, from before the body to after it."""
    options = ["-n", "-U", "--immediate-mode", "-s", "0", "-w", str(path), "tcp"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "listening on" not in process.stderr.readline():
        assert process.poll() is None, "tcpdump ended"
    try:
        yield Capture(path)
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def machines(ground: Ground) -> Cluster:
    if ground.nodes is None:
        pytest.skip("the machines of this cluster are out of reach")
    return ground.nodes


@pytest.fixture(scope="module")
def pair(make_space: Callable[..., Space], machines: Cluster) -> Space:
    """``web`` on the first node, a meshed and an unmeshed caller on each node."""
    made = make_space("pair")
    first, last = "node1", f"node{len(machines.nodes)}"
    serving = container("app", "serve", "--http", "8080", "--tcp", "2525")
    made.apply(pod("web", pod_spec(serving, nodeName=first), annotations={"config.pillion.dev/opaque-ports": "2525"}))
    made.apply(service("web", ports=[{"name": "http", "port": 80, "targetPort": 8080}, {"name": "talk", "port": 2525, "targetPort": 2525}]))
    for name, node, marked in (("near", first, {}), ("far", last, {}), ("stranger", last, OUTSIDE)):
        made.apply(pod(name, pod_spec(container("app", "serve", "--http", "8080"), nodeName=node), annotations=marked))
    made.ready("web", "near", "far", "stranger")
    return made


@pytest.mark.parametrize("who", ["near", "far"])
def test_calls_between_meshed_pods_are_tls_1_3_and_nothing_else(pair: Space, machines: Cluster, tmp_path: Path, who: str) -> None:
    """On the bridge between the nodes for the far caller, on the node's own bridge for the near one."""
    address = pair.json("get", "pod", "web")["status"]["podIP"]
    first = machines.nodes[0]
    link = ["tcpdump", "-i", f"{first.namespace}-up"] if who == "far" else first.inside("tcpdump", "-i", "cni0")
    note = f"note-{uuid.uuid4().hex}"
    with watching(link, tmp_path / "wire.pcap") as wire:
        for _ in range(3):
            assert caller(pair.call(who, f"http://web/{note}", "--header", f"x-note: {note}")) == identity(pair)
        said = pair.app(who, "tcp", "web", "2525", "--say", note)
        assert said.get("echo") == note, said
        assert caller(pair.answered("stranger", f"http://web/{note}")) == ""
        peers = {pair.json("get", "pod", name)["status"]["podIP"]: name for name in (who, "stranger")}

        def calls_of(name: str) -> list[Connection]:
            return [each for port in (8080, 2525) for each in wire.to(address, port) if peers.get(each.client[0]) == name]

        # for contrast, or the capture would prove nothing; and last, so that all before is in the file too
        until("the stranger's words are seen", lambda: any(note.encode() in each.sent.data()[0] for each in calls_of("stranger")))
    assert {each.server[1] for each in calls_of(who)} == {8080, 2525}
    for each in calls_of(who):
        sent, received = each.sent.data()[0], each.received.data()[0]
        check_tls13_untrusted(sent, received)
        assert note.encode() not in sent + received


def test_the_sidecars_count_what_they_carried_as_tls(pair: Space) -> None:
    before = _tls_requests(pair)
    assert pair.call("far", "http://web/counted").get("status") == 200
    until("both sidecars have counted it", lambda: all(after > was for after, was in zip(_tls_requests(pair), before, strict=True)))


def _tls_requests(pair: Space) -> list[float]:
    """(outbound at far, inbound at web): requests over mutual TLS with the other's identity."""
    wanted = (("far", "outbound", f'server_id="{identity(pair)}"'), ("web", "inbound", f'client_id="{identity(pair)}"'))
    found = []
    for name, direction, peer in wanted:
        series = pair.metrics(name)
        parts = ("pillion_request_total{", f'direction="{direction}"', 'tls="true"', peer)
        found.append(sum(value for key, value in series.items() if all(part in key for part in parts)))
    return found
