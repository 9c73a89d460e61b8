"""The running mesh: what should exist against what does, brought together whenever something changed. Called by local.supervisor.

One task, `Mesh.run`, level-triggered: it looks at all manifests and all pods, starts and stops what differs, and then writes what others
read (API objects for the controllers, hosts files, the node's rules). Any number of changes while it works make one more round.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from core.k8s.fields import InvalidObject
from core.k8s.objects import Service, read_core_object
from core.refs import Ref
from ebpf import redirect
from injector.fixed import STATUS
from injector.mesh import LOCAL_MESH
from injector.sidecar import BUNDLE_CONFIG_MAP, BUNDLE_KEY
from local import rules, services, volumes, workloads
from local.agent import NodeAgent
from local.injection import inject
from local.network import POD_CIDR4, POD_CIDR6, SERVICE_CIDR4, SERVICE_CIDR6, Addresses, AddressPool, OutOfAddresses
from local.objects import Manifest
from local.pod import Node, Pod, now_text
from local.podspec import Base
from local.sandbox import SetupFailed, run_program
from local.workloads import PodPlan

# What the policy controller may need until sidecars know what was written: it looks at its folder every 200 ms (core.k8s.folder)
CONTROLLER_LAG_S = 0.5


@dataclass(frozen=True)
class Setup:
    """What the supervisor gives. state: the runner's folder. names: (address, names) of the control plane for every hosts file.
    pods_exist: told the uids of all pods, before a new one can have a certificate."""

    state: Path
    base: Base
    sign: Callable[[Mapping[str, Any], str, int], str]
    ipv6: bool
    names: Sequence[tuple[str, str]]
    own_objects: Sequence[Mapping[str, Any]] = ()
    pods_exist: Callable[[Iterable[str]], None] = lambda _: None
    agent: NodeAgent | None = None


class Mesh:
    """Manifests in, pods out."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.manifests: dict[Ref, Manifest] = {}
        self.pods: dict[Ref, Pod] = {}
        self.refused: dict[Ref, str] = {}
        self.troubles: dict[str, str] = {}
        self.finished: dict[Ref, str] = {}
        self._bundle = ""
        self._config_digest = ""
        self._dirty = trio.Event()
        self._pool = AddressPool(POD_CIDR4, POD_CIDR6, ipv6=setup.ipv6)
        self._vip_pool = AddressPool(SERVICE_CIDR4, SERVICE_CIDR6, ipv6=setup.ipv6)
        self._vips: dict[Ref, Addresses] = {}
        self._services: list[tuple[Service, Mapping[str, Any]]] = []
        self._written: dict[str, bytes] = {}
        self._ruleset = ""
        self._links = 0
        self._created: dict[Ref, str] = {}
        self._rounds = 0
        self._working = False
        self._last_write = trio.current_time()
        scratch = setup.state / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        # tokens and logs lie in there: apps of other pods see the same file system and must not read them
        (setup.state / "pods").mkdir(mode=0o700, exist_ok=True)
        self._node = Node(setup.state / "pods", scratch, setup.base, setup.sign, self._hosts_lines, self.changed, setup.agent)

    # --- changes -------------------------------------------------------------------------------------------------

    def apply(self, manifest: Manifest) -> None:
        """This object exists now, in this version."""
        self._created.setdefault(manifest.ref, now_text())
        self.manifests[manifest.ref] = manifest
        self.changed()

    def delete(self, ref: Ref) -> bool:
        """This object does not exist any more; False when it did not before."""
        known = self.manifests.pop(ref, None) is not None
        self._created.pop(ref, None)
        self.changed()
        return known

    def set_bundle(self, pem: str) -> None:
        """The trust bundle that the identity service publishes: the ConfigMap ``pillion-trust-anchors`` of every namespace."""
        self._bundle = pem
        self.changed()

    def changed(self) -> None:
        """Something is different: look at everything soon."""
        self._dirty.set()

    @property
    def settled(self) -> bool:
        """Everything that was said so far has been acted on, by the policy controller too."""
        idle = self._rounds > 0 and not self._working and not self._dirty.is_set()
        return idle and trio.current_time() - self._last_write > CONTROLLER_LAG_S

    @property
    def known_services(self) -> list[Service]:
        """All Services with their addresses."""
        return [service for service, _ in self._services]

    @property
    def api_objects(self) -> list[dict[str, Any]]:
        """What the policy controller reads, as it was written last."""
        return [json.loads(content) for content in self._written.values()]

    # --- the round -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever; pods run in this task's nursery."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._dirty.wait()
                self._dirty, self._working = trio.Event(), True
                await self._reconcile(nursery)
                self._rounds, self._working = self._rounds + 1, False
                await trio.sleep(0.02)  # changes come in bursts: one round for all of them

    @property
    def longest_grace_s(self) -> float:
        """How long ending all pods in order may take."""
        return max((pod.grace_s for pod in self.pods.values()), default=0.0)

    async def stop_all(self) -> None:
        """End every pod gracefully."""
        self.manifests.clear()
        async with trio.open_nursery() as nursery:
            for pod in list(self.pods.values()):
                nursery.start_soon(pod.stop)

    async def _reconcile(self, nursery: trio.Nursery) -> None:
        self._read_services()
        desired = self._desired()
        for ref, pod in list(self.pods.items()):
            if pod.ended.is_set() and (pod.stopping.is_set() or ref not in desired):
                self._forget(ref, pod)
        for ref, plan in desired.items():
            running = self.pods.get(ref)
            if running is None:
                self._start(plan, nursery)
            elif running.plan.digest != plan.digest and not running.stopping.is_set():
                nursery.start_soon(running.stop)  # the same name (StatefulSet, Pod): the old one goes first
        for ref, pod in self.pods.items():
            if ref not in desired and not pod.stopping.is_set() and self._may_go(pod, desired):
                nursery.start_soon(pod.stop)
        if self._config_changed():
            for pod in self.pods.values():
                if not pod.ended.is_set():
                    pod.refresh_soon(nursery)
        await self._publish()

    def _may_go(self, pod: Pod, desired: Mapping[Ref, PodPlan]) -> bool:
        """A pod with successors stays until all of them are ready (a rolling update that adds first)."""
        successors = [
            self.pods.get(ref) for ref, plan in desired.items() if plan.owner == pod.plan.owner and plan.digest != pod.plan.digest
        ]
        return not pod.ready or all(successor and successor.ready for successor in successors)

    def _config_changed(self) -> bool:
        """Did a ConfigMap, a Secret or the trust bundle change since the last round?"""
        config = [self.manifests[ref].raw for ref in sorted(self.manifests) if ref.kind in ("ConfigMap", "Secret")]
        digest = workloads.digest_of([self._bundle, config])
        changed, self._config_digest = digest != self._config_digest, digest
        return changed

    def _desired(self) -> dict[Ref, PodPlan]:
        desired: dict[Ref, PodPlan] = {}
        self.refused.clear()
        for ref in sorted(self.manifests):
            try:
                for plan in workloads.pods_of(self.manifests[ref]):
                    desired.setdefault(plan.ref, plan)
            except (InvalidObject, TypeError, ValueError, KeyError, AttributeError) as error:
                self.refused[ref] = str(error)  # the shape was checked; whatever else is wrong must not take the others down
        return desired

    def _start(self, plan: PodPlan, nursery: trio.Nursery) -> None:
        namespace = self.manifests.get(Ref("", "Namespace", "", plan.ref.namespace))
        annotations = namespace.metadata.annotations if namespace else {}
        result = inject(plan.raw, annotations, LOCAL_MESH)
        if isinstance(result, str):
            self.refused[plan.owner] = result
            return
        try:
            addresses = self._pool.take()
        except OutOfAddresses as error:
            self.refused[plan.owner] = str(error)
            return
        raw = json.loads(json.dumps(result.pod, default=str))
        raw["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": now_text()}
        if result.skips is None:
            # said by the author, not by the injector: callers would demand an identity from a pod that has none
            (raw["metadata"].get("annotations") or {}).pop(STATUS, None)
        raw["spec"].setdefault("serviceAccountName", workloads.service_account_of(raw))
        raw["spec"]["nodeName"] = "local"
        self._links += 1
        capture = redirect.capture(*result.skips) if result.skips is not None else ""
        lookup = self._lookup_in(plan.ref.namespace)
        pod = Pod(plan, raw, addresses, capture, f"pod{self._links}", self._node, lookup)
        pod.why_unmeshed = result.why_not
        self.pods[plan.ref] = pod
        self._count_pods()
        nursery.start_soon(self._run_pod, pod)

    async def _run_pod(self, pod: Pod) -> None:
        try:
            await pod.run()
        except Exception as error:  # one pod's trouble must not take the others down; it is shown and not tried again
            pod.phase, pod.message = "Failed", f"the runner failed: {error!r}"
            pod.ended.set()
            self.changed()
        self._count_pods()

    def _count_pods(self) -> None:
        self._setup.pods_exist([pod.raw["metadata"]["uid"] for pod in self.pods.values() if not pod.ended.is_set()])

    def _forget(self, ref: Ref, pod: Pod) -> None:
        self._pool.give_back(pod.addresses)
        del self.pods[ref]
        volumes.remove_tree(pod.folder)
        self.changed()

    def _lookup_in(self, namespace: str) -> Callable[[str, str], Mapping[str, Any] | None]:
        def lookup(kind: str, name: str) -> Mapping[str, Any] | None:
            if kind == "ConfigMap" and name == BUNDLE_CONFIG_MAP and self._bundle:
                return {"data": {BUNDLE_KEY: self._bundle}}
            found = self.manifests.get(Ref("", kind, namespace, name))
            return found.raw if found else None

        return lookup

    # --- what others read ----------------------------------------------------------------------------------------

    def _read_services(self) -> None:
        """Typed Services with their addresses; an address stays with its Service as long as that exists."""
        found = []
        self.troubles = {}
        for ref, manifest in sorted(self.manifests.items()):
            if ref.kind != "Service" or ref.group:
                continue
            try:
                raw = self._with_addresses(manifest)
                view = read_core_object(raw)
            except (InvalidObject, OutOfAddresses) as error:
                self.troubles[str(ref)] = str(error)
                continue
            if isinstance(view, Service):
                found.append((view, raw))
        for ref in [ref for ref in self._vips if ref not in self.manifests]:
            self._vip_pool.give_back(self._vips.pop(ref))
        self._services = found

    def _with_addresses(self, manifest: Manifest) -> Mapping[str, Any]:
        spec = dict(manifest.raw.get("spec") or {})
        if spec.get("clusterIP") == "None" or spec.get("type") == "ExternalName":
            return dict(manifest.raw, spec=spec)
        if manifest.ref not in self._vips:
            self._vips[manifest.ref] = self._vip_pool.take()
        ips = list(services.of_family(self._vips[manifest.ref], services.families(manifest.raw)))
        return dict(manifest.raw, spec=spec | {"clusterIP": ips[0] if ips else "None", "clusterIPs": ips or ["None"]})

    def facts(self) -> list[services.PodFacts]:
        """All pods that have an address and are not done."""
        return [pod.facts for pod in self.pods.values() if pod.phase in ("Pending", "Running") and not pod.ended.is_set()]

    def _hosts_lines(self, namespace: str) -> list[str]:
        return services.hosts_lines(self._services, self.facts(), namespace, self._setup.names)

    async def _publish(self) -> None:
        facts = self.facts()
        objects = self._objects(facts)
        if objects != self._written:
            await trio.to_thread.run_sync(self._write_objects, objects)
            self._last_write = trio.current_time()
        for pod in self.pods.values():
            if not pod.ended.is_set():
                pod.update_hosts()
        fronts = services.fronts([service for service, _ in self._services], facts)
        ruleset = rules.services(fronts, [fact.addresses for fact in facts])
        if ruleset != self._ruleset:
            try:
                await run_program(["nft", "-f", "-"], ruleset)
                self._ruleset = ruleset
                self.troubles.pop("node rules", None)
            except SetupFailed as error:
                self.troubles["node rules"] = str(error)

    def _objects(self, facts: list[services.PodFacts]) -> dict[str, bytes]:
        found: list[Mapping[str, Any]] = list(self._setup.own_objects)
        for ref, manifest in self.manifests.items():
            if ref.kind not in ("Service", "Pod", "ConfigMap", "Secret") and not ref.group.startswith(("apps", "batch")):
                found.append(self._dated(ref, manifest.raw))
        for service, raw in self._services:
            found.append(self._dated(service.ref, raw))
            found += services.slices(service, raw, facts)
        found += [pod.object() for pod in self.pods.values()]
        named = {Ref("", "Namespace", "", pod.plan.ref.namespace) for pod in self.pods.values()} - self.manifests.keys()
        found += [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": ref.name}} for ref in sorted(named)]
        return {file_name(raw): json.dumps(raw, sort_keys=True, default=str).encode() for raw in found}

    def _dated(self, ref: Ref, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """With a creation time, as the API server would give it: it settles conflicts between objects."""
        meta = raw["metadata"]
        return (
            raw if meta.get("creationTimestamp") else dict(raw, metadata={**meta, "creationTimestamp": self._created.get(ref, now_text())})
        )

    def _write_objects(self, objects: Mapping[str, bytes]) -> None:
        folder = self._setup.state / "api"
        for name, content in objects.items():
            if self._written.get(name) != content:
                volumes.write_atomically(folder / name, content, 0o644)
        for name in self._written.keys() - objects.keys():
            (folder / name).unlink(missing_ok=True)
        self._written = dict(objects)


def file_name(raw: Mapping[str, Any]) -> str:
    """One file an object: ``pod.shop.web-0.json``."""
    meta = raw["metadata"]
    kind = str(raw["kind"]).lower()
    group = str(raw["apiVersion"]).rpartition("/")[0]
    return ".".join(part for part in (kind, group, meta.get("namespace"), meta["name"]) if part) + ".json"
