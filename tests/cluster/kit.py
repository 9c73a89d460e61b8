"""The programs of a real Kubernetes, built from Go modules and cached by version: what the test cluster is made of.

Parts: ``kubernetes`` (API server, controller manager, scheduler, kubelet, kube-proxy, kubectl), ``coredns``, ``pause``, ``gateway`` (the
Gateway API's CRDs and its conformance suite), ``echo`` (the application that the suite talks to) and ``cert-manager`` (program and chart).
Each is built once into ``~/.cache/pillion/kit/<part>-<version>`` (PILLION_CACHE changes the folder); from empty caches all take about nine
minutes on two quiet cores, and 700 MB. Needs Go and a Go module proxy, nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CACHE = Path(os.environ.get("PILLION_CACHE") or Path.home() / ".cache" / "pillion")
KUBERNETES = "1.34.4"
COREDNS = "1.14.7"
GATEWAY_API = "1.6.3"  # 1.7 wants Go 1.27
CERT_MANAGER = "1.21.2"
ECHO = "v0.0.0-20260827124520-eed52ebb66ad"
"""The conformance suite's echo-advanced is Istio's echo application; its client is what the suite executes inside pods."""

_CERT_MANAGER_MAIN = Path(__file__).parent / "certmanager" / "main.go"
_PAUSE = """package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ends := make(chan os.Signal, 1)
	signal.Notify(ends, syscall.SIGINT, syscall.SIGTERM)
	<-ends
}
"""


class CannotBuild(Exception):
    """A part of the kit could not be built; says which program failed and how."""


def say(text: str) -> None:
    """Progress, for whoever waits: standard error, or what the test runner puts here."""
    print(f"cluster: {text}", file=sys.stderr, flush=True)


def _run(*command: str, cwd: Path, **environment: str) -> str:
    settings = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", **environment}
    done = subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuild(f"{' '.join(command[:4])} ... failed with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def _build(work: Path, out: Path, *packages: str, flags: str = "") -> None:
    _run("go", "build", "-trimpath", "-ldflags", f"-s -w {flags}", "-o", f"{out}/", *packages, cwd=work)


def _module(work: Path, name: str, go: str, *more: str) -> None:
    (work / "go.mod").write_text("\n".join([f"module {name}", f"go {go}", *more, ""]))


def _kubernetes(work: Path, out: Path) -> None:
    """Its go.mod replaces the staging modules by local folders, which the published module lacks; their versions are v0.<same>."""
    shown = json.loads(_run("go", "mod", "download", "-json", f"k8s.io/kubernetes@v{KUBERNETES}", cwd=work))
    lines = Path(shown["GoMod"]).read_text().splitlines()
    staging = [line.split()[0] for line in lines if "=> ./staging" in line]
    minor = KUBERNETES.split(".", 1)[1]
    replaced = [f"replace {module} => {module} v0.{minor}" for module in staging]
    _module(work, "cluster", "1.24.0", f"require k8s.io/kubernetes v{KUBERNETES}", *replaced)
    stamp = "k8s.io/component-base/version"
    flags = f"-X {stamp}.gitVersion=v{KUBERNETES} -X {stamp}.gitMajor=1 -X {stamp}.gitMinor={minor.split('.')[0]}"
    programs = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl")
    _build(work, out, *(f"k8s.io/kubernetes/cmd/{program}" for program in programs), flags=flags)


def _coredns(work: Path, out: Path) -> None:
    _module(work, "dns", "1.26.0")
    _run("go", "get", f"github.com/coredns/coredns@v{COREDNS}", cwd=work)
    _build(work, out, "github.com/coredns/coredns")


def _pause(work: Path, out: Path) -> None:
    _module(work, "pause", "1.24.0")
    (work / "main.go").write_text(_PAUSE)
    _build(work, out, ".")


def _gateway(work: Path, out: Path) -> None:
    _module(work, "gateway", "1.26.0")
    api, suite = "sigs.k8s.io/gateway-api", "sigs.k8s.io/gateway-api/conformance"
    _run("go", "get", f"{api}@v{GATEWAY_API}", f"{suite}@v{GATEWAY_API}", cwd=work)
    _run("go", "test", "-c", "-trimpath", "-ldflags", "-s -w", "-o", str(out / "gateway-conformance"), suite, cwd=work)
    # the suite reads its manifests from its working folder
    for source, target in ((f"{api}", "crds"), (suite, "suite")):
        folder = Path(_run("go", "list", "-m", "-f", "{{.Dir}}", source, cwd=work).strip())
        shutil.copytree(folder / "config" / "crd" if target == "crds" else folder, out / target)
    _run("chmod", "-R", "u+w", str(out), cwd=work)  # the module cache is read-only


def _echo(work: Path, out: Path) -> None:
    control_plane = "github.com/envoyproxy/go-control-plane/envoy"
    _module(
        work, "echo", "1.26.0",
        f"require istio.io/istio {ECHO}",
        f"replace {control_plane} => {control_plane} v1.37.0",
        "replace istio.io/api => istio.io/api v1.30.3",
        "replace istio.io/client-go => istio.io/client-go v1.30.3",
    )  # fmt: skip
    # no second try on an error: a build that names what it misses adds it to go.mod under -mod=mod
    _build(work, out, *(f"istio.io/istio/pkg/test/echo/cmd/{program}" for program in ("client", "server")))


def _cert_manager(work: Path, out: Path) -> None:
    module = "github.com/cert-manager/cert-manager"
    _module(work, f"{module}/kit", "1.26.0")
    shutil.copy(_CERT_MANAGER_MAIN, work)
    _run("go", "get", f"{module}@v{CERT_MANAGER}", cwd=work)
    _run("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", str(out / "cert-manager"), ".", cwd=work)
    source = Path(_run("go", "list", "-m", "-f", "{{.Dir}}", module, cwd=work).strip())
    shutil.copytree(source / "deploy" / "charts" / "cert-manager", out / "chart")
    _run("chmod", "-R", "u+w", str(out), cwd=work)  # the module cache is read-only


PARTS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "kubernetes": (KUBERNETES, _kubernetes),
    "coredns": (COREDNS, _coredns),
    "pause": ("1", _pause),
    "gateway": (GATEWAY_API, _gateway),
    "echo": (ECHO[-12:], _echo),
    "cert-manager": (f"{CERT_MANAGER}-{hashlib.sha256(_CERT_MANAGER_MAIN.read_bytes()).hexdigest()[:8]}", _cert_manager),
}


def folder(part: str) -> Path:
    """Where a part lies, built or not."""
    return CACHE / "kit" / f"{part}-{PARTS[part][0]}"


def have(part: str) -> Path:
    """The folder of a part, built first if it is not there; two processes at once build it once."""
    made = folder(part)
    if made.exists():
        return made
    with _alone():
        if not made.exists():
            _make(part, made)
    return made


def _make(part: str, made: Path) -> None:
    if shutil.which("go") is None:
        raise CannotBuild("needs Go (Debian: golang-go, 1.26 or newer) to build a Kubernetes; or name a cluster by KUBECONFIG")
    started = time.monotonic()
    say(f"building {part} {PARTS[part][0]} from Go modules, once")
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        work, out = Path(scratch) / "work", Path(scratch) / "out"
        work.mkdir()
        out.mkdir()
        PARTS[part][1](work, out)
        out.rename(made)
    say(f"built {part} in {time.monotonic() - started:.0f} s: {made}")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    (CACHE / "kit").mkdir(parents=True, exist_ok=True)
    with (CACHE / "kit" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
