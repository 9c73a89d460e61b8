"""Reaching a running mesh from a command: the runner's control socket, sidecars' admin ports, the control plane's private sockets.

Blocking, because a command does one thing. It reads; what changes something goes through `pillion local` and `pillion identity`.
"""

from __future__ import annotations

import http.client
import os
import socket
import sys
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any

import msgspec

from cli.output import CommandFailed
from core.k8s.kinds import kind_meant
from identity.admin_client import IdentityAdmin
from injector.fixed import ADMIN_PORT, SIDECAR_NAME
from local import client, protocol
from local.state import BadName, state_folder
from local.workloads import who_else

_TIMEOUT_S = 10.0
_ANSWER_BYTES_MAX = 64 << 20

_FETCH = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=float(sys.argv[3]))
connection.request("GET", sys.argv[2])
response = connection.getresponse()
sys.stdout.buffer.write(b"%d\\n" % response.status + response.read())
"""
"""Runs inside the pod, with the system's interpreter and nothing else: the admin port is asked over the pod's own loopback."""


class LocalMesh:
    """A mesh that `pillion local up` runs. name: its ``--name``. instead: what else may have been meant, when it does not run."""

    def __init__(self, name: str, instead: str = "") -> None:
        try:
            self.state: Path = state_folder(name)
        except BadName as error:
            raise CommandFailed(str(error)) from None
        self.name = name
        self._instead = instead

    def ask(self, request: protocol.Request, fds: tuple[int, ...] = ()) -> protocol.Answer:
        """One request to the runner; raises CommandFailed with the runner's own reasons."""
        try:
            answer = client.ask(self.name, request, fds)
        except client.NotRunning as error:
            raise CommandFailed(str(error), error.next_step + self._instead) from None
        except protocol.BadMessage as error:
            raise CommandFailed(f"the runner of mesh {self.name!r} speaks another version ({error})", "pillion local down") from None
        if isinstance(answer, protocol.Failed):
            raise CommandFailed("; ".join(answer.reasons), "pillion local status")
        return answer

    def pods(self, namespace: str, workload: str, *, meshed: bool = True) -> list[protocol.PodStatus]:
        """The pods that a name on the command line means: ``cart``, ``deploy/cart`` or a pod's name. Never empty.

        meshed: only those with a sidecar, which most questions are about.
        """
        status = self.ask(protocol.Status())
        assert isinstance(status, protocol.MeshStatus)
        found = match_pods(status.pods, namespace, workload)
        if not found:
            others = [(pod.namespace, pod.owner.partition("/")[2]) for pod in status.pods]
            raise CommandFailed(f"no pod or workload {workload!r} in namespace {namespace}", who_else(others, namespace, workload))
        kept = [pod for pod in found if pod.meshed or not meshed]
        if not kept:
            hint = "annotate its pod template with pillion.dev/inject: enabled"
            why = found[0].why_unmeshed or "it has no sidecar"
            raise CommandFailed(f"{workload} in namespace {namespace} is not meshed: {why}", hint)
        return kept

    def workloads(self, namespace: str) -> dict[str, list[protocol.PodStatus]]:
        """``deployment/cart`` and the like -> the meshed pods that run, of a namespace; never empty."""
        status = self.ask(protocol.Status())
        assert isinstance(status, protocol.MeshStatus)
        found: dict[str, list[protocol.PodStatus]] = {}
        for pod in status.pods:
            if pod.namespace == namespace and pod.meshed and pod.phase == "Running":
                kind, _, name = pod.owner.partition("/")
                found.setdefault(f"{kind.lower()}/{name}", []).append(pod)
        if not found:
            others = sorted({pod.namespace for pod in status.pods if pod.meshed})
            raise CommandFailed(f"nothing in namespace {namespace} is meshed and runs", f"-n with one of: {', '.join(others) or 'none'}")
        return found

    def service_ips(self, namespace: str, name: str) -> tuple[str, ...]:
        """A Service's own addresses; raises CommandFailed when there is no such Service."""
        status = self.ask(protocol.Status())
        assert isinstance(status, protocol.MeshStatus)
        found = next((one for one in status.services if (one.namespace, one.name) == (namespace, name)), None)
        if found is None:
            raise CommandFailed(f"there is no Service {name} in namespace {namespace}", "pillion local status")
        return found.addresses

    def sidecar(self, pod: protocol.PodStatus, path: str) -> bytes:
        """GET a path of the sidecar's admin port; raises CommandFailed unless it answers 200."""
        interpreter = os.path.realpath(sys.executable)  # outside of a virtual environment that the pod's user may not enter
        argv = (interpreter, "-I", "-S", "-c", _FETCH, str(ADMIN_PORT), path, str(_TIMEOUT_S))
        with tempfile.TemporaryFile() as received, open(os.devnull, "r+b") as null:
            answer = self.ask(protocol.Exec(pod.namespace, pod.name, SIDECAR_NAME, argv), (null.fileno(), received.fileno(), null.fileno()))
            received.seek(0)
            data = received.read(_ANSWER_BYTES_MAX)
        exited = answer.code if isinstance(answer, protocol.Exited) else 1
        status, _, body = data.partition(b"\n")
        if exited != 0 or not status.isdigit():
            name = f"{pod.namespace}/{pod.name}"
            raise CommandFailed(
                f"the sidecar of {name} does not answer", f"pillion local logs -n {pod.namespace} {pod.name} -c {SIDECAR_NAME}"
            )
        if status != b"200":
            raise CommandFailed(f"the sidecar of {pod.namespace}/{pod.name} answered {status.decode()} to GET {path}: {_line(body)}")
        return body

    def policy(self, path: str, **query: str) -> Any:
        """GET from the policy controller's diagnostics; raises CommandFailed."""
        where = Path(os.environ.get("PILLION_DIAGNOSTICS_SOCKET") or self.state / "policy" / "diagnostics.sock")
        status, body = get_unix(where, f"{path}?{urllib.parse.urlencode(query)}", "the policy controller", self.name)
        answer = _decoded(body)
        if status != 200:
            told = answer.get("error") if isinstance(answer, dict) else None
            raise CommandFailed(f"the policy controller answered {status}: {told or _line(body)}", "pillion local status")
        return answer

    def identity(self) -> IdentityAdmin:
        """The identity service's operator socket; raises CommandFailed when there is no mesh it could belong to."""
        if given := os.environ.get("PILLION_IDENTITY_ADMIN_SOCKET"):
            return IdentityAdmin(Path(given))
        self.ask(protocol.Status())
        return IdentityAdmin(self.state / "identity" / "admin.sock")


