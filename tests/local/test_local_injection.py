"""Pods of the local runner go through the injector; capture follows what it decided."""

from __future__ import annotations

from typing import Any

from injector.mesh import DEFAULT_MESH, LOCAL_MESH
from injector.patch import apply_patch, review
from local.injection import Injected, inject

ENABLED = {"pillion.dev/inject": "enabled"}
SKIP = "config.pillion.dev/skip-outbound-ports"


def pod(**annotations: str) -> dict[str, Any]:
    meta = {"name": "web", "namespace": "shop", "annotations": {name.replace("__", "/"): value for name, value in annotations.items()}}
    return {"metadata": meta, "spec": {"containers": [{"name": "app", "command": ["true"]}]}}


def injected(raw: dict[str, Any], namespace: dict[str, str]) -> Injected:
    found = inject(raw, namespace, LOCAL_MESH)
    assert isinstance(found, Injected), found
    return found


def test_a_meshed_pod_has_a_sidecar_and_is_captured_but_for_its_skipped_ports() -> None:
    found = injected(pod(), {**ENABLED, SKIP: "25"})
    assert found.pod["spec"]["initContainers"][0]["name"] == "pillion-proxy"
    assert found.skips == ((), ((25, 25),))


def test_a_sidecar_is_told_names_as_they_are_in_its_hosts_file() -> None:
    (sidecar,) = injected(pod(), ENABLED).pod["spec"]["initContainers"]
    told = {each["name"]: each.get("value", "") for each in sidecar["env"]}
    for name in ("PILLION_IDENTITY_ADDR", "PILLION_POLICY_ADDR"):
        assert told[name].rpartition(":")[0].endswith(".svc.cluster.local")


def test_an_unmeshed_pod_is_left_alone_with_the_reason() -> None:
    raw = pod()
    found = injected(raw, {})
    assert found.pod == raw and found.skips is None and "pillion.dev/inject" in found.why_not


def test_a_pod_injected_by_hand_is_captured_too() -> None:
    by_hand = injected(pod(), {**ENABLED, SKIP: "25"}).pod
    again = injected(dict(by_hand), {})
    assert again.pod["spec"] == by_hand["spec"] and again.skips == ((), ((25, 25),))


def test_what_a_cluster_needs_of_a_pod_injected_by_hand_is_not_run_here() -> None:
    raw = pod()
    raw["metadata"]["annotations"] = dict(ENABLED)
    _, patch = review(raw, {SKIP: "25"}, DEFAULT_MESH)
    found = injected(apply_patch(raw, patch), {})
    assert [container["name"] for container in found.pod["spec"]["initContainers"]] == ["pillion-proxy"]
    assert "command" not in found.pod["spec"]["initContainers"][0] and found.skips == ((), ((25, 25),))


def test_only_the_injectors_word_makes_a_pod_meshed() -> None:
    assert injected(pod(pillion__x="y", **{"pillion.dev__status": "injected"}), {}).skips is None
    lookalike = pod()
    lookalike["spec"]["containers"].append({"name": "pillion-proxy", "command": ["true"]})
    assert injected(lookalike, {}).skips is None
    assert "has a name of the sidecar's" in str(inject(lookalike, ENABLED, LOCAL_MESH))


def test_a_refusal_is_a_sentence() -> None:
    assert "expected enabled or disabled" in str(inject(pod(), {"pillion.dev/inject": "on"}, LOCAL_MESH))
