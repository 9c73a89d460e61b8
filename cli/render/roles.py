"""The roles of the chart, written from the table of what each component may ask (`core.k8s.access`). Pure.

The chart holds the result as a template, with the reason beside every rule, because people read roles before they install them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from core.k8s.access import CONTROL, Component, Grant, grants_of

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
        role = _ROLE.format(kind=kind, component=component, namespace=where, rules="".join(_rules(found)))
        binding = _BINDING.format(kind=kind, component=component, namespace=where)
        if component == "agent":
            yield f"{{{{- if .Values.agent.enabled }}}}\n{role}"
            yield f"{binding}{{{{- end }}}}\n"
        else:
            yield role
            yield binding


def _rules(grants: Iterable[Grant]) -> Iterator[str]:
    for grant in grants:
        yield f"  # {grant.reason}\n"
        yield f"  - apiGroups: {json.dumps([grant.group])}\n"
        yield f"    resources: [{', '.join(grant.resources)}]\n"
        if grant.names:
            yield f"    resourceNames: [{', '.join(grant.names)}]\n"
        yield f"    verbs: [{', '.join(grant.verbs)}]\n"
