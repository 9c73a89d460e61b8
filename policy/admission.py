"""Which objects this mesh understands, and the verdict on one that somebody wants to store: valid means the model could be constructed.

Pure. `parse_object` is what sources read with; `admit` is what the admission webhook and ``pillion check`` ask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from core.k8s.fields import InvalidObject, Raw
from core.k8s.objects import Object, group_kind, read_core_object
from policy import gateway, model

_READERS: Mapping[tuple[str, str], Callable[[Raw], Object]] = {
    (model.GROUP, "Server"): model.read_server,
    (model.GROUP, "AuthorizationPolicy"): model.read_authorization_policy,
    (model.GROUP, "MeshTLSAuthentication"): model.read_mesh_tls_authentication,
    (model.GROUP, "NetworkAuthentication"): model.read_network_authentication,
    (model.GATEWAY_GROUP, "HTTPRoute"): gateway.read_http_route,
    (model.GATEWAY_GROUP, "GRPCRoute"): gateway.read_grpc_route,
}
_VERSIONS = {model.GROUP: (model.VERSION,), model.GATEWAY_GROUP: ("v1", "v1beta1")}


def parse_object(raw: Raw) -> Object | None:
    """The typed object, None for a kind that nobody here reads; raises InvalidObject."""
    group, kind = group_kind(raw)
    reader = _READERS.get((group, kind))
    if reader is None:
        if group == model.GROUP:
            known = ", ".join(sorted(kind for group, kind in _READERS if group == model.GROUP))
            raise InvalidObject("kind", f"one of {known}", kind)
        return read_core_object(raw)
    version = str(raw["apiVersion"]).rpartition("/")[2]
    if version not in _VERSIONS[group]:
        raise InvalidObject("apiVersion", " or ".join(f"{group}/{version}" for version in _VERSIONS[group]), str(raw["apiVersion"]))
    return reader(raw)


def admit(raw: Raw) -> str | None:
    """Why the object must not be stored, in one sentence; None when it may."""
    try:
        parse_object(raw)
    except InvalidObject as error:
        return str(error)
    return None
