"""`pillion inject` and `uninject`: put workloads of a manifest into the mesh, or take them out. Reads a file, writes to stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from cli.output import CommandFailed, say
from core.k8s.manifests import InvalidManifest, read_manifests
from injector.decide import Inject, Refuse, Skip
from injector.mark import mark, unmark, wish_of
from injector.mesh import DEFAULT_MESH, InvalidMesh, Mesh, read_mesh
from injector.patch import apply_patch, review
from injector.undo import is_injected
from injector.undo import uninject as taken_out

_TEMPLATES = {
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "ReplicationController": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
    "Pod": (),
    "Namespace": (),
}
"""Where the pod (template), or what is annotated in its place, stands in each kind."""

_FILE = click.Path(exists=True, dir_okay=False, allow_dash=True)


@click.command()
@click.argument("file", type=_FILE)
@click.option("--manual", is_flag=True, help="Write the sidecar itself, as the webhook would, instead of asking the webhook for it.")
@click.option("--mesh", "mesh_file", type=_FILE, help="Mesh settings for --manual: mesh.yaml of the ConfigMap pillion-config.")
def inject(file: str, manual: bool, mesh_file: str | None) -> None:
    """Print the manifests of FILE (``-`` for standard input) with their workloads in the mesh; comments are lost.

    What becomes of each workload is said on standard error.
    """
    if mesh_file and not manual:
        raise click.UsageError("--mesh is for --manual: otherwise the webhook uses its own settings")
    mesh = _mesh(mesh_file)
    documents = _read(file)
    namespaces = _namespace_annotations(documents)
    for document, keys in (found := list(_workloads(documents))):
        pod = _pod(document, keys)
        if wish_of(pod) == "disabled":
            say(f"{_name(document)}: left as it is: it is disabled by its annotation", err=True)
            continue
        if wish_of(pod) != "enabled":
            try:
                pod = mark(pod)
            except ValueError as error:
                raise CommandFailed(f"{_name(document)}: {error}") from None
        namespace = namespaces.get(_namespace(document), {})
        if manual and document["kind"] != "Namespace":
            pod = _with_sidecar(document, pod, namespace, mesh)
        else:
            say(f"{_name(document)}: annotated{_outlook(document, pod, namespace)}", err=True)
        _replace(document, keys, pod)
    if not found:
        say(f"{file}: nothing in it has pods, so it is printed as it is", err=True)
    _write(documents)


@click.command()
@click.argument("file", type=_FILE)
def uninject(file: str) -> None:
    """Print the manifests of FILE (``-`` for standard input) with their workloads out of the mesh; comments are lost."""
    documents = _read(file)
    for document, keys in _workloads(documents):
        pod = _pod(document, keys)
        found = unmark(taken_out(pod))
        if found != pod:
            what = "the sidecar is taken out" if is_injected(pod) else "the annotation is taken away"
            say(f"{_name(document)}: {what}", err=True)
            _replace(document, keys, found)
    _write(documents)


def _outlook(document: Mapping[str, Any], pod: Mapping[str, Any], namespace: Mapping[str, str]) -> str:
    """What the webhook will do with its pods; a running mesh may have settings of its own, which are not known here."""
    if document["kind"] == "Namespace":
        return "; pods that are created in it from now on get a sidecar"
    match review(pod, namespace, DEFAULT_MESH)[0]:
        case Inject():
            return (
                "; its pods get their sidecar when they are created" if document["kind"] != "Pod" else "; it gets its sidecar when created"
            )
        case Skip(reason="already-injected"):
            return "; the sidecar is written in already"
        case Skip(sentence=sentence):
            return f", but it will get no sidecar: {sentence}"
        case Refuse(sentence=sentence):
            return f", but the injector will refuse it: {sentence}"


def _with_sidecar(document: Mapping[str, Any], pod: Mapping[str, Any], namespace: Mapping[str, str], mesh: Mesh) -> dict[str, Any]:
    decision, patch = review(pod, namespace, mesh)
    if isinstance(decision, Refuse):
        raise CommandFailed(f"{_name(document)}: {decision.sentence}")
    if isinstance(decision, Skip):
        say(f"{_name(document)}: left as it is: {decision.sentence}", err=True)
    else:
        say(f"{_name(document)}: the sidecar is written in", err=True)
    return apply_patch(pod, patch)


def _mesh(file: str | None) -> Mesh:
    if file is None:
        return DEFAULT_MESH
    try:
        return read_mesh(sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes())
    except InvalidMesh as error:
        raise CommandFailed(f"{file}: {error}") from None


def _read(file: str) -> list[dict[str, Any]]:
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return read_manifests(data, is_json=file.endswith(".json"))
    except InvalidManifest as error:
        raise CommandFailed(f"{file}: {error}") from None


def _namespace_annotations(documents: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Of the Namespaces that are among the documents; what is wrong with others is said where they are used."""
    found = {}
    for document in documents:
        metadata = document.get("metadata")
        if document.get("kind") == "Namespace" and isinstance(metadata, dict):
            annotations = metadata.get("annotations")
            found[str(metadata.get("name"))] = {
                str(key): str(value) for key, value in (annotations if isinstance(annotations, dict) else {}).items()
            }
    return found


def _namespace(document: Mapping[str, Any]) -> str:
    metadata = document.get("metadata")
    return str(metadata.get("namespace") or "default") if isinstance(metadata, dict) else "default"


def _workloads(documents: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    for document in documents:
        keys = _TEMPLATES.get(str(document.get("kind")))
        if keys is not None:
            yield document, keys


def _pod(document: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    place: Any = document
    for key in keys:
        place = place.get(key) if isinstance(place, dict) else None
    if not isinstance(place, dict) or not isinstance(place.get("metadata"), dict | None):
        raise CommandFailed(f"{_name(document)}: expected an object at {'.'.join(keys) or 'the top'}")
    return place


def _replace(document: dict[str, Any], keys: tuple[str, ...], pod: Mapping[str, Any]) -> None:
    place: Any = document
    for key in keys:
        place = place[key]
    order = [*(key for key in place if key in pod), *(key for key in pod if key not in place)]
    new = {key: pod[key] for key in order}
    place.clear()
    place.update(new)


def _name(document: Mapping[str, Any]) -> str:
    metadata = document.get("metadata")
    return f"{str(document.get('kind')).lower()} {metadata.get('name') if isinstance(metadata, dict) else None}"


def _write(documents: list[dict[str, Any]]) -> None:
    click.echo(yaml.safe_dump_all(documents, sort_keys=False), nl=False)
