"""Workload identity: the only place that knows its syntax.

A workload is named by the SPIFFE URI ``spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`` (SPIFFE-ID section 2).
The same name has a second spelling, `WorkloadId.server_name`, that fits into a TLS server name indication, where a URI is not allowed.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property

_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(?:\.{_LABEL})*"
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")  # SPIFFE-ID 2.1: also underscores and dots anywhere
_NAMESPACE = re.compile(_LABEL)
_SERVICE_ACCOUNT = re.compile(_SUBDOMAIN)
_URI_MAX_BYTES = 2048  # SPIFFE-ID 2.3: implementations must not accept longer ones
_DNS_NAME_MAX = 253
_DNS_LABEL_MAX = 63

DEFAULT_TRUST_DOMAIN = "cluster.local"


class InvalidName(ValueError):
    """A name from outside (certificate, token, setting) that is not a workload identity; the text says which rule it broke."""


@dataclass(frozen=True)
class WorkloadId:
    """Who a workload is: a service account of a namespace in a trust domain.

    Construct it with `parse_workload_id` or `WorkloadId.checked` when any part comes from outside.
    """

    trust_domain: str
    namespace: str
    service_account: str

    @classmethod
    def checked(cls, trust_domain: str, namespace: str, service_account: str) -> WorkloadId:
        """Build an identity from parts of unknown origin; raises InvalidName naming the part that is wrong."""
        if not _TRUST_DOMAIN.fullmatch(trust_domain):
            raise InvalidName(f"trust domain {trust_domain!r}: expected 1 to 255 of a-z 0-9 . - _")
        if len(namespace) > _DNS_LABEL_MAX or not _NAMESPACE.fullmatch(namespace):
            raise InvalidName(f"namespace {namespace!r}: expected a DNS label of at most 63 characters")
        if len(service_account) > _DNS_NAME_MAX or not _SERVICE_ACCOUNT.fullmatch(service_account):
            raise InvalidName(f"service account {service_account!r}: expected a DNS subdomain of at most 253 characters")
        return cls(trust_domain, namespace, service_account)

    @cached_property
    def uri(self) -> str:
        """``spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>``"""
        return f"spiffe://{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    @cached_property
    def server_name(self) -> str:
        """The name a sidecar puts into SNI to address this workload: ``<sa>.<ns>.sa.pillion.<trust-domain>``.

        Unambiguous because a namespace holds no dot. A name that DNS syntax cannot carry (a label over 63 characters, more than
        253 in all, an underscore) is replaced by a digest of the URI: SNI only says who is addressed, the certificate proves it.
        """
        name = f"{self.service_account}.{self.namespace}.sa.pillion.{self.trust_domain}"
        labels = name.split(".")
        if len(name) <= _DNS_NAME_MAX and all(re.fullmatch(_LABEL, label) and len(label) <= _DNS_LABEL_MAX for label in labels):
            return name
        return f"{hashlib.sha256(self.uri.encode()).hexdigest()[:40]}.digest.sa.pillion.invalid"

    def __str__(self) -> str:
        return self.uri


def parse_workload_id(uri: str) -> WorkloadId:
    """Read a SPIFFE URI from a certificate, token or policy; raises InvalidName for everything that is not exactly our shape.

    >>> parse_workload_id("spiffe://cluster.local/ns/shop/sa/cart").namespace
    'shop'
    """
    if len(uri.encode("utf-8", "replace")) > _URI_MAX_BYTES:
        raise InvalidName(f"identity URI is longer than {_URI_MAX_BYTES} bytes")
    parts = uri.split("/")
    if len(parts) != 7 or parts[0] != "spiffe:" or parts[1] or parts[3] != "ns" or parts[5] != "sa":
        raise InvalidName(f"identity {uri!r}: expected spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>")
    return WorkloadId.checked(parts[2], parts[4], parts[6])
