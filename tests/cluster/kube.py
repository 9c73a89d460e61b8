"""A cluster as the tests use it: kubectl, typed just enough, and calls between pods."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.cluster.images import APP_IMAGE

Object = dict[str, Any]


COMPONENTS = ("identity", "policy", "injector")
CONTROL_PLANE = tuple(f"deployment/pillion-{component}" for component in COMPONENTS)
AGENTS = "daemonset/pillion-agent"

_KNOWN_WITHIN_S = 60.0
"""How long the cluster may take to tell of a fresh Service: its DNS of the name, endpoint slices of the ready pods."""


class Refused(Exception):
    """kubectl failed; its message is what the API server said."""


def until(what: str, test: Callable[[], Any], seconds: float = 120, pause: float = 0.2) -> Any:
    """The first true answer of ``test``; AssertionError naming ``what`` and the last answer when there is none in time.

    The bounds here and below are for machines that have much else to do: only what never comes reaches them.
    """
    end = time.monotonic() + seconds
    while True:
        answer = test()
        if answer:
            return answer
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s; last seen: {answer!r}"
        time.sleep(pause)


@dataclass
class Kube:
    """kubectl on one cluster; every call raises Refused with what the API server said."""

    kubectl: str
    kubeconfig: str

    def command(self, *arguments: str) -> list[str]:
        return [self.kubectl, f"--kubeconfig={self.kubeconfig}", *arguments]

    def run(self, *arguments: str, input: str | None = None, timeout: float = 120) -> str:
        done = subprocess.run(self.command(*arguments), input=input, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode:
            raise Refused(f"kubectl {' '.join(arguments)[:200]}: {done.stderr.strip()[-3000:]} {done.stdout.strip()[-1000:]}")
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "-o", "json"))

    def apply(self, *objects: Object | str, namespace: str | None = None) -> str:
        """Objects, or texts of manifests."""
        texts = [each if isinstance(each, str) else yaml.safe_dump(each) for each in objects]
        scope = [f"--namespace={namespace}"] if namespace else []
        return self.run(*scope, "apply", "-f", "-", input="\n---\n".join(texts))

    def server(self) -> str:
        """The host that the kubeconfig names."""
        return str(self.json("config", "view", "--minify")["clusters"][0]["cluster"]["server"])


@dataclass
class Space:
    """A namespace of one test, and short words for what tests do in it."""

    kube: Kube
    name: str
    created: float = field(default_factory=time.monotonic)

    def run(self, *arguments: str, input: str | None = None, timeout: float = 120) -> str:
        return self.kube.run(f"--namespace={self.name}", *arguments, input=input, timeout=timeout)

    def json(self, *arguments: str) -> Any:
        return self.kube.json(f"--namespace={self.name}", *arguments)

    def apply(self, *objects: Object | str) -> str:
        return self.kube.apply(*objects, namespace=self.name)

    def pods(self, selector: str = "") -> list[Object]:
        """Pods that are not being deleted."""
        found: list[Object] = self.json("get", "pods", f"--selector={selector}")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def pod(self, selector: str) -> Object:
        """The one running pod of this selector, waited for."""
        return until(f"one running pod {selector}", lambda: next((pod for pod in self.pods(selector) if pod["status"].get("podIP")), None))  # type: ignore[no-any-return]

    def rolled_out(self, *workloads: str, seconds: float = 180) -> None:
        for workload in workloads:
            try:
                self.run("rollout", "status", workload, f"--timeout={seconds:.0f}s", timeout=seconds + 10)
            except Refused as refused:
                raise Refused(f"{refused}\n{self.story()}") from None

    def ready(self, *pods: str, seconds: float = 180) -> None:
        try:
            self.run("wait", "--for=condition=Ready", f"--timeout={seconds:.0f}s", *(f"pod/{pod}" for pod in pods), timeout=seconds + 10)
        except Refused as refused:
            raise Refused(f"{refused}\n{self.story()}") from None

    def story(self) -> str:
        """What went on here, for a failed test: pods, warnings, the end of sidecars' logs."""
        parts = [self.run("get", "pods", "-o", "wide"), self.run("get", "events", "--field-selector=type=Warning")]
        for pod in self.pods():
            name = pod["metadata"]["name"]
            for container in ("pillion-capture", "pillion-proxy"):
                with contextlib.suppress(Refused):
                    parts.append(f"{name}/{container}: " + self.run("logs", name, "-c", container, "--tail=10"))
        return "\n".join(parts)

    # --- the app ---------------------------------------------------------------------------------------------------------------------

    def exec(self, target: str, *command: str, container: str = "app", timeout: float = 60) -> str:
        return self.run("exec", target, "-c", container, "--", *command, timeout=timeout)

    def app(self, target: str, *arguments: str, container: str = "app", timeout: float = 60) -> Any:
        """The tests' app as a caller inside a pod: its one line of JSON."""
        return json.loads(self.exec(target, "python3", "/app/app.py", *arguments, container=container, timeout=timeout))

    def call(self, target: str, url: str, *more: str, container: str = "app") -> Any:
        """One request, asked again while the cluster has not told of a fresh Service yet; the last outcome when it never does."""
        end = time.monotonic() + _KNOWN_WITHIN_S
        while True:
            outcome = self.app(target, "call", url, *more, container=container)
            if not _untold(outcome) or time.monotonic() > end:
                return outcome
            time.sleep(0.2)

    def answered(self, target: str, url: str, *more: str) -> Any:
        """The first answer with status 200, for callers outside of the mesh too: the node refuses them what it has not heard of yet."""
        seen: list[Any] = []

        def ask() -> Any:
            seen[:] = [self.app(target, "call", url, *more)]
            return seen[0] if seen[0].get("status") == 200 else None

        try:
            return until(f"{url} answers {target}", ask, _KNOWN_WITHIN_S)
        except AssertionError as error:
            raise AssertionError(f"{error}; seen: {seen}") from None

    @contextlib.contextmanager
    def load(self, target: str, url: str, *more: str) -> Iterator[Load]:
        """A load from inside a pod while the body runs; its totals are in the yielded object afterwards.

        It runs by itself inside the pod, so that neither the API server nor a kubelet has to be there meanwhile. It begins when there is
        somebody who answers.
        """
        self.answered(target, url)
        file = f"/tmp/load-{time.monotonic_ns()}"
        program = 'setsid python3 /app/app.py load "$@" > $0.json 2> $0.err < /dev/null & echo $!'
        number = self.exec(target, "sh", "-c", program, file, url, "--seconds=1200", *more).strip()
        running = Load()
        try:
            yield running
        finally:
            self.exec(target, "sh", "-c", f"kill {number}")
            said = until("the load has ended", lambda: self.exec(target, "sh", "-c", f"cat {file}.json {file}.err"))
            running.end(said)

    # --- the sidecar -----------------------------------------------------------------------------------------------------------------

    def metrics(self, pod: str) -> dict[str, float]:
        """The sidecar's metrics, by series as written."""
        text = self.run("get", "--raw", f"/api/v1/namespaces/{self.name}/pods/{pod}:4191/proxy/metrics")
        pairs = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {series: float(value) for series, _, value in pairs}


