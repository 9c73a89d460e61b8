"""`pillion local`: the mesh on one machine. Mounted by the command line as the group ``local``.

Exit codes: 0 done, 1 not done (with the reasons on stderr), 2 wrong usage, 130 interrupted; `exec` passes on the command's own.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence

import click

from local import client, protocol
from local.state import BadName


def _fail(*reasons: str, next_step: str = "", code: int = 1) -> click.exceptions.Exit:
    for reason in reasons:
        click.echo(f"error: {reason}", err=True)
    if next_step:
        click.echo(f"  try: {next_step}", err=True)
    return click.exceptions.Exit(code)


def _ask(name: str, request: protocol.Request, fds: tuple[int, ...] = ()) -> protocol.Answer:
    try:
        answer = client.ask(name, request, fds)
    except client.NotRunning as error:
        raise _fail(str(error), next_step=error.next_step) from None
    except (BadName, protocol.BadMessage) as error:
        raise _fail(str(error)) from None
    if isinstance(answer, protocol.Failed):
        raise _fail(*answer.reasons)
    return answer


class _Folder(click.Path):
    """A folder; who names a file in it, as kubectl wants it, is told so."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> str:
        if os.path.isfile(value):
            self.fail(f"{os.fspath(value)} is a file: name its folder, {os.path.dirname(value) or '.'}", param, ctx)
        return str(super().convert(value, param, ctx))


_FOLDER = _Folder(exists=True, file_okay=False)
_CAPTURE = click.Choice(["auto", "nft", "ebpf"])
_name = click.option("--name", default="default", show_default=True, help="Which mesh, when several run on this machine.")
_namespace = click.option("-n", "--namespace", default="default", show_default=True, help="The pod's namespace.")
_output = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)


@click.group("local")
def local() -> None:
    """Run a mesh on this machine: manifests in, pods as network namespaces, no Kubernetes."""


@local.command()
@click.option("-f", "--file", "folder", required=True, type=_FOLDER, help="Folder with manifests; edits take effect.")
@click.option("--detach", is_flag=True, help="Return when all pods are ready.")
@click.option("--capture", type=_CAPTURE, default="auto", show_default=True, help="How traffic is led to the sidecars.")
@click.option("--timeout", default=120.0, show_default=True, help="Seconds to wait until all pods are ready.")
@_name
def up(folder: str, detach: bool, capture: str, timeout: float, name: str) -> None:
    """Start everything in a folder and wait until all pods are ready."""
    if capture == "ebpf" and os.geteuid() != 0:
        raise _fail(
            "--capture ebpf: only root may load programs into the kernel; use --capture nft (or auto, which means nft without root)"
        )
    try:
        client.start(name, folder, capture)
        click.echo("images are ignored: every container runs its command on this machine's file system", err=True)
        if not detach:
            _attend(name, timeout)
            return
        status = client.wait_ready(name, timeout, _waiting)
    except (client.CannotStart, client.NotRunning, BadName) as error:
        raise _fail(str(error)) from None
    except KeyboardInterrupt:
        if detach and client.answers(name):
            raise _fail("interrupted; the mesh keeps running", next_step=f"pillion local down --name {name}", code=130) from None
        with contextlib.suppress(client.NotRunning):
            client.end(name)
        raise _fail("interrupted; the mesh is ended", code=130) from None
    if not status.ready:
        late = "everything else is ready" if status.waits_for_edits else f"not everything was ready within {timeout:g} s"
        late += "; it keeps running"
        raise _fail(*status.reasons, late, next_step=f"pillion local status --name {name}, or pillion local down --name {name}")
    click.echo(f"{len(status.pods)} pods ready" + ("" if status.pods else f": no manifest in {folder} asks for one"))


def _waiting(reason: str) -> None:
    click.echo(f"waiting: {reason}", err=True)


def _attend(name: str, timeout_s: float) -> None:
    """Stay until Ctrl-C; the mesh ends with this process, however that ends."""
    with client.connect(name) as lease:
        lease.sendall(protocol.encode(protocol.Attend()))
        status = client.wait_ready(name, timeout_s, _waiting)  # Ctrl-C before its end is `up`'s to tell: not done
        try:
            for reason in status.reasons:
                click.echo(f"error: {reason}", err=True)
            click.echo(f"{sum(pod.ready for pod in status.pods)} of {len(status.pods)} pods ready; Ctrl-C ends the mesh", err=True)
            while lease.recv(1):
                pass
        except KeyboardInterrupt:
            client.end(name)


@local.command()
@_output
def check(output: str) -> None:
    """Say what this machine lacks for running a mesh.

    Exit code 1 when something is missing.
    """
    from local.check import check as check_machine
    from local.check import is_fatal

    findings = check_machine()
    if output == "json":
        click.echo(
            protocol.as_json([{"name": finding.name, "ok": not finding.missing, "missing": finding.missing} for finding in findings])
        )
    else:
        for finding in findings:
            click.echo(f"{'missing' if finding.missing else 'ok     '}  {finding.name}{': ' + finding.missing if finding.missing else ''}")
    if any(map(is_fatal, findings)):
        raise click.exceptions.Exit(1)


@local.command()
@_name
def down(name: str) -> None:
    """End the mesh: every process, namespace, mount and rule of it."""
    try:
        client.end(name)
    except client.NotRunning as error:
        raise _fail(str(error), next_step=error.next_step) from None
    except BadName as error:
        raise _fail(str(error)) from None
    click.echo("down")


