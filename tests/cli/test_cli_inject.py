"""`pillion inject` and `uninject` over whole files: what goes in comes out again, and by hand is as by webhook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.main import cli
from injector.mark import mark, unmark
from injector.mesh import Mesh
from injector.patch import apply_patch, review

POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": [{"name": "app"}]}}


def run(*words: str, given: Any = None) -> Result:
    documents = given if isinstance(given, list) else [given]
    return CliRunner().invoke(cli, list(words), input=yaml.safe_dump_all(documents))


def documents(result: Result) -> list[Any]:
    assert result.exit_code == 0, result.output
    return list(yaml.safe_load_all(result.stdout))


metadata = st.sampled_from(
    [{}, {"metadata": None}, {"metadata": {}}, {"metadata": {"name": "x"}}, {"metadata": {"annotations": {}}}]
) | st.builds(
    lambda found: {"metadata": {"annotations": found}},
    st.none() | st.dictionaries(st.sampled_from(["mine", "pillion.dev/before"]), st.sampled_from(["x", "{}"])),
)
probe = st.sampled_from([{}, {"livenessProbe": {"tcpSocket": {"port": 80}}}, {"readinessProbe": {"httpGet": {"port": 80, "scheme": None}}}])
spec = st.builds(
    lambda first, second, more: {"containers": [{"name": "a", **first}, {"name": "b", **second}], **more},
    probe,
    probe,
    st.sampled_from([{}, {"volumes": []}, {"initContainers": None}, {"initContainers": [{"name": "i"}], "volumes": [{"name": "v"}]}]),
)


def wrapped(kind: str, template: dict[str, Any]) -> dict[str, Any]:
    if kind == "Pod":
        return {"kind": kind, **template}
    if kind == "CronJob":
        return {"kind": kind, "metadata": {"name": "x"}, "spec": {"jobTemplate": {"spec": {"template": template}}}}
    return {"kind": kind, "metadata": {"name": "x"}, "spec": {"template": template}}


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["Pod", "Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob"]), metadata, spec, st.booleans())
def test_uninject_is_the_inverse_of_inject(kind: str, meta: dict[str, Any], pod: dict[str, Any], manual: bool) -> None:
    before = wrapped(kind, {**meta, "spec": pod})
    injected = documents(run("inject", "-", *(["--manual"] if manual else []), given=before))
    assert injected != [before]
    assert documents(run("uninject", "-", given=injected)) == [before]


@given(metadata)
def test_unmark_is_the_inverse_of_mark(meta: dict[str, Any]) -> None:
    marked = mark(meta)
    assert marked["metadata"]["annotations"]["pillion.dev/inject"] == "enabled"
    assert unmark(marked) == meta


def test_by_hand_is_as_by_webhook(tmp_path: Path) -> None:
    settings_file = tmp_path / "mesh.yaml"
    settings_file.write_text("{image: 'other:3', capture: agent, defaults: {log-level: debug}}")
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": "default", "annotations": {"config.pillion.dev/keep-probes": "true"}},
    }
    (_, by_hand) = documents(run("inject", "--manual", "--mesh", str(settings_file), "-", given=[namespace, POD]))
    asked = mark(POD)
    mesh = Mesh(image="other:3", capture="agent", defaults={"log-level": "debug"})
    assert by_hand == apply_patch(asked, review(asked, namespace["metadata"]["annotations"], mesh)[1])  # type: ignore[index]


def test_a_namespace_is_annotated_and_what_is_disabled_stays() -> None:
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}
    disabled = json.loads(json.dumps(POD))
    disabled["metadata"]["annotations"] = {"pillion.dev/inject": "disabled"}
    result = run("inject", "-", given=[namespace, disabled])
    first, second = documents(result)
    assert first["metadata"]["annotations"] == {"pillion.dev/inject": "enabled"} and second == disabled
    assert "pod a: left as it is: it is disabled" in result.stderr
    assert documents(run("uninject", "-", given=[first, second])) == [namespace, disabled]


def test_what_becomes_of_each_workload_is_said_beside_the_manifests() -> None:
    host, wrong = json.loads(json.dumps(POD)), mark(POD)
    host["spec"]["hostNetwork"] = True
    wrong["metadata"]["annotations"]["config.pillion.dev/log-level"] = "loud"
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": {"template": POD}}
    said = run("inject", "-", given=[namespace, deployment, host, wrong]).stderr.splitlines()
    assert said[:2] == [
        "namespace shop: annotated; pods that are created in it from now on get a sidecar",
        "deployment web: annotated; its pods get their sidecar when they are created",
    ]
    assert said[2].startswith("pod a: annotated, but it will get no sidecar: the pod uses the network of its node")
    assert said[3].startswith("pod a: annotated, but the injector will refuse it: annotation config.pillion.dev/log-level of the pod is")
    assert run("inject", "--manual", "-", given=deployment).stderr == "deployment web: the sidecar is written in\n"


def test_a_file_without_workloads_is_printed_as_it_is_and_that_is_said() -> None:
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}}
    result = run("inject", "-", given=config)
    assert documents(result) == [config] and result.stderr == "-: nothing in it has pods, so it is printed as it is\n"


def test_what_cannot_be_injected_by_hand_is_said() -> None:
    host = json.loads(json.dumps(POD))
    host["spec"]["hostNetwork"] = True
    result = run("inject", "--manual", "-", given=host)
    assert "hostNetwork" in result.stderr and documents(result)[0]["spec"] == host["spec"]
    wrong = mark(POD)
    wrong["metadata"]["annotations"]["config.pillion.dev/log-level"] = "loud"
    result = run("inject", "--manual", "-", given=wrong)
    assert result.exit_code == 1 and "expected one of debug, info, warning, error" in result.stderr


@pytest.mark.parametrize(("text", "said"), [("captrue: agent", "captrue"), ("capture: maybe", "capture"), ("a: [", "YAML")])
def test_wrong_mesh_settings_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mesh.yaml").write_text(text)
    result = run("inject", "--manual", "--mesh", str(tmp_path / "mesh.yaml"), "-", given=POD)
    assert result.exit_code == 1 and said in result.stderr and result.stdout == ""