def _untold(outcome: Any) -> bool:
    """Neither DNS nor the sidecar know of whom was called."""
    return outcome.get("headers", {}).get("pillion-proxy-error") == "no-endpoints" or outcome.get("error", "").startswith("gaierror")


class Load:
    """What a load saw: set when it has ended."""

    calls = 0
    failed = 0
    failures: Sequence[str] = ()
    pods: dict[str, int]

    def end(self, output: str) -> None:
        try:
            totals = json.loads(output.splitlines()[-1])
        except (ValueError, IndexError):
            raise AssertionError(f"the load did not end in order: {output[-1000:]}") from None
        self.calls, self.failed, self.failures, self.pods = totals["calls"], totals["failed"], totals["failures"], totals["pods"]


# --- manifests -----------------------------------------------------------------------------------------------------------------------


def container(name: str = "app", /, *arguments: str, **more: Any) -> Object:
    """A container of the tests' app; by default it serves HTTP on 8080."""
    shown = {"name": name, "image": APP_IMAGE, "imagePullPolicy": "IfNotPresent", "args": list(arguments or ("serve",))}
    if not arguments:
        shown["ports"] = [{"name": "http", "containerPort": 8080}]
        shown["readinessProbe"] = {"httpGet": {"path": "/ready", "port": "http"}, "periodSeconds": 1, "timeoutSeconds": 5}
    return {**shown, **more}


def lingering() -> Object:
    """A container whose app is not ready for some seconds before it ends, as one does that lets its callers go elsewhere."""
    ports = [{"name": "http", "containerPort": 8080}]
    ready = {"httpGet": {"path": "/ready", "port": "http"}, "periodSeconds": 1, "timeoutSeconds": 5}
    return container("app", "serve", "--http", "8080", "--drain", "8", ports=ports, readinessProbe=ready)


def pod_spec(*containers: Object, **more: Any) -> Object:
    return {"terminationGracePeriodSeconds": 20, "containers": list(containers or (container(),)), **more}


def pod(name: str, spec: Object | None = None, **metadata: Any) -> Object:
    labels = {"app": name, **metadata.pop("labels", {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels, **metadata}, "spec": spec or pod_spec()}


def workload(
    kind: str, name: str, spec: Object | None = None, *, replicas: int | None = 1, annotations: dict[str, str] | None = None, **more: Any
) -> Object:
    """A Deployment, StatefulSet or DaemonSet (``replicas`` None) whose pods have the label app: NAME."""
    template = {"metadata": {"labels": {"app": name}, "annotations": annotations or {}}, "spec": spec or pod_spec()}
    body = {
        "selector": {"matchLabels": {"app": name}},
        "template": template,
        **({} if replicas is None else {"replicas": replicas}),
        **more,
    }
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name}, "spec": body}


def service(name: str, port: int = 80, target: int | str = 8080, *, selector: dict[str, str] | None = None, **more: Any) -> Object:
    ports = more.pop("ports", [{"name": "http", "port": port, "targetPort": target}])
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": selector or {"app": name}, "ports": ports, **more},
    }


def client(name: str = "client", **more: Any) -> Object:
    """A pod that does nothing until somebody executes the app in it."""
    idle = {"name": "app", "image": APP_IMAGE, "imagePullPolicy": "IfNotPresent", "args": ["serve", "--http", "8080"]}
    return pod(name, pod_spec(idle), **more)


OUTSIDE = {"pillion.dev/inject": "disabled"}
"""Annotations of a pod that stays out of the mesh."""
