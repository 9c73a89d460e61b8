"""The HTTPS front of the identity service: the serving certificate and its renewal, hypercorn.

Keeps one TLS context for the life of the process and loads each new certificate into it: connections that are made later present it,
those that exist go on. Called by `__main__`.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import random

import trio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypercorn.config import Config
from starlette.applications import Starlette

from core.k8s import https
from core.names import WorkloadId
from core.runtime import logs
from core.runtime.process import most_files, most_memory
from identity.authority import Authority
from identity.issuer import IssuerExpired
from identity.schedule import renew_after_s, retry_after_s
from identity.wire import POLL_S

_CONNECTION_BYTES = 128 * 1024  # measured: 62 KB after the handshake, 120 KB with the longest head and body that are taken
_FILES_OF_OUR_OWN = 256
_OF_ONE_CLIENT_MAX = 1024  # a pod needs two; behind an address translation stand all pods of a node
_FEW_OF_ONE_CLIENT = 2  # who has no more loses none, however many have come
_LOOK_S = 30.0  # the wall clock may jump: look again at least this often

log = logs.logger("identity")


@dataclass(frozen=True)
class Capacity:
    """connections: every sidecar's poll, and those that come to be certified, for which a fifth is kept."""

    connections: int

    @property
    def polls(self) -> int:
        """Who may wait for news."""
        return self.connections * 4 // 5

    @classmethod
    def of_process(cls) -> Capacity:
        """Three quarters of the memory that this process may use: anybody may connect, and must not have it ended for lack of memory."""
        return cls(max(5, min(most_memory() * 3 // 4 // _CONNECTION_BYTES, most_files() - _FILES_OF_OUR_OWN)))


class ServingCertificate:
    """Our own certificate, signed by our own issuer, inside the context that the listener uses."""

    def __init__(self, authority: Authority, identity: WorkloadId) -> None:
        """Raises IssuerExpired when nothing can be signed."""
        self._authority = authority
        self._identity = identity
        self.context = _context()
        self.not_after = 0.0
        self.renew()

    def renew(self) -> None:
        """A fresh key and certificate from the issuer in force, with its chain."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._authority.sign(key.public_key(), self._identity)
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        # ssl loads from files only: an anonymous one in memory, gone when it is closed.
        fd = os.memfd_create("serving", os.MFD_CLOEXEC)
        with os.fdopen(fd, "wb") as file:
            file.write(key_pem + leaf.chain_pem)
            file.flush()
            self.context.load_cert_chain(f"/proc/self/fd/{fd}")
        self.not_after = leaf.not_after

    async def keep(self) -> None:
        """Renew at 70 % of life and at once when the issuer changes; for ever."""
        trust, failures = self._authority.trust, 0
        while True:
            version, issuer = trust.version, trust.value.issuer.id
            due = self._authority.clock() + renew_after_s(self._authority.clock(), self.not_after, random())
            if failures:
                due = self._authority.clock() + retry_after_s(failures, self.not_after - self._authority.clock(), random())
            while trust.value.issuer.id == issuer and (left := due - self._authority.clock()) > 0:
                with trio.move_on_after(min(left, _LOOK_S)):
                    version = await trust.wait_newer(version)
            try:
                self.renew()
                failures = 0
            except IssuerExpired as error:
                failures += 1
                log.error("serving certificate not renewed", reason=str(error), not_after=self.not_after)


def _context() -> ssl.SSLContext:
    context = https.server_context()  # callers show no certificate: they have a token, and before their first certificate nothing else
    # Clients order the suites (AES-128-GCM first); the ssl module cannot order those of TLS 1.3 itself.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    return context


class _Config(Config):
    """Hypercorn's settings."""

    def __init__(self) -> None:
        self.accesslog = None
        self.errorlog = None
        self.include_server_header = False
        self.h11_max_incomplete_size = 16 * 1024
        self.keep_alive_timeout = 10.0  # also bounds how slowly a request's head may come
        self.read_timeout = int(POLL_S) + 15  # a client is silent while it waits for the answer to its poll
        self.ssl_handshake_timeout = 5.0
        self.graceful_timeout = 2.0
        self.websocket_max_message_size = 1024


async def serve_https(
    application: Starlette,
    context: ssl.SSLContext,
    sockets: list[socket.socket],
    shutdown: Callable[[], Awaitable[None]],
    capacity: Capacity,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until ``shutdown`` returns, then finish what is in work within two seconds."""
    await https.serve_https(
        application,
        context,
        sockets,
        shutdown,
        config=_Config(),
        connections_max=capacity.connections,
        of_one_client_max=_OF_ONE_CLIENT_MAX,
        few_of_one_client=_FEW_OF_ONE_CLIENT,
        task_status=task_status,
    )
