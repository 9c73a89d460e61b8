"""Checks of what the mesh does for workloads: policies without effect, pods without a sidecar, sidecars that are ill or old."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cli.check.certificates import is_meshed
from cli.check.cluster import NAMESPACE, Cluster, Object, name_of, some
from cli.check.installation import mesh_settings
from cli.check.model import Category, Check, Failed, Skipped
from core.k8s.errors import ApiError
from core.k8s.fields import InvalidObject
from injector.decide import Inject, Refuse, Skip, decide, wants
from injector.fixed import SIDECAR_NAME
from injector.misspelt import misplaced, misspelt
from policy.admission import parse_object
from policy.index import Index, IndexSettings
from policy.index.destinations import meshed
from policy.index.idle import idle_servers, unknown_accounts
from policy.index.report import problems

_KINDS = (
    ("", "v1", "namespaces"),
    ("", "v1", "nodes"),
    ("", "v1", "pods"),
    ("", "v1", "services"),
    ("discovery.k8s.io", "v1", "endpointslices"),
    ("gateway.networking.k8s.io", "v1", "httproutes"),
    ("gateway.networking.k8s.io", "v1", "grpcroutes"),
    ("policy.pillion.dev", "v1alpha1", "servers"),
    ("policy.pillion.dev", "v1alpha1", "authorizationpolicies"),
    ("policy.pillion.dev", "v1alpha1", "meshtlsauthentications"),
    ("policy.pillion.dev", "v1alpha1", "networkauthentications"),
)
_EXPIRY = re.compile(r"^pillion_identity_cert_expiration_timestamp_seconds ([0-9.e+]+)$", re.MULTILINE)
_SIDECARS_ASKED = 200  # one request each; more would make the check slow without telling more


async def _index(cluster: Cluster) -> tuple[Index, list[str]]:
    """What the policy controller knows, from the same objects; and what it refuses."""
    mesh = await mesh_settings(cluster)
    index, refused = Index(IndexSettings(trust_domain=mesh.trust_domain)), []
    for kind in _KINDS:
        for raw in await cluster.objects(*kind):
            try:
                parsed = parse_object(raw)
            except InvalidObject as error:
                refused.append(f"{raw.get('kind', kind[2])} {name_of(raw)}: {error}")
                continue
            if parsed is not None:
                index.apply(parsed)
    return index, refused


async def policies_understood(cluster: Cluster) -> str:
    """None is refused."""
    index, refused = await _index(cluster)
    if refused:
        raise Failed("\n".join(refused[:20]))
    return f"{len(index.store.objects)} objects"


def _some_lines(found: list[str], most: int = 20) -> str:
    return "\n".join(found[:most]) + (f"\nand {len(found) - most} more" if len(found) > most else "")


async def policies_act(cluster: Cluster) -> None:
    """None is without effect, in conflict with another, or about names that lead nowhere."""
    index, _ = await _index(cluster)
    told = [*problems(index), *sorted(idle_servers(index))]
    with contextlib.suppress(ApiError):  # who may not list them is told the rest
        accounts = {
            (item["metadata"]["namespace"], item["metadata"]["name"]) for item in await cluster.objects("", "v1", "serviceaccounts")
        }
        told += sorted(unknown_accounts(index, accounts))
    found = [f"{problem.ref}: {problem.message}" for problem in told]
    if found:
        raise Failed(_some_lines(found))


async def policies_enforced(cluster: Cluster) -> None:
    """No Server is for a pod without a sidecar: nobody would ask it."""
    index, _ = await _index(cluster)
    plain = [pod for of in index.store.pods.values() for pod in of.values() if not (meshed(pod) or pod.finished)]
    found = []
    for pod in plain:
        servers = index.store.servers.get(pod.metadata.namespace, {}).values()
        found += [f"{server.ref}: {pod.ref} has no sidecar" for server in servers if server.pod_selector.matches(pod.metadata.labels)]
    if found:
        raise Failed(_some_lines(found))


# --- injection -----------------------------------------------------------------------------------------------------------------------


def unmeshed(pods: list[Object], namespaces: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str, str]]:
    """(pod, stable word, sentence) of pods that were to have a sidecar and have none."""
    for pod in pods:
        annotations = namespaces.get(pod["metadata"].get("namespace", ""), {})
        if is_meshed(pod) or not wants(pod, annotations):
            continue
        match decide(pod, annotations):
            case Inject():
                yield name_of(pod), "not-injected", "was created before it was asked for, or while no injector answered; restart it"
            case Skip(reason=reason, sentence=sentence) | Refuse(reason=reason, sentence=sentence):
                yield name_of(pod), reason, sentence


async def injected(cluster: Cluster) -> str:
    """Pods in namespaces that asked for it, or that asked themselves."""
    namespaces = {
        item["metadata"]["name"]: item["metadata"].get("annotations") or {} for item in await cluster.objects("", "v1", "namespaces")
    }
    pods = await cluster.pods()
    found = list(unmeshed(pods, namespaces))
    if found:
        late = any(reason == "not-injected" for _, reason, _ in found)
        hint = "kubectl rollout restart -n NAMESPACE deploy/NAME" if late else "docs/injection.md#who-gets-none-and-who-is-told"
        raise Failed("\n".join(f"{name}: {sentence}" for name, _, sentence in found[:20]), hint)
    return f"{sum(map(is_meshed, pods))} of {len(pods)} pods have a sidecar"


async def events_of_injector(cluster: Cluster) -> None:
    """What the injector left out or refused lately, in its own words."""
    found = await cluster.objects("events.k8s.io", "v1", "events", cluster.only)
    told = []
    for event in found:
        if event.get("reportingController") == "pillion.dev/injector" and event.get("reason") == "InjectionRefused":
            about = event.get("regarding") or {}
            told.append(f"{about.get('kind')} {about.get('namespace')}/{about.get('name')}: {event.get('note')}")
    if told:
        raise Failed("\n".join(sorted(set(told))[:20]))


async def annotations_read(cluster: Cluster) -> None:
    """None that looks like ours is read by nobody."""
    found = []
    for kind, items in (("namespace", await cluster.objects("", "v1", "namespaces")), ("pod", await cluster.pods())):
        for item in items:
            found += [f"{kind} {name_of(item)}: {sentence}" for sentence in misspelt(item["metadata"].get("annotations") or {})]
    for kind in ("deployment", "statefulset", "daemonset"):
        for item in await cluster.objects("apps", "v1", f"{kind}s", cluster.only):
            if item["metadata"].get("namespace") != NAMESPACE:
                found += [f"{kind} {name_of(item)}: {sentence}" for sentence in misplaced(item["metadata"].get("annotations") or {})]
    if found:
        raise Failed(_some_lines(found))


# --- sidecars ------------------------------------------------------------------------------------------------------------------------


async def _meshed(cluster: Cluster) -> list[Object]:
    found = [pod for pod in await cluster.pods() if is_meshed(pod)]
    if not found:
        raise Skipped(f"no pod{' of namespace ' + cluster.only if cluster.only else ''} has a sidecar")
    return found


async def sidecars_ready(cluster: Cluster) -> str:
    """As the kubelet sees them."""
    found = await _meshed(cluster)
    ill = [name_of(pod) for pod in found if not _sidecar_ready(pod)]
    if ill:
        raise Failed(f"{len(ill)} of {len(found)} sidecars are not ready: {some(ill)}", "kubectl logs -n NAMESPACE POD -c pillion-proxy")
    return f"{len(found)} sidecars"


def _sidecar_ready(pod: Object) -> bool:
    status: dict[str, Any] = pod.get("status") or {}
    containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    return any(item.get("name") == SIDECAR_NAME and item.get("ready") for item in containers)


async def sidecars_current(cluster: Cluster) -> str:
    """Of the image that new pods get."""
    mesh = await mesh_settings(cluster)
    found = await _meshed(cluster)
    old = [f"{name_of(pod)} ({image})" for pod in found if (image := _sidecar_image(pod)) != mesh.image]
    if old:
        raise Failed(
            f"{len(old)} of {len(found)} run another image than {mesh.image}: {some(old)}",
            "kubectl rollout restart -n NAMESPACE deploy/NAME",
        )
    return mesh.image


def _sidecar_image(pod: Object) -> str:
    spec = pod["spec"]
    containers = [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]
    return next(str(item.get("image")) for item in containers if item.get("name") == SIDECAR_NAME)


async def sidecars_certified(cluster: Cluster) -> str:
    """With more than a few minutes left, by their own metrics through the API server."""
    found = [pod for pod in await _meshed(cluster) if _sidecar_ready(pod)][:_SIDECARS_ASKED]
    told, least = [], float("inf")
    for pod in found:
        meta = pod["metadata"]
        try:
            text = await cluster.text(f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}:4191/proxy/metrics")
        except ApiError as error:
            told.append(f"{name_of(pod)}: {error.message}")
            continue
        expires = _EXPIRY.search(text)
        left = float(expires[1]) - cluster.clock() if expires else 0.0
        least = min(least, left)
        if left < 300:
            told.append(f"{name_of(pod)}: " + (f"its certificate ends in {left:.0f} s" if expires else "it has no certificate"))
    if told:
        raise Failed("\n".join(told[:20]))
    return f"{len(found)} sidecars, the first certificate ends in {least / 3600:.1f} h" if found else ""


POLICY = Category(
    "policy",
    "Policy",
    (
        Check("policy-understood", "every policy is understood", "error", policies_understood),
        Check("policy-effective", "every policy has the effect it was meant to have", "warning", policies_act),
        Check("policy-enforced", "every pod that a Server is for has a sidecar", "warning", policies_enforced),
    ),
)
INJECTION = Category(
    "injection",
    "Injection",
    (
        Check("injected", "every pod that asked for a sidecar has one", "warning", injected),
        Check("annotations-read", "every annotation that looks like ours is one", "warning", annotations_read),
        Check("injection-refused", "no pod was refused lately", "warning", events_of_injector),
    ),
)
SIDECARS = Category(
    "data-plane",
    "Sidecars",
    (
        Check("data-plane-ready", "all of them are ready", "error", sidecars_ready, settles=True),
        Check("data-plane-version", "they run the image that new pods get", "warning", sidecars_current),
        Check("data-plane-certificates", "their certificates are in force", "error", sidecars_certified),
    ),
)
