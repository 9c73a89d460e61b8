"""Taking a pod out of the mesh leaves what was there before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from injector.decide import Inject
from injector.mesh import Mesh
from injector.patch import apply_patch, review
from injector.undo import is_injected, uninject

ENABLED = {"pillion.dev/inject": "enabled"}
PREFIX = "config.pillion.dev/"


def pod(**spec: Any) -> dict[str, Any]:
    spec.setdefault("containers", [{"name": "app"}])
    return {"metadata": {"annotations": dict(ENABLED)}, "spec": spec}


def there_and_back(found: dict[str, Any], mesh: Mesh, namespace: dict[str, str] | None = None) -> dict[str, Any]:
    decision, patch = review(found, namespace or {}, mesh)
    assume(isinstance(decision, Inject))
    injected = apply_patch(found, patch)
    assert is_injected(injected)
    before = copy.deepcopy(injected)
    back = uninject(injected)
    assert injected == before, "it must not change what it is given"
    return back


ports = st.integers(1, 65535)
actions = st.one_of(
    st.builds(lambda port, path: {"httpGet": {"port": port, "path": path}}, ports | st.just("http"), st.text(max_size=4)),
    st.builds(lambda port: {"tcpSocket": {"port": port}}, ports),
    st.builds(lambda port: {"grpc": {"port": port}}, ports),
    st.just({"exec": {"command": ["true"]}}),
)
probes = st.builds(lambda action, more: {**action, **more}, actions, st.dictionaries(st.just("timeoutSeconds"), st.integers(1, 9)))
containers = st.fixed_dictionaries(
    {"ports": st.just([{"name": "http", "containerPort": 8080}])},
    optional={"livenessProbe": probes, "readinessProbe": probes, "startupProbe": probes, "restartPolicy": st.just("Always")},
)
annotations = st.dictionaries(
    st.sampled_from(
        ["mine", "pillion.dev/before", "pillion.dev/status", "kubectl.kubernetes.io/default-container", PREFIX + "skip-inbound-ports"]
    ),
    st.sampled_from(["80", "", "{}", "injected", "[]", '{"empty": {"volumes": 0}}']),
)
maybe_empty = st.none() | st.just([])


@st.composite
def pods(draw: st.DrawFn) -> dict[str, Any]:
    spec: dict[str, Any] = {"containers": [{"name": f"app{n}", **draw(containers)} for n in range(draw(st.integers(1, 3)))]}
    for field in ("volumes", "initContainers"):
        choice = draw(st.sampled_from(["absent", "empty", "some"]))
        if choice == "empty":
            spec[field] = draw(maybe_empty)
        elif choice == "some":
            spec[field] = [{"name": "data", "emptyDir": {}}] if field == "volumes" else [{"name": "init", **draw(containers)}]
    found: dict[str, Any] = {"spec": spec}
    metadata = draw(st.sampled_from(["absent", "null", "some"]))
    if metadata == "null":
        found["metadata"] = None
    elif metadata == "some":
        found["metadata"] = {"name": "x"} if draw(st.booleans()) else {}
        if draw(st.booleans()):
            found["metadata"]["annotations"] = draw(st.none() | annotations)
    return found


meshes = st.builds(
    Mesh,
    capture=st.sampled_from(["init", "agent", "none"]),
    native_sidecar=st.booleans(),
    defaults=st.dictionaries(st.sampled_from(["skip-outbound-ports", "await"]), st.just("true")).filter(
        lambda found: "skip-outbound-ports" not in found
    )
    | st.just({"skip-outbound-ports": "25", "await": "false"}),
)


@given(pods(), meshes, st.booleans())
def test_what_went_in_comes_out_and_nothing_else(found: dict[str, Any], mesh: Mesh, keep: bool) -> None:
    namespace = {**ENABLED, PREFIX + "keep-probes": "true" if keep else "false", PREFIX + "skip-inbound-ports": "9000"}
    assert there_and_back(found, mesh, namespace) == found


def test_edits_made_meanwhile_stay() -> None:
    decision, patch = review(pod(), {}, Mesh(native_sidecar=False))
    assert isinstance(decision, Inject)
    injected = apply_patch(pod(), patch)
    injected["spec"]["containers"].append({"name": "late"})
    injected["spec"]["containers"][1]["image"] = "app:2"
    injected["spec"]["volumes"].insert(0, {"name": "data", "emptyDir": {}})
    back = uninject(injected)
    assert back["spec"] == {
        "containers": [{"name": "app", "image": "app:2"}, {"name": "late"}],
        "volumes": [{"name": "data", "emptyDir": {}}],
    }


def test_a_pod_that_was_never_injected_stays_as_it_is() -> None:
    found = pod(volumes=[], initContainers=None)
    assert not is_injected(found) and uninject(found) == found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["metadata", "annotations", "spec", "containers", "initContainers", "volumes", "name", "probes", "app", "livenessProbe"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["metadata", "spec"]), JSON), JSON)
def test_no_shape_breaks_it(found: dict[str, Any], before: Any) -> None:
    import json

    uninject(found)
    damaged = pod()
    damaged["metadata"]["annotations"] |= {"pillion.dev/status": "injected", "pillion.dev/before": json.dumps(before)}
    assert uninject(damaged)["spec"]["containers"] == [{"name": "app"}]


@pytest.mark.parametrize("field", ["containers", "initContainers"])
def test_half_of_it_is_taken_out_too(field: str) -> None:
    found = pod(containers=[{"name": "app"}])
    found["spec"][field] = [*found["spec"].get(field, []), {"name": "pillion-proxy"}]
    assert uninject(found) == pod()
