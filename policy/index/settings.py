"""Cluster-wide facts the index needs beside the objects. Pure values."""

from __future__ import annotations

from dataclasses import dataclass

from core.names import DEFAULT_TRUST_DOMAIN

ALL_NETWORKS = ("0.0.0.0/0", "::/0")
CLUSTER_NETWORKS = ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16", "fd00::/8")  # Linkerd's clusterNetworks


@dataclass(frozen=True)
class IndexSettings:
    """default_inbound_policy: for pods without the annotation, one of policy.model.ACCESS_POLICIES.

    opaque_ports: ports of server-speaks-first protocols, opaque unless an annotation says otherwise (Linkerd's default list).
    """

    trust_domain: str = DEFAULT_TRUST_DOMAIN
    default_inbound_policy: str = "all-unauthenticated"
    cluster_networks: tuple[str, ...] = CLUSTER_NETWORKS
    opaque_ports: str = "25,587,3306,4444,5432,6379,9300,11211"
