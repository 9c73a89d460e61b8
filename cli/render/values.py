"""The settings of an installation, typed: defaults, what ``--set`` and values files may say, and the schema that Helm checks with. Pure.

The same names and defaults stand, with their explanations, in manifests/helm/values.yaml; a test keeps the two equal.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec

from injector.options import InvalidOption, check_defaults

Replicas = Annotated[int, msgspec.Meta(ge=1, le=99)]
Resources = dict[Literal["requests", "limits"], dict[str, str]]
Policy = Literal["deny", "audit", "all-unauthenticated", "all-authenticated", "cluster-unauthenticated", "cluster-authenticated"]
FailurePolicy = Literal["Ignore", "Fail"]
LogLevel = Literal["debug", "info", "warning", "error"]


class InvalidValues(ValueError):
    """A setting that does not exist, or with a value that means nothing; the text names it and what was expected."""


class _Values(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", omit_defaults=False):
    pass


def _resources(cpu: str, memory: str, limit: str) -> Resources:
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": limit}}


class Issuer(_Values, frozen=True):
    """Where the certificate authority comes from.

    source: made (the identity service makes it and keeps it in the Secret pillion-issuer), secret (you or cert-manager keep that Secret),
    or values (the Secret is written from certificate, key and anchors, all PEM).
    """

    source: Literal["made", "secret", "values"] = "made"
    certificate: str = ""
    key: str = ""
    anchors: str = ""


class Identity(_Values, frozen=True):
    """The identity service."""

    replicas: Replicas = 1
    resources: Resources = msgspec.field(default_factory=lambda: _resources("20m", "80Mi", "512Mi"))
    leaf_lifetime_seconds: Annotated[int, msgspec.Meta(ge=600, le=7 * 86400)] = 86400
    issuer: Issuer = Issuer()


class PolicyController(_Values, frozen=True):
    """The policy controller and its validating webhook."""

    replicas: Replicas = 1
    resources: Resources = msgspec.field(default_factory=lambda: _resources("50m", "100Mi", "512Mi"))
    failure_policy: FailurePolicy = "Ignore"


class Injector(_Values, frozen=True):
    """The mutating webhook."""

    replicas: Replicas = 1
    resources: Resources = msgspec.field(default_factory=lambda: _resources("20m", "80Mi", "256Mi"))
    failure_policy: FailurePolicy = "Ignore"
    timeout_seconds: Annotated[int, msgspec.Meta(ge=1, le=30)] = 10


class Agent(_Values, frozen=True):
    """The eBPF agent of each node. Without it pods capture by an init container with NET_ADMIN."""

    enabled: bool = True
    resources: Resources = msgspec.field(default_factory=lambda: _resources("20m", "120Mi", "512Mi"))
    priority_class_name: str = "system-node-critical"
    tolerations: list[dict[str, Any]] = msgspec.field(default_factory=lambda: [{"operator": "Exists"}])


class Sidecar(_Values, frozen=True):
    """What every sidecar starts with. defaults: names of annotations without their prefix; those of pods and namespaces are stronger."""

    native: bool = True
    defaults: dict[str, str] = msgspec.field(default_factory=dict)


class CertManager(_Values, frozen=True):
    """Serving certificates of the webhooks from cert-manager instead of the components' own."""

    enabled: bool = False
    issuer_ref: dict[str, str] = msgspec.field(default_factory=lambda: {"kind": "ClusterIssuer", "name": "pillion-webhooks"})


