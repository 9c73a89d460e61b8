"""Puts the identity service together and runs it: the only module here that constructs everything. Called by `__main__`."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import trio

from core.k8s.api import Api
from core.k8s.cluster import in_cluster_access
from core.runtime import logs
from core.runtime.admin import AdminServer, standard_routes
from core.runtime.drain import Drain, drain_on_signals
from core.runtime.listen import listen, trio_listener
from identity.admin import answer, listen_admin, serve_admin
from identity.admin_wire import Answer
from identity.authority import Authority
from identity.config import Config
from identity.given import GivenFiles, follow_files
from identity.local_tokens import LocalReviewer
from identity.metrics import exposition
from identity.serve import Capacity, ServingCertificate, serve_https
from identity.service import IdentityService
from identity.store import Store, replace_file
from identity.tokens import KubernetesReviewer, TokenReviewer

_TEND_EVERY_S = 10.0

log = logs.logger("identity")


def authority_of(config: Config, files: GivenFiles | None) -> Authority:
    """The authority that the settings describe. Raises StoreUnsafe, IssuerInvalid or OSError."""
    store = Store(config.ca_dir) if config.ca_dir else None
    if store is not None:
        store.lock()
    if files is None:
        return Authority.self_made(config.trust_domain, store, lifetime_s=config.leaf_lifetime_s)
    issuer, anchors = files.read(time.time())
    return Authority.given(config.trust_domain, issuer, anchors, store, lifetime_s=config.leaf_lifetime_s)


def files_of(config: Config) -> GivenFiles | None:
    """Where a given issuer lies, None when we make our own."""
    if config.issuer_dir is not None:
        return GivenFiles.in_directory(config.issuer_dir)
    if config.issuer_files:
        certificate, key, anchors = (Path(path) for path in config.issuer_files)
        return GivenFiles(certificate, key, anchors)
    return None


def reviewer_of(config: Config) -> TokenReviewer:
    """Who reviews tokens. Raises OSError when its files are not there, NoCluster."""
    if config.tokens is not None:
        return LocalReviewer(config.tokens.read_bytes(), config.trust_domain)
    access = in_cluster_access()
    return KubernetesReviewer(Api(lambda: access), config.trust_domain)


async def run(config: Config) -> None:
    """Serve until SIGTERM."""
    files = files_of(config)
    authority = authority_of(config, files)
    capacity = Capacity.of_process()
    service = IdentityService(authority, reviewer_of(config), polls_max=capacity.polls)
    serving = ServingCertificate(authority, config.identity)
    drain = Drain()
    drain.subscribe(service.drain)
    routes = standard_routes(
        not_ready=lambda: _not_ready(authority, drain), metrics=lambda: exposition(authority, service, serving), shutdown=drain.start
    )
    admin = AdminServer(routes)
    sock, admin_sock = listen(config.listen), listen(config.admin_listen)
    async with trio.open_nursery() as nursery:
        await nursery.start(drain_on_signals, drain)
        await nursery.start(admin.serve, [trio_listener(admin_sock)])
        if config.admin_socket is not None:
            nursery.start_soon(serve_admin, partial(_answer, authority, config.pods_file), listen_admin(config.admin_socket))
        if files is not None:
            nursery.start_soon(follow_files, files, authority)
        if config.bundle_file is not None:
            nursery.start_soon(publish_bundle, authority, config.bundle_file)
        nursery.start_soon(serving.keep)
        nursery.start_soon(tend, authority)
        trust = authority.trust.value
        log.info("serving", listen=str(config.listen), identity=config.identity.uri, generation=trust.generation, issuer=trust.issuer.id)
        await serve_https(service.application(), serving.context, [sock], drain.wait_started, capacity)
        nursery.cancel_scope.cancel()
    if config.admin_socket is not None:
        config.admin_socket.unlink(missing_ok=True)


async def _answer(authority: Authority, pods_file: Path | None, line: bytes) -> Answer:
    if pods_file is not None and (pods := pods_of(pods_file)):
        authority.ledger.keep(pods)
    return answer(authority, line)


def pods_of(path: Path) -> frozenset[str]:
    """The uids in a file, one a line; none when that is not known."""
    try:
        return frozenset(path.read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError):
        return frozenset()


async def publish_bundle(authority: Authority, path: Path) -> None:
    """Keep a file that everybody may read equal to the trust bundle; for ever."""
    while True:
        version = authority.trust.version
        try:
            publish(path, authority.trust.value.bundle_pem)
        except OSError as error:
            log.error("trust bundle not published", path=str(path), reason=str(error))
        with trio.move_on_after(_TEND_EVERY_S):
            await authority.trust.wait_newer(version)


def publish(path: Path, bundle_pem: bytes) -> None:
    """Replace the file when it differs; raises OSError."""
    if not path.exists() or path.read_bytes() != bundle_pem:
        replace_file(path, bundle_pem, 0o644)


async def tend(authority: Authority) -> None:
    """Housekeeping; for ever."""
    while True:
        try:
            authority.tend()
        except OSError as error:
            log.error("housekeeping failed, will be tried again", reason=str(error))
        await trio.sleep(_TEND_EVERY_S)


def _not_ready(authority: Authority, drain: Drain) -> list[str]:
    reasons = [f"draining: {drain.reason}"] if drain.started else []
    if authority.issuer.not_after <= authority.clock():
        reasons.append("the issuer's chain has expired: renew the issuer")
    return reasons
