"""`pillion check` on an installation in memory: what is asked, in which order, how long, and how it is shown."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from cli.check import command
from cli.check.catalogue import CONTROL_PLANE, DATA_PLANE, PRE
from cli.check.certificates import PROBE_POLICY
from cli.check.cluster import Cluster
from cli.check.command import as_json, lines, summary
from cli.check.model import Category, Check, Failed, Result, Skipped
from cli.check.run import run_checks
from cli.check.server import needed_kinds
from cli.main import cli
from cli.render.chart import load_chart, render
from core.k8s.access import GRANTS, questions
from policy.admission import admit
from tests.cli.check_lab import FakeApi, pod, results_of, wrong


async def test_nothing_is_wrong_with_an_installation_in_order(api: FakeApi) -> None:
    found = await results_of(api)
    assert {result.check.id: result.text for result in found if result.outcome in ("error", "warning")} == {}
    assert [result.check.id for result in found if result.outcome == "skipped"] == ["control-plane-replicas"]
    assert len(found) == sum(len(category.checks) for category in (*CONTROL_PLANE, *DATA_PLANE))


async def test_before_an_installation_everything_needed_is_asked_for() -> None:
    api = FakeApi()
    for name in ("httproutes", "grpcroutes"):
        spec = {"versions": [{"name": "v1", "served": True}]}
        meta = {"name": f"{name}.gateway.networking.k8s.io"}
        api.put({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": meta, "spec": spec})
    api.denied = lambda spec: False
    assert await wrong(api, categories=PRE) == {}
    api.denied = lambda spec: spec["resourceAttributes"]["resource"] in ("clusterroles", "networkpolicies")
    told = await wrong(api, categories=PRE)
    assert told == {"pre-permissions": "you may not create networkpolicies.networking.k8s.io, clusterroles.rbac.authorization.k8s.io"}


def test_plurals_of_what_is_installed_are_those_of_the_api() -> None:
    found = {name for _, name, _ in needed_kinds(render(load_chart(), {"createNamespace": True}, ha=True))}
    assert {"networkpolicies", "mutatingwebhookconfigurations", "poddisruptionbudgets", "daemonsets", "namespaces"} <= found


async def test_a_namespace_of_somebody_else_is_not_taken() -> None:
    api = FakeApi()
    api.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "pillion"}})
    api.put(pod("theirs", "pillion"))
    told = {found.check.id: found.text for found in await results_of(api, PRE[2:]) if found.outcome == "error"}
    assert told["pre-namespace"] == "namespace pillion exists and has pods of somebody else: pillion/theirs"


async def test_a_fatal_failure_ends_the_run(api: FakeApi) -> None:
    api.drop("CustomResourceDefinition", "grpcroutes.gateway.networking.k8s.io")
    found = await results_of(api)
    assert found[-1].check.id == "gateway-api-crds"
    assert "stopped" in summary(found)


async def test_all_grants_of_this_variant_are_asked(api: FakeApi) -> None:
    found = {result.check.id: result.text for result in await results_of(api)}
    asked = [question for grant in GRANTS if grant.when != "given-issuer" for question in questions(grant)]
    assert found["rbac-grants"] == f"{len(asked)} verbs"


async def test_an_api_server_that_goes_away_is_an_error_of_the_check(api: FakeApi) -> None:
    api.down = True
    (found,) = await results_of(api)
    assert (found.outcome, found.text) == ("error", "GET: no answer")


def test_the_probe_is_refused_by_the_model() -> None:
    assert admit({**PROBE_POLICY, "metadata": {"name": "x", "namespace": "default"}}), "or the webhook could not refuse it"


# --- running -------------------------------------------------------------------------------------------------------------------------


def category(*checks: Check) -> Category:
    return Category("c", "C", checks)


async def test_what_settles_is_asked_again_until_it_holds(autojump_clock: trio.testing.MockClock) -> None:
    asked = []

    async def look(cluster: Cluster) -> str:
        asked.append(trio.current_time())
        if len(asked) < 4:
            raise Failed("not yet")
        return "now"

    told: list[str] = []
    cluster = Cluster(FakeApi(), "0.1.0")
    rows = [category(Check("x", "it holds", "error", look, settles=True))]
    (found,) = await run_checks(rows, cluster, 10, lambda _c, _k, cause: told.append(cause), lambda _: None)
    assert (found.outcome, found.text) == ("success", "now")
    assert told == ["", "not yet", "not yet", "not yet"]


async def test_waiting_ends_with_the_time(autojump_clock: trio.testing.MockClock) -> None:
    async def look(cluster: Cluster) -> None:
        raise Failed("never")

    start = trio.current_time()
    rows = [category(Check("x", "it holds", "error", look, settles=True), Check("y", "it too", "warning", look))]
    found = await run_checks(rows, Cluster(FakeApi(), "0.1.0"), 10, lambda *_: None, lambda _: None)
    assert [result.outcome for result in found] == ["error", "warning"]
    assert 8 <= trio.current_time() - start <= 10


async def test_nothing_is_waited_for_where_nothing_is_installed(autojump_clock: trio.testing.MockClock) -> None:
    api = FakeApi()
    for name in ("httproutes", "grpcroutes"):
        spec = {"versions": [{"name": "v1", "served": True}]}
        meta = {"name": f"{name}.gateway.networking.k8s.io"}
        api.put({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": meta, "spec": spec})
    start = trio.current_time()
    found = (await results_of(api, wait_s=300))[-1]
    assert (found.check.id, found.text) == ("crds", "Pillion is not installed on this cluster: it has no namespace pillion")
    assert found.hint == "pillion install | kubectl apply -f -" and trio.current_time() == start


async def test_a_look_that_never_ends_is_ended(autojump_clock: trio.testing.MockClock) -> None:
    async def look(cluster: Cluster) -> None:
        await trio.sleep_forever()

    (found,) = await run_checks(
        [category(Check("x", "it ends", "error", look))], Cluster(FakeApi(), "0"), 0, lambda *_: None, lambda _: None
    )
    assert found.text == "no answer within 60 s"


# --- showing -------------------------------------------------------------------------------------------------------------------------


async def nothing(cluster: Cluster) -> None:
    raise Skipped("x")


def test_text_of_the_cluster_cannot_steer_a_terminal() -> None:
    bad = Result(category(), Check("x", "it holds", "error", nothing), "error", "pod \x1b[31m[bold]x[/bold]\nnext", "do that")
    assert [line.plain for line in lines(bad)] == ["× it holds", "    pod ?[31m[bold]x[/bold]", "    next", "    try: do that"]


def test_json_has_what_programs_need(api: FakeApi) -> None:
    rows = [Result(category(), Check("x", "it holds", "error", nothing), outcome, "t", "h") for outcome in ("success", "warning", "error")]  # type: ignore[arg-type]
    assert as_json(rows) == {
        "success": False,
        "categories": [
            {
                "categoryName": "c",
                "checks": [
                    {"id": "x", "description": "it holds", "severity": "error", "result": "success", "detail": "t"},
                    {"id": "x", "description": "it holds", "severity": "error", "result": "warning", "error": "t", "hint": "h"},
                    {"id": "x", "description": "it holds", "severity": "error", "result": "error", "error": "t", "hint": "h"},
                ],
            }
        ],
    }
    assert as_json(rows[:2])["success"] is True


@pytest.mark.parametrize(("outcome", "code"), [("success", 0), ("warning", 0), ("error", 1)])
@pytest.mark.parametrize("output", ["table", "short", "json"])
def test_exit_codes_and_outputs(monkeypatch: pytest.MonkeyPatch, outcome: str, code: int, output: str) -> None:
    async def fake(categories: Any, namespace: str, wait_s: float, screen: Any, kubeconfig: str, context: str) -> list[Result]:
        found = Result(category(), Check("x", "it holds", "error", nothing), outcome, "why", "do that")  # type: ignore[arg-type]
        screen.tell(found.category, found.check, "")
        screen.done(found)
        return [found]

    monkeypatch.setattr(command, "_check", fake)
    result = CliRunner().invoke(cli, ["check", "-o", output])
    assert result.exit_code == code
    if output == "json":
        assert json.loads(result.stdout)["success"] is (code == 0)
    else:
        assert ("it holds" in result.stdout) is (output == "table" or outcome != "success")
        assert ("try: do that" in result.stdout) is (outcome != "success")


def test_without_a_terminal_one_line_says_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fake(categories: Any, namespace: str, wait_s: float, screen: Any, kubeconfig: str, context: str) -> list[Result]:
        found = Result(category(), Check("x", "it holds", "error", nothing), "success")
        for cause in ("", "0 of 1 ready\nmore", "0 of 1 ready\nmore"):
            screen.tell(found.category, found.check, cause)
        screen.done(found)
        return [found]

    monkeypatch.setattr(command, "_check", fake)
    result = CliRunner().invoke(cli, ["check"])
    assert result.stderr == "waiting: C: it holds (0 of 1 ready)\n"


def test_pre_and_proxy_exclude_each_other() -> None:
    assert CliRunner().invoke(cli, ["check", "--pre", "--proxy"]).exit_code == 2


def test_without_a_cluster_the_next_step_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(cli, ["check"])
    assert result.exit_code == 1
    assert "set KUBECONFIG" in result.output
