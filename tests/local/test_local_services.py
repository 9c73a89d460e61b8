"""Services: who stands behind an address, under which names, by which rules."""

from __future__ import annotations

from typing import Any

from core.k8s.objects import EndpointSlice, Service, read_core_object
from core.refs import Ref
from ebpf import redirect
from local import rules
from local.network import POD_CIDR4, POD_CIDR6, Addresses, AddressPool
from local.services import PodFacts, alias_lines, families, fronts, hosts_file, hosts_lines, slices


def pod(number: int, *, ready: bool = True, app: str = "web", **more: Any) -> PodFacts:
    addresses = Addresses(f"10.142.0.{number}", f"fd42:142::{number:x}")
    return PodFacts(Ref("", "Pod", "shop", f"{app}-{number}"), {"app": app}, addresses, ready, {"http": 8000 + number}, **more)


def service(**spec: Any) -> tuple[Service, dict[str, Any]]:
    defaults = {
        "selector": {"app": "web"},
        "clusterIP": "10.143.0.10",
        "clusterIPs": ["10.143.0.10"],
        "ports": [{"port": 80, "targetPort": "http"}],
    }
    raw = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"}, "spec": defaults | spec}
    found = read_core_object(raw)
    assert isinstance(found, Service)
    return found, raw


def test_only_ready_pods_of_the_selector_and_namespace_stand_behind_a_port() -> None:
    found, _ = service()
    other = PodFacts(Ref("", "Pod", "else", "x"), {"app": "web"}, Addresses("10.142.0.9", ""), True, {})
    (front,) = fronts([found], [pod(10), pod(11, ready=False), pod(12, app="db"), other])
    assert [(backend.pod.addresses.v4, backend.port) for backend in front.backends] == [("10.142.0.10", 8010)]


def test_slices_say_who_is_ready_and_read_back_as_the_controllers_read_them() -> None:
    found, raw = service()
    (first, second) = slices(found, raw, [pod(10), pod(11, ready=False)])
    views = [read_core_object(one) for one in (first, second)]
    assert all(isinstance(view, EndpointSlice) and view.service == "web" for view in views)
    ready = {endpoint["addresses"][0]: endpoint["conditions"]["ready"] for one in (first, second) for endpoint in one["endpoints"]}
    assert ready == {"10.142.0.10": True, "10.142.0.11": False}
    assert first["ports"] == [{"name": "", "port": 8010, "protocol": "TCP"}], "a named port may differ from pod to pod"


def test_a_service_without_pods_still_has_a_slice() -> None:
    found, raw = service()
    (only,) = slices(found, raw, [])
    assert only["endpoints"] == []


def test_a_service_is_ipv4_unless_it_asks() -> None:
    assert families({}) == ("IPv4",)
    assert families({"spec": {"ipFamilyPolicy": "PreferDualStack"}}) == ("IPv4", "IPv6")
    assert families({"spec": {"ipFamilies": ["IPv6"]}}) == ("IPv6",)


def test_names_are_short_only_in_the_own_namespace() -> None:
    pair = service()
    assert hosts_lines([pair], [], "shop") == ["10.143.0.10 web.shop.svc.cluster.local web.shop.svc web.shop web"]
    assert hosts_lines([pair], [], "other") == ["10.143.0.10 web.shop.svc.cluster.local web.shop.svc web.shop"]


def test_a_headless_service_leads_to_its_ready_pods_and_names_each() -> None:
    pair = service(clusterIP="None", clusterIPs=["None"])
    lines = hosts_lines([pair], [pod(10, hostname="web-0", subdomain="web"), pod(11, ready=False)], "shop")
    assert lines[0].startswith("10.142.0.10 web.shop.svc.cluster.local")
    assert lines[1].startswith("10.142.0.10 web-0.web.shop.svc.cluster.local")
    assert len(lines) == 2


def test_aliases_of_a_pod_are_in_its_hosts_file() -> None:
    spec = {"hostAliases": [{"ip": "10.9.9.9", "hostnames": ["db.example", "db"]}, {"ip": "10.9.9.8"}]}
    assert alias_lines(spec) == ["10.9.9.9 db.example db"]
    assert alias_lines({}) == []


def test_a_pod_knows_itself() -> None:
    assert "10.142.0.10 web-10\n" in hosts_file(pod(10), [])


def test_rules_spread_over_ready_pods_and_refuse_where_there_is_none() -> None:
    found, _ = service()
    text = rules.services(fronts([found], [pod(10), pod(11)]), [pod(10).addresses])
    assert "ip daddr 10.143.0.10 tcp dport 80 dnat ip to numgen random mod 2 map { 0 : 10.142.0.10 . 8010, 1 : 10.142.0.11 . 8011 }" in text
    assert "dnat" not in rules.services(fronts([found], []), [])
    assert "reject" in rules.services([], [])


def test_capture_exempts_the_sidecar_loopback_and_what_is_skipped() -> None:
    text = redirect.capture([(9000, 9000)], [(25, 25), (26, 30)])
    output, prerouting = text.split("chain prerouting")
    assert output.index("skuid 2102 return") < output.rindex("redirect to :4140")
    assert "tcp dport { 25-30 } return" in output, "ranges that touch are one: nft refuses overlaps"
    assert "tcp dport { 4191, 9000 } return" in prerouting and "redirect to :4143" in prerouting
    assert "4143" not in prerouting.split("redirect")[0], "what is dialled at the sidecar's own port goes through its loop guard"


def test_overlapping_ranges_merge() -> None:
    assert redirect.merged([(5, 9), (1, 2), (8, 12), (3, 3)]) == [(1, 3), (5, 12)]


def test_addresses_come_round_only_after_all_others() -> None:
    pool = AddressPool(POD_CIDR4, POD_CIDR6, ipv6=True)
    first, second = pool.take(), pool.take()
    pool.give_back(first)
    assert first != second and pool.take() not in (first, second)
    assert (first.v4, first.v6) == ("10.142.0.10", "fd42:142::a")


def test_without_ipv6_a_pod_has_one_address() -> None:
    assert AddressPool(POD_CIDR4, POD_CIDR6, ipv6=False).take().all == ("10.142.0.10",)
