"""Names in manifests that lead nowhere: no mistake of form, so nothing refuses them, and yet not what their author means. Pure.

A Service or Server for a port that no pod has, a Server for pods without a sidecar, a policy for a Server that is not there, an annotation
that nobody reads. `pillion local status` shows them as notes. Called by local.report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from core.k8s.objects import Service
from core.refs import Ref
from injector.misspelt import misspelt
from local.objects import Manifest
from local.services import PodFacts, selected
from policy import model
from policy.admission import parse_object


def hints(manifests: Mapping[Ref, Manifest], services: Iterable[Service], pods: Sequence[PodFacts]) -> list[str]:
    """Sentences that begin with the object. pods: all that have an address, ready or not."""
    found = [hint for service in services for hint in _of_service(service, pods)]
    for ref, manifest in sorted(manifests.items()):
        found += _of_annotations(ref, manifest)
        if ref.group != model.GROUP:
            continue
        typed = parse_object(manifest.raw)
        if isinstance(typed, model.Server):
            chosen = [pod for pod in pods if pod.ref.namespace == ref.namespace and typed.pod_selector.matches(pod.labels)]
            found += _of_port(ref, typed.port, chosen) + _of_sidecars(ref, chosen)
        elif isinstance(typed, model.AuthorizationPolicy):
            wanted = [typed.target, *(one for one in typed.required if one.group == model.GROUP)]
            missing = [one for one in wanted if one.kind != "Namespace" and one not in manifests]
            found += [f"{ref}: {one} does not exist, so it lets nobody in" for one in missing]
    return found


def _of_service(service: Service, pods: Sequence[PodFacts]) -> Iterator[str]:
    if service.spec.selector:
        chosen = selected(service, pods)
        for port in service.spec.ports:
            yield from _of_port(service.ref, port.target_port or port.port, chosen)


def _of_annotations(ref: Ref, manifest: Manifest) -> Iterator[str]:
    template = (manifest.raw.get("spec") or {}).get("template") or {}
    for metadata in (manifest.raw["metadata"], template.get("metadata") or {}):
        yield from (f"{ref}: {sentence}" for sentence in misspelt(metadata.get("annotations") or {}))


def _of_sidecars(ref: Ref, chosen: Sequence[PodFacts]) -> list[str]:
    plain = sorted(pod.ref.name for pod in chosen if not pod.meshed)
    return [f"{ref}: nobody enforces it on pods without a sidecar: {', '.join(plain)}"] if plain else []


def _of_port(ref: Ref, port: int | str, chosen: Sequence[PodFacts]) -> list[str]:
    if not chosen:
        return [f"{ref}: selects no pod"]
    names = sorted({name for pod in chosen for name in pod.ports})
    if isinstance(port, int) or port in names:
        return []
    return [f"{ref}: no pod that it selects has a container port named {port!r} (named are: {', '.join(names) or 'none'})"]
