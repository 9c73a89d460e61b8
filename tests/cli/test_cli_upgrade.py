"""`pillion upgrade` and `uninstall`: what is kept, what is named, what is refused; against a cluster in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any

import pytest
import trio
import yaml
from click.testing import CliRunner, Result

from cli import uninstall as uninstall_module
from cli import upgrade as upgrade_module
from cli.installed import installed, stored
from cli.main import cli
from cli.output import CommandFailed
from cli.render.chart import load_chart, render
from cli.render.values import InvalidValues, checked, retained
from cli.uninstall import goes_with_namespace
from cli.upgrade import following, leftovers
from core.k8s.api import Listing, object_path
from core.k8s.errors import NotFound

PLURALS = {"NetworkPolicy": "networkpolicies"}


class FakeApi:
    """What is installed, by collection."""

    def __init__(self, objects: list[dict[str, Any]]) -> None:
        self.objects = objects

    def items(self, path: str) -> list[dict[str, Any]]:
        return [item for item in self.objects if path == collection(item)]

    async def get(self, path: str, **query: str) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        for item in self.objects:
            if path == collection(item, named=True):
                return item
        raise NotFound(f"GET {path}", 404)

    async def list(self, path: str, *, label_selector: str = "") -> Listing[dict[str, Any]]:
        await trio.lowlevel.checkpoint()
        assert label_selector in ("", "app.kubernetes.io/part-of=pillion")
        if "cert-manager.io" in path:
            raise NotFound("no such kind", 404)
        return Listing(self.items(path), "1")


def collection(item: dict[str, Any], *, named: bool = False) -> str:
    group, _, version = item["apiVersion"].rpartition("/")
    kind = item["kind"]
    plural = PLURALS.get(kind) or (kind.lower()[:-1] + "ies" if kind.endswith("y") else kind.lower() + "s")
    meta = item["metadata"]
    return object_path(group, version, plural, meta.get("namespace", ""), meta["name"]) if named else object_path(group, version, plural)


def installation(settings: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    found = render(load_chart(), {"createNamespace": True, **(settings or {})})
    bundle = {"name": "pillion-trust-anchors", "namespace": "shop", "labels": {"app.kubernetes.io/part-of": "pillion"}}
    return [*found, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": bundle}]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``run(objects, "upgrade", ...)``: the command on a cluster with these objects."""

    def call(objects: list[dict[str, Any]], *arguments: str) -> Result:
        def ask(question: Callable[[Any], Awaitable[Any]], kubeconfig: str, context: str) -> Any:
            return trio.run(question, FakeApi(objects))

        monkeypatch.setattr(upgrade_module, "ask_cluster", ask)
        monkeypatch.setattr(uninstall_module, "ask_cluster", ask)
        return CliRunner().invoke(cli, list(arguments))

    return call


def objects_of(result: Result) -> dict[tuple[str, str], dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(result.stdout)}


# --- upgrade -------------------------------------------------------------------------------------------------------------------------


def test_upgrade_renders_with_the_settings_of_the_installation(run: Callable[..., Result]) -> None:
    there = installation({"logLevel": "debug", "policy": {"replicas": 2}, "agent": {"enabled": False}})
    found = objects_of(run(there, "upgrade", "--set", "policy.failurePolicy=Fail"))
    assert found["Deployment", "pillion-policy"]["spec"]["replicas"] == 2
    assert ("DaemonSet", "pillion-agent") not in found
    assert found["ValidatingWebhookConfiguration", "pillion-policy"]["webhooks"][0]["failurePolicy"] == "Fail"
    assert "data" not in found["Secret", "pillion-issuer"]


def test_upgrade_to_high_availability_and_back(run: Callable[..., Result]) -> None:
    up = objects_of(run(installation({"policy": {"replicas": 5}}), "upgrade", "--ha"))
    assert {key[1] for key in up if key[0] == "PodDisruptionBudget"} == {"pillion-identity", "pillion-policy", "pillion-injector"}
    assert up["Deployment", "pillion-policy"]["spec"]["replicas"] == 3
    down = run(installation({"highAvailability": True, "identity": {"replicas": 3}}), "upgrade", "--reset-settings")
    assert objects_of(down)["Deployment", "pillion-identity"]["spec"]["replicas"] == 1
    assert "kubectl delete poddisruptionbudget pillion-identity -n pillion" in down.stderr


def test_upgrade_without_an_installation_names_install(run: Callable[..., Result]) -> None:
    result = run([], "upgrade")
    assert result.exit_code == 1
    assert "pillion install" in result.output


def test_upgrade_leaves_helms_installations_to_helm(run: Callable[..., Result]) -> None:
    there = installation()
    next(item for item in there if item["metadata"]["name"] == "pillion-config")["metadata"]["annotations"] = {
        "meta.helm.sh/release-name": "mesh"
    }
    result = run(there, "upgrade")
    assert result.exit_code == 1
    assert "helm upgrade mesh" in result.output


