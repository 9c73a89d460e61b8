from __future__ import annotations

from typing import Any

import pytest

from core.k8s.fields import InvalidObject
from core.k8s.objects import EndpointSlice, Pod, Service, read_core_object
from core.k8s.selector import read_selector


def _pod(**fields: Any) -> Pod:
    found = read_core_object({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **fields})
    assert isinstance(found, Pod)
    return found


def test_only_fields_that_are_read_are_looked_at() -> None:
    pod = _pod(
        spec={
            "nodeName": "n",
            "containers": [{"name": "c", "image": "x", "ports": [{"containerPort": 80, "protocol": "UDP"}, {"containerPort": 81}]}],
        }
    )
    assert [port.container_port for port in pod.ports] == [81]
    assert pod.spec.service_account_name == "default"
    assert pod.ref.namespace == "default"


def test_null_means_absent() -> None:
    pod = _pod(metadata={"name": "a", "creationTimestamp": None, "labels": None}, spec={"containers": [{"ports": None}]}, status=None)
    assert pod.metadata.labels == {}
    assert pod.ips == ()


def test_addresses_are_canonical_and_distinct() -> None:
    pod = _pod(status={"podIP": "10.0.0.1", "podIPs": [{"ip": "::ffff:10.0.0.1"}, {"ip": "10.0.0.1"}, {"ip": "FD00::1"}, {"ip": "what"}]})
    assert pod.ips == ("10.0.0.1", "fd00::1")
    assert _pod(status={"podIP": "10.0.0.2"}).ips == ("10.0.0.2",)


def test_a_headless_service_has_no_virtual_address() -> None:
    service = read_core_object(
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"clusterIP": "None", "clusterIPs": ["None"]}}
    )
    assert isinstance(service, Service) and service.vips == ()


def test_a_slice_belongs_to_the_service_of_its_label() -> None:
    raw = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "x", "namespace": "shop", "labels": {"kubernetes.io/service-name": "cart"}},
        "endpoints": [{"addresses": ["10.0.0.1"]}],
    }
    found = read_core_object(raw)
    assert isinstance(found, EndpointSlice) and found.service == "cart" and found.endpoints[0].conditions.ready is None


def test_a_namespace_is_in_no_namespace() -> None:
    found = read_core_object({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "namespace": "default"}})
    assert found is not None and found.ref.namespace == ""


def test_age_comes_first_then_the_name_and_no_timestamp_is_oldest() -> None:
    old = _pod(metadata={"name": "z", "creationTimestamp": "2026-01-01T00:00:00Z"})
    young = _pod(metadata={"name": "a", "creationTimestamp": "2026-01-01T00:00:01Z"})
    unstored = _pod(metadata={"name": "m"})
    assert sorted([young, old, unstored], key=lambda pod: pod.metadata.age_key) == [unstored, old, young]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, "apiVersion: expected GROUP/VERSION, found nothing"),
        ({"apiVersion": "v1"}, "kind: expected the kind of the object, found nothing"),
        ({"apiVersion": "v1", "kind": "Pod"}, "metadata: expected a value, found nothing"),
        (
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "labels": {"x": 1}}},
            "metadata.labels[...]: expected str in quotes, found ",
        ),
        ({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a/b"}}, "metadata.name: expected a DNS name"),
    ],
)
def test_an_invalid_object_is_refused_with_its_place(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidObject) as refused:
        read_core_object(raw)
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize(
    ("requirement", "words"),
    [
        (
            {"key": "a", "operator": "Near"},
            "spec.podSelector.matchExpressions[0].operator: expected one of In, NotIn, Exists, DoesNotExist",
        ),
        ({"key": "a", "operator": "In"}, "spec.podSelector.matchExpressions[0].values: expected at least one value"),
        (
            {"key": "a", "operator": "Exists", "values": ["x"]},
            "spec.podSelector.matchExpressions[0].values: expected no values with operator Exists",
        ),
    ],
)
def test_an_invalid_selector_is_refused_with_its_place(requirement: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidObject) as refused:
        read_selector({"matchExpressions": [requirement]}, "spec.podSelector")
    assert str(refused.value).startswith(words)
