"""Which pods get a sidecar, and what is said when one does not."""

from __future__ import annotations

from typing import Any

import pytest

from injector.decide import Decision, Inject, Refuse, Skip, decide
from injector.options import FIXED_ENV, NAMES, InvalidOption, Options, check_defaults, quantity, read_options

INJECTED = {"pillion.dev/status": "injected"}
ENABLED = {"pillion.dev/inject": "enabled"}


def pod(annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    spec.setdefault("containers", [{"name": "app", "ports": [{"name": "http", "containerPort": 8080}]}])
    return {"metadata": {"name": "web-0", "namespace": "shop", "annotations": annotations}, "spec": spec}


def skipped(decision: object) -> str:
    assert isinstance(decision, Skip), decision
    return decision.reason


def refused(decision: object) -> str:
    assert isinstance(decision, Refuse), decision
    return decision.sentence


def test_a_pod_is_injected_when_it_or_its_namespace_says_so() -> None:
    assert isinstance(decide(pod(ENABLED), {}), Inject)
    assert isinstance(decide(pod(), ENABLED), Inject)


def test_a_pod_nobody_annotated_is_left_alone() -> None:
    assert skipped(decide(pod(), {})) == "not-annotated"
    assert skipped(decide({}, {})) == "not-annotated"


def test_the_pods_word_beats_the_namespaces() -> None:
    assert skipped(decide(pod({"pillion.dev/inject": "disabled"}), ENABLED)) == "disabled"
    assert isinstance(decide(pod(ENABLED), {"pillion.dev/inject": "disabled"}), Inject)


def test_a_word_that_means_nothing_is_refused_rather_than_left_out_of_the_mesh() -> None:
    where = decide(pod({"pillion.dev/inject": "ture"}), {})
    assert isinstance(where, Refuse) and where.reason == "invalid-inject-annotation-at-workload"
    assert "'ture'" in where.sentence and "enabled or disabled" in where.sentence
    where = decide(pod(), {"pillion.dev/inject": "yes"})
    assert isinstance(where, Refuse) and where.reason == "invalid-inject-annotation-at-namespace"


def test_host_network_is_never_captured() -> None:
    assert skipped(decide(pod(ENABLED, hostNetwork=True), {})) == "host-network"


def test_windows_has_no_sidecar() -> None:
    assert skipped(decide(pod(ENABLED, os={"name": "windows"}), {})) == "unsupported-os"


@pytest.mark.parametrize("field", ["containers", "initContainers"])
def test_a_second_sidecar_is_never_added(field: str) -> None:
    spec = {"containers": [{"name": "app"}], field: [{"name": "pillion-proxy"}]}
    assert skipped(decide(pod({**ENABLED, **INJECTED}, **spec), {})) == "already-injected"


@pytest.mark.parametrize("name", ["pillion-proxy", "pillion-capture"])
@pytest.mark.parametrize("field", ["containers", "initContainers"])
def test_a_container_that_took_our_name_keeps_no_pod_out_of_the_mesh(field: str, name: str) -> None:
    spec = {"containers": [{"name": "app"}], field: [{"name": name, "securityContext": {"runAsUser": 1000}}]}
    for words in (ENABLED, {**ENABLED, "pillion.dev/status": "no"}):
        assert f"container {name} has a name of the sidecar's" in refused(decide(pod(words, **spec), {}))
    assert skipped(decide(pod({}, **spec), {})) == "not-annotated"


@pytest.mark.parametrize("number", [4140, 4143, 4191])
def test_an_app_does_not_listen_where_the_sidecar_does(number: int) -> None:
    def decided(protocol: dict[str, str]) -> Decision:
        return decide(pod(ENABLED, containers=[{"name": "app", "ports": [{"containerPort": number, **protocol}]}]), {})

    assert f"container app declares port {number}, where the sidecar listens" in refused(decided({}))
    assert isinstance(decided({"protocol": "UDP"}), Inject)


@pytest.mark.parametrize(
    ("container", "mesh"),
    [
        ({"name": "linkerd-proxy"}, "Linkerd"),
        ({"name": "istio-init"}, "Istio"),
        ({"name": "x", "image": "mirror.example/istio/proxyv2:1.30.3"}, "Istio"),
        ({"name": "x", "image": "mirror.example:5000/cached/linkerd/proxy@sha256:00"}, "Linkerd"),
        ({"name": "x", "image": "envoyproxy/envoy"}, "Envoy"),
    ],
)
def test_another_meshs_sidecar_is_left_alone(container: dict[str, str], mesh: str) -> None:
    decision = decide(pod(ENABLED, containers=[{"name": "app"}, container]), {})
    assert skipped(decision) == "foreign-sidecar"
    assert isinstance(decision, Skip) and mesh in decision.sentence


def test_an_image_that_only_looks_similar_is_an_app() -> None:
    assert isinstance(decide(pod(ENABLED, containers=[{"name": "app", "image": "registry:5000/envoyproxy/envoy-lookalike"}]), {}), Inject)


def test_an_app_with_the_sidecars_uid_would_pass_capture_and_is_refused() -> None:
    assert "2102" in refused(decide(pod(ENABLED, containers=[{"name": "app", "securityContext": {"runAsUser": 2102}}]), {}))
    assert "2102" in refused(decide(pod(ENABLED, securityContext={"runAsUser": 2102}), {}))


def test_a_wrong_option_is_refused_with_annotation_value_and_what_was_expected() -> None:
    sentence = refused(decide(pod({**ENABLED, "config.pillion.dev/log-level": "loud"}), {}))
    assert sentence == ("annotation config.pillion.dev/log-level of the pod is 'loud': expected one of debug, info, warning, error")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("default-inbound-policy", "allow"),
        ("opaque-ports", "0"),
        ("opaque-ports", "80-70"),
        ("skip-inbound-ports", "65536"),
        ("skip-outbound-ports", "a b"),
        ("unchecked-path-ports", "80;81"),
        ("log-level", "INFO"),
        ("access-log", "apache"),
        ("forwarded", "via"),
        ("keep-probes", "yes"),
        ("shutdown-grace", "-1"),
        ("shutdown-grace", "3601"),
        ("accelerate", ""),
        ("image", "bad image"),
        ("image-pull-policy", "always"),
        ("require-identity-ports", "http api"),
        ("unaccelerated-ports", "-1"),
        ("real-caller", "no"),
        ("log-format", "plain"),
        ("wait-before-exit", "1h"),
        ("shutdown-endpoint", "off"),
        ("await", "enabled"),
        ("native-sidecar", "1"),
        ("capture", "none"),
        ("connect-timeout", "9ms"),
        ("detect-timeout", "11m"),
        ("cpu-request", "lots"),
        ("cpu-limit", "1 core"),
        ("memory-request", "64MB"),
        ("memory-limit", "-1"),
        ("ephemeral-storage-request", "1e3"),
        ("ephemeral-storage-limit", "."),
        ("env", "PILLION_X=1"),
        ("env", '{"PATH": "/tmp"}'),
        ("env", '{"PILLION_MAX_CONNECTIONS": 1}'),
        ("env", '{"PILLION_MAX_CONNECTIONS": "\\u0000"}'),
        ("env", '{"PILLION_IDENTITY_ADDR": "evil:1"}'),
        ("no-such-option", "x"),
    ],
)
@pytest.mark.parametrize("where", ["pod", "namespace"])
def test_every_option_has_values_that_are_wrong(name: str, value: str, where: str) -> None:
    annotations = {f"config.pillion.dev/{name}": value}
    with pytest.raises(InvalidOption) as caught:
        read_options(*((annotations, {}) if where == "pod" else ({}, annotations)), {})
    assert name in str(caught.value) and repr(value) in str(caught.value) and f"of the {where}" in str(caught.value)