def test_upgrade_keeps_the_trust_domain(run: Callable[..., Result]) -> None:
    there = installation({"trustDomain": "a.example"})
    kept = objects_of(run(there, "upgrade", "--reset-settings"))["ConfigMap", "pillion-config"]
    assert yaml.safe_load(kept["data"]["mesh.yaml"])["trustDomain"] == "a.example"
    assert run(there, "upgrade", "--set", "trustDomain=b.example").exit_code == 1


def test_a_setting_of_another_version_is_left_out_and_named(run: Callable[..., Result]) -> None:
    there = installation()
    config = next(item for item in there if item["metadata"]["name"] == "pillion-config")
    values = yaml.safe_load(config["data"]["values.yaml"])
    values["policy"]["gone"], values["old"] = 1, {"x": 1}
    config["data"]["values.yaml"] = yaml.safe_dump(values)
    result = run(there, "upgrade")
    assert objects_of(result)
    assert "setting policy.gone does not exist any more" in result.stderr
    assert "setting old does not exist any more" in result.stderr


def test_settings_that_cannot_be_read_are_no_reason_to_guess(run: Callable[..., Result]) -> None:
    there = installation()
    next(item for item in there if item["metadata"]["name"] == "pillion-config")["data"]["values.yaml"] = "- a list"
    result = run(there, "upgrade")
    assert result.exit_code == 1
    assert "values.yaml" in result.output


def test_images_follow_the_version_unless_they_have_their_own() -> None:
    now = metadata.version("pillion")
    settings = {"image": "registry.example:5000/pillion:0.0.1", "agentImage": "mine/agent:stable"}
    assert following(settings, "0.0.1") == {"image": f"registry.example:5000/pillion:{now}", "agentImage": "mine/agent:stable"}
    assert following(settings, "") == settings


def test_what_components_make_is_no_leftover() -> None:
    there = [
        {"kind": "Secret", "metadata": {"name": "made", "namespace": "pillion"}},
        {"kind": "ConfigMap", "metadata": {"name": "pillion-trust-anchors", "namespace": "shop"}},
        {"kind": "Deployment", "metadata": {"name": "old", "namespace": "pillion"}},
    ]
    assert leftovers(there, []) == [("Deployment", "pillion", "old")]


def test_free_names_of_settings_are_kept() -> None:
    assert retained({"nodeSelector": {"anything": "x"}, "sidecar": {"defaults": {"log-level": "debug"}}}) == (
        {"nodeSelector": {"anything": "x"}, "sidecar": {"defaults": {"log-level": "debug"}}},
        [],
    )
    with pytest.raises(InvalidValues):
        checked({"nodeSelector": {"a": 1}})


# --- uninstall -----------------------------------------------------------------------------------------------------------------------


def pod(meshed: bool, phase: str = "Running") -> dict[str, Any]:
    name = "pillion-proxy" if meshed else "app"
    meta = {"name": "cart-1", "namespace": "shop"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"containers": [{"name": name}]}, "status": {"phase": phase}}


def test_uninstall_names_everything_but_the_kinds(run: Callable[..., Result]) -> None:
    found = list(objects_of(run([*installation(), pod(meshed=False)], "uninstall")))
    assert not [key for key in found if key[0] == "CustomResourceDefinition"]
    assert found[0] == ("MutatingWebhookConfiguration", "pillion-injector"), "nothing is asked of an injector that is gone"
    assert found[-1] == ("Namespace", "pillion")
    assert ("ConfigMap", "pillion-trust-anchors") in found
    rights = [number for number, key in enumerate(found) if key[0] == "ClusterRoleBinding"]
    programs = [number for number, key in enumerate(found) if key[0] in ("Deployment", "DaemonSet")]
    assert max(rights) < min(programs), "a program that takes a while to end could write what is deleted meanwhile"
    assert max(programs) < found.index(("ConfigMap", "pillion-trust-anchors")), "or they would write it again"


def test_uninstall_with_kinds(run: Callable[..., Result]) -> None:
    found = objects_of(run(installation(), "uninstall", "--crds"))
    assert len([key for key in found if key[0] == "CustomResourceDefinition"]) == 4


def test_uninstall_is_refused_while_pods_have_sidecars(run: Callable[..., Result]) -> None:
    there = [*installation(), pod(meshed=True)]
    result = run(there, "uninstall")
    assert result.exit_code == 1
    assert "1 pods still have sidecars: shop/cart-1" in result.output
    assert objects_of(run(there, "uninstall", "--force"))
    assert objects_of(run([*installation(), pod(meshed=True, phase="Succeeded")], "uninstall"))


def test_uninstall_of_nothing_says_so(run: Callable[..., Result]) -> None:
    assert "not installed" in run([], "uninstall").output


async def test_reading_an_installation_fails_by_name() -> None:
    api: Any = FakeApi([])
    with pytest.raises(CommandFailed, match="not installed"):
        await stored(api)
    assert await installed(api, crds=True) == []


def test_what_lies_in_our_namespace_goes_with_it() -> None:
    assert goes_with_namespace({"kind": "Secret", "metadata": {"name": "x", "namespace": "pillion"}})
    assert not goes_with_namespace({"kind": "Deployment", "metadata": {"name": "x", "namespace": "pillion"}})
    assert not goes_with_namespace({"kind": "ConfigMap", "metadata": {"name": "x", "namespace": "shop"}})
