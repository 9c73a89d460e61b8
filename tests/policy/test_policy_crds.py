"""The CRDs and the model say the same: what the API server stores is what the controller understands, and nothing it defaults differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from policy import model

CRDS = sorted((Path(__file__).parents[2] / "manifests" / "helm" / "templates" / "crds").glob("*.yaml"))
SPECS = {
    "Server": model._ServerSpec,
    "AuthorizationPolicy": model._AuthorizationPolicySpec,
    "MeshTLSAuthentication": model._MeshTLSSpec,
    "NetworkAuthentication": model._NetworksSpec,
}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    crd = yaml.safe_load(path.read_text())
    return crd, crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]


def test_there_is_a_crd_for_each_kind() -> None:
    assert {_read(path)[0]["spec"]["names"]["kind"] for path in CRDS} == set(SPECS)


@pytest.mark.parametrize("path", CRDS, ids=lambda path: path.stem)
def test_names_version_and_fields_are_the_models(path: Path) -> None:
    crd, spec = _read(path)
    names = crd["spec"]["names"]
    assert crd["metadata"]["name"] == f"{names['plural']}.{model.GROUP}" == f"{path.stem}.{model.GROUP}"
    assert [version["name"] for version in crd["spec"]["versions"]] == [model.VERSION]
    fields = SPECS[names["kind"]].__struct_encode_fields__
    assert set(spec["properties"]) == set(fields)


def test_enumerations_and_defaults_are_the_models() -> None:
    _, server = _read(next(path for path in CRDS if path.stem == "servers"))
    assert tuple(server["properties"]["accessPolicy"]["enum"]) == model.ACCESS_POLICIES
    assert tuple(server["properties"]["proxyProtocol"]["enum"]) == tuple(model.PROXY_PROTOCOLS)
    defaults = {name: field["default"] for name, field in server["properties"].items() if "default" in field}
    assert defaults == {"proxyProtocol": model._ServerSpec({}, 1).proxy_protocol, "accessPolicy": model._ServerSpec({}, 1).access_policy}
