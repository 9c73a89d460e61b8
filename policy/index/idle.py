"""Names in policies that lead nowhere yet: a Server for no pod, an identity that nobody has. No mistake of form, and often one of writing.

A cluster may mean them: a workload that is scaled away, a service account that comes later. So they change no status and are told only to
who asks: `pillion check` and `pillion local status`. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from core.names import InvalidName, parse_workload_id
from core.refs import Ref
from policy.index.index import Index
from policy.index.report import Problem
from policy.index.store import Named
from policy.model import MeshTLSAuthentication, Server

_SIDECAR_PORTS = "pillion-"  # how the names of the sidecar's own ports begin: no Server is for them


def idle_servers(index: Index) -> Iterator[Problem]:
    """Servers that are for no pod there is, and those whose port none of their pods has by that name."""
    for by_name in index.store.servers.values():
        for server in by_name.values():
            if sentence := _idle(index, server):
                yield Problem(server.ref, "idle", sentence)


def _idle(index: Index, server: Server) -> str:
    """Why no pod has the port, "" when one may: which numbers an app listens on, nobody declares."""
    pods = index.store.pods.get(server.metadata.namespace, {}).values()
    chosen = [pod for pod in pods if server.pod_selector.matches(pod.metadata.labels)]
    if not chosen:
        return "selects no pod"
    names = {port.name for pod in chosen for port in pod.ports if port.name and not port.name.startswith(_SIDECAR_PORTS)}
    if isinstance(server.port, int) or server.port in names:
        return ""
    return f"no pod that it selects has a container port named {server.port!r} (named are: {', '.join(sorted(names)) or 'none'})"


def unknown_accounts(index: Index, known: Collection[Named]) -> Iterator[Problem]:
    """Service accounts that policies let in and that are not there. known: those that are, beside the ones that pods have."""
    of_pods = {(pod.metadata.namespace, pod.spec.service_account_name) for by_name in index.store.pods.values() for pod in by_name.values()}
    for ref, accounts in _accounts(index):
        for namespace, name in accounts:
            if (namespace, name) not in known and (namespace, name) not in of_pods:
                yield Problem(ref, "no-such-account", f"there is no service account {name} in namespace {namespace}, so nobody comes as it")


def _accounts(index: Index) -> Iterator[tuple[Ref, list[Named]]]:
    """(object, service accounts that it names one by one)."""
    for by_name in index.store.policies.values():
        for policy in by_name.values():
            yield policy.ref, [(one.namespace, one.name) for one in policy.required if one.kind == "ServiceAccount"]
    for found in index.store.authentications.values():
        if isinstance(found, MeshTLSAuthentication):
            named = [account for account in found.accounts if account[1] != "*"]
            yield found.ref, named + [account for uri in found.identities for account in _account(index, uri)]


def _account(index: Index, uri: str) -> list[Named]:
    """Of an identity that is one workload's of the own trust domain; none of a pattern."""
    try:
        identity = parse_workload_id(uri)
    except InvalidName:
        return []
    return [(identity.namespace, identity.service_account)] if identity.trust_domain == index.settings.trust_domain else []
