"""Names in manifests that lead nowhere: no mistake of form, so nothing refuses them, and yet not what their author means. Pure.

A Service for a port that no pod has, a policy that does not act, a Server for pods without a sidecar, an annotation that nobody reads,
a namespace or service account that was never written down. `pillion local status` shows them as notes. Called by local.report.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from core.k8s.fields import InvalidObject
from core.k8s.objects import Service
from core.refs import Ref
from injector.misspelt import misplaced, misspelt, of_linkerd
from local.objects import WORKLOADS, Manifest
from local.services import PodFacts, selected
from policy import model
from policy.admission import parse_object
from policy.gateway import InboundRoute
from policy.index import Index
from policy.index.idle import idle_servers, unknown_accounts
from policy.index.report import problems

_ALWAYS_THERE = ("default", "kube-system", "kube-public", "kube-node-lease")  # on every cluster
_SIDECAR_PORTS = "pillion-"  # how the names of the sidecar's own ports begin


def hints(
    manifests: Mapping[Ref, Manifest],
    services: Iterable[Service],
    pods: Sequence[PodFacts],
    objects: Iterable[Mapping[str, Any]],
) -> list[str]:
    """Sentences that begin with the object. pods: all that have an address, ready or not. objects: what the policy controller reads."""
    found = _of_namespaces(manifests)
    found += [hint for service in services for hint in _of_service(service, pods)]
    for ref, manifest in sorted(manifests.items()):
        found += _of_annotations(ref, manifest)
        found += _of_account(manifests, ref, manifest)
        found += _of_parents(ref, manifest)
        if ref.group == model.GROUP and isinstance(typed := parse_object(manifest.raw), model.Server):
            chosen = [pod for pod in pods if pod.ref.namespace == ref.namespace and typed.pod_selector.matches(pod.labels)]
            found += _of_sidecars(ref, chosen)
    accounts = {(ref.namespace, ref.name) for ref in manifests if ref.kind == "ServiceAccount"}
    return found + _of_policies(objects, accounts)


def _of_policies(objects: Iterable[Mapping[str, Any]], accounts: set[tuple[str, str]]) -> list[str]:
    """The same sentences as `pillion check` has on a cluster."""
    index = Index()
    for raw in objects:
        with contextlib.suppress(InvalidObject):  # the controller refuses it as well; `local.mesh` has told so already
            if (typed := parse_object(raw)) is not None:
                index.apply(typed)
    accounts = accounts | {(namespace, "default") for namespace in index.store.namespaces}
    told = [*problems(index), *sorted([*idle_servers(index), *unknown_accounts(index, accounts)])]
    return [f"{problem.ref}: {problem.message}" for problem in told]


def _of_namespaces(manifests: Mapping[Ref, Manifest]) -> list[str]:
    """A pod in a namespace that is only a slip of the pen would be outside of the mesh without a word."""
    first = {ref.namespace: ref for ref in sorted(manifests, reverse=True) if ref.namespace not in ("", *_ALWAYS_THERE)}
    missing = [(name, ref) for name, ref in sorted(first.items()) if Ref("", "Namespace", "", name) not in manifests]
    return [f"{ref}: there is no Namespace {name}; a cluster would refuse it" for name, ref in missing]


def _of_account(manifests: Mapping[Ref, Manifest], ref: Ref, manifest: Manifest) -> list[str]:
    if (ref.group, ref.kind) not in WORKLOADS:
        return []
    pod = manifest.raw if ref.kind == "Pod" else manifest.raw["spec"]["template"]
    spec = pod.get("spec") or {}
    name = spec.get("serviceAccountName") or "default"
    if name == "default" or Ref("", "ServiceAccount", ref.namespace, name) in manifests:
        return []
    return [f"{ref}: there is no ServiceAccount {name} in namespace {ref.namespace}; a cluster would refuse its pods"]


def _of_parents(ref: Ref, manifest: Manifest) -> list[str]:
    if ref.group != model.GATEWAY_GROUP:
        return []
    with contextlib.suppress(InvalidObject):
        typed = parse_object(manifest.raw)
        if isinstance(typed, InboundRoute) and not (typed.servers or typed.forwarding or typed.unattachable or typed.mistaken):
            return [f"{ref}: none of its parents is a Service or a Server, so it does nothing here"]
    return []


def _of_service(service: Service, pods: Sequence[PodFacts]) -> Iterator[str]:
    if service.spec.selector:
        chosen = selected(service, pods)
        for port in service.spec.ports:
            yield from _of_port(service.ref, port.target_port or port.port, chosen)


def _of_annotations(ref: Ref, manifest: Manifest) -> Iterator[str]:
    own = manifest.raw["metadata"].get("annotations") or {}
    template = (manifest.raw.get("spec") or {}).get("template") or {}
    of_template = (template.get("metadata") or {}).get("annotations") or {}
    for some in (own, of_template):
        yield from (f"{ref}: {sentence}" for sentence in (*misspelt(some), *of_linkerd(some)))
    if (ref.group, ref.kind) in WORKLOADS and ref.kind != "Pod":
        yield from (f"{ref}: {sentence}" for sentence in misplaced(own))


def _of_sidecars(ref: Ref, chosen: Sequence[PodFacts]) -> list[str]:
    plain = sorted(pod.ref.name for pod in chosen if not pod.meshed)
    return [f"{ref}: nobody enforces it on pods without a sidecar: {', '.join(plain)}"] if plain else []


def _of_port(ref: Ref, port: int | str, chosen: Sequence[PodFacts]) -> list[str]:
    if not chosen:
        return [f"{ref}: selects no pod"]
    names = sorted({name for pod in chosen for name in pod.ports if not name.startswith(_SIDECAR_PORTS)})
    if isinstance(port, int) or port in names:
        return []
    return [f"{ref}: no pod that it selects has a container port named {port!r} (named are: {', '.join(names) or 'none'})"]
