from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import h11
import policy_lab as lab
import pytest
import trio
from certs import Authority
from policy_lab import CART, parsed

from core.addrs import ListenAddr, parse_addr
from core.credentials import Credentials
from core.env import HostPort, InvalidSettings, load
from core.k8s.folder import FolderSource
from core.k8s.source import Apply, Delete, Event, Refusal, Reset
from core.names import WorkloadId
from core.refs import Ref
from core.runtime.admin import AdminServer
from core.runtime.watch import Cell
from policy.__main__ import main
from policy.admission import parse_object
from policy.client import PolicyClient
from policy.config import Config
from policy.controller import Controller, run
from policy.diagnostics import exposition, listen_unix, routes
from policy.index import IndexSettings
from policy.wire import Hello
from tests.ports import unused_port

REQUIRED = {
    "PILLION_POLICY_SOURCE": "folder:/x",
    "PILLION_IDENTITY_ADDR": "identity:8080",
    "PILLION_IDENTITY_TOKEN_FILE": "/t",
    "PILLION_TRUST_ANCHORS_FILE": "/a",
}


class Told:
    """A source that says what the test tells it to."""

    def __init__(self, *first: Event) -> None:
        self.first = first
        self.refusals: Sequence[Refusal] = ()
        self.waiting: Sequence[str] = ()
        self.emit: Callable[[Sequence[Event]], None] | None = None
        self.release = trio.Event()

    async def run(self, emit: Callable[[Sequence[Event]], None], *, task_status: trio.TaskStatus[None]) -> None:
        await self.release.wait()
        emit(self.first)
        self.emit = emit
        task_status.started()
        await trio.sleep_forever()


def test_events_become_verbs_and_their_changes_reach_the_server() -> None:
    controller = Controller(Told())
    told: list[object] = []
    controller.server.changed = told.extend  # type: ignore[method-assign,assignment]
    controller.receive([Apply(parsed(lab.pod())), Apply(parsed(lab.server()))])
    assert controller.index.inbound_policy("shop", "cart-0", 8080).server.kind == "Server"
    assert set(told) == {lab.CART_POD, lab.CART_IP}
    controller.receive([Delete(parsed(lab.server()).ref)])
    assert controller.index.inbound_policy("shop", "cart-0", 8080).server.kind == "default"
    controller.receive([Reset("", "Pod", ())])
    assert controller.index.pod("shop", "cart-0") is None


def _config(tmp_path: Path, **values: str) -> Config:
    fixed = {
        **REQUIRED,
        "PILLION_POLICY_SOURCE": f"folder:{tmp_path}",
        "PILLION_POLICY_LISTEN": "127.0.0.1:0",
        "PILLION_ADMIN_LISTEN": "127.0.0.1:0",
        "PILLION_DIAGNOSTICS_SOCKET": str(tmp_path / "diagnostics"),
    }
    return load(Config, {**fixed, **values})


async def _get(path: Path, target: str) -> tuple[int, object]:
    stream = await trio.open_unix_socket(str(path))
    connection = h11.Connection(h11.CLIENT)
    async with stream:
        head = connection.send(h11.Request(method="GET", target=target, headers=[("host", "x"), ("connection", "close")]))
        await stream.send_all((head or b"") + (connection.send(h11.EndOfMessage()) or b""))
        body, status = b"", 0
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(65536)))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            else:
                return status, json.loads(body)