@local.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_namespace
@click.option("-c", "--container", default=None, help="Default: the first that is not a sidecar.")
@_name
@click.argument("pod")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def exec_(namespace: str, container: str | None, name: str, pod: str, command: tuple[str, ...]) -> None:
    """Run a command in a pod as its app's user.

    POD may be the name of a Deployment. The exit code is the command's.
    """
    container, command = _late_options(container, command)
    if not command:
        raise click.UsageError("name a command after POD: pillion local exec POD -- CMD...")
    env = {key: os.environ[key] for key in ("TERM",) if key in os.environ}
    answer = _ask(name, protocol.Exec(namespace, pod, container, command, env), (0, 1, 2))
    assert isinstance(answer, protocol.Exited)
    sys.exit(answer.code)


def _late_options(container: str | None, words: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """``POD -c C -- CMD``, as kubectl allows."""
    if len(words) > 2 and words[0] in ("-c", "--container"):
        container, words = words[1], words[2:]
    return container, words[1:] if words[:1] == ("--",) else words


@local.command()
@_namespace
@click.option("-c", "--container", default=None, help="Default: all but sidecars and init containers.")
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C.")
@_name
@click.argument("pod")
def logs(namespace: str, container: str | None, follow: bool, name: str, pod: str) -> None:
    """Print what a pod's containers wrote."""
    answer = _ask(name, protocol.Logs(namespace, pod, container))
    assert isinstance(answer, protocol.LogFiles)
    several = len(answer.files) > 1
    positions = dict.fromkeys((path for _, path in answer.files), 0)
    with contextlib.suppress(KeyboardInterrupt):  # how --follow ends
        while True:
            for title, path in answer.files:
                positions[path] = _print_from(path, positions[path], f"[{title}] " if several else "")
            if not follow:
                return
            time.sleep(0.2)


def _print_from(path: str, position: int, prefix: str) -> int:
    try:
        with open(path, "rb") as file:
            if file.seek(0, os.SEEK_END) < position:
                position = 0  # the runner emptied a log that grew too large
            file.seek(position)
            content = file.read()
    except OSError:
        return 0
    for line in content.splitlines(keepends=True):
        sys.stdout.write(prefix + line.decode(errors="replace"))
    sys.stdout.flush()
    return position + len(content)


@local.command()
@_output
@_name
def status(output: str, name: str) -> None:
    """Show pods, services and what is wrong.

    Exit code 1 when not everything is ready.
    """
    answer = _ask(name, protocol.Status())
    assert isinstance(answer, protocol.MeshStatus)
    if output == "json":
        click.echo(protocol.as_json(answer))
    else:
        _print_tables(answer)
    if not answer.ready:
        raise click.exceptions.Exit(1)


def _print_tables(mesh: protocol.MeshStatus) -> None:
    pods = []
    for pod in mesh.pods:
        running = [container for container in pod.containers if container.kind != "init"]
        ready = f"{sum(container.ready for container in running)}/{len(running)}"
        restarts = str(sum(container.restarts for container in pod.containers))
        meshed = "yes" if pod.meshed else "no"
        pods.append((pod.namespace, pod.name, ready, pod.phase, meshed, pod.capture, restarts, ", ".join(pod.addresses)))
    _print_table(("NAMESPACE", "POD", "READY", "STATUS", "MESHED", "CAPTURE", "RESTARTS", "ADDRESS"), pods)
    if mesh.services:
        services = []
        for service in mesh.services:
            addresses = ", ".join(service.addresses) or "headless"
            services.append((service.namespace, service.name, addresses, ", ".join(map(str, service.ports)), ", ".join(service.endpoints)))
        click.echo()
        _print_table(("NAMESPACE", "SERVICE", "ADDRESS", "PORTS", "READY ENDPOINTS"), services)
    for note in mesh.notes:
        click.echo(f"note: {note}", err=True)
    for reason in mesh.reasons:
        click.echo(f"not ready: {reason}", err=True)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned, and nothing is cut or folded: a name must be there whole to be copied, in a narrow terminal and in a pipe too."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for line in (columns, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _text(file: str) -> str:
    """What a file holds, or standard input (``-``); of a device no more is read than shows that it is too much."""
    try:
        with click.open_file(file, "rb") as stream:
            content: bytes = stream.read(protocol.MAX_LINE_BYTES)
    except OSError as error:
        raise _fail(f"{file}: {error.strerror}") from None
    if len(content) == protocol.MAX_LINE_BYTES:
        raise _fail(f"{file}: expected less than {protocol.MAX_LINE_BYTES} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _fail(f"{file}: expected UTF-8, found something else at byte {error.start}") from None


def _change(kind: type[protocol.ApplyText] | type[protocol.DeleteText], files: tuple[str, ...], name: str) -> None:
    for file in files:
        answer = _ask(name, kind(_text(file), file, file.endswith(".json")))
        assert isinstance(answer, protocol.Done)
        for line in answer.lines:
            click.echo(line)


_files = click.option("-f", "--file", "files", required=True, multiple=True, type=click.Path(exists=True, dir_okay=False, allow_dash=True))


@local.command()
@_files
@_name
def apply(files: tuple[str, ...], name: str) -> None:
    """Create or change the objects of a manifest.

    The folder stays as it is.
    """
    _change(protocol.ApplyText, files, name)


@local.command()
@_files
@_name
def delete(files: tuple[str, ...], name: str) -> None:
    """Delete the objects that a manifest names."""
    _change(protocol.DeleteText, files, name)
