"""Reaching the pods of a cluster from a command: which ones a name means, and running a program in a container of one.

Blocking, by the official client, which speaks the exec protocol and every kind of kubeconfig. What may be done is the API server's to
decide: reading needs get and list of pods, running a program needs create of pods/exec.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgspec

from cli.output import WHICH_CLUSTER, CommandFailed
from core.k8s.kinds import kind_meant
from identity.admin_client import IdentityAdmin
from injector.fixed import ADMIN_PORT, SIDECAR_NAME

CONTROL_NAMESPACE = "pillion"
IDENTITY = "pillion-identity"
_TIMEOUT_S = 90

_FETCH = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=10)
connection.request("GET", sys.argv[2])
response = connection.getresponse()
sys.stdout.write(response.read().decode() if response.status == 200 else "")
sys.exit(0 if response.status == 200 else 1)
"""


_FETCH_UNIX = """
import http.client, json, socket, sys
class Unix(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(sys.argv[1])
connection = Unix("localhost")
connection.request("GET", sys.argv[2])
response = connection.getresponse()
print(json.dumps({"status": response.status, "body": json.loads(response.read())}))
"""
DIAGNOSTICS = "/tmp/diagnostics.sock"  # noqa: S108 - in the container, where only the controller writes
"""Where the policy controller of an installation answers (manifests/helm/templates/policy.yaml): whoever may exec there may ask."""


@dataclass(frozen=True)
class FoundPod:
    """A meshed pod."""

    namespace: str
    name: str


def configured(kubeconfig: str = "", context: str = "") -> bool:
    """Whether anything says which cluster is meant."""
    return bool(kubeconfig or context or os.environ.get("KUBECONFIG") or (Path.home() / ".kube" / "config").exists())


class ClusterMesh:
    """The mesh of one cluster. Raises CommandFailed when no kubeconfig says where it is."""

    def __init__(self, kubeconfig: str = "", context: str = "", control_namespace: str = CONTROL_NAMESPACE) -> None:
        from kubernetes import client, config

        try:
            api = config.new_client_from_config(kubeconfig or None, context or None, persist_config=False)  # type: ignore[no-untyped-call]
        except (config.ConfigException, OSError) as error:
            raise CommandFailed(f"no cluster: {error}", "set KUBECONFIG, or name a local mesh with --name") from None
        except Exception as error:  # an open set: the library takes a file of any other shape for one
            raise CommandFailed(f"no cluster: this is no kubeconfig ({type(error).__name__})", WHICH_CLUSTER) from None
        self._core = client.CoreV1Api(api)
        self._leases = client.CoordinationV1Api(api)
        self._control = control_namespace

    def pods(self, namespace: str, workload: str) -> list[FoundPod]:
        """The meshed pods of a pod's or workload's name, as ``kind/name`` or bare; never empty."""
        kind, _, name = workload.rpartition("/")
        found = [pod for pod in self._call(self._core.list_namespaced_pod, namespace).items if _means(pod, kind, name)]
        if not found:
            raise CommandFailed(f"no pod or workload {workload!r} in namespace {namespace}", f"kubectl get pods -n {namespace}")
        meshed = [FoundPod(namespace, pod.metadata.name) for pod in found if _sidecar(pod)]
        if not meshed:
            raise CommandFailed(f"{workload} in namespace {namespace} is not meshed", "pillion check --proxy")
        return meshed

    def workloads(self, namespace: str) -> dict[str, list[FoundPod]]:
        """``deployment/cart`` and the like -> the meshed pods that run, of a namespace; never empty."""
        found: dict[str, list[FoundPod]] = {}
        for pod in self._call(self._core.list_namespaced_pod, namespace).items:
            if _sidecar(pod) and pod.status.phase == "Running" and not pod.metadata.deletion_timestamp:
                found.setdefault("/".join(_owner(pod)), []).append(FoundPod(namespace, pod.metadata.name))
        if not found:
            next_step = f"kubectl get pods -n {namespace}, or pillion check --proxy"
            raise CommandFailed(f"nothing in namespace {namespace} is meshed and runs", next_step)
        return found

    def service_ips(self, namespace: str, name: str) -> tuple[str, ...]:
        """A Service's own addresses, none of a headless one; raises CommandFailed when there is no such Service."""
        found = self._call(self._core.list_namespaced_service, namespace, field_selector=f"metadata.name={name}").items
        if not found:
            raise CommandFailed(f"there is no Service {name} in namespace {namespace}", "kubectl get services -A")
        return tuple(ip for ip in found[0].spec.cluster_i_ps or () if ip != "None")

    def sidecar(self, pod: FoundPod, path: str) -> bytes:
        """GET a path of the sidecar's admin port, over the pod's own loopback."""
        argv = ["python", "-I", "-S", "-c", _FETCH, str(ADMIN_PORT), path]
        return self.run(pod.namespace, pod.name, SIDECAR_NAME, argv).encode()

    def policy(self, path: str, **query: str) -> Any:
        """GET from the diagnostics of a policy controller that is ready: of every replica the answer is the same."""
        found = self._call(self._core.list_namespaced_pod, self._control, label_selector="app.kubernetes.io/component=policy").items
        ready = [pod for pod in found if any(one.ready for one in pod.status.container_statuses or ())]
        if not ready:
            raise CommandFailed(f"no policy controller is ready in namespace {self._control}", "pillion check")
        argv = ["python", "-I", "-S", "-c", _FETCH_UNIX, DIAGNOSTICS, f"{path}?{urlencode(query)}"]
        answer = msgspec.json.decode(self.run(self._control, ready[0].metadata.name, "policy", argv))
        if answer["status"] != 200:
            told = answer["body"].get("error") if isinstance(answer["body"], dict) else answer["body"]
            raise CommandFailed(f"the policy controller answered {answer['status']}: {told}", "kubectl get pods")
        return answer["body"]

    def identity(self) -> IdentityAdmin:
        """The operator's socket of the identity service's replica that leads; whichever that is at each request."""

        def exchange(line: bytes) -> bytes:
            lease = self._call(self._leases.read_namespaced_lease, IDENTITY, self._control)
            leader = lease.spec.holder_identity if lease.spec else ""
            if not leader:
                raise ConnectionRefusedError(errno.ECONNREFUSED, "no replica of the identity service leads at the moment")
            try:
                return self.run(self._control, leader, "identity", ["python", "-m", "identity.ask", line.decode()]).encode()
            except CommandFailed as error:  # the pod that led may be gone
                raise ConnectionRefusedError(errno.ECONNREFUSED, error.message) from None

        return IdentityAdmin(None, who=f"the identity service in namespace {self._control}", exchange=exchange)

    def run(self, namespace: str, pod: str, container: str, argv: list[str]) -> str:
        """What a program in the container printed; raises CommandFailed with its last words when it failed."""
        from kubernetes.stream import stream

        socket = self._call(
            stream,
            self._core.connect_get_namespaced_pod_exec,
            pod,
            namespace,
            container=container,
            command=argv,
            stdin=False,
            stdout=True,
            stderr=True,
            tty=False,
            _preload_content=False,
        )
        socket.run_forever(timeout=_TIMEOUT_S)
        out, errors = socket.read_stdout(timeout=0), socket.read_stderr(timeout=0)
        ended = not socket.is_open()
        code = socket.returncode if ended else None
        socket.close()
        if code != 0:
            why = errors.strip().rpartition("\n")[2] or (f"exit code {code}" if ended else f"no answer within {_TIMEOUT_S} s")
            raise CommandFailed(
                f"container {container} of pod {namespace}/{pod}: {why}", f"kubectl logs -n {namespace} {pod} -c {container}"
            )
        return str(out)

    def _call(self, function: Any, *arguments: Any, **options: Any) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return function(*arguments, **options)
        except ApiException as error:
            raise CommandFailed(f"the API server refuses: {_told(error)}", "kubectl auth can-i --list") from None
        except HTTPError as error:
            host = self._core.api_client.configuration.host
            raise CommandFailed(f"the API server at {host} does not answer: {_root(error)}", "kubectl cluster-info") from None