async def test_diagnostics_answer_on_a_private_socket(tmp_path: Path) -> None:
    controller = Controller(Told())
    controller.receive([Apply(parsed(raw)) for raw in (lab.pod(), lab.server(), lab.server("zz"), lab.service(), lab.endpoints("cart-0"))])
    refusal = Refusal("a.yaml", Ref("", "Pod", "shop", "x"), "spec: expected y, found z", kept=False)
    path = tmp_path / "socket"
    path.write_text("left by a dead process")
    async with trio.open_nursery() as nursery:
        await nursery.start(AdminServer(routes(controller.index, lambda: [refusal])).serve, [listen_unix(str(path))])
        assert path.stat().st_mode & 0o777 == 0o600
        status, policy = await _get(path, "/diagnostics/policy?namespace=shop&pod=cart-0&port=8080")
        assert status == 200 and isinstance(policy, dict)
        assert policy["why"] == "server shop/cart takes the port over, with accessPolicy deny"
        status, found = await _get(path, "/diagnostics/endpoints?addr=10.96.0.1:80")
        assert isinstance(found, dict) and found["endpoints"][0]["addr"] == "10.0.0.5:8080"
        status, found = await _get(path, "/diagnostics/conflicts")
        assert isinstance(found, dict)
        assert [problem["reason"] for problem in found["problems"]] == ["overlap"]
        assert found["refused"][0]["message"] == "a.yaml (pod shop/x): spec: expected y, found z; it is ignored"
        status, rows = await _get(path, "/diagnostics/authz?namespace=shop&pod=cart-0")
        assert isinstance(rows, list) and rows[0]["clients"] == "nobody"
        for target, code in (
            ("policy?namespace=shop&pod=x&port=1", 404),
            ("policy?pod=x&port=0", 400),
            ("endpoints?addr=x", 400),
            ("authz?pod=x", 404),
        ):
            status, found = await _get(path, f"/diagnostics/{target}")
            assert (status, list(found)) == (code, ["error"])  # type: ignore[call-overload]
        nursery.cancel_scope.cancel()


def test_metrics_are_valid_prometheus_text() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    controller = Controller(Told())
    controller.receive([Apply(parsed(lab.pod()))])
    controller.server.counters.refuse("identity")
    text = exposition(controller.index, controller.server.counters, ()).decode()
    found = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    assert found["pillion_policy_refused_total"] == found["pillion_policy_objects"] == 1


async def test_the_whole_controller_serves_a_folder_live_and_only_once_it_is_synced(tmp_path: Path) -> None:
    authority, sockets = Authority(), tmp_path
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "pod.json").write_text(json.dumps(lab.pod(ip="127.0.0.1")))
    port = unused_port()
    config = _config(sockets, PILLION_POLICY_LISTEN=f"127.0.0.1:{port}")

    async def certify(cell: Cell[Credentials | None]) -> None:
        cell.set(authority.credentials(config.identity))

    cell = Cell[Credentials | None](authority.credentials(CART))
    client = PolicyClient(("127.0.0.1", port), WorkloadId("cluster.local", "pillion", "pillion-policy"), cell, Hello("shop", "cart-0", "1"))
    watched = client.watch_port(8080)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, config, FolderSource(folder, parse_object), certify)
        nursery.start_soon(client.run)
        with trio.fail_after(30):
            first = await watched.wait_for(bool)
            assert first is not None and first.server.name == "all-unauthenticated"
            (folder / "server.json").write_text(json.dumps(lab.server()))
            await watched.wait_for(lambda value: value is not None and value.server.kind == "Server")
        nursery.cancel_scope.cancel()


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(InvalidSettings) as wrong:
        load(
            Config,
            {"PILLION_POLICY_SOURCE": "consul", "PILLION_DEFAULT_INBOUND_POLICY": "open", "PILLION_CLUSTER_NETWORKS": "10.0.0.1/8"},
        )
    assert len(wrong.value.problems) == 6


def test_settings_reach_the_index() -> None:
    config = load(
        Config, {**REQUIRED, "PILLION_TRUST_DOMAIN": "a.example", "PILLION_OPAQUE_PORTS": "1-2", "PILLION_CLUSTER_NETWORKS": "10.0.0.0/8"}
    )
    assert config.index == IndexSettings("a.example", "all-unauthenticated", ("10.0.0.0/8",), "1-2")
    assert config.listen == ListenAddr(parse_addr("[::]:8090"))
    assert config.identity_addr == HostPort("identity", 8080)
    assert config.identity.uri == "spiffe://a.example/ns/pillion/sa/pillion-policy"


def test_check_config_says_ok_or_everything_that_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in REQUIRED.items():
        monkeypatch.setenv(name, value)
    assert main(["--check-config", "--source", "folder:/y"]) == 0
    assert main(["--check-config", "--source", "etcd:/y"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "ok\n" and "PILLION_POLICY_SOURCE" in captured.err
