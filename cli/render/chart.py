"""Renders the chart of an installation: its templates with the settings, as objects in the order in which they can be applied.

Reads the chart's files and nothing else. Called by `cli.install`; Helm renders the same files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cli.render.template import TemplateError, Templates
from cli.render.values import InvalidValues, checked, merged

NAMESPACE = "pillion"
CHART = Path(__file__).resolve().parent.parent.parent / "manifests" / "helm"

# Helm's InstallOrder (pkg/release/util/kind_sorter.go), as far as we have these kinds; webhooks come last, when somebody answers them.
_ORDER = (
    "Namespace",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "ServiceAccount",
    "Secret",
    "ConfigMap",
    "CustomResourceDefinition",
    "ClusterRole",
    "ClusterRoleBinding",
    "Role",
    "RoleBinding",
    "Service",
    "DaemonSet",
    "Deployment",
    "Issuer",
    "Certificate",
    "MutatingWebhookConfiguration",
    "ValidatingWebhookConfiguration",
)


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Ten times faster where libyaml is there."""


@dataclass(frozen=True)
class Chart:
    """The chart's files. high_availability: the overlay that ``--ha`` puts under other settings."""

    metadata: Mapping[str, Any]
    templates: Mapping[str, str]
    high_availability: Mapping[str, Any]


def load_chart(folder: Path = CHART) -> Chart:
    """Read a chart; raises OSError."""
    files = sorted(path for path in (folder / "templates").rglob("*") if path.suffix in (".yaml", ".tpl"))
    return Chart(
        yaml.safe_load((folder / "Chart.yaml").read_text("utf-8")),
        {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in files},
        yaml.safe_load((folder / "values-ha.yaml").read_text("utf-8")),
    )


def render(chart: Chart, settings: Mapping[str, Any], *, ha: bool = False) -> list[dict[str, Any]]:
    """Every object of an installation, in the order of applying; raises InvalidValues, and TemplateError for a fault of the chart."""
    values = checked(merged(chart.high_availability if ha else {}, settings))
    version = str(chart.metadata["version"])
    dot = {
        "Values": values,
        "Release": {"Name": NAMESPACE, "Namespace": NAMESPACE, "Service": "pillion"},
        "Chart": {"Name": chart.metadata["name"], "Version": version, "AppVersion": str(chart.metadata["appVersion"])},
    }
    templates = Templates()
    for name, text in chart.templates.items():
        templates.add(name, text)
    objects: list[dict[str, Any]] = []
    for name in chart.templates:
        if name.endswith(".yaml"):
            objects += _documents(name, templates.render(name, dot))
    return sorted(objects, key=_order)


def _documents(name: str, text: str) -> list[dict[str, Any]]:
    try:
        return [document for document in yaml.load_all(text, Loader=_Loader) if document]
    except yaml.YAMLError as error:
        raise TemplateError(f"{name} does not render to YAML: {error}") from None


def _order(found: Mapping[str, Any]) -> tuple[int, str, str]:
    kind = str(found["kind"])
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind, str(found["metadata"]["name"]))


class _Dumper(yaml.SafeDumper):
    """Long text as blocks, and no aliases, which nobody reads."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def as_yaml(objects: Iterable[Mapping[str, Any]]) -> str:
    """Documents for ``kubectl apply -f -``."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=140)


__all__ = ["CHART", "NAMESPACE", "Chart", "InvalidValues", "TemplateError", "as_yaml", "load_chart", "render"]
