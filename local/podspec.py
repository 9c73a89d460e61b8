"""From a pod's containers to processes: command line, environment, working directory, uid, files. Pure; called by local.pod.

Field rules are those of the core/v1 API reference (Container, EnvVar, Volume); what has no meaning without images is left out.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

APP_UID = 65532  # `nonroot` of the usual minimal images: belongs to nobody on a normal machine

_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")

Lookup = Callable[[str, str], Mapping[str, Any] | None]
"""(kind, name) in the pod's namespace -> the object, None when there is none."""


class NotYet(Exception):
    """The pod cannot start as things are, and may when something else appears; the text says what is missing."""


@dataclass(frozen=True)
class Token:
    """A projected service account token: kept fresh by the runner. path: relative to the volume."""

    path: str
    audience: str
    lifetime_s: int


@dataclass(frozen=True)
class Volume:
    """What a volume holds. host_path: that file or folder of the machine itself. files: relative path -> content."""

    name: str
    host_path: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    tokens: tuple[Token, ...] = ()
    writable: bool = False


@dataclass(frozen=True)
class VolumeMount:
    """Container.volumeMounts[]."""

    volume: str
    path: str
    sub_path: str = ""
    read_only: bool = False


@dataclass(frozen=True)
class ContainerPlan:
    """The process of a container. kind: ``init`` ends before the next starts; ``sidecar`` is an init container that keeps running."""

    name: str
    kind: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    uid: int
    gid: int
    mounts: tuple[VolumeMount, ...]
    probes: Mapping[str, Mapping[str, Any]]
    ports: Mapping[str, int]
    pre_stop: Mapping[str, Any] | None = None

    @property
    def restarts_always(self) -> bool:
        """A native sidecar is restarted whatever the pod's restartPolicy says."""
        return self.kind == "sidecar"


@dataclass(frozen=True)
class Base:
    """What every process starts from. env: PATH and the like. sidecar_argv: the program behind the container that injection adds."""

    env: Mapping[str, str]
    sidecar_argv: tuple[str, ...]


def container_plans(pod: Mapping[str, Any], lookup: Lookup, base: Base) -> list[ContainerPlan]:
    """All containers in starting order: init containers and native sidecars as listed, then the others; raises NotYet."""
    spec = pod["spec"]
    plans = []
    for container in spec.get("initContainers") or []:
        kind = "sidecar" if container.get("restartPolicy") == "Always" else "init"
        plans.append(_container(pod, container, kind, lookup, base))
    return plans + [_container(pod, container, "app", lookup, base) for container in spec["containers"]]