@pytest.mark.parametrize("where", ["pod", "namespace"])
def test_an_option_behind_the_wrong_prefix_is_refused_not_ignored(where: str) -> None:
    annotations = {"pillion.dev/inject": "enabled", "pillion.dev/require-identity-ports": "80"}
    with pytest.raises(InvalidOption) as caught:
        read_options(*((annotations, {}) if where == "pod" else ({}, annotations)), {})
    assert str(caught.value) == (
        f"annotation pillion.dev/require-identity-ports of the {where} is '80': "
        "expected it to be written config.pillion.dev/require-identity-ports"
    )


def test_options_are_read_and_the_pods_win() -> None:
    prefix = "config.pillion.dev/"
    options = read_options(
        {prefix + "skip-outbound-ports": "25, 6000-6010 ,db", prefix + "shutdown-grace": "5s", prefix + "keep-probes": "true"},
        {prefix + "shutdown-grace": "60", prefix + "access-log": "all", prefix + "skip-inbound-ports": "9000"},
        {"db": 5432},
    )
    assert options.skip_outbound_ports == ((25, 25), (6000, 6010), (5432, 5432))
    assert options.skip_inbound_ports == ((9000, 9000),)
    assert (options.shutdown_grace_s, options.access_log, options.keep_probes) == (5, "all", True)
    assert options.settled == {prefix + "skip-inbound-ports": "9000"}


