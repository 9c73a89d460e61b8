"""Names in manifests that lead nowhere: no mistake of form, so nothing refuses them, and yet not what their author means. Pure.

A Service for a port that no pod has, a policy that does not act, a Server for pods without a sidecar, an annotation that nobody reads.
`pillion local status` shows them as notes. Called by local.report.
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
from policy.index import Index
from policy.index.idle import idle_servers, unknown_accounts
from policy.index.report import problems

_SIDECAR_PORTS = "pillion-"  # how the names of the sidecar's own ports begin


def hints(
    manifests: Mapping[Ref, Manifest],
    services: Iterable[Service],
    pods: Sequence[PodFacts],
    objects: Iterable[Mapping[str, Any]],
) -> list[str]:
    """Sentences that begin with the object. pods: all that have an address, ready or not. objects: what the policy controller reads."""
    found = [hint for service in services for hint in _of_service(service, pods)]
    for ref, manifest in sorted(manifests.items()):
        found += _of_annotations(ref, manifest)
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