class Values(_Values, frozen=True):
    """Every setting."""

    image: str = "pillion:0.1.0"
    agent_image: str = "pillion-agent:0.1.0"
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: list[dict[str, str]] = msgspec.field(default_factory=list)
    create_namespace: bool = False
    trust_domain: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9._-]{0,253}[a-z0-9])?$")] = "cluster.local"
    cluster_domain: str = "cluster.local"
    cluster_networks: list[str] = msgspec.field(
        default_factory=lambda: ["10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16", "fd00::/8"]
    )
    default_inbound_policy: Policy = "all-unauthenticated"
    opaque_ports: str = "25,587,3306,4444,5432,6379,9300,11211"
    log_level: LogLevel = "info"
    high_availability: bool = False
    network_policies: bool = True
    node_selector: dict[str, str] = msgspec.field(default_factory=lambda: {"kubernetes.io/os": "linux"})
    tolerations: list[dict[str, Any]] = msgspec.field(default_factory=list)
    priority_class_name: str = ""
    cert_manager: CertManager = CertManager()
    identity: Identity = Identity()
    policy: PolicyController = PolicyController()
    injector: Injector = Injector()
    agent: Agent = Agent()
    sidecar: Sidecar = Sidecar()


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults with ``given`` over them, as a chart sees them; raises InvalidValues."""
    try:
        read = msgspec.convert(given, Values, str_keys=True)
    except msgspec.ValidationError as error:
        raise InvalidValues(_sentence(str(error))) from None
    whole: dict[str, Any] = msgspec.to_builtins(read)
    problem = _contradiction(read)
    if problem:
        raise InvalidValues(problem)
    return whole


def _contradiction(values: Values) -> str:
    issuer = values.identity.issuer
    pems = (issuer.certificate, issuer.key, issuer.anchors)
    if issuer.source == "values" and not all(pems):
        return "identity.issuer.source is values: certificate, key and anchors are needed, all PEM"
    if issuer.source != "values" and any(pems):
        return "identity.issuer has certificate, key or anchors: set identity.issuer.source=values to use them"
    try:
        check_defaults(values.sidecar.defaults)
    except InvalidOption as error:
        return f"sidecar.defaults.{error.name} is {error.value!r}: expected {error.expected}"
    return ""


def _sentence(told: str) -> str:
    """``Expected `int`, got `str` - at `$.policy.replicas` `` names the place first."""
    cause, _, place = told.partition(" - at ")
    where = place.strip("`").removeprefix("$").removeprefix(".")
    return f"{where or 'settings'}: {cause[:1].lower()}{cause[1:]}".replace("`", "")


def merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """``upper`` over ``lower``: objects key by key, everything else replaced, as Helm merges values."""
    whole = dict(lower)
    for key, value in upper.items():
        below = whole.get(key)
        whole[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return whole


def retained(found: Mapping[str, Any], known: type[_Values] = Values, place: str = "") -> tuple[dict[str, Any], list[str]]:
    """Settings of another version: those that exist here, and the names of those that do not."""
    kept: dict[str, Any] = {}
    gone: list[str] = []
    declared = {entry.encode_name: entry.type for entry in msgspec.structs.fields(known)}
    for name, value in found.items():
        type_ = declared.get(name)
        if type_ is None:
            gone.append(place + name)
        elif isinstance(type_, type) and issubclass(type_, _Values) and isinstance(value, Mapping):
            kept[name], below = retained(value, type_, f"{place}{name}.")
            gone += below
        else:
            kept[name] = value
    return kept, gone


def assigned(assignments: Iterable[str]) -> dict[str, Any]:
    """``a.b=1,c={x,y}`` as Helm reads ``--set``; raises InvalidValues."""
    whole: dict[str, Any] = {}
    for text in assignments:
        for part in _outside_braces(text):
            key, equals, value = part.partition("=")
            if not equals or not key.strip():
                raise InvalidValues(f"--set {part}: expected name=value")
            whole = merged(whole, _nested([step.replace("\\.", ".") for step in re.split(r"(?<!\\)\.", key.strip())], _scalar(value)))
    return whole


def _outside_braces(text: str) -> list[str]:
    parts = re.findall(r"(?:\{[^{}]*\}|\\,|[^,])+", text)
    return [part.replace("\\,", ",") for part in parts]


def _nested(steps: list[str], value: Any) -> dict[str, Any]:
    for step in reversed(steps):
        value = {step: value}
    found: dict[str, Any] = value
    return found


def _scalar(text: str) -> Any:
    if text.startswith("{") and text.endswith("}"):
        return [_scalar(part) for part in text[1:-1].split(",") if part]
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?(0|[1-9][0-9]*)", text) else text


def schema() -> dict[str, Any]:
    """values.schema.json: what Helm checks settings with; the same under every Python, of which 3.13 and newer unindent docstrings."""
    found: dict[str, Any] = msgspec.json.schema(Values)
    for definition in found["$defs"].values():
        definition["description"] = inspect.cleandoc(definition["description"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}
