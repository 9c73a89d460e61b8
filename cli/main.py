"""The `pillion` command: one group, each command in its own module and imported only when it is called.

Importing late keeps ``pillion version`` quick, and lets one part be absent without breaking the others. Exit codes: docs/cli.md.
"""

from __future__ import annotations

import importlib
import platform
import sys
from importlib import metadata

import click
from click.shell_completion import get_completion_class

from cli.output import CommandFailed

_COMMANDS = {
    "authz": ("cli.authz:authz", "Show who may use which port of a workload, and by which policy."),
    "check": ("cli.check.command:check", "Look for what is wrong with an installation on Kubernetes."),
    "demo": ("cli.demo.command:demo", "Run the example shop on this machine, and check what Pillion promises."),
    "diagnostics": ("cli.diagnostics:diagnostics", "Look into sidecars and the policy controller."),
    "identity": ("cli.identity:identity", "Show a workload's certificates, or rotate what signs them."),
    "inject": ("cli.inject:inject", "Put the workloads of a manifest into the mesh."),
    "install": ("cli.install:install", "Print the manifests of an installation on Kubernetes."),
    "local": ("local.commands:local", "Run a mesh on this machine, without Kubernetes."),
    "stat": ("cli.stat:stat", "Show success, rate and latency of workloads, without Prometheus."),
    "uninstall": ("cli.uninstall:uninstall", "Print what to delete of an installation on Kubernetes."),
    "upgrade": ("cli.upgrade:upgrade", "Print the manifests of this version for an installation that is there."),
    "uninject": ("cli.inject:uninject", "Take the workloads of a manifest out of the mesh."),
}
"""Name -> (module:attribute, the line in ``pillion --help``)."""


_INTERRUPTED = 130


class _LateGroup(click.Group):
    """Imports a command when it is called; the list of commands needs no import."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            hint = "install Pillion with the extras cli and control, or run `make venv`"
            raise CommandFailed(f"`pillion {cmd_name}` is not part of this installation ({error})", hint) from None
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list for ``--help``, from the table, so that help imports nothing."""
        rows = {name: line for name, (_, line) in _COMMANDS.items()}
        rows.update({name: command.get_short_help_str(100) for name, command in self.commands.items()})
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows.items()))


@click.group(cls=_LateGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pillion", message="%(prog)s %(version)s")
def cli() -> None:
    """Pillion: a service mesh in Python."""


@cli.command()
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def version(output: str) -> None:
    """Show the version of Pillion and of the interpreter."""
    from cli.output import print_json

    found = {"pillion": metadata.version("pillion"), "python": platform.python_version()}
    if output == "json":
        print_json(found)
    else:
        click.echo(f"pillion {found['pillion']} (Python {found['python']})")


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL: `source <(pillion completion bash)`."""
    found = get_completion_class(shell)
    if found is None:
        raise CommandFailed(f"no completion for {shell}")
    click.echo(found(cli, {}, "pillion", "_PILLION_COMPLETE").source())


def main() -> None:
    """The entry point: runs the command and exits with its code.

    When the reader of its output has left (`pillion ... | head`), click ends it with 1, silently.
    """
    try:
        code = cli(prog_name="pillion", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = _INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
