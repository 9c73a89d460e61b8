"""The roles of the chart, written from the table of what each component may ask (`core.k8s.access`). Pure.

The chart holds the result as a template, with the reason beside every rule, because people read roles before they install them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

from core.k8s.access import CONTROL, Component, Grant, When, grants_of

COMPONENTS: tuple[Component, ...] = ("identity", "policy", "injector", "agent")

_HEAD = """\
# What each component may ask of the API server, and why. Written by `make manifests` from core/k8s/access.py.
"""
_ROLE = """\
apiVersion: rbac.authorization.k8s.io/v1
kind: {kind}
metadata:
  name: pillion-{component}{namespace}
  labels:
    {{{{- include "pillion.labels" (dict "root" . "component" "{component}") | nindent 4 }}}}
rules:
{rules}"""
_BINDING = """\
apiVersion: rbac.authorization.k8s.io/v1
kind: {kind}Binding
metadata:
  name: pillion-{component}{namespace}
  labels:
    {{{{- include "pillion.labels" (dict "root" . "component" "{component}") | nindent 4 }}}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: {kind}, name: pillion-{component}}}
subjects:
  - {{kind: ServiceAccount, name: pillion-{component}, namespace: {{{{ .Release.Namespace }}}}}}
"""
_CONDITIONS: Mapping[When, str] = {
    "given-issuer": 'ne .Values.identity.issuer.source "made"',
    "own-serving": "not .Values.certManager.enabled",
}
"""Variant of an installation -> what templates ask; the same as `core.k8s.access.variants`, which a test compares."""
_NAMESPACE = "\n  namespace: {{ .Release.Namespace }}"


def roles_template() -> str:
    """The text of templates/rbac.yaml."""
    documents = "---\n".join(document for component in COMPONENTS for document in _roles(component))
    return _HEAD + documents


def _roles(component: Component) -> Iterator[str]:
    for kind, namespace in (("ClusterRole", ""), ("Role", CONTROL)):
        found = [grant for grant in grants_of(component) if grant.namespace == namespace]
        if not found:
            continue
        where = _NAMESPACE if namespace else ""
        # a role without a rule would be none
        whole = ".Values.agent.enabled" if component == "agent" else _CONDITIONS.get(found[0].when, "")
        whole = whole if component == "agent" or len({grant.when for grant in found}) == 1 else ""
        role = _ROLE.format(kind=kind, component=component, namespace=where, rules="".join(_rules(found, conditions=not whole)))
        binding = _BINDING.format(kind=kind, component=component, namespace=where)
        yield f"{{{{- if {whole} }}}}\n{role}" if whole else role
        yield f"{binding}{{{{- end }}}}\n" if whole else binding


def _rules(grants: Iterable[Grant], *, conditions: bool) -> Iterator[str]:
    for grant in grants:
        condition = _CONDITIONS.get(grant.when) if conditions else None
        yield f"  {{{{- if {condition} }}}}\n" if condition else ""
        yield f"  # {grant.reason}\n"
        yield f"  - apiGroups: {json.dumps([grant.group])}\n"
        yield f"    resources: [{', '.join(grant.resources)}]\n"
        if grant.names:
            yield f"    resourceNames: [{', '.join(grant.names)}]\n"
        yield f"    verbs: [{', '.join(grant.verbs)}]\n"
        yield "  {{- end }}\n" if condition else ""
