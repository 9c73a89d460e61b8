"""Which API server this process talks to, and as whom: a pod's service account, or a kubeconfig.

A kubeconfig is read by the official ``kubernetes`` package (merging, client certificates, exec plugins, OIDC), which is imported only
then: it costs 34 MB that a pod need not pay for an address, a token file and a CA file. docs/adr/0007 says why requests go over trio.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import trio

from core.k8s.api import Api
from core.k8s.http import Access

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class NoCluster(Exception):
    """There is no way to an API server; the text says what is missing and what to do."""


@asynccontextmanager
async def connect(kubeconfig: str = "", context: str = "", *, user_agent: str = "pillion") -> AsyncIterator[Api]:
    """An Api for as long as the block lasts; raises NoCluster when nothing says where it is. The first request connects."""
    api = Api(partial(find_access, kubeconfig, context), user_agent)
    try:
        await api.access()
        yield api
    finally:
        with trio.CancelScope(shield=True):
            await api.close()


def find_access(
    kubeconfig: str = "", context: str = "", environ: Mapping[str, str] = os.environ, service_account: Path = SERVICE_ACCOUNT
) -> Access:
    """What is named, else KUBECONFIG, else the pod's service account, else ~/.kube/config; raises NoCluster. Reads files: slow."""
    named = kubeconfig or environ.get("KUBECONFIG", "")
    if named or context:
        return kubeconfig_access(named, context)
    if environ.get("KUBERNETES_SERVICE_HOST"):
        return in_cluster_access(environ, service_account)
    home = Path(environ.get("HOME", "/nonexistent")) / ".kube" / "config"
    if home.exists():
        return kubeconfig_access(str(home), context)
    raise NoCluster("no Kubernetes cluster is configured: set KUBECONFIG, or create ~/.kube/config")


def in_cluster_access(environ: Mapping[str, str] = os.environ, service_account: Path = SERVICE_ACCOUNT) -> Access:
    """The API server as every pod is told it; the kubelet replaces the token file, so it is read anew for each use."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not port.isdigit():
        raise NoCluster("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: this is no pod of a cluster")
    token_file, ca_file = service_account / "token", service_account / "ca.crt"
    try:
        trust = _trust(str(ca_file))
        namespace = (service_account / "namespace").read_text().strip()
        _bearer(token_file)
    except (OSError, ssl.SSLError) as error:
        raise NoCluster(f"the service account in {service_account}: {error} (automountServiceAccountToken must be true)") from error
    return Access(host, int(port), tls=trust, authorization=partial(_bearer, token_file), namespace=namespace)


def kubeconfig_access(path: str = "", context: str = "") -> Access:
    """The cluster and user of a kubeconfig's context; path may be a list as in KUBECONFIG. Raises NoCluster."""
    from kubernetes.client import Configuration
    from kubernetes.config import ConfigException, list_kube_config_contexts, load_kube_config

    configuration = Configuration()
    configuration.proxy = None  # of the environment, which is about the internet
    try:
        load_kube_config(path or None, context or None, client_configuration=configuration, persist_config=False)  # type: ignore[no-untyped-call]
        contexts, active = list_kube_config_contexts(path or None)  # type: ignore[no-untyped-call]
    except (ConfigException, OSError, ValueError) as error:
        raise NoCluster(f"kubeconfig {path or '~/.kube/config'}: {error}") from error
    except Exception as error:  # an open set: the library takes a file of any other shape for one
        raise NoCluster(f"kubeconfig {path or '~/.kube/config'}: this is none ({type(error).__name__})") from error
    if configuration.proxy:
        raise NoCluster(f"kubeconfig {path}: proxy-url is not supported; reach {configuration.host} directly")
    chosen = next((entry for entry in contexts if entry.get("name") == context), active)
    try:
        url = urlsplit(configuration.host)
        trust = _kubeconfig_trust(configuration) if url.scheme == "https" else None
        port = url.port or (443 if trust else 80)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise NoCluster(f"kubeconfig {path}: {error}") from error

    def authorization() -> str:
        settings = configuration.auth_settings()
        return str(settings["BearerToken"]["value"] or "") if "BearerToken" in settings else ""

    return Access(
        url.hostname or "localhost",
        port,
        url.path.rstrip("/"),
        trust,
        configuration.tls_server_name or "",
        authorization,
        str((chosen or {}).get("context", {}).get("namespace") or "default"),
    )


def _kubeconfig_trust(configuration: object) -> ssl.SSLContext:
    trust = _trust(getattr(configuration, "ssl_ca_cert", None))
    if not getattr(configuration, "verify_ssl", True):  # the user's word: insecure-skip-tls-verify
        trust.check_hostname = False
        trust.verify_mode = ssl.CERT_NONE
    certificate = getattr(configuration, "cert_file", None)
    if certificate:
        trust.load_cert_chain(certificate, getattr(configuration, "key_file", None))
    return trust


def _trust(ca_file: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # cluster CAs of many installers lack extensions that strictness asks for
    return context


def _bearer(token_file: Path) -> str:
    return f"Bearer {token_file.read_text().strip()}"
