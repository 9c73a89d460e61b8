"""mesh.yaml: what `pillion install` writes is what the injector understands, and nothing else is taken."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from injector.mesh import DEFAULT_MESH, KEYS, InvalidMesh, Mesh, read_mesh


def test_what_is_left_out_has_its_default() -> None:
    assert read_mesh(b"") == read_mesh(b"{}") == DEFAULT_MESH
    assert (DEFAULT_MESH.identity, DEFAULT_MESH.policy) == (
        "pillion-identity.pillion.svc.cluster.local.:8080",
        "pillion-policy.pillion.svc.cluster.local.:8090",
    )


def test_every_key_is_read() -> None:
    found = read_mesh(
        b"""
        image: registry:5000/pillion@sha256:0123456789abcdef
        imagePullPolicy: Always
        command: [python, -m, proxy]
        trustDomain: example.org
        clusterDomain: k8s.example.org
        controlNamespace: mesh
        identityAddr: identity.example.org:443
        policyAddr: "[fd00::1]:8090"
        capture: agent
        nativeSidecar: false
        defaults: {log-level: debug, skip-outbound-ports: "25"}
        """
    )
    assert found == Mesh(
        image="registry:5000/pillion@sha256:0123456789abcdef",
        image_pull_policy="Always",
        command=("python", "-m", "proxy"),
        trust_domain="example.org",
        cluster_domain="k8s.example.org",
        control_namespace="mesh",
        identity_addr="identity.example.org:443",
        policy_addr="[fd00::1]:8090",
        capture="agent",
        native_sidecar=False,
        defaults={"log-level": "debug", "skip-outbound-ports": "25"},
    )
    assert len(KEYS) == 11


def test_the_addresses_follow_namespace_and_domain() -> None:
    found = read_mesh(b"{controlNamespace: mesh, clusterDomain: k8s.example.org}")
    assert found.identity == "pillion-identity.mesh.svc.k8s.example.org.:8080"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a: [", "not YAML"),
        (b"- a", "not YAML"),
        (b"{}\n---\n{}", "one document"),
        (b"captrue: agent", "captrue"),
        (b"capture: maybe", "capture: expected"),
        (b"nativeSidecar: maybe", "nativeSidecar: expected bool"),
        (b"image: ''", "image"),
        (b"image: 'a b'", "image"),
        (b"trustDomain: EXAMPLE.org", "trust domain"),
        (b"controlNamespace: a.b", "namespace"),
        (b"clusterDomain: 'a/b'", "clusterDomain"),
        (b"identityAddr: nowhere", "identityAddr: expected HOST:PORT"),
        (b"policyAddr: 'a:0'", "policyAddr"),
        (b"defaults: {log-level: loud}", "defaults.log-level: expected one of debug"),
        (b"defaults: {no-such-option: x}", "defaults.no-such-option"),
        (b"defaults: {opaque-ports: '25'}", "policy controller"),
        (b"defaults: {shutdown-grace: 5}", "defaults"),
    ],
)
def test_wrong_settings_are_refused_at_their_key(text: bytes, said: str) -> None:
    with pytest.raises(InvalidMesh) as caught:
        read_mesh(text)
    assert said in str(caught.value)


@given(st.binary(max_size=60))
def test_any_bytes_give_settings_or_the_one_error(text: bytes) -> None:
    try:
        read_mesh(text)
    except InvalidMesh:
        pass


@pytest.mark.parametrize("settings", [[], ["--set", "agent.enabled=false", "--set", "sidecar.native=false"]])
def test_what_install_writes_is_understood(settings: list[str]) -> None:
    words = [sys.executable, "-m", "cli.main", "install", "--set", "sidecar.defaults.log-level=debug", *settings]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (config,) = [
        document
        for document in yaml.safe_load_all(done.stdout)
        if document and document["kind"] == "ConfigMap" and document["metadata"]["name"] == "pillion-config"
    ]
    found = read_mesh(config["data"]["mesh.yaml"].encode())
    assert found.defaults == {"log-level": "debug"}
    assert (found.capture, found.native_sidecar) == (("init", False) if settings else ("agent", True))
