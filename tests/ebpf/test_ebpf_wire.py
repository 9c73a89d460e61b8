"""The agent's protocol: what is said is what is read, and nothing else is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.addrs import canonical_ip
from ebpf.wire import BadMessage, PodFacts, Register, Remove, Status, Steer, Unregister, decode_request_untrusted, pod_facts, request_line

texts = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=60)
ports = st.integers(1, 65535)
ranges = st.lists(st.tuples(ports, ports).map(lambda pair: (min(pair), max(pair))), max_size=5).map(tuple)
addresses = st.lists(st.ip_addresses().map(str).map(canonical_ip), max_size=4).map(tuple)
flags = st.booleans()
pods = st.builds(
    PodFacts, texts, texts, texts, st.integers(0, 65536), ports, ports, ranges, ranges, flags, ranges, flags, addresses, flags
)  # fmt: skip
requests = st.one_of(st.builds(Register, pods), st.builds(Unregister, texts), st.builds(Steer, texts), st.just(Status()), st.just(Remove()))


@given(requests)
def test_what_was_said_is_what_is_read(request):
    line = request_line(request)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert decode_request_untrusted(line) == request


@given(st.binary(max_size=300))
def test_any_bytes_give_a_request_or_the_one_error(data):
    try:
        decode_request_untrusted(data)
    except BadMessage as error:
        assert str(error)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3))


@given(st.dictionaries(st.sampled_from([*PodFacts._fields, "else"]), json_values))
def test_any_object_gives_a_pod_or_the_one_error(body):
    try:
        found = pod_facts(body)
    except BadMessage:
        return
    assert found == pod_facts(json.loads(json.dumps(found._asdict())))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"id": ""}, "id: expected printable text"),
        ({"name": "a\nb"}, "name: expected printable text"),
        ({"sidecar_uid": True}, "sidecar_uid: expected a number"),
        ({"inbound_port": 0}, "inbound_port: expected a number from 1 to 65535"),
        ({"skip_inbound": [[9, 8]]}, "skip_inbound: expected pairs"),
        ({"skip_outbound": [[1, 2]] * 257}, "at most 256"),
        ({"accelerate": "false"}, "accelerate: expected true or false"),
        ({"addresses": ["10.0.0"]}, "addresses: '10.0.0' is not an IP"),
        ({"netns": "/x"}, "unknown field 'netns'"),
    ],
)
def test_a_wrong_field_is_named(changed, words):
    with pytest.raises(BadMessage, match=words.replace("[", "\\[")):
        pod_facts({"id": "a", "namespace": "b", "name": "c", **changed})


def test_deep_nesting_is_refused_like_anything_else():
    with pytest.raises(BadMessage):
        decode_request_untrusted(b"[" * 100_000)
