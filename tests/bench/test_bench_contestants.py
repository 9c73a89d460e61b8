"""The contestants' configurations: complete, accepted by the programs themselves, the same rules for all."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from bench import certs, peers
from bench.contestants.base import API_RULES, BULK_RULES, GRPC_RULES, Context, Setup, grown_rules, render
from bench.contestants.envoy import Envoy, policies_json
from bench.contestants.haproxy import Haproxy, acl_lines
from bench.contestants.objects import objects
from bench.levels import LEVELS
from bench.stage import Pinning, Stage, endpoint_ips, redirect_rules
from ebpf.plan import CONNECT, NFT, NFT_SOCKMAP
from policy.admission import parse_object

SETUPS = [
    Setup(),
    Setup("http2", GRPC_RULES),
    Setup("opaque", BULK_RULES, endpoints=3),
    Setup(rules=grown_rules(100), endpoints=10),
    Setup(inbound_only=True),
]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> certs.Certificates:
    return certs.make(tmp_path_factory.mktemp("certs"))


def stage_and_context(tmp_path: Path, certificates: certs.Certificates, setup: Setup) -> tuple[Stage, Context]:
    stage = cast(Stage, SimpleNamespace(workdir=tmp_path, endpoints=endpoint_ips(setup.endpoints)))
    return stage, Context(peers.Peers(None, None, None, None, None, None), certificates, tmp_path, Pinning())


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("between", ["http1", "http2"])
def test_envoy_configurations_are_yaml_with_mutual_tls_on_the_hop(
    tmp_path: Path, certificates: certs.Certificates, setup: Setup, between: str
) -> None:
    stage, context = stage_and_context(tmp_path, certificates, setup)
    parts = {role: yaml.safe_load(text)["static_resources"] for role, text in Envoy(between=between).configs(context, stage, setup).items()}
    assert set(parts) == ({"inbound"} if setup.inbound_only else {"inbound", "outbound"})
    inbound = parts["inbound"]["listeners"][0]["filter_chains"][0]["transport_socket"]["typed_config"]
    assert inbound["require_client_certificate"] is True
    if not setup.inbound_only:
        cluster = parts["outbound"]["clusters"][0]
        assert len(cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]) == setup.endpoints
        tls = cluster["transport_socket"]["typed_config"]["common_tls_context"]
        assert tls["validation_context"]["match_typed_subject_alt_names"][0]["matcher"]["exact"] == certs.spiffe("server")
        assert {tls["tls_params"]["tls_minimum_protocol_version"]} == {"TLSv1_3"}


def test_envoy_rules_ask_for_identity_method_and_path() -> None:
    policies = json.loads(policies_json(API_RULES, certs.spiffe("client")))
    assert len(policies) == len(API_RULES) == 6
    first = policies["rule-0000"]
    assert first["principals"] == [{"authenticated": {"principal_name": {"exact": certs.spiffe("client")}}}]
    assert {"url_path": {"path": {"prefix": "/api/users/"}}} in first["permissions"][0]["and_rules"]["rules"]


@pytest.mark.needs("haproxy")
@pytest.mark.parametrize("setup", SETUPS)
def test_haproxy_accepts_its_configurations(tmp_path: Path, certificates: certs.Certificates, setup: Setup) -> None:
    stage, context = stage_and_context(tmp_path, certificates, setup)
    for role, text in Haproxy().configs(context, stage, setup).items():
        path = tmp_path / f"{role}.cfg"
        path.write_text(text)
        done = subprocess.run(["haproxy", "-c", "-f", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_haproxy_denies_what_no_rule_allows() -> None:
    lines = acl_lines(API_RULES, "client").splitlines()
    assert "unless { ssl_c_s_dn(cn) -m str client }" in lines[0]
    assert len(lines) == 1 + len(API_RULES) + 1
    assert lines[-1].strip() == "http-request deny deny_status 403"


@pytest.mark.needs("nginx")
def test_nginx_accepts_its_configuration(tmp_path: Path) -> None:
    path = tmp_path / "nginx.conf"
    path.write_text(render("nginx.conf", workdir=tmp_path, port=18080, body="x"))
    done = subprocess.run(["nginx", "-t", "-c", str(path), "-p", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("setup", SETUPS)
def test_every_object_for_pillion_is_admitted(setup: Setup) -> None:
    made = objects(setup, endpoint_ips(setup.endpoints))
    kinds: dict[str, int] = {}
    for one in made:
        assert parse_object(cast(Any, one)) is not None, one["kind"]
        kinds[one["kind"]] = kinds.get(one["kind"], 0) + 1
    routes = 0 if setup.app == "opaque" else len(setup.rules)
    assert (kinds.get("HTTPRoute", 0), kinds["AuthorizationPolicy"], kinds["Pod"]) == (routes, routes or 1, setup.endpoints + 1)


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_a_grown_policy_still_allows_the_work(count: int) -> None:
    rules = grown_rules(count)
    assert len(rules) == count == len(set(rules))
    assert any("/api/users/1".startswith(rule.prefix) for rule in rules)
    assert count == 1 or set(API_RULES) <= set(rules)


def test_a_missing_placeholder_is_an_error_and_not_left_in_a_configuration() -> None:
    with pytest.raises(KeyError):
        render("nginx.conf", workdir="/tmp")


def test_the_redirect_exempts_the_proxy_by_uid_and_nothing_else() -> None:
    rules = redirect_rules(outbound=True, inbound=False)
    assert "meta skuid 2102 return" in rules
    assert "redirect to :4140" in rules
    assert "prerouting" not in rules


def test_the_clients_leaf_has_one_name_and_the_servers_also_the_dns_name(certificates: certs.Certificates) -> None:
    from cryptography import x509

    def names(account: str) -> list[object]:
        leaf = x509.load_pem_x509_certificate(certificates.chain(account).read_bytes())
        return [name.value for name in leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value]

    assert names("client") == ["spiffe://cluster.local/ns/bench/sa/client"]
    assert names("server") == ["spiffe://cluster.local/ns/bench/sa/server", certs.dns_name("server")]
    assert certificates.key("client").stat().st_mode & 0o077 == 0


def test_what_the_benchmark_installs_is_on_the_list_of_what_make_installs() -> None:
    listed = (peers.ROOT / "tools" / "debian-packages.txt").read_text().splitlines()
    names = {line.partition("#")[0].strip() for line in listed}
    assert {*peers.DEBIAN.values(), "python3-dev"} - names == set()


def test_missing_peers_are_named_with_what_to_install() -> None:
    lines = peers.Peers(None, None, None, None, None, None).missing()
    assert any(line.startswith("envoy:") for line in lines)
    assert "wrk: apt-get install wrk" in lines


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("nginx version: nginx/1.22.1\n", "1.22.1"),
        ("HAProxy version 2.6.12-1+deb12u4 2026", "2.6.12-1+deb12u4"),
        ("/lib/python3.11/envoy  version: 9e55/1.40.0/Clean", "1.40.0"),
        ("wrk debian/4.1.0\n -v  Print version details", "4.1.0"),
        ("none", "unknown"),
    ],
)
def test_versions_are_read_from_what_programs_say(text: str, version: str) -> None:
    assert peers.first_version(text) == version


def test_endpoint_addresses_are_distinct_and_never_the_clients() -> None:
    ips = endpoint_ips(1000)
    assert len(set(ips)) == 1000
    assert all(not ip.startswith("10.7.0.") for ip in ips)


def test_a_pair_of_sidecars_is_led_on_every_rung_that_captures() -> None:
    assert {name: (led.level, led.accelerate) for name, led in LEVELS.items()} == {
        "nftables": (NFT, False),
        "nftables+sockmap": (NFT_SOCKMAP, True),
        "connect": (CONNECT, False),
        "connect+sockmap": (CONNECT, True),
    }
