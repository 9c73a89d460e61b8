"""The pods of this node as a cluster knows them: the API server says which exist and want what, /proc says where they are.

No CRI and no kubelet: a list and watch of the pods with our node's name, in a thread; a pod's processes are found by the ``pod<uid>`` in
their cgroup. Speaks HTTP itself, because any client library is bigger than the agent. Called by ebpf.agent with ``--node``.

Needs: list and watch on pods, ``hostPID: true``, /proc and the pods' cgroups as the node has them.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from core.runtime import memory
from ebpf import procs
from ebpf.facts import facts_untrusted, has_ended
from ebpf.pods import Pods
from ebpf.resident import drop_file_pages
from ebpf.wire import BadMessage, PodFacts

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_PAGE = 8  # pods of one list request: bounds the memory for JSON
_LINE_BYTES_MAX = 4 << 20  # an object in etcd has 1.5 MB at most
_WATCH_S = 300
_RETRY_MAX_S = 5.0  # new pods wait for us as soon as the API server is back


class ApiFailed(RuntimeError):
    """The API server did not answer as it should; the text says what it did."""


class Gone(ApiFailed):
    """The version to watch from is too old: list again."""


# --- the API server -----------------------------------------------------------------------------------------------------------------------


class Api:
    """GET requests with the pod's own service account. A new connection each: a watch occupies one for minutes."""

    def __init__(self, account: Path = _ACCOUNT, environ: Mapping[str, str] = os.environ) -> None:
        self._account = account
        try:
            self._address = (environ["KUBERNETES_SERVICE_HOST"], int(environ["KUBERNETES_SERVICE_PORT"]))
        except (KeyError, ValueError):
            raise ApiFailed("KUBERNETES_SERVICE_HOST and _PORT are not set: --node is for an agent in a cluster") from None

    def lines(self, path: str, timeout_s: float) -> Iterator[bytes]:
        """The lines of an answer with status 200, as they come; raises ApiFailed, Gone. timeout_s: of silence."""
        try:
            context = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
            token = (self._account / "token").read_text(encoding="ascii").strip()
            with socket.create_connection(self._address, timeout=10) as plain:
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                with context.wrap_socket(plain, server_hostname=self._address[0]) as stream:
                    stream.settimeout(timeout_s)
                    host = f"[{self._address[0]}]" if ":" in self._address[0] else self._address[0]
                    head = f"GET {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\naccept: application/json\r\n"
                    stream.sendall(f"{head}user-agent: pillion-agent\r\nconnection: close\r\n\r\n".encode())
                    with stream.makefile("rb") as file:
                        file.peek(1)  # with the first bytes of the answer session tickets were read: nothing is left of the handshake
                        drop_file_pages()  # of OpenSSL 4 MB, which only handshakes use; a watch lasts for minutes
                        yield from answer_lines_untrusted(file)
        except (OSError, ValueError) as error:
            raise ApiFailed(f"{self._address[0]}: {error}") from None


def answer_lines_untrusted(file: BinaryIO) -> Iterator[bytes]:
    """The body of one HTTP/1.1 answer, line by line; raises ApiFailed, Gone, OSError."""
    words = file.readline(4096).split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1."):
        raise ApiFailed("the API server did not answer in HTTP/1.1")
    chunked, length = False, None
    for _ in range(200):
        line = file.readline(16384).strip().lower()
        if not line:
            break
        name, _, value = line.partition(b":")
        chunked = chunked or (name == b"transfer-encoding" and b"chunked" in value)
        if name == b"content-length" and value.strip().isdigit():
            length = int(value)
    pieces = _chunks(file) if chunked else _rest(file, length)
    if words[1] == b"410":
        raise Gone("the version is too old")
    if words[1] != b"200":
        said = b"".join(piece for piece, _ in zip(pieces, range(4), strict=False))[:300]
        raise ApiFailed(f"the API server answered {words[1].decode('ascii', 'replace')}: {said.decode(errors='replace')}")
    buffered = b""
    for piece in pieces:
        buffered += piece
        while b"\n" in buffered:
            line, _, buffered = buffered.partition(b"\n")
            yield line
        if len(buffered) > _LINE_BYTES_MAX * 8:
            raise ApiFailed("an answer of the API server is too long")
    if buffered:
        yield buffered


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while True:
        size_text = file.readline(100).partition(b";")[0].strip()
        try:
            size = int(size_text, 16)
        except ValueError:
            raise ApiFailed("the API server's answer ended in the middle") from None
        if not 0 < size <= _LINE_BYTES_MAX * 8:
            if size == 0:
                return
            raise ApiFailed("a chunk of the API server's answer has no sensible size")
        data = file.read(size)
        if len(data) < size:
            raise ApiFailed("the API server's answer ended in the middle")
        file.readline(4)
        yield data


def _rest(file: BinaryIO, length: int | None) -> Iterator[bytes]:
    left = length if length is not None else 1 << 62
    while left > 0 and (data := file.read(min(left, 65536))):
        left -= len(data)
        yield data


# --- the source ---------------------------------------------------------------------------------------------------------------------------


