"""`pillion demo`: start the shop, play the acts, end it. Exit codes: 0 every line as it should be, 1 not, 130 interrupted."""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

import core
from cli.demo import acts
from cli.demo.calls import Shop
from cli.demo.evidence import Capture, alive, members, runner_pid
from cli.demo.show import Show
from cli.output import CommandFailed
from cli.reach import LocalMesh
from local import client, protocol
from local.state import BadName, state_folder

_READY_WITHIN_S = 60.0
_GONE_WITHIN_S = 10.0
_INTERRUPTED = 130

NEXT = """
It keeps running. To look around:

  pillion local status --name {name}
  pillion local exec --name {name} -n shop web -- python3 /tools/call.py http GET http://cart/basket --note hello
  pillion local exec --name {name} -n shop stranger -- python3 /tools/call.py http GET http://cart/basket
  pillion authz -n shop stock --name {name}
  pillion identity -n shop stock --name {name}
  pillion diagnostics proxy-metrics -n shop cart --name {name}
  pillion local logs -n shop cart -c pillion-proxy -f --name {name}
  pillion local apply -f {live} --name {name}
  pillion identity rotate --name {name}
  nsenter -t {runner} {how} tcpdump -ni any -A tcp port 8080 or tcp port 50051

To end it:

  pillion local down --name {name}

(pillion is .venv/bin/pillion)"""


@click.command()
@click.option("--keep", is_flag=True, help="Leave the shop running, and say what to try next.")
@click.option(
    "-f",
    "--file",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Manifests instead of examples/shop: change a copy, and see lines fail.",
)
@click.option("--name", default=None, help="Name of the mesh. Default: demo with --keep, else one of its own.")
def demo(keep: bool, folder: Path | None, name: str | None) -> None:
    """Run the example shop on this machine and check everything that Pillion promises about it."""
    example = folder or examples()
    _check_machine()
    show = Show()
    name = name or ("demo" if keep else f"demo-{os.getpid()}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: with everything cleaned up
    try:
        _run(show, example, name, keep)
    except KeyboardInterrupt:
        click.echo("interrupted; everything is cleaned up", err=True)
        raise click.exceptions.Exit(_INTERRUPTED) from None
    _verdict(show)
    if show.failures:
        raise click.exceptions.Exit(1)


def examples() -> Path:
    """examples/shop of this checkout; raises CommandFailed."""
    folder = Path(core.__file__).resolve().parents[1] / "examples" / "shop"
    if not folder.is_dir():
        raise CommandFailed(f"the demo's manifests are not at {folder}", "run it in a checkout: make demo")
    return folder


def _check_machine() -> None:
    from local.check import check, is_fatal

    missing = [f"{finding.name}: {finding.missing}" for finding in check() if is_fatal(finding)]
    if missing:
        raise CommandFailed(f"this machine cannot run a mesh: {'; '.join(missing)}", "pillion local check")
    if importlib.util.find_spec("grpc") is None:
        raise CommandFailed("the demo's gRPC workload needs the Python package grpcio", "make venv, or install Pillion with the extra test")


def _run(show: Show, example: Path, name: str, keep: bool) -> None:
    with ExitStack() as stack:
        runner = stack.enter_context(_mesh(show, example, name, keep))
        # in the mesh's own folder, which ends with the mesh, whatever ends this process
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="demo-", dir=state_folder(name))))
        # before the first pod has a link: a connection whose beginning was missed could not be judged
        capture = stack.enter_context(Capture(runner, folder / "packets.pcap"))
        status = client.wait_ready(name, _READY_WITHIN_S)
        if not status.ready:
            # the demo's own mesh ends with this error, logs and all
            raise CommandFailed("; ".join(status.reasons), f"pillion local up -f {example} --detach, which leaves it as it is to look into")
        shop = Shop(LocalMesh(name))
        idle = acts.memory(shop)
        note = f"note-{secrets.token_hex(8)}"
        acts.ready(show, shop, status, runner, note)
        acts.who_may(show, shop, note)
        acts.on_the_wire(show, shop, capture, note)
        live = example / "live" / "web-may-use-stock.yaml"
        acts.live_policy(show, shop, live, note)
        acts.rotate(show, shop)
        acts.costs(show, shop, name, idle)
        if keep:
            show.plain(NEXT.format(name=name, live=live, runner=runner, how="-n" if os.geteuid() == 0 else "-U --preserve-credentials -n"))


@contextmanager
def _mesh(show: Show, example: Path, name: str, keep: bool) -> Iterator[int]:
    """The running mesh; yields the runner's pid. Ends it in every case but the one: --keep and nothing was raised."""
    kept = False
    try:
        with uninterrupted():  # a runner that is half started answers nobody who would end it
            client.start(name, str(example))
    except (client.CannotStart, BadName) as error:
        raise CommandFailed(str(error)) from None
    except KeyboardInterrupt:
        _end_quietly(name)
        raise
    try:
        with client.connect(name) as lease:
            if not keep:
                lease.sendall(protocol.encode(protocol.Attend()))  # should this process be killed, the mesh ends with it
            yield runner_pid(name)
            kept = keep
            if not kept:
                _end(show, name)
    finally:
        if not kept:
            with uninterrupted():
                _end_quietly(name)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect at the end of this, as KeyboardInterrupt. (Blocking them would be inherited by what is started.)"""
    told: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: told.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if told:
        raise KeyboardInterrupt


def _end(show: Show, name: str) -> None:
    """End the mesh and look whether anything of it is left."""
    show.chapter("The end")
    pids = members(runner_pid(name))
    client.end(name)
    acts.until(lambda: not alive(pids), _GONE_WITHIN_S)
    left = alive(pids)
    text = f"all {len(pids)} processes are gone, and with them every namespace, mount and rule"
    show.check(not left and not state_folder(name).exists(), text, f"left: {sorted(left)} {state_folder(name)}")


def _end_quietly(name: str) -> None:
    try:
        client.end(name)
    except client.NotRunning:
        pass  # it ended as it should, or never came up


def _verdict(show: Show) -> None:
    show.chapter(f"{show.checks - len(show.failures)} of {show.checks} lines as they should be, in {show.elapsed_s:.0f} s")
    for failure in show.failures:
        show.say(f"not: {failure}")