def match_pods(pods: tuple[protocol.PodStatus, ...], namespace: str, workload: str) -> list[protocol.PodStatus]:
    """Pods by pod name, owner's name, or ``kind/name`` with kubectl's short kinds."""
    kind, slash, name = workload.rpartition("/")
    kind = kind_meant(kind)
    mine = [pod for pod in pods if pod.namespace == namespace]
    exact = [pod for pod in mine if pod.name == name and kind in ("", "pod")]
    owned = [pod for pod in mine if pod.owner.lower() == f"{kind}/{name}" or (not slash and pod.owner.partition("/")[2] == name)]
    return exact or sorted(owned, key=lambda pod: pod.name)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def get_unix(path: Path, target: str, who: str, mesh: str) -> tuple[int, bytes]:
    """(status, body) of a GET over a Unix socket; raises CommandFailed naming ``who`` did not answer."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", target)
        response = connection.getresponse()
        return response.status, response.read(_ANSWER_BYTES_MAX)
    except (OSError, http.client.HTTPException) as error:
        raise CommandFailed(f"{who} of mesh {mesh!r} does not answer on {path} ({_told(error)})", "pillion local status") from None
    finally:
        connection.close()


def _told(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        return None


def _line(body: bytes) -> str:
    return body.decode("utf-8", "replace").strip().partition("\n")[0][:200]
