"""The chart without Helm: the template language, the settings, and what the chart renders to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from click.testing import CliRunner

from cli.main import cli
from cli.render.chart import CHART, load_chart, render
from cli.render.template import TemplateError, Templates
from cli.render.values import InvalidValues, Values, assigned, checked, merged, schema
from core.k8s.access import CONTROL, GRANTS, variants

DOT = {"Values": {"on": True, "off": False, "name": "x", "count": 3, "list": ["a", "b"], "map": {"k2": 2, "k1": 1}, "none": []}}


def text_of(template: str, dot: Any = None) -> str:
    templates = Templates()
    templates.add("t", template)
    return templates.render("t", dot or DOT)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a {{ .Values.name }} b", "a x b"),
        ("a\n  {{- .Values.name -}}\n  b", "axb"),
        ("{{ .Values.count }}{{ .Values.on }}", "3true"),
        ("{{ if .Values.on }}1{{ else }}2{{ end }}", "1"),
        ("{{ if .Values.off }}1{{ else if .Values.none }}2{{ else }}3{{ end }}", "3"),
        ("{{ if not .Values.off }}1{{ end }}", "1"),
        ('{{ if and .Values.on (eq .Values.name "x") }}1{{ end }}', "1"),
        ("{{ if or .Values.off .Values.none }}1{{ end }}", ""),
        ("{{ range .Values.list }}<{{ . }}{{ $.Values.name }}>{{ end }}", "<ax><bx>"),
        ("{{ range $at, $it := .Values.list }}{{ $at }}{{ $it }}{{ end }}", "0a1b"),
        ("{{ range $key, $it := .Values.map }}{{ $key }}{{ $it }};{{ end }}", "k11;k22;"),
        ("{{ with .Values.map }}{{ .k1 }}{{ end }}", "1"),
        ("{{ with .Values.none }}no{{ end }}", ""),
        ("{{ $x := .Values.name }}{{ $x | quote }}", '"x"'),
        ('{{- define "n" -}}<{{ .a }}>{{- end -}}{{ include "n" (dict "a" 1) }}', "<1>"),
        ("k:{{ .Values.map | toYaml | nindent 2 }}", "k:\n  k1: 1\n  k2: 2"),
        ("{{ .Values.list | toJson }}", '["a","b"]'),
        ('{{ join "," .Values.list | quote }}', '"a,b"'),
        ('{{ .Values.none | default "d" }}', "d"),
        ('{{ "}}" }}{{/* a comment */}}', "}}"),
        ('{{ `raw "x"` }}', 'raw "x"'),
        ('{{ "hi" | b64enc }}', "aGk="),
    ],
)
def test_what_the_chart_uses_of_the_template_language(template: str, text: str) -> None:
    assert text_of(template) == text


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("\n{{ .Values.typo }}", "t:2: .Values.typo: no typo"),
        ("{{ if .Values.on }}", "t:1: if has no end"),
        ("{{ end }}", "t:1: end without"),
        ("{{ $y }}", "t:1: no variable $y"),
        ('{{ lookup "v1" }}', "t:1: lookup is not a function of this renderer|t:1: 'lookup' is not a value"),
        ("{{ .Values.map }}", "t:1: prints a list or an object"),
        ('{{ include "gone" . }}', "t:1: no template 'gone'"),
        ("{{ (eq 1 1 }}", "t:1: parentheses do not match"),
        ("a {{ b", "t:1: an action is not closed"),
        ('{{ nindent "x" .Values.name }}', "t:1: nindent: "),
    ],
)
def test_what_is_not_in_it_is_refused_with_its_place(template: str, told: str) -> None:
    with pytest.raises(TemplateError, match="|".join(part.replace("$", r"\$").replace("(", r"\(") for part in told.split("|"))):
        text_of(template)


def test_variables_end_with_their_block() -> None:
    with pytest.raises(TemplateError, match="no variable"):
        text_of("{{ if .Values.on }}{{ $x := 1 }}{{ end }}{{ $x }}")


# --- settings ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignments", "found"),
    [
        (["a.b=1", "a.c=true"], {"a": {"b": 1, "c": True}}),
        (["a=x,b=y"], {"a": "x", "b": "y"}),
        (["list={a,b}"], {"list": ["a", "b"]}),
        (["a=1", "a=2"], {"a": 2}),
        (["nodeSelector.kubernetes\\.io/os=linux"], {"nodeSelector": {"kubernetes.io/os": "linux"}}),
        (["ports=25\\,26"], {"ports": "25,26"}),
        (["cpu=007"], {"cpu": "007"}),
        (["empty="], {"empty": ""}),
    ],
)
def test_set_is_read_as_helm_reads_it(assignments: list[str], found: dict[str, Any]) -> None:
    assert assigned(assignments) == found


def test_set_without_a_value_is_refused() -> None:
    with pytest.raises(InvalidValues, match="--set replicas: expected name=value"):
        assigned(["replicas"])


def test_objects_merge_and_everything_else_is_replaced() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "l": [1, 2]}, {"a": {"c": 3}, "l": [9]}) == {"a": {"b": 1, "c": 3}, "l": [9]}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"polcy": {}}, "polcy"),
        ({"policy": {"replicas": 0}}, r"policy.replicas: expected int >= 1"),
        ({"policy": {"replicas": "three"}}, "policy.replicas: expected int, got str"),
        ({"injector": {"failurePolicy": "Maybe"}}, "injector.failurePolicy: invalid enum value 'Maybe'"),
        ({"identity": {"issuer": {"source": "values"}}}, "certificate, key and anchors are needed"),
        ({"identity": {"issuer": {"key": "x"}}}, "set identity.issuer.source=values"),
        ({"sidecar": {"defaults": {"log-level": "loud"}}}, "sidecar.defaults.log-level is 'loud': expected one of"),
        ({"sidecar": {"defaults": {"lag-level": "info"}}}, "sidecar.defaults.lag-level"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidValues, match=told):
        checked(given)


def test_the_chart_explains_every_setting_with_its_default() -> None:
    written = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    assert written == msgspec.to_builtins(Values())


def test_helm_checks_settings_with_our_types() -> None:
    assert json.loads((CHART / "values.schema.json").read_text("utf-8")) == schema()


# --- the chart -----------------------------------------------------------------------------------------------------------------------


def test_derived_files_and_golden_installations_are_current() -> None:
    from tools.manifests import derived, golden

    for path, text in {**derived(), **golden()}.items():
        assert path.read_text("utf-8") == text, f"{path.name} differs: make manifests, and look at the difference"


@pytest.mark.parametrize("settings", ["", "identity.issuer.source=secret", "certManager.enabled=true", "agent.enabled=false"])
def test_roles_are_the_table(settings: str) -> None:
    given = assigned([settings] if settings else [])
    rules = [
        (role["metadata"]["name"].removeprefix("pillion-"), role["metadata"].get("namespace", ""), rule)
        for role in render(load_chart(), given)
        if role["kind"] in ("Role", "ClusterRole")
        for rule in role["rules"]
    ]
    expected = [
        (
            grant.component,
            grant.namespace,
            {
                "apiGroups": [grant.group],
                "resources": list(grant.resources),
                **({"resourceNames": list(grant.names)} if grant.names else {}),
                "verbs": list(grant.verbs),
            },
        )
        for grant in GRANTS
        if grant.when in variants(checked(given)) and not (grant.component == "agent" and "agent" in settings)
    ]
    assert sorted(map(str, rules)) == sorted(map(str, expected))


def test_no_grant_reaches_further_than_its_component_needs() -> None:
    for grant in GRANTS:
        assert "*" not in grant.verbs + grant.resources, grant
        assert not {"escalate", "bind", "impersonate", "deletecollection"} & set(grant.verbs), grant
        if "secrets" in grant.resources:  # also creating: a Secret of type service-account-token becomes anybody's token
            assert grant.namespace == CONTROL and grant.names and "create" not in grant.verbs, grant
        if not grant.namespace and not grant.names:
            assert not {"update", "delete"} & set(grant.verbs), f"{grant}: changes objects of any name in any namespace"


def containers(ha: bool = False) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    pods = [
        (found["metadata"]["name"], found["spec"]["template"])
        for found in render(load_chart(), {}, ha=ha)
        if found["kind"] in ("Deployment", "DaemonSet")
    ]
    return [(name, pod, container) for name, pod in pods for container in pod["spec"]["containers"]]


def test_the_control_plane_runs_as_restricted_asks() -> None:
    checked_names = []
    for name, pod, container in containers():
        if name == "pillion-agent":
            continue
        checked_names.append(name)
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not pod["spec"].get("hostNetwork")
        assert all("hostPath" not in volume for volume in pod["spec"]["volumes"])
    assert sorted(checked_names) == ["pillion-identity", "pillion-injector", "pillion-policy"]


def test_every_container_has_probes_requests_and_a_bound_of_memory() -> None:
    for name, _, container in containers():
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] == "admin", name
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
        assert "memory" in container["resources"]["limits"], name


def test_high_availability_spreads_replicas_and_bounds_disruption() -> None:
    found = render(load_chart(), {}, ha=True)
    budgets = {item["metadata"]["name"]: item["spec"]["selector"]["matchLabels"] for item in found if item["kind"] == "PodDisruptionBudget"}
    for item in found:
        if item["kind"] != "Deployment":
            continue
        assert item["spec"]["replicas"] == 3
        labels = item["spec"]["template"]["metadata"]["labels"]
        assert budgets[item["metadata"]["name"]].items() <= labels.items()
        terms = item["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert terms[0]["labelSelector"]["matchLabels"].items() <= labels.items()
        assert item["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    webhooks = [hook for item in found if item["kind"].endswith("WebhookConfiguration") for hook in item["webhooks"]]
    assert {hook["failurePolicy"] for hook in webhooks} == {"Fail"}


def test_settings_from_the_command_line_win_over_the_profile() -> None:
    found = render(load_chart(), {"policy": {"replicas": 5}}, ha=True)
    assert {item["metadata"]["name"]: item["spec"]["replicas"] for item in found if item["kind"] == "Deployment"} == {
        "pillion-identity": 3,
        "pillion-policy": 5,
        "pillion-injector": 3,
    }


def test_every_object_says_that_it_is_ours() -> None:
    for item in render(load_chart(), {"createNamespace": True}, ha=True):
        assert item["metadata"]["labels"]["app.kubernetes.io/part-of"] == "pillion", item["metadata"]["name"]


def test_webhooks_leave_out_what_must_start_without_them() -> None:
    for item in render(load_chart(), {}):
        if item["kind"] != "MutatingWebhookConfiguration":
            continue
        (hook,) = item["webhooks"]
        assert {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["kube-system", "cert-manager", "pillion"]} in hook[
            "namespaceSelector"
        ]["matchExpressions"]
        assert hook["sideEffects"] == "None" and hook["reinvocationPolicy"] == "IfNeeded"


def test_no_key_is_printed_and_applying_again_keeps_the_one_that_was_made() -> None:
    for item in render(load_chart(), {}):
        if item["kind"] == "Secret":
            assert not {"data", "stringData"} & set(item), item["metadata"]["name"]
            assert item.get("type", "Opaque") == "Opaque"


def test_a_given_authority_is_written_into_the_secret() -> None:
    issuer = {"source": "values", "certificate": "C", "key": "K", "anchors": "A"}
    (secret,) = [item for item in render(load_chart(), {"identity": {"issuer": issuer}}) if item["metadata"]["name"] == "pillion-issuer"]
    assert secret["data"] == {"tls.crt": "Qw==", "tls.key": "Sw==", "ca.crt": "QQ=="}


def test_the_stored_settings_render_the_same_again_and_hold_no_key() -> None:
    issuer = {"source": "values", "certificate": "CERTIFICATE", "key": "PRIVATE", "anchors": "ANCHORS"}
    first = render(load_chart(), {"identity": {"issuer": issuer}, "policy": {"replicas": 2}, "opaquePorts": "25"}, ha=True)
    stored = next(item for item in first if item["metadata"]["name"] == "pillion-config")["data"]["values.yaml"]
    assert "PRIVATE" not in stored and "CERTIFICATE" not in stored
    again = render(load_chart(), yaml.safe_load(stored))
    # the Secret stays as it is on the cluster: applying it without data would take the data away
    assert again == [item for item in first if item["metadata"]["name"] != "pillion-issuer"]


def test_without_the_agent_nothing_privileged_is_installed() -> None:
    found = render(load_chart(), {"agent": {"enabled": False}, "createNamespace": True})
    assert not [item for item in found if item["kind"] == "DaemonSet" or "agent" in item["metadata"]["name"]]
    namespace = next(item for item in found if item["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_install_prints_documents_and_takes_settings_from_everywhere(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("logLevel: debug\nimage: from-file:1\n", "utf-8")
    options = ["install", "-f", str(tmp_path / "mine.yaml"), "--set", "image=from-set:1", "--image", "from-option:1"]
    result = CliRunner().invoke(cli, options)
    assert result.exit_code == 0, result.output
    found = {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(result.output)}
    container = found["Deployment", "pillion-policy"]["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "from-option:1"
    assert {"name": "PILLION_LOG_LEVEL", "value": "debug"} in container["env"]
    assert ("Namespace", "pillion") in found


def test_install_of_a_wrong_setting_says_which(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["install", "--set", "polcy.replicas=2"])
    assert result.exit_code == 1
    assert "polcy" in result.output


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a\n", "document 1: expected an object, found list"),
        ("logLevel: info\n---\nlogLevel: debug\n", "expected one document, found 2"),
        ("logLevel: info\nlogLevel: debug\n", "the key 'logLevel' twice"),
        ("a:\n  b\n c: [", "line 3"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_in_a_line_with_the_next_step(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(text, "utf-8")
    lines = CliRunner().invoke(cli, ["install", "-f", str(file)]).output.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"error: {file}: ")
    assert told in lines[0]
    assert lines[1] == "  try: settings and their meaning: manifests/helm/values.yaml"


def test_crds_alone() -> None:
    result = CliRunner().invoke(cli, ["install", "--crds"])
    assert {item["kind"] for item in yaml.safe_load_all(result.output)} == {"CustomResourceDefinition"}
