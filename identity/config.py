"""The settings of the identity service, from the environment. Pure.

Two sources of everything that must not be lost. ``files``: a private folder, or an issuer given as files (the local runner, any machine).
``kubernetes``: Secrets, shared by any number of replicas; see the package `cluster`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.addrs import ListenAddr
from core.env import InvalidSettings, comma_list, integer, listen_addr, one_of, setting, text
from core.names import DEFAULT_TRUST_DOMAIN, InvalidName, WorkloadId

SERVICE_ACCOUNT = "pillion-identity"
ISSUER_SECRET = "pillion-issuer"
STATE_SECRET = "pillion-identity-state"


def optional_path(value: str) -> Path | None:
    """A path; empty for none."""
    return Path(value.strip()) if value.strip() else None


def _trust_domain(value: str) -> str:
    try:
        return WorkloadId.checked(value.strip(), "ns", "sa").trust_domain
    except InvalidName as error:
        raise ValueError(str(error)) from None


def _namespace(value: str) -> str:
    try:
        return WorkloadId.checked(DEFAULT_TRUST_DOMAIN, value.strip(), "sa").namespace
    except InvalidName as error:
        raise ValueError(str(error)) from None


def token_review(value: str) -> Path | None:
    """``kubernetes`` (None) or ``local:<path of a public key>``."""
    word, _, path = value.strip().partition(":")
    if word == "kubernetes" and not path:
        return None
    if word == "local" and path:
        return Path(path)
    raise ValueError("expected kubernetes, or local:<path of the public key of the tokens, PEM>")


@dataclass(frozen=True)
class Config:
    """Every setting; `core.env.load` reads them."""

    trust_domain: str = setting("PILLION_TRUST_DOMAIN", _trust_domain, default=DEFAULT_TRUST_DOMAIN, reason="of all identities")
    source: str = setting(
        "PILLION_IDENTITY_SOURCE", one_of("files", "kubernetes"), default="files", reason="where keys and trust state are"
    )
    control_namespace: str = setting("PILLION_CONTROL_NAMESPACE", _namespace, default="pillion", reason="our own namespace")
    listen: ListenAddr = setting("PILLION_IDENTITY_LISTEN", listen_addr, default="[::]:8080", reason="where sidecars ask, HTTPS")
    admin_listen: ListenAddr = setting("PILLION_ADMIN_LISTEN", listen_addr, default="[::]:9990", reason="liveness, readiness, metrics")
    admin_socket: Path | None = setting(
        "PILLION_IDENTITY_ADMIN_SOCKET", optional_path, default="", reason="Unix socket for pillion identity rotate; empty for none"
    )
    ca_dir: Path | None = setting(
        "PILLION_CA_DIR",
        optional_path,
        default="",
        reason="private: keys, trust state, ledger; its own CA when none is given",
    )
    issuer_dir: Path | None = setting(
        "PILLION_ISSUER_DIR", optional_path, default="", reason="a given issuer: tls.crt, tls.key, ca.crt; followed live"
    )
    issuer_files: tuple[str, ...] = setting(
        "PILLION_ISSUER_FILES", comma_list(text), default="", reason="a given issuer as three PEM files: certificate,key,anchors"
    )
    bundle_file: Path | None = setting(
        "PILLION_BUNDLE_FILE", optional_path, default="", reason="where to publish the trust bundle for pods that start later"
    )
    pods_file: Path | None = setting(
        "PILLION_PODS_FILE",
        optional_path,
        default="",
        reason="local: uids of the pods that exist, one a line; a rotation waits for no other",
    )
    issuer_secret: str = setting(
        "PILLION_ISSUER_SECRET", text, default="", reason="kubernetes: Secret with a given issuer, followed live; empty: it makes its own"
    )
    pod_name: str = setting("PILLION_POD_NAME", text, default="", reason="kubernetes: of this replica")
    pod_uid: str = setting("PILLION_POD_UID", text, default="", reason="kubernetes: of this replica, for Events")
    token_file: Path | None = setting(
        "PILLION_IDENTITY_TOKEN_FILE", optional_path, default="", reason="kubernetes: our token, by which replicas ask each other"
    )
    tokens: Path | None = setting("PILLION_TOKEN_REVIEW", token_review, default="kubernetes", reason="who knows whose a token is")
    leaf_lifetime_s: int = setting(
        "PILLION_LEAF_LIFETIME_S", integer(30, 7 * 86400), default="86400", unit="s", reason="life of a workload's certificate"
    )
    log_level: str = setting("PILLION_LOG_LEVEL", one_of("debug", "info", "warning", "error"), default="info", reason="of the log")
    log_format: str = setting("PILLION_LOG_FORMAT", one_of("json", "console"), default="json", reason="of the log")

    @property
    def state_secret(self) -> str:
        """kubernetes: the Secret that holds our state; install makes it, empty."""
        return STATE_SECRET if self.issuer_secret == ISSUER_SECRET else ISSUER_SECRET

    @property
    def identity(self) -> WorkloadId:
        """Ours."""
        return WorkloadId.checked(self.trust_domain, self.control_namespace, SERVICE_ACCOUNT)

    def check(self) -> None:
        """What no single setting shows; raises InvalidSettings."""
        found = []
        if self.source == "kubernetes":
            if not self.pod_name or self.token_file is None:
                found.append("PILLION_IDENTITY_SOURCE=kubernetes needs PILLION_POD_NAME and PILLION_IDENTITY_TOKEN_FILE")
            if self.issuer_dir or self.issuer_files or self.ca_dir or self.bundle_file or self.tokens:
                found.append(
                    "PILLION_IDENTITY_SOURCE=kubernetes keeps everything in the cluster: leave out PILLION_CA_DIR, PILLION_ISSUER_DIR, "
                    "PILLION_ISSUER_FILES, PILLION_BUNDLE_FILE and PILLION_TOKEN_REVIEW"
                )
        elif self.issuer_dir is None and not self.issuer_files and self.ca_dir is None:
            found.append("set PILLION_CA_DIR (makes its own CA there) or PILLION_ISSUER_DIR (tls.crt, tls.key, ca.crt)")
        if self.issuer_dir is not None and self.issuer_files:
            found.append("PILLION_ISSUER_DIR and PILLION_ISSUER_FILES exclude each other")
        if self.issuer_files and len(self.issuer_files) != 3:
            found.append("PILLION_ISSUER_FILES: expected three paths, certificate,key,anchors")
        if found:
            raise InvalidSettings(tuple(found))