def test_without_annotations_the_defaults_hold() -> None:
    assert read_options({}, {}, {}) == Options()


def test_every_option_is_tried_above() -> None:
    marks = test_every_option_has_values_that_are_wrong.pytestmark  # type: ignore[attr-defined]
    tried = {name for mark in marks for name, *_ in mark.args[1] if mark.args[0] == ("name", "value")}
    assert tried >= set(NAMES)


def test_the_meshs_defaults_are_the_weakest_and_what_capture_follows_becomes_the_pods_own() -> None:
    prefix = "config.pillion.dev/"
    mesh = {"skip-outbound-ports": "25", "log-level": "warning", "accelerate": "false"}
    options = read_options({prefix + "log-level": "debug"}, {prefix + "accelerate": "true"}, {}, mesh)
    assert (options.log_level, options.accelerate, options.skip_outbound_ports) == ("debug", True, ((25, 25),))
    assert options.settled == {prefix + "skip-outbound-ports": "25", prefix + "accelerate": "true"}


def test_a_default_that_only_the_policy_controller_knows_is_refused() -> None:
    with pytest.raises(InvalidOption, match="mesh settings"):
        check_defaults({"opaque-ports": "25"})
    check_defaults({"memory-request": "40Mi"})


def test_resources_are_read_as_kubernetes_does_and_a_request_is_at_most_its_limit() -> None:
    prefix = "config.pillion.dev/"
    options = read_options({prefix + "cpu-request": "100m", prefix + "cpu-limit": "0.5", prefix + "memory-request": "64Mi"}, {}, {})
    assert options.resources == {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"cpu": "0.5"}}
    with pytest.raises(InvalidOption, match="at most memory-limit, which is 64M"):
        read_options({prefix + "memory-request": "64Mi", prefix + "memory-limit": "64M"}, {}, {})


@pytest.mark.parametrize(
    ("small", "large"), [("999m", "1"), ("1", "1001m"), ("1k", "1Ki"), ("1023Ki", "1Mi"), ("1M", "1Mi"), ("1Gi", "1.1Gi"), ("1G", "1Ti")]
)
def test_quantities_are_ordered(small: str, large: str) -> None:
    assert quantity(small) < quantity(large)


def test_a_wait_before_exit_must_fit_into_the_grace_period() -> None:
    annotations = {**ENABLED, "config.pillion.dev/wait-before-exit": "30"}
    assert "terminationGracePeriodSeconds, which is 30" in refused(decide(pod(annotations), {}))
    assert isinstance(decide(pod(annotations, terminationGracePeriodSeconds=31), {}), Inject)


def test_an_app_with_the_sidecars_uid_is_refused_also_in_a_pod_that_was_injected_before() -> None:
    added = {"name": "late", "securityContext": {"runAsUser": 2102}}
    ours = {"name": "pillion-proxy", "securityContext": {"runAsUser": 2102}}
    once = {**ENABLED, **INJECTED}
    assert "late" in refused(decide(pod(once, containers=[{"name": "app"}, added], initContainers=[ours]), {}))
    assert skipped(decide(pod(once, containers=[{"name": "app"}], initContainers=[ours]), {})) == "already-injected"


def test_what_the_injector_sets_is_what_no_annotation_may() -> None:
    from injector.mesh import Mesh
    from injector.sidecar import environment

    found = {entry["name"] for entry in environment(pod(), Options(), [], Mesh(capture="agent"), native=True)}
    tunable = {f"PILLION_{name}" for name in ("LOG_LEVEL", "LOG_FORMAT", "ACCESS_LOG", "SHUTDOWN_GRACE_S", "SHUTDOWN_ENDPOINT")}
    assert found - tunable == FIXED_ENV


def test_the_list_of_inbound_policies_is_the_controllers() -> None:
    from injector.options import INBOUND_POLICIES
    from policy.model import ACCESS_POLICIES

    assert set(INBOUND_POLICIES) == set(ACCESS_POLICIES)
