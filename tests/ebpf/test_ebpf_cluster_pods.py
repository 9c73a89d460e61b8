"""Pods of a cluster's node: what capture reads of a pod object, what the API server may answer, and when a pod is registered."""

from __future__ import annotations

import io
import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpf import cluster_pods, facts
from ebpf.cluster_pods import ApiFailed, ClusterPods, Gone, answer_lines_untrusted
from ebpf.facts import facts_untrusted, port_list
from ebpf.wire import BadMessage, PodFacts
from injector import fixed
from injector.decide import declared_ports
from injector.options import PREFIX, read_options
from injector.patch import apply_patch, review


def pod(uid: str = "u1", **annotations: str) -> dict[str, Any]:
    named = {f"{PREFIX}{name.replace('_', '-')}": value for name, value in annotations.items()}
    raw = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "web-0", "namespace": "shop", "uid": uid, "annotations": {fixed.INJECT: "enabled", **named}},
        "spec": {"containers": [{"name": "app", "image": "x", "ports": [{"containerPort": 8080, "name": "http"}]}]},
    }
    _, patch = review(raw, {})
    injected = apply_patch(raw, patch)
    injected["metadata"]["resourceVersion"] = "7"
    return dict(injected)


def test_the_words_are_the_injectors():
    assert (facts.STATUS, facts.INJECTED, facts.SIDECAR_NAME, facts.PREFIX) == (fixed.STATUS, fixed.INJECTED, fixed.SIDECAR_NAME, PREFIX)


def test_what_the_injector_made_is_understood():
    assert facts_untrusted(pod()) == PodFacts("u1", "shop", "web-0")
    found = facts_untrusted(
        pod(skip_inbound_ports="25,8000-8010", skip_outbound_ports="http", accelerate="false", unaccelerated_ports="http")
    )
    assert found == PodFacts(
        "u1", "shop", "web-0",
        skip_inbound=((25, 25), (8000, 8010)), skip_outbound=((8080, 8080),), accelerate=False, unaccelerated=((8080, 8080),),
    )  # fmt: skip
    assert facts_untrusted(pod(real_caller="false")).real_caller is False


@pytest.mark.parametrize("text", ["", "25", "25,http, 8000-8010", "unknown,1"])
def test_port_lists_mean_what_they_mean_to_the_injector(text):
    raw = pod()
    options = read_options({f"{PREFIX}skip-inbound-ports": text}, {}, declared_ports(raw))
    assert port_list(text, {"http": 8080}) == options.skip_inbound_ports


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["metadata"]["annotations"].pop(fixed.STATUS),
        lambda raw: raw["spec"].update(hostNetwork=True),
        lambda raw: raw.update(status={"phase": "Succeeded"}),
        lambda raw: raw["spec"].update(initContainers=[]),
    ],
    ids=["not injected", "host network", "ended", "no sidecar"],
)
def test_other_pods_are_none_of_ours(change):
    raw = pod()
    change(raw)
    assert facts_untrusted(raw) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["metadata", "spec", "containers", "ports", "name"]), inner)
    ),
)


@given(st.dictionaries(st.sampled_from(["metadata", "spec", "status"]), json_values))
def test_any_object_gives_facts_nothing_or_the_one_error(raw):
    try:
        facts_untrusted(raw)
    except BadMessage:
        pass


# --- the API server -------------------------------------------------------------------------------------------------------------------


def lines(answer: bytes) -> list[bytes]:
    return list(answer_lines_untrusted(io.BufferedReader(io.BytesIO(answer))))