def _container(pod: Mapping[str, Any], container: Mapping[str, Any], kind: str, lookup: Lookup, base: Base) -> ContainerPlan:
    env = {**base.env, "HOSTNAME": hostname_of(pod), **environment(pod, container, lookup)}
    command = container.get("command") or list(base.sidecar_argv)  # only the injected sidecar comes without one
    words = [*command, *(container.get("args") or [])]
    uid, gid = user_of(pod, container)
    return ContainerPlan(
        name=container["name"],
        kind=kind,
        argv=tuple(expand(word, env) for word in words),
        env=env,
        cwd=container.get("workingDir") or "/",
        uid=uid,
        gid=gid,
        mounts=tuple(
            VolumeMount(mount["name"], mount["mountPath"], mount.get("subPath") or "", bool(mount.get("readOnly")))
            for mount in container.get("volumeMounts") or []
        ),
        probes={name: container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe") if container.get(name)},
        ports=named_ports([container]),
        pre_stop=(container.get("lifecycle") or {}).get("preStop"),
    )


def hostname_of(pod: Mapping[str, Any]) -> str:
    """Pod.spec.hostname or the pod's name, at most 63 characters (the kernel's limit and Kubernetes')."""
    return str(pod["spec"].get("hostname") or pod["metadata"]["name"])[:63].rstrip("-.")


def user_of(pod: Mapping[str, Any], container: Mapping[str, Any]) -> tuple[int, int]:
    """uid and gid: the container's securityContext, then the pod's, then `APP_UID`."""
    levels = [container.get("securityContext") or {}, pod["spec"].get("securityContext") or {}]
    uid = next((level["runAsUser"] for level in levels if level.get("runAsUser") is not None), APP_UID)
    gid = next((level["runAsGroup"] for level in levels if level.get("runAsGroup") is not None), uid)
    return uid, gid


def named_ports(containers: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Port name -> number; unnamed ports under their number's text."""
    ports: dict[str, int] = {}
    for container in containers:
        for port in container.get("ports") or []:
            ports[port.get("name") or str(port["containerPort"])] = port["containerPort"]
    return ports


def expand(text: str, env: Mapping[str, str]) -> str:
    """``$(NAME)`` becomes the variable, ``$$`` a dollar, an unknown reference stays as it is (Container.args, EnvVar.value)."""
    return _REFERENCE.sub(lambda match: "$" if match[1] is None else env.get(match[1], match[0]), text)


def environment(pod: Mapping[str, Any], container: Mapping[str, Any], lookup: Lookup) -> dict[str, str]:
    """envFrom first, then env in order, each seeing those before it; raises NotYet for a missing source."""
    env: dict[str, str] = {}
    for source in container.get("envFrom") or []:
        prefix = source.get("prefix") or ""
        for kind, key in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
            if ref := source.get(key):
                data = _data(kind, ref, lookup)
                env |= {prefix + name: value.decode("utf-8", "replace") for name, value in data.items()}
    for entry in container.get("env") or []:
        if entry.get("valueFrom"):
            value = _from_source(entry["valueFrom"], pod, lookup)
            if value is not None:
                env[entry["name"]] = value
        else:
            env[entry["name"]] = expand(str(entry.get("value") or ""), env)
    return env


def _from_source(source: Mapping[str, Any], pod: Mapping[str, Any], lookup: Lookup) -> str | None:
    if ref := source.get("fieldRef"):
        return field_of(pod, ref["fieldPath"])
    for kind, key in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
        if ref := source.get(key):
            data = _data(kind, ref, lookup)
            if ref["key"] in data:
                return data[ref["key"]].decode("utf-8", "replace")
            if ref.get("optional"):
                return None
            raise NotYet(f"{kind} {ref['name']} has no key {ref['key']}")
    return "0"  # resourceFieldRef: nothing limits a process here, which the API also expresses as the node's whole capacity


def field_of(pod: Mapping[str, Any], path: str) -> str:
    """Downward API: metadata.*, spec.serviceAccountName, spec.nodeName, status.podIP(s), status.hostIP; raises NotYet for another path."""
    meta, spec, status = pod["metadata"], pod["spec"], pod.get("status") or {}
    if match := re.fullmatch(r"metadata\.(labels|annotations)\['(.*)'\]", path):
        return str((meta.get(match[1]) or {}).get(match[2], ""))
    plain: Mapping[str, Callable[[], object]] = {
        "metadata.name": lambda: meta["name"],
        "metadata.namespace": lambda: meta["namespace"],
        "metadata.uid": lambda: meta.get("uid", ""),
        "metadata.labels": lambda: "\n".join(f'{key}="{value}"' for key, value in sorted((meta.get("labels") or {}).items())),
        "metadata.annotations": lambda: "\n".join(f'{key}="{value}"' for key, value in sorted((meta.get("annotations") or {}).items())),
        "spec.serviceAccountName": lambda: spec.get("serviceAccountName") or "default",
        "spec.nodeName": lambda: spec.get("nodeName") or "local",
        "status.podIP": lambda: status.get("podIP", ""),
        "status.podIPs": lambda: ",".join(entry["ip"] for entry in status.get("podIPs") or []),
        "status.hostIP": lambda: status.get("hostIP", ""),
        "status.hostIPs": lambda: status.get("hostIP", ""),
    }
    if path not in plain:
        raise NotYet(f"fieldRef {path} is not one of {', '.join(plain)}")
    return str(plain[path]())


def _data(kind: str, ref: Mapping[str, Any], lookup: Lookup) -> dict[str, bytes]:
    name = ref.get("name") or ref.get("secretName") or ""
    found = lookup(kind, name)
    if found is None:
        if ref.get("optional"):
            return {}
        raise NotYet(f"{kind} {name} does not exist")
    return content_of(kind, found)


def content_of(kind: str, raw: Mapping[str, Any]) -> dict[str, bytes]:
    """data, binaryData and stringData of a ConfigMap or Secret as bytes."""
    encoded = raw.get("data") if kind == "Secret" else raw.get("binaryData")
    plain = raw.get("stringData") if kind == "Secret" else raw.get("data")
    content = {name: base64.b64decode(value) for name, value in (encoded or {}).items()}
    return content | {name: str(value).encode() for name, value in (plain or {}).items()}


def volume_plans(pod: Mapping[str, Any], lookup: Lookup) -> list[Volume]:
    """What every volume of the pod holds; raises NotYet for a missing source or a kind that needs a cluster."""
    return [_volume(pod, volume, lookup) for volume in pod["spec"].get("volumes") or []]


def _volume(pod: Mapping[str, Any], volume: Mapping[str, Any], lookup: Lookup) -> Volume:
    name = volume["name"]
    if "emptyDir" in volume:
        return Volume(name, writable=True)
    if host := volume.get("hostPath"):
        return Volume(name, host_path=host["path"], writable=True)
    if projected := volume.get("projected"):
        return _projected(name, pod, projected.get("sources") or [], lookup)
    for key in ("configMap", "secret", "downwardAPI"):
        if key in volume:
            return _projected(name, pod, [{key: volume[key]}], lookup)
    raise NotYet(f"volume {name} is of a kind that the local runner has not: use emptyDir, hostPath, configMap, secret or projected")


def _projected(name: str, pod: Mapping[str, Any], sources: Sequence[Mapping[str, Any]], lookup: Lookup) -> Volume:
    files: dict[str, bytes] = {}
    tokens: list[Token] = []
    for source in sources:
        if token := source.get("serviceAccountToken"):
            audience, lifetime = token.get("audience") or "", int(token.get("expirationSeconds") or 3600)
            tokens.append(Token(_relative(token["path"]), audience, lifetime))
        for key, kind in (("configMap", "ConfigMap"), ("secret", "Secret")):
            if key in source:
                files |= _chosen(kind, source[key], lookup)
        for item in (source.get("downwardAPI") or {}).get("items") or []:
            files[_relative(item["path"])] = field_of(pod, (item.get("fieldRef") or {}).get("fieldPath", "")).encode()
    return Volume(name, files=files, tokens=tuple(tokens))


def _chosen(kind: str, source: Mapping[str, Any], lookup: Lookup) -> dict[str, bytes]:
    data = _data(kind, source, lookup)
    items = source.get("items")
    if not items:
        return {_relative(key): value for key, value in data.items()}
    missing = [item["key"] for item in items if item["key"] not in data]
    if missing and not source.get("optional"):
        raise NotYet(f"{kind} {source.get('name') or source.get('secretName')} has no key {missing[0]}")
    return {_relative(item["path"]): data[item["key"]] for item in items if item["key"] in data}


def _relative(path: str) -> str:
    """A path that stays inside its volume; raises NotYet for one that does not."""
    if path.startswith("/") or ".." in path.split("/") or not path:
        raise NotYet(f"path {path!r} of a volume leads out of it")
    return path
