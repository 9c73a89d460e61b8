"""Read-only views of a running sidecar for `pillion diagnostics`: settings, certificates, policies, endpoints. Never a key or a token."""

from __future__ import annotations

import dataclasses

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from core.credentials import Credentials
from core.runtime.admin import Handler, Request, Response, json_response
from core.runtime.watch import Cell
from proxy.config import Config
from proxy.discover import Discovery


def dump_routes(config: Config, credentials: Cell[Credentials | None], discovery: Discovery) -> dict[tuple[str, str], Handler]:
    """``/config /certs /policy /endpoints`` for the admin port."""

    async def settings(_: Request) -> Response:
        shown = {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return json_response(shown | {"probes": {path: _without_headers(probe) for path, probe in config.probes.items()}})

    async def certs(_: Request) -> Response:
        return json_response(certificates(credentials.value))

    async def policy(_: Request) -> Response:
        known = ((port, state.authorizer) for port, state in sorted(discovery.ports.items()))
        return json_response({str(port): None if found is None else msgspec.to_builtins(found.policy) for port, found in known})

    async def endpoints(_: Request) -> Response:
        known = sorted(discovery.destinations.items())
        return json_response(
            {str(addr): None if state.destination is None else msgspec.to_builtins(state.destination) for addr, state in known}
        )

    return {("GET", "/config"): settings, ("GET", "/certs"): certs, ("GET", "/policy"): policy, ("GET", "/endpoints"): endpoints}


def certificates(credentials: Credentials | None) -> dict[str, object] | None:
    """What we prove ourselves with and believe others by, without the key."""
    if credentials is None:
        return None
    return {
        "identity": credentials.identity.uri,
        "not_before": credentials.not_before,
        "not_after": credentials.not_after,
        "chain": [_certificate(one) for one in x509.load_pem_x509_certificates(credentials.chain_pem)],
        "trust_anchors": [_certificate(one) for one in x509.load_pem_x509_certificates(credentials.bundle_pem)],
        "chain_pem": credentials.chain_pem.decode("ascii"),
    }


def _certificate(certificate: x509.Certificate) -> dict[str, object]:
    return {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "serial": f"{certificate.serial_number:x}",
        "not_before": certificate.not_valid_before_utc.timestamp(),
        "not_after": certificate.not_valid_after_utc.timestamp(),
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
    }


def _without_headers(probe: object) -> object:
    """An app's probe as written, but for the values of header fields: manifests hold credentials there, and every pod may ask us."""
    http = probe.get("httpGet") if isinstance(probe, dict) else None
    if not isinstance(probe, dict) or not isinstance(http, dict) or not http.get("httpHeaders"):
        return probe
    names = [field.get("name") if isinstance(field, dict) else None for field in http["httpHeaders"]]
    return {**probe, "httpGet": {**http, "httpHeaders": [{"name": name, "value": "(not shown)"} for name in names]}}


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float | str | dict) or value is None else _many(value)


def _many(value: object) -> object:
    return [_plain(one) for one in value] if isinstance(value, tuple) and not hasattr(value, "_fields") else str(value)
