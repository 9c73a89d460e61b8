"""Which pods a workload asks for, and what a name on the command line means."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from core.k8s.fields import InvalidObject
from local.objects import Manifest, read_manifest
from local.workloads import match_workload, pods_of, who_else


def workload(kind: str, name: str = "web", **spec: Any) -> Manifest:
    template = {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "app", "command": ["true"]}]}}
    group = "batch/v1" if kind == "Job" else "apps/v1"
    found = read_manifest(
        {"apiVersion": group, "kind": kind, "metadata": {"name": name, "namespace": "shop"}, "spec": {"template": template, **spec}}
    )
    assert found is not None
    return found


def names(manifest: Manifest) -> list[str]:
    return [pod.ref.name for pod in pods_of(manifest)]


def test_a_deployment_has_one_pod_unless_it_says_otherwise() -> None:
    assert len(names(workload("Deployment"))) == 1
    assert len(names(workload("Deployment", replicas=3))) == 3
    assert names(workload("Deployment", replicas=0)) == []


def test_more_replicas_keep_the_pods_there_are() -> None:
    assert names(workload("Deployment", replicas=3))[:2] == names(workload("Deployment", replicas=2))


def test_another_template_means_other_pods() -> None:
    changed = copy.deepcopy(workload("Deployment"))
    changed.raw["spec"]["template"]["spec"]["containers"][0]["command"] = ["false"]
    assert not set(names(changed)) & set(names(workload("Deployment")))


def test_a_stateful_sets_pods_keep_their_names_and_hostnames() -> None:
    first, second = pods_of(workload("StatefulSet", replicas=2, serviceName="db", volumeClaimTemplates=[{"metadata": {"name": "data"}}]))
    assert (first.ref.name, second.ref.name) == ("web-0", "web-1")
    assert (second.raw["spec"]["hostname"], second.raw["spec"]["subdomain"]) == ("web-1", "db")
    assert second.raw["spec"]["volumes"] == [{"name": "data", "emptyDir": {}}]


def test_a_job_tries_again_a_bounded_number_of_times() -> None:
    (pod,) = pods_of(workload("Job"))
    assert pod.backoff_limit == 6
    assert pod.raw["metadata"]["labels"]["batch.kubernetes.io/job-name"] == "web"


def test_pods_of_a_deployment_are_owned_by_it() -> None:
    (pod,) = pods_of(workload("Deployment"))
    assert pod.raw["metadata"]["ownerReferences"][0]["kind"] == "Deployment"
    assert pod.raw["metadata"]["labels"]["pod-template-hash"] in pod.ref.name


@pytest.mark.parametrize("count", [-1, 201, "3", True])
def test_a_replica_count_that_is_none_is_refused(count: object) -> None:
    with pytest.raises(InvalidObject, match=r"spec\.replicas"):
        pods_of(workload("Deployment", replicas=count))


def test_a_name_is_a_pod_first_and_a_workload_else() -> None:
    pods = [*pods_of(workload("Deployment", replicas=2)), *pods_of(workload("StatefulSet", "db"))]
    first = pods[0].ref.name
    assert [pod.ref.name for pod in match_workload(pods, "shop", first)] == [first]
    assert len(match_workload(pods, "shop", "web")) == 2
    assert len(match_workload(pods, "shop", "deploy/web")) == 2
    assert match_workload(pods, "shop", "deployment/db") == []
    assert len(match_workload(pods, "shop", "sts/db")) == 1
    assert match_workload(pods, "default", "web") == []


def test_a_name_that_nothing_has_is_answered_with_what_may_be_meant() -> None:
    there = [("shop", "web"), ("shop", "cart"), ("shop", "web"), ("ops", "web"), ("ops", "tool")]
    assert who_else(there, "default", "deploy/tool") == "-n ops"
    assert who_else(there, "default", "web") == "-n ops or -n shop"
    assert who_else(there, "ops", "tol") == "one of: ops/tool, ops/web; see -n"
    assert who_else(there, "default", "nobody") == "one of: ops/tool, ops/web, shop/cart, shop/web; see -n"
    many = [("shop", f"w{number:02}") for number in range(12)]
    assert who_else(many, "shop", "web").endswith("shop/w09 and 2 more; see -n")
    assert who_else([], "shop", "web") == "pillion local status; no pod is there yet"
