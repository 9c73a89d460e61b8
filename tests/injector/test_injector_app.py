"""The injector's process: against an API server, with its certificate made, its settings followed, its end in order."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml
from injector_lab import post, review_of

from injector.__main__ import main
from injector.app import MeshFile
from injector.cluster import regarding
from injector.metrics import Metrics
from injector.patch import apply_patch
from tests.core.fake_apiserver import KINDS, FakeApiServer, running
from tests.ports import unused_port

POD = {"metadata": {"name": "a"}, "spec": {"containers": [{"name": "app"}]}}
EVENTS = "/apis/events.k8s.io/v1/events"


def settings(tmp_path: Path, server: FakeApiServer, **more: str) -> dict[str, str]:
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "clusters": [{"name": "x", "cluster": {"server": f"http://127.0.0.1:{server.port}"}}],
        "users": [{"name": "x", "user": {"token": "t"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    (tmp_path / "mesh.yaml").write_text("image: first:1\n")
    return {
        "PILLION_KUBECONFIG": str(tmp_path / "kubeconfig"),
        "PILLION_MESH_FILE": str(tmp_path / "mesh.yaml"),
        "PILLION_INJECTOR_LISTEN": f"127.0.0.1:{unused_port()}",
        "PILLION_ADMIN_LISTEN": f"127.0.0.1:{unused_port()}",
        **more,
    }


def port_of(environ: Mapping[str, str], name: str) -> int:
    return int(environ[name].rpartition(":")[2])


async def admin(environ: Mapping[str, str], path: str) -> tuple[int, str]:
    import urllib.error
    import urllib.request

    def ask() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{environ['PILLION_ADMIN_LISTEN']}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    return await trio.to_thread.run_sync(ask)


@asynccontextmanager
async def injector(environ: Mapping[str, str]) -> AsyncIterator[trio.Process]:
    process = await trio.lowlevel.open_process([sys.executable, "-m", "injector"], env={**os.environ, **environ}, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = bytearray()

    async def read() -> None:
        assert process.stderr is not None
        async for chunk in process.stderr:
            said.extend(chunk)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        try:
            with trio.fail_after(60):
                while (await admin(environ, "/ready"))[0] != 200:
                    assert process.poll() is None, said.decode()
                    await trio.sleep(0.05)
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                with trio.move_on_after(60, shield=True) as scope:
                    await process.wait()
                if scope.cancelled_caught:
                    process.kill()
    assert process.returncode == 0, said.decode()
    assert b"Traceback" not in said, said.decode()


def ca_of(server: FakeApiServer) -> bytes:
    found = server.get("MutatingWebhookConfiguration", "", "pillion-injector")
    return base64.b64decode(found["webhooks"][0]["clientConfig"]["caBundle"])


async def ask(environ: Mapping[str, str], server: FakeApiServer, pod: Any, namespace: str) -> dict[str, Any]:
    body = json.dumps(review_of(pod, namespace)).encode()
    status, answer = await trio.to_thread.run_sync(
        partial(post, port_of(environ, "PILLION_INJECTOR_LISTEN"), ca_of(server), body, "/mutate")
    )
    assert status == 200, answer
    response: dict[str, Any] = json.loads(answer)["response"]
    return response


@asynccontextmanager
async def cluster() -> AsyncIterator[FakeApiServer]:
    async with running(FakeApiServer(kinds={**KINDS, EVENTS: "Event"})) as server:
        metadata = {"name": "pillion-injector-tls", "namespace": "pillion"}
        server.put({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque"})
        hook = {"name": "injector.pillion.dev", "clientConfig": {"service": {"name": "pillion-injector", "namespace": "pillion"}}}
        kind = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration"}
        server.put({**kind, "metadata": {"name": "pillion-injector"}, "webhooks": [hook]})
        annotations = {"pillion.dev/inject": "enabled"}
        server.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "annotations": annotations}})
        yield server


@pytest.mark.slow
async def test_the_process_serves_the_api_server_and_ends_in_order(tmp_path: Path) -> None:
    async with cluster() as server:
        environ = settings(tmp_path, server)
        async with injector(environ) as process:
            response = await ask(environ, server, POD, "shop")
            after = apply_patch(POD, json.loads(base64.b64decode(response["patch"])))
            assert after["spec"]["initContainers"][0]["image"] == "first:1"
            assert "patch" not in await ask(environ, server, POD, "elsewhere")
            host = {**POD, "spec": {**POD["spec"], "hostNetwork": True}}  # type: ignore[dict-item]
            assert "warnings" in await ask(environ, server, host, "shop")
            with trio.fail_after(60):
                await server.wait_requests("POST /apis/events.k8s.io/v1/namespaces/shop/events", 1)
            (event,) = [found for (collection, *_), found in server.objects.items() if collection == EVENTS]
            assert (event["reason"], event["regarding"]["name"]) == ("InjectionSkipped", "a")
            status, metrics = await admin(environ, "/metrics")
            assert status == 200 and 'pillion_injector_decisions_total{decision="skipped",reason="host-network"} 1.0' in metrics
            assert "process_resident_memory_bytes" in metrics and "pillion_injector_serving_expiry_timestamp_seconds" in metrics
            page = (Path(__file__).parents[2] / "docs" / "injection.md").read_text(encoding="utf-8")
            names = {line.split()[2] for line in metrics.splitlines() if line.startswith("# TYPE pillion_") and "_created " not in line}
            assert names == set(re.findall(r"\| `(pillion_injector_[a-z_]+)` \|", page))
            # new settings are taken while it runs
            (tmp_path / "mesh.yaml").write_text("image: second:2\n")
            with trio.fail_after(60):
                while b"second:2" not in base64.b64decode((await ask(environ, server, POD, "shop"))["patch"]):  # noqa: ASYNC110  # a process
                    await trio.sleep(0.1)
            process.terminate()
            with trio.fail_after(60):
                while (await admin(environ, "/ready"))[0] != 503:  # noqa: ASYNC110  # a process
                    await trio.sleep(0.05)
            response = await ask(environ, server, POD, "shop")
            assert "patch" in response, "who still has our address is answered while others learn that we end"
        written = {line for line in server.requests if not line.startswith("GET")}
        assert written == {
            "PUT /api/v1/namespaces/pillion/secrets/pillion-injector-tls",
            "PATCH /apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/pillion-injector",
            "POST /apis/events.k8s.io/v1/namespaces/shop/events",
        }


def test_settings_that_cannot_be_used_change_nothing(tmp_path: Path) -> None:
    path, metrics = tmp_path / "mesh.yaml", Metrics()
    path.write_text("{}")
    file = MeshFile(path, metrics)

    def written(text: str | None) -> str:
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
        file.look()
        file.look()
        return file.mesh.value.image

    assert written("image: a:1") == "a:1"
    assert written("imgae: b:2") == "a:1"
    assert written(None) == "a:1"
    assert written("image: c:3") == "c:3"
    counted = metrics.exposition()
    assert b'pillion_injector_mesh_reloads_total{result="taken"} 2.0' in counted
    assert b'pillion_injector_mesh_reloads_total{result="refused"} 2.0' in counted


def test_check_config_says_everything_that_is_wrong_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def checked(**environ: str) -> tuple[int, str, str]:
        monkeypatch.setattr(os, "environ", environ)
        return main(["--check-config"]), *capsys.readouterr()

    code, _, said = checked(PILLION_INJECTOR_LISTEN="nowhere", PILLION_LOG_LEVEL="loud")
    assert code == 1 and "PILLION_INJECTOR_LISTEN" in said and "PILLION_LOG_LEVEL" in said
    mesh = tmp_path / "mesh.yaml"
    mesh.write_text("capture: maybe")
    code, _, said = checked(PILLION_MESH_FILE=str(mesh))
    assert code == 1 and "PILLION_MESH_FILE: capture: expected" in said
    mesh.write_text("capture: init")
    assert checked(PILLION_MESH_FILE=str(mesh)) == (0, "ok\n", "")
    code, _, said = checked(PILLION_MESH_FILE=str(tmp_path / "none.yaml"))
    assert code == 1 and "none.yaml" in said
    assert main(["--what"]) == 2


@pytest.mark.parametrize(
    ("metadata", "about"),
    [
        ({"name": "a"}, ("Pod", "a")),
        ({"generateName": "web-5d-"}, ("Pod", "web-5d")),
        (
            {"ownerReferences": [{"kind": "ReplicaSet", "name": "web", "uid": "u", "apiVersion": "apps/v1", "controller": True}]},
            ("ReplicaSet", "web"),
        ),
        ({"name": "a", "ownerReferences": [{"kind": "Node", "name": "n"}]}, ("Pod", "a")),
        ({"ownerReferences": {"kind": 1}}, ("Pod", "")),
        (None, ("Pod", "")),
    ],
)
def test_events_regard_whoever_made_the_pod(metadata: Any, about: tuple[str, str]) -> None:
    found = regarding({"metadata": metadata}, "shop")
    assert (found.kind, found.name) == about and found.namespace == "shop"