def chunked(*pieces: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def test_lines_are_put_together_from_chunks():
    assert lines(chunked(b'{"a":', b'1}\n{"b"', b":2}\n")) == [b'{"a":1}', b'{"b":2}']
    assert lines(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabcdef") == [b"abc"]


def test_refusals_are_told_with_the_servers_words():
    with pytest.raises(ApiFailed, match=r"answered 403: .*forbidden"):
        lines(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 9\r\n\r\nforbidden")
    with pytest.raises(Gone):
        lines(b"HTTP/1.1 410 Gone\r\ncontent-length: 0\r\n\r\n")
    with pytest.raises(ApiFailed, match="in the middle"):
        lines(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab")


@given(st.binary(max_size=200))
def test_any_answer_gives_lines_or_the_one_error(data):
    for answer in (data, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + data):
        try:
            lines(answer)
        except ApiFailed:
            pass


class Api:
    """Answers as told, by path."""

    def __init__(self, *answers: list[bytes]) -> None:
        self.answers, self.paths = list(answers), []

    def lines(self, path, timeout_s):
        self.paths.append(path)
        return iter(self.answers.pop(0))


class Pods:
    """What was registered with which namespace."""

    def __init__(self) -> None:
        self.pods: dict[str, PodFacts] = {}
        self.failures: dict[str, str] = {}

    def register(self, found, netns):
        self.pods[found.id] = found

    def unregister(self, uid):
        del self.pods[uid]


def listed(*pods: dict[str, Any], more: str = "") -> list[bytes]:
    return [json.dumps({"items": pods, "metadata": {"resourceVersion": "5", "continue": more}}).encode()]


def event(kind: str, raw: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": raw}).encode()


@pytest.fixture
def processes(monkeypatch):
    """uid -> pids of its processes."""
    found: dict[str, list[int]] = {}
    monkeypatch.setattr(cluster_pods.procs, "members_of_pods", lambda uids: {uid: found.get(uid, []) for uid in uids})
    monkeypatch.setattr(cluster_pods.procs, "open_netns", lambda pid: os.open("/dev/null", os.O_RDONLY))
    return found


def test_pods_are_listed_in_pages_and_then_watched(processes):
    api = Api(listed(pod("u1"), more="next page"), listed(pod("u2")), [event("ADDED", pod("u3")), event("DELETED", pod("u1"))])
    woken: list[int] = []
    source, pods = ClusterPods("node 1", lambda: woken.append(1), api), Pods()
    assert source.apply(pods) is False and not source.synced
    version = source.list_once()
    assert "continue=next%20page" in api.paths[1] and "spec.nodeName%3Dnode%201" in api.paths[0]
    processes.update(u1=[1], u2=[2])
    assert source.apply(pods) is False and set(pods.pods) == {"u1", "u2"}
    assert source.watch_once(version) == "7" and "resourceVersion=5" in api.paths[2]
    assert source.apply(pods) is True, "u3 has no process yet"
    assert set(pods.pods) == {"u2"}
    processes.update(u3=[3])
    assert source.apply(pods) is False and set(pods.pods) == {"u2", "u3"} and len(woken) == 3


def test_changed_options_are_registered_again_and_wrong_ones_are_told(processes):
    api = Api(
        listed(pod("u1")), [event("MODIFIED", pod("u1", accelerate="false"))], [event("MODIFIED", {**pod("u1"), "spec": {"containers": 3}})]
    )
    source, pods = ClusterPods("n", lambda: None, api), Pods()
    processes.update(u1=[1])
    source.list_once()
    source.apply(pods)
    source.watch_once("5")
    source.apply(pods)
    assert pods.pods["u1"].accelerate is False
    before = dict(pods.pods)
    source.watch_once("7")
    source.apply(pods)
    assert pods.pods == before and "cannot be understood" in pods.failures["u1"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw["metadata"]["annotations"].pop(fixed.STATUS),
        lambda raw: raw["metadata"].pop("annotations"),
        lambda raw: raw["metadata"]["annotations"].update({f"{PREFIX}skip-inbound-ports": "0"}),
        lambda raw: raw["metadata"]["annotations"].update({f"{PREFIX}skip-inbound-ports": "99999"}),
    ],
    ids=["status taken away", "no annotations", "no port", "beyond all ports"],
)
@pytest.mark.parametrize("restarted", [False, True], ids=["same agent", "agent restarted"])
def test_a_pod_that_runs_stays_captured_whatever_becomes_of_its_annotations(processes, edit, restarted):
    edited, ended = pod("u1"), {**pod("u1"), "status": {"phase": "Succeeded"}}
    edit(edited)
    source, pods = ClusterPods("n", lambda: None, Api(listed(pod("u1")), [event("MODIFIED", edited)])), Pods()
    processes.update(u1=[1])
    source.list_once()
    source.apply(pods)
    if restarted:  # what it captured was restored from its state
        source = ClusterPods("n", lambda: None, Api(listed(edited), [event("MODIFIED", edited)], [event("MODIFIED", ended)]))
        source.list_once()
    else:
        source._api = Api([event("MODIFIED", edited)], [event("MODIFIED", ended)])
    source.watch_once("5")
    source.apply(pods)
    assert set(pods.pods) == {"u1"}
    source.watch_once("6")
    source.apply(pods)
    assert not pods.pods, "nothing of it runs any more"


def test_a_version_that_is_too_old_means_listing_again():
    source = ClusterPods(
        "n", lambda: None, Api([event("ERROR", {"code": 410, "message": "too old"})], [event("ERROR", {"code": 500, "message": "x"})])
    )
    with pytest.raises(Gone):
        source.watch_once("1")
    with pytest.raises(ApiFailed, match="watch: x"):
        source.watch_once("1")