class ClusterPods:
    """Keeps `wanted` (uid -> facts) up to date in a thread; `apply` brings it to the agent's pods, in the agent's own thread."""

    def __init__(self, node: str, wake: Callable[[], None], api: Api | None = None) -> None:
        self._node, self._wake = node, wake
        self._api = api
        self._lock = threading.Lock()
        self._wanted: dict[str, PodFacts] = {}
        self._living: set[str] = set()
        self._applied: dict[str, PodFacts] = {}
        self._refused: dict[str, str] = {}
        self.synced = False
        self.failure = ""

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._run, name="cluster-pods", daemon=True).start()

    def _run(self) -> None:
        pause_s = 1.0
        while True:
            try:
                self._api = self._api or Api()
                version = self.list_once()
                self.failure, pause_s = "", 1.0
                while True:
                    version = self.watch_once(version)
            except Gone:
                continue
            except ApiFailed as error:
                self.failure = str(error)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self.failure = f"the API server's answer cannot be understood: {error!r}"
            time.sleep(pause_s * (0.5 + os.urandom(1)[0] / 510))
            pause_s = min(pause_s * 2, _RETRY_MAX_S)

    def list_once(self) -> str:
        """All pods of the node, in pages; returns the version to watch from."""
        assert self._api is not None
        found: dict[str, PodFacts] = {}
        refused: dict[str, str] = {}
        living: set[str] = set()
        selector = quote(f"spec.nodeName={self._node}")
        token = ""
        while True:
            path = f"/api/v1/pods?fieldSelector={selector}&limit={_PAGE}" + (f"&continue={quote(token)}" if token else "")
            page = json.loads(b"\n".join(self._api.lines(path, 30)))
            for pod in page["items"]:
                self._take(pod, found, refused, living)
            token = page["metadata"].get("continue") or ""
            if not token:
                break
        with self._lock:
            self._wanted, self._refused, self._living, self.synced = found, refused, living, True
        self._wake()
        version: str = page["metadata"]["resourceVersion"]
        del page
        memory.give_back()
        return version

    def watch_once(self, version: str) -> str:
        """Changes since a version, until the server ends the watch; returns the last version. Raises Gone, ApiFailed."""
        assert self._api is not None
        path = f"/api/v1/pods?fieldSelector={quote(f'spec.nodeName={self._node}')}&watch=1&allowWatchBookmarks=true"
        for line in self._api.lines(f"{path}&resourceVersion={quote(version)}&timeoutSeconds={_WATCH_S}", _WATCH_S + 30):
            event = json.loads(line)
            kind, pod = event["type"], event["object"]
            if kind == "ERROR":
                raise Gone("watch") if pod.get("code") == 410 else ApiFailed(f"watch: {pod.get('message')}")
            version = pod["metadata"]["resourceVersion"]
            if kind == "BOOKMARK":
                continue
            with self._lock:
                self._wanted.pop(pod["metadata"]["uid"], None)
                self._refused.pop(pod["metadata"]["uid"], None)
                self._living.discard(pod["metadata"]["uid"])
                if kind != "DELETED":
                    self._take(pod, self._wanted, self._refused, self._living)
            self._wake()
        return version

    def _take(self, pod: Mapping[str, Any], found: dict[str, PodFacts], refused: dict[str, str], living: set[str]) -> None:
        if not has_ended(pod):
            living.add(pod["metadata"]["uid"])
        try:
            facts = facts_untrusted(pod)
        except BadMessage as error:
            refused[pod["metadata"]["uid"]] = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}: {error}"
            return
        if facts is not None:
            found[facts.id] = facts

    def apply(self, pods: Pods) -> bool:
        """Register what appeared, unregister what is gone; returns whether a pod is still without namespace. Never blocks on the API.

        A pod that is captured stays so while it lives, whatever becomes of its annotations: edited ones that cannot be understood, or are
        no injected pod's any more, must not let its app around the sidecar.
        """
        with self._lock:
            if not self.synced:
                return False
            wanted, living = dict(self._wanted), set(self._living)
            for uid, why in self._refused.items():
                pods.failures[uid] = why
        for uid in [uid for uid in pods.failures if uid != "state" and uid not in wanted and uid not in self._refused]:
            del pods.failures[uid]
        for uid in [uid for uid in pods.pods if uid not in living]:
            pods.unregister(uid)
            self._applied.pop(uid, None)
        changed = {uid: facts for uid, facts in wanted.items() if uid not in pods.pods or self._applied.get(uid) != facts}
        members = procs.members_of_pods(changed) if changed else {}
        registered = [self._register(pods, facts, members[uid]) for uid, facts in changed.items()]
        if any(registered):
            drop_file_pages()
        return not all(registered)

    def _register(self, pods: Pods, facts: PodFacts, pids: list[int]) -> bool:
        for pid in pids:
            try:
                netns = procs.open_netns(pid)
            except OSError:
                continue  # it ended meanwhile
            try:
                pods.register(facts, netns)
            except (OSError, BadMessage) as error:
                pods.failures[facts.id] = f"{facts.namespace}/{facts.name}: {error}"
                return False
            finally:
                os.close(netns)
            pods.failures.pop(facts.id, None)
            self._applied[facts.id] = facts
            return True
        return False  # its sandbox does not exist yet
