"""Checks of certificates: the authority, what every namespace trusts, and what the webhooks present."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cli.check.cluster import NAMESPACE, Cluster, Object, some
from cli.check.installation import UPGRADE, mesh_settings
from cli.check.model import Category, Check, Failed, Skipped
from core.k8s.errors import ApiError, Forbidden, Invalid
from core.k8s.fields import Raw
from core.k8s.serving_pair import InvalidPair, read_pair, trusts
from identity.chains import InvalidBundle, read_bundle_untrusted
from identity.issuer import IssuerInvalid, load_issuer
from injector.fixed import SIDECAR_NAME

_SOON_S = 60 * 86400.0  # Linkerd's checks warn as early: time for a rotation without hurry
_SERVING_SOON_S = 2 * 86400.0
_ANCHORS, _KEY = "pillion-trust-anchors", "ca-bundle.crt"
_HOOKS = {
    "injector": ("mutatingwebhookconfigurations", "pillion-injector"),
    "policy": ("validatingwebhookconfigurations", "pillion-policy"),
}


def decoded(secret: Object) -> dict[str, bytes]:
    """The files of a Secret; what is not base64 is empty."""
    found = {}
    for name, text in (secret.get("data") or {}).items():
        try:
            found[name] = base64.b64decode(text or "", validate=True)
        except binascii.Error:
            found[name] = b""
    return found


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).date().isoformat()


async def _authority(cluster: Cluster) -> dict[str, bytes]:
    secret = await cluster.find("", "v1", "secrets", "pillion-issuer", NAMESPACE)
    if secret is None:
        raise Failed(f"Secret {NAMESPACE}/pillion-issuer is not there", UPGRADE)
    files = decoded(secret)
    missing = [name for name in ("tls.crt", "tls.key", "ca.crt") if not files.get(name)]
    if missing:
        raise Failed(
            f"Secret {NAMESPACE}/pillion-issuer has no {', '.join(missing)} yet", f"kubectl logs -n {NAMESPACE} deploy/pillion-identity"
        )
    return files


async def issuer_can_sign(cluster: Cluster) -> str:
    """Key, chain and anchors fit and are in force."""
    files = await _authority(cluster)
    try:
        issuer, _ = load_issuer(files["tls.crt"], files["tls.key"], files["ca.crt"], cluster.clock())
    except IssuerInvalid as error:
        raise Failed(f"Secret {NAMESPACE}/pillion-issuer: {error}") from None
    return f"until {_day(issuer.not_after)}"


async def issuer_lasts(cluster: Cluster) -> None:
    """Longer than a rotation takes."""
    files = await _authority(cluster)
    _soon("the issuer's certificate", read_bundle_untrusted(files["tls.crt"]), cluster.clock(), _SOON_S)


async def anchors_last(cluster: Cluster) -> None:
    """Longer than a rotation takes."""
    files = await _authority(cluster)
    _soon("a trust anchor", read_bundle_untrusted(files["ca.crt"]), cluster.clock(), _SOON_S)


def _soon(what: str, certificates: list[x509.Certificate], now: float, least_s: float) -> None:
    for certificate in certificates:
        left = certificate.not_valid_after_utc.timestamp() - now
        if left < least_s:
            raise Failed(f"{what} ({certificate.subject.rfc4514_string()}) ends in {left / 86400:.0f} days, on {_day(now + left)}")


async def trusted_everywhere(cluster: Cluster) -> str:
    """Every namespace with meshed pods has the bundle of ours."""
    ours = await _bundle(cluster, NAMESPACE)
    namespaces = {pod["metadata"]["namespace"] for pod in await cluster.pods() if is_meshed(pod)}
    other = [name for name in sorted(namespaces) if await _bundle(cluster, name, missing_is_empty=True) != ours]
    if other:
        raise Failed(f"no ConfigMap {_ANCHORS}, or another one than in {NAMESPACE}: {some(other)}")
    return f"{len(namespaces)} namespaces, {len(ours)} anchors"


async def _bundle(cluster: Cluster, namespace: str, *, missing_is_empty: bool = False) -> set[bytes]:
    found = await cluster.find("", "v1", "configmaps", _ANCHORS, namespace)
    try:
        pem = str(((found or {}).get("data") or {}).get(_KEY, "")).encode()
        return {certificate.public_bytes(encoding=_DER) for certificate in read_bundle_untrusted(pem)}
    except InvalidBundle as error:
        if missing_is_empty:
            return set()
        raise Failed(f"ConfigMap {namespace}/{_ANCHORS}: {error}", f"kubectl logs -n {NAMESPACE} deploy/pillion-identity") from None


def is_meshed(pod: Object) -> bool:
    """Has a sidecar."""
    spec = pod.get("spec") or {}
    return any(item.get("name") == SIDECAR_NAME for item in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])])


# --- webhooks ------------------------------------------------------------------------------------------------------------------------


async def _hook(cluster: Cluster, component: str) -> Object:
    plural, name = _HOOKS[component]
    found = await cluster.find("admissionregistration.k8s.io", "v1", plural, name)
    if found is None:
        raise Failed(f"{plural} {name} is not there", UPGRADE)
    return found


async def _pair(cluster: Cluster, component: str) -> Any:
    secret = await cluster.find("", "v1", "secrets", f"pillion-{component}-tls", NAMESPACE)
    try:
        return read_pair(decoded(secret or {}))
    except InvalidPair as error:
        hint = f"kubectl logs -n {NAMESPACE} deploy/pillion-{component}"
        raise Failed(f"Secret {NAMESPACE}/pillion-{component}-tls: {error}", hint) from None


def certificate_trusted(component: str) -> Callable[[Cluster], Coroutine[Any, Any, str]]:
    """The API server trusts what the webhook presents."""

    async def look(cluster: Cluster) -> str:
        found, pair = await _hook(cluster, component), await _pair(cluster, component)
        for webhook in found.get("webhooks") or []:
            known = decoded({"data": {"ca": (webhook.get("clientConfig") or {}).get("caBundle")}})["ca"]
            if not known:
                raise Failed(f"webhook {webhook.get('name')} has no caBundle, so the API server cannot call it")
            if not trusts(known, pair.ca_pem or pair.certificate_pem):
                raise Failed(f"the caBundle of webhook {webhook.get('name')} is not what Secret pillion-{component}-tls is signed by")
        if pair.not_after <= cluster.clock():
            raise Failed(f"the certificate ended on {_day(pair.not_after)}")
        return f"until {_day(pair.not_after)}"

    return look


def certificate_lasts(component: str) -> Callable[[Cluster], Coroutine[Any, Any, None]]:
    """It is renewed in time."""

    async def look(cluster: Cluster) -> None:
        pair = await _pair(cluster, component)
        if pair.not_after - cluster.clock() < _SERVING_SOON_S:
            raise Failed(f"the certificate of pillion-{component} ends on {_day(pair.not_after)} and was not renewed")

    return look


_PROBE_POD: Raw = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"generateName": "pillion-check-", "namespace": "default", "annotations": {"pillion.dev/inject": "enabled"}},
    "spec": {
        "containers": [
            {
                "name": "app",
                "image": "pillion-check",
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "runAsNonRoot": True,
                    "runAsUser": 1000,
                    "capabilities": {"drop": ["ALL"]},
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
            }
        ]
    },
}


async def injects(cluster: Cluster) -> None:
    """A dry run of a pod comes back with a sidecar."""
    await mesh_settings(cluster)
    try:
        made = await cluster.api.post("/api/v1/namespaces/default/pods", _PROBE_POD, dryRun="All")
    except Forbidden as error:
        if "admission webhook" in error.message:
            raise Failed(error.message) from error
        raise Skipped("you may not create a pod in namespace default, not even as a dry run") from error
    except ApiError as error:
        raise Failed(error.message) from error
    if not is_meshed(made):
        raise Failed("a pod that asks for a sidecar is created without one: the API server does not reach the injector")


PROBE_POLICY: Raw = {
    "apiVersion": "policy.pillion.dev/v1alpha1",
    "kind": "MeshTLSAuthentication",
    "metadata": {"generateName": "pillion-check-", "namespace": "default"},
    "spec": {"identities": ["spiffe://cluster.local/neither/namespace/nor/account"]},
}
"""Passes the schema; only the controller knows what an identity looks like."""


async def validates(cluster: Cluster) -> None:
    """A dry run of a policy that means nothing is refused by us."""
    try:
        await cluster.api.post("/apis/policy.pillion.dev/v1alpha1/namespaces/default/meshtlsauthentications", PROBE_POLICY, dryRun="All")
    except (Forbidden, Invalid, ApiError) as error:
        if 'admission webhook "policy.pillion.dev"' in error.message and "denied the request" in error.message:
            return
        if isinstance(error, Forbidden):
            raise Skipped("you may not create a MeshTLSAuthentication in namespace default, not even as a dry run") from error
        raise Failed(error.message) from error
    raise Failed(
        "a MeshTLSAuthentication with an identity that nobody can have is accepted: the API server does not reach the policy controller"
    )


_DER = Encoding.DER
_LOGS = f"kubectl logs -n {NAMESPACE} deploy/pillion-"

CERTIFICATES = Category(
    "certificates",
    "Certificates",
    (
        Check("issuer", "the issuer can sign, and its chain ends in a trust anchor", "fatal", issuer_can_sign, settles=True),
        Check("issuer-expiry", "the issuer lasts for 60 days or more", "warning", issuer_lasts),
        Check("anchors-expiry", "the trust anchors last for 60 days or more", "warning", anchors_last),
        Check(
            "trust-bundle",
            "every namespace with meshed pods trusts the same anchors",
            "error",
            trusted_everywhere,
            f"{_LOGS}identity",
            settles=True,
        ),
    ),
)
WEBHOOKS = Category(
    "webhooks",
    "Webhooks",
    (
        Check(
            "injector-certificate", "the API server trusts the injector", "error", certificate_trusted("injector"), f"{_LOGS}injector", True
        ),
        Check("injector-certificate-expiry", "the injector's certificate is renewed in time", "warning", certificate_lasts("injector")),
        Check("injector-answers", "a pod that asks for a sidecar gets one (dry run)", "error", injects, f"{_LOGS}injector", True),
        Check(
            "policy-certificate",
            "the API server trusts the policy controller",
            "error",
            certificate_trusted("policy"),
            f"{_LOGS}policy",
            True,
        ),
        Check(
            "policy-certificate-expiry", "the policy controller's certificate is renewed in time", "warning", certificate_lasts("policy")
        ),
        Check("policy-answers", "a policy that means nothing is refused (dry run)", "error", validates, f"{_LOGS}policy", True),
    ),
)
