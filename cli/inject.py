"""`pillion inject` and `uninject`: put workloads of a manifest into the mesh, or take them out. Reads a file, writes to stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from cli.output import CommandFailed
from core.k8s.manifests import InvalidManifest, read_manifests
from injector.decide import INJECT, SIDECAR_NAME, STATUS, Refuse, Skip
from injector.patch import apply_patch, review

_TEMPLATES = {
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "ReplicationController": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
    "Pod": (),
}
"""Where the pod (template) of each kind stands."""


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--manual", is_flag=True, help="Write the sidecar itself, as the webhook would, instead of asking the webhook for it.")
def inject(file: str, manual: bool) -> None:
    """Print the manifests of FILE (``-`` for standard input) with their workloads in the mesh; comments are lost."""
    documents = _read(file)
    for document, keys in _workloads(documents):
        pod = _pod(document, keys)
        pod.setdefault("metadata", {})
        annotations = dict(pod["metadata"].get("annotations") or {})
        pod["metadata"]["annotations"] = {**annotations, INJECT: "enabled"}
        if manual:
            _replace(document, keys, _with_sidecar(document, pod))
    _write(documents)


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
def uninject(file: str) -> None:
    """Print the manifests of FILE (``-`` for standard input) with their workloads out of the mesh; comments are lost."""
    documents = _read(file)
    for document, keys in _workloads(documents):
        pod = _pod(document, keys)
        spec = pod.get("spec") or {}
        containers = [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]
        metadata = pod.get("metadata") or {}
        annotations = dict(metadata.get("annotations") or {})
        if STATUS in annotations or any(container.get("name") == SIDECAR_NAME for container in containers):
            raise CommandFailed(
                f"{_name(document)} holds the sidecar itself", "go back to the manifest from before `pillion inject --manual`"
            )
        if annotations.pop(INJECT, None) is not None:
            click.echo(f"{_name(document)}: {INJECT} removed", err=True)
            metadata["annotations"] = annotations
            if not annotations:
                del metadata["annotations"]
    _write(documents)


def _with_sidecar(document: dict[str, Any], pod: dict[str, Any]) -> dict[str, Any]:
    decision, patch = review(pod, {})
    if isinstance(decision, Refuse):
        raise CommandFailed(f"{_name(document)}: {decision.sentence}")
    if isinstance(decision, Skip):
        click.echo(f"{_name(document)}: left as it is: {decision.sentence}", err=True)
        return pod
    return apply_patch(pod, patch)


def _read(file: str) -> list[dict[str, Any]]:
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return read_manifests(data, is_json=file.endswith(".json"))
    except InvalidManifest as error:
        raise CommandFailed(f"{file}: {error}") from None


def _workloads(documents: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    for document in documents:
        keys = _TEMPLATES.get(str(document.get("kind")))
        if keys is not None:
            yield document, keys


def _pod(document: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    place: Any = document
    for key in keys:
        place = place.get(key) if isinstance(place, dict) else None
    if not isinstance(place, dict) or not isinstance(place.get("metadata", {}), dict):
        raise CommandFailed(f"{_name(document)}: expected an object at {'.'.join(keys) or 'the top'}")
    return place


def _replace(document: dict[str, Any], keys: tuple[str, ...], pod: dict[str, Any]) -> None:
    if not keys:
        document.update(pod)
        return
    place: Any = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = pod


def _name(document: dict[str, Any]) -> str:
    metadata = document.get("metadata")
    return f"{str(document.get('kind')).lower()} {metadata.get('name') if isinstance(metadata, dict) else None}"


def _write(documents: list[dict[str, Any]]) -> None:
    click.echo(yaml.safe_dump_all(documents, sort_keys=False), nl=False)
