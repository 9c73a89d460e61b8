"""A node as a cluster knows it: an API server over TLS that lists and watches its pods, and a sandbox with a listening sidecar for each.

python node_of_pods.py sandboxes CGROUP UID...      makes them, says so, and ends with its standard input
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

_CLONE_NEWNET = 0x40000000
_SIDECAR_UID, _INBOUND_PORT = 2102, 4143


class ApiServer:
    """Serves a list in pages and a watch without events. account: a folder as the kubelet mounts it into pods. Use `close`."""

    def __init__(self, pods: Sequence[dict[str, Any]], account: Path) -> None:
        from cryptography import x509

        from tests.certs import Authority

        authority = Authority("cluster")
        made = authority.credentials("spiffe://cluster.local/ns/x/sa/x", names=[x509.DNSName("localhost")])
        account.mkdir()
        for name, data in (("ca.crt", authority.bundle_pem), ("token", b"secret"), ("pair", made.key_pem + made.chain_pem)):
            (account / name).write_bytes(data)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(account / "pair")
        self.watching = threading.Event()
        self._over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(list(pods)))
        self._server.daemon_threads = True
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environ(self) -> list[str]:
        """What the kubelet tells every pod, as words for env(1)."""
        return ["KUBERNETES_SERVICE_HOST=localhost", f"KUBERNETES_SERVICE_PORT={self._server.server_address[1]}"]

    def close(self) -> None:
        """End the watch, and everything else."""
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self, pods: list[dict[str, Any]]) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
                assert self.headers["authorization"] == "Bearer secret"
                self.send_response(200)
                if "watch" in query:
                    self.send_header("transfer-encoding", "chunked")
                    self.end_headers()
                    server.watching.set()
                    server._over.wait()
                    self.wfile.write(b"0\r\n\r\n")
                    return
                first, size = int(query.get("continue", "0")), int(query["limit"])
                more = str(first + size) if first + size < len(pods) else ""
                body = json.dumps({"items": pods[first : first + size], "metadata": {"resourceVersion": "9", "continue": more}}).encode()
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


class Sandboxes:
    """A process in a network namespace and a cgroup of its own for each pod, which listens as its sidecar. Use `close`."""

    def __init__(self, cgroup: Path, uids: Sequence[str]) -> None:
        self._cgroup = cgroup
        self._folders = [cgroup / f"pod{uid}" for uid in uids]
        for folder in (cgroup, *self._folders):
            folder.mkdir()
        words = [sys.executable, "-S", __file__, "sandboxes", str(cgroup), *uids]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"listening\n"

    def close(self) -> None:
        """Every process, every cgroup."""
        self._process.communicate()
        for folder in (*self._folders, self._cgroup):
            folder.rmdir()


def _sandbox(cgroup: Path, told: int) -> None:
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    os.setresgid(_SIDECAR_UID, _SIDECAR_UID, _SIDECAR_UID)
    os.setresuid(_SIDECAR_UID, _SIDECAR_UID, _SIDECAR_UID)
    listener = socket.create_server(("::", _INBOUND_PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    os.write(told, b"+")
    signal.pause()
    listener.close()


def _sandboxes(cgroup: Path, uids: Sequence[str]) -> None:
    read, write = os.pipe()
    children = []
    for uid in uids:
        child = os.fork()
        if not child:
            _sandbox(cgroup / f"pod{uid}", write)
            os._exit(0)
        children.append(child)
    ready = 0
    while ready < len(uids):
        ready += len(os.read(read, 4096))
    print("listening", flush=True)
    sys.stdin.read()
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    _sandboxes(Path(sys.argv[2]), sys.argv[3:])
