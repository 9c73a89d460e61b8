"""The runner's side of the control socket: status, logs, exec, apply, delete, down. Called by local.supervisor.

Whoever reaches the socket may do everything: it is its owner's alone from the moment it is there.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable
from pathlib import Path

import trio

from core.k8s.fields import InvalidObject
from core.k8s.manifests import InvalidManifest, read_manifests
from core.runtime.private_socket import listen_privately
from local import protocol, workloads
from local.mesh import Mesh
from local.objects import Manifest, read_manifest
from local.pod import Pod
from local.process import Stdio

_FDS = 3


async def serve(
    path: Path,
    mesh: Mesh,
    report: Callable[[], protocol.MeshStatus],
    down: Callable[[], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """For ever: accept on ``path``. down: begins the end of the runner."""
    listener = trio.socket.from_stdlib_socket(listen_privately(path, 64))
    task_status.started()
    control = _Control(mesh, report, down)
    async with trio.open_nursery() as nursery:
        while True:
            connection, _ = await listener.accept()
            nursery.start_soon(control.converse, connection)


class _Control:
    def __init__(self, mesh: Mesh, report: Callable[[], protocol.MeshStatus], down: Callable[[], None]) -> None:
        self._mesh, self._report, self._down = mesh, report, down

    async def converse(self, connection: trio.socket.SocketType) -> None:
        """One request, one answer."""
        with connection:
            fds: list[int] = []
            try:
                line = await _read_request(connection, fds)
                try:
                    answer = await self._answer(protocol.decode_request(line), connection, fds)
                except protocol.BadMessage as error:
                    answer = protocol.Failed((f"the runner did not understand this command ({error}): are both of one version?",))
                except (LookupError, OSError) as error:
                    answer = protocol.Failed((str(error.args[-1]) if error.args else repr(error),))
                if answer is not None:
                    await _send(connection, protocol.encode(answer))
            except OSError:
                pass  # the command went away; nobody is left to tell
            finally:
                for fd in fds:
                    os.close(fd)

    async def _answer(self, request: protocol.Request, connection: trio.socket.SocketType, fds: list[int]) -> protocol.Answer | None:
        if isinstance(request, protocol.Status):
            return self._report()
        if isinstance(request, protocol.Logs):
            return self._logs(request)
        if isinstance(request, protocol.Exec):
            return await self._exec(request, connection, fds)
        if isinstance(request, protocol.ApplyText):
            return self._apply(request)
        if isinstance(request, protocol.DeleteText):
            return self._delete(request)
        if isinstance(request, protocol.Attend):
            await _hang_up(connection)
        self._down()
        if isinstance(request, protocol.Down):
            await trio.sleep_forever()  # the connection closes when nothing is left: that is the answer
        return None

    def _find(self, namespace: str, name: str) -> list[Pod]:
        plans = {pod.plan.ref: pod for pod in self._mesh.pods.values()}
        found = [plans[plan.ref] for plan in workloads.match_workload([pod.plan for pod in plans.values()], namespace, name)]
        if not found:
            others = [(pod.plan.ref.namespace, pod.plan.owner.name) for pod in plans.values()]
            raise LookupError(f"no pod or workload {name!r} in namespace {namespace}; try {workloads.who_else(others, namespace, name)}")
        return found

    def _logs(self, request: protocol.Logs) -> protocol.LogFiles:
        files = []
        for pod in self._find(request.namespace, request.pod):
            names = [container["name"] for key in ("initContainers", "containers") for container in pod.raw["spec"].get(key) or []]
            chosen = [name for name in names if request.container in (None, name)]
            if not chosen:
                raise LookupError(f"pod {pod.plan.ref.name} has no container {request.container} (it has: {', '.join(names)})")
            if request.container is None:
                chosen = [container["name"] for container in pod.raw["spec"]["containers"]]
            files += [(f"{pod.plan.ref.name}/{name}", str(pod.log_path(name))) for name in chosen]
        return protocol.LogFiles(tuple(files))

    async def _exec(self, request: protocol.Exec, connection: trio.socket.SocketType, fds: list[int]) -> protocol.Answer:
        if len(fds) != _FDS:
            return protocol.Failed(("exec came without its three file descriptors",))
        found = self._find(request.namespace, request.pod)
        pod = next((pod for pod in found if pod.ready), found[0])
        process = await pod.exec(request.container, request.argv, request.env, Stdio(*fds))
        for fd in fds:
            os.close(fd)  # or a pipe of the caller never ends while the command's children hold nothing
        fds.clear()
        code: int | None = None
        async with trio.open_nursery() as nursery:

            async def until_hung_up() -> None:
                await _hang_up(connection)
                process.kill()

            nursery.start_soon(until_hung_up)
            try:
                code = await process.wait()
            except BaseException:
                await process.end()
                raise
            nursery.cancel_scope.cancel()
        return protocol.Exited(code)

    def _apply(self, request: protocol.ApplyText) -> protocol.Answer:
        manifests, reasons, lines = _read(request.text, request.where, is_json=request.is_json)
        if reasons:
            return protocol.Failed(tuple(reasons))
        for manifest in manifests:
            known = manifest.ref in self._mesh.manifests
            self._mesh.apply(manifest)
            lines.append(f"{manifest.ref} {'configured' if known else 'created'}")
        return protocol.Done(tuple(lines))

    def _delete(self, request: protocol.DeleteText) -> protocol.Answer:
        manifests, reasons, lines = _read(request.text, request.where, is_json=request.is_json)
        missing = [manifest for manifest in manifests if not self._mesh.delete(manifest.ref)]
        lines += [f"{manifest.ref} deleted" for manifest in manifests if manifest not in missing]
        reasons += [f"{manifest.ref} does not exist" for manifest in missing]
        return protocol.Failed((*lines, *reasons)) if reasons else protocol.Done(tuple(lines))


def _read(text: str, where: str, *, is_json: bool) -> tuple[list[Manifest], list[str], list[str]]:
    """(objects, refusals, remarks) of a manifest's text."""
    try:
        documents = read_manifests(text.encode(), is_json=is_json)
    except InvalidManifest as error:
        return [], [f"{where}: {error}"], []
    if not documents:
        return [], [f"{where}: expected objects, found none"], []
    manifests, reasons, lines = [], [], []
    for raw in documents:
        try:
            manifest = read_manifest(raw)
        except InvalidObject as error:
            name = (raw.get("metadata") or {}).get("name") if isinstance(raw.get("metadata"), dict) else None
            reasons.append(f"{where} ({raw.get('kind')} {name}): {error}")
            continue
        if manifest is None:
            lines.append(f"{raw.get('kind')} {raw.get('metadata', {}).get('name')} ignored: it means nothing without Kubernetes")
        else:
            manifests.append(manifest)
    return manifests, reasons, lines


async def _read_request(connection: trio.socket.SocketType, fds: list[int]) -> bytes:
    """One line; file descriptors that come with it are added to ``fds``."""
    line = b""
    while not line.endswith(b"\n"):
        room = socket.CMSG_SPACE(_FDS * array.array("i").itemsize)
        chunk, ancillary, _, _ = await connection.recvmsg(64 * 1024, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.extend(array.array("i", data[: len(data) - len(data) % 4]))
        line += chunk
        if not chunk or len(line) > protocol.MAX_LINE_BYTES:
            raise ConnectionError("the request was not one line")
    return line


async def _send(connection: trio.socket.SocketType, data: bytes) -> None:
    while data:
        data = data[await connection.send(data) :]


async def _hang_up(connection: trio.socket.SocketType) -> None:
    """Returns when the other side is gone."""
    try:
        while await connection.recv(1024):
            pass
    except OSError:
        pass  # reset: gone as well
