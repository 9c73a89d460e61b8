"""From manifests to decisions: what the index serves, evaluated as the sidecar evaluates it."""

from __future__ import annotations

import policy_lab as lab
import pytest

from policy.authorize import Client, PortAuthorizer

FRONT = "spiffe://cluster.local/ns/shop/sa/front"
OPS = "spiffe://cluster.local/ns/ops/sa/admin"
WIDE = lab.policy("wide", lab.ref("ServiceAccount", "front"))
ADMIN = lab.route("admin", path="/admin")
ROOT = lab.route("root", path="/")


def narrow(*, inherit: bool) -> lab.Raw:
    return lab.policy("ops", lab.ref("MeshTLSAuthentication", "ops"), at=lab.target("HTTPRoute", "admin"), inherit=inherit)


OPS_ONLY = lab.mesh_tls("ops", refs=[{"kind": "Namespace", "name": "ops"}])


@pytest.mark.parametrize(
    ("objects", "who", "target", "decision"),
    [
        ((), None, b"/", "Permit"),
        ((lab.namespace(default_inbound_policy="all-authenticated"),), None, b"/", "Denied"),
        ((lab.namespace(default_inbound_policy="all-authenticated"),), FRONT, b"/", "Permit"),
        ((lab.server(), WIDE), FRONT, b"/", "Permit"),
        ((lab.server(), WIDE), OPS, b"/", "Denied"),
        ((lab.server(), WIDE, ADMIN, ROOT, narrow(inherit=True), OPS_ONLY), FRONT, b"/admin", "Permit"),
        ((lab.server(), WIDE, ADMIN, ROOT, narrow(inherit=False), OPS_ONLY), FRONT, b"/admin", "Denied"),
        ((lab.server(), WIDE, ADMIN, ROOT, narrow(inherit=False), OPS_ONLY), OPS, b"/admin/x", "Permit"),
        ((lab.server(), WIDE, ADMIN, ROOT, narrow(inherit=False), OPS_ONLY), OPS, b"/", "Denied"),
        ((lab.server(), WIDE, ADMIN, ROOT, narrow(inherit=False)), OPS, b"/admin", "Denied"),
        ((lab.server(), WIDE, ADMIN), FRONT, b"/other", "NoRoute"),
        ((lab.server(), WIDE, ADMIN), FRONT, b"/admin/../x", "BadTarget"),
        ((lab.server(), WIDE, lab.route("admin", path="/admin", filters=[{"type": "URLRewrite"}]), ROOT), FRONT, b"/admin", "Denied"),
    ],
)
def test_manifests_decide_as_documented(objects: tuple[lab.Raw, ...], who: str | None, target: bytes, decision: str) -> None:
    policy = lab.indexed(lab.pod(), *objects).inbound_policy("shop", "cart-0", 8080)
    authorizer = PortAuthorizer(policy, "cluster.local")
    client = authorizer.for_client(Client("10.0.0.9", who, "" if who else "plaintext"))
    found = client.request(b"GET", target, b"cart", tuple(None for _ in authorizer.header_names))
    assert type(found).__name__ == decision