def _means(pod: Any, kind: str, name: str) -> bool:
    kind = kind_meant(kind)
    if pod.metadata.name == name and kind in ("", "pod"):
        return True
    owner = next((owner for owner in pod.metadata.owner_references or () if owner.controller), None)
    if owner is None:
        return False
    owned_by, owner_name = owner.kind.lower(), owner.name
    if owned_by == "replicaset" and kind in ("", "deployment") and owner_name.rpartition("-")[0] == name:
        return True  # a Deployment's ReplicaSet is named after it and a hash of the template
    return owner_name == name and kind in ("", owned_by)


def _owner(pod: Any) -> tuple[str, str]:
    """Kind and name of what a person would call the pod's workload: the pod itself when nothing controls it."""
    owner = next((owner for owner in pod.metadata.owner_references or () if owner.controller), None)
    if owner is None:
        return "pod", pod.metadata.name
    if owner.kind == "ReplicaSet" and "pod-template-hash" in (pod.metadata.labels or {}):
        return "deployment", owner.name.rpartition("-")[0]  # a Deployment's ReplicaSet is named after it and a hash of the template
    return owner.kind.lower(), owner.name


def _sidecar(pod: Any) -> bool:
    containers = [*(pod.spec.containers or ()), *(pod.spec.init_containers or ())]
    return any(container.name == SIDECAR_NAME for container in containers)


def _root(error: BaseException) -> str:
    """What began it, without what urllib3 wraps around it: ``Connection refused``."""
    for _ in range(10):
        inner = getattr(error, "reason", None) or error.__cause__ or next(iter(error.args), None)
        if not isinstance(inner, BaseException):
            break
        error = inner
    return getattr(error, "strerror", None) or str(error)


def _told(error: Any) -> str:
    try:
        return str(msgspec.json.decode(error.body or b"")["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return str(error.reason or error.status)
