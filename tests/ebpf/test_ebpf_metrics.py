"""The agent's metrics, read by the official parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from ebpf.layout import Counter
from ebpf.metrics import render

NODE = {"ability": {"connect": "", "steer": "no", "sockmap": "", "nft": ""}, "resident_bytes": 17_000_000}


def pod(name: str, level: int, **counters: int) -> dict:
    counted = {counter.name.lower(): counters.get(counter.name.lower(), 0) for counter in Counter} if level < 3 else {}
    fast = {"accelerated": level < 3, "accelerated_to_app": level == 1}
    return {"namespace": 'a"b\\', "name": name, "level": level, **fast, "listens": True, "counters": counted}


def test_every_sample_is_read_back_with_its_labels():
    text = render(NODE, [pod("one", 1, bytes=5, by_tcp_memory=2), pod("two", 3), pod("three", 2)])
    samples = {
        (one.name, one.labels.get("pod"), one.labels.get("cause")): one.value
        for f in text_string_to_metric_families(text)
        for one in f.samples
    }
    assert samples["pillion_agent_redirected_bytes_total", "one", None] == 5
    assert samples["pillion_agent_fallbacks_total", "one", "memory"] == 2
    assert samples["pillion_agent_pod_level", "two", None] == 3
    ways = [samples[f"pillion_agent_pod_accelerated{way}", "three", None] for way in ("", "_to_app")]
    assert ways == [1, 0], "what its app sends"
    assert ("pillion_agent_redirected_bytes_total", "two", None) not in samples, "nothing is counted behind plain nftables"
    assert 'namespace="a\\"b\\\\"' in text


def test_every_counter_of_the_programs_is_shown():
    shown = render(NODE, [pod("one", 1, **{counter.name.lower(): 1000 + counter for counter in Counter})])
    for counter in Counter:
        assert f" {1000 + counter}\n" in shown, counter.name


def test_a_node_says_what_it_lacks():
    assert 'pillion_agent_node_ability{part="steer"} 0\n' in render(NODE, [])
    assert 'pillion_agent_pods{level="1"} 0\n' in render(NODE, [])
