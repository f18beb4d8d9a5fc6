"""`blockd node`: this machine's node service as a service of the system."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from blockd.cli import output as out
from blockd.cli.common import Function, output_option
from blockd.cli.service import DEFAULT_LISTEN
from blockd.client import Json
from blockd.node import units

EPILOG = """\b
Examples:
  blockd node install
  systemctl daemon-reload && systemctl enable --now blockd
"""


def _directory(
    name: str, help_text: str, default: Path | None = None
) -> Callable[[Function], Function]:
    return click.option(
        name,
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        default=default,
        show_default=default is not None,
        help=help_text,
    )


root_option = _directory(
    "--root", "The root directory of the machine, for packages and images.", Path("/")
)
prefix_option = _directory(
    "--prefix", "The files go to lib/ below it; packages use /usr.", units.PREFIX
)


@click.group(epilog=EPILOG)
def node() -> None:
    """Run blockd as a service of this machine."""


@node.command(
    epilog="""\b
Examples:
  blockd node install
  blockd node install --home /srv/blockd --listen 127.0.0.1:9500
  blockd node install --root build/root --prefix /usr --program /usr/bin/blockd

Installs units for systemd and a rule for udev; systemd/README.md explains them. Nothing is started.
Running it again changes what has to be changed, so it is right after an upgrade.
"""
)
@_directory("--home", f"Where the node service keeps its state.  [default: {units.HOME}]")
@click.option(
    "--listen",
    is_flag=False,
    flag_value=DEFAULT_LISTEN,
    metavar="[HOST:PORT]",
    help=f"Serve the API on TCP too, {DEFAULT_LISTEN} unless told otherwise; a token is asked for.",
)
@click.option(
    "--program",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The blockd program the units start.  [default: that of this installation]",
)
@root_option
@prefix_option
@output_option
@click.pass_context
def install(
    context: click.Context,
    home: Path | None,
    listen: str | None,
    program: Path | None,
    root: Path,
    prefix: Path,
    output: str,
) -> None:
    """Put the units and the udev rule in place."""
    home = home or context.find_root().params.get("home") or units.HOME
    program = program or units.own_program()
    changes = units.install(
        root=root, prefix=prefix, program=program, home=home.absolute(), listen=listen
    )
    changed = any(change.action != "unchanged" for change in changes)
    next_steps = ["systemctl daemon-reload", "udevadm control --reload"] if changed else []
    next_steps += [
        "systemctl enable --now blockd",
        "systemctl restart blockd    # if it runs already; its volumes go on serving",
        f"export BLOCKD_HOME={home.absolute()}    # for the other commands",
    ]
    facts = {"program": str(program), "home": str(home.absolute()), "listen": listen}
    _show(changes, {**facts, "next": next_steps}, output)


@node.command(
    epilog="""\b
Examples:
  systemctl disable --now blockd && blockd node uninstall
  blockd node uninstall --root build/root --prefix /usr

Volumes and their data stay, and so do daemons that run.
"""
)
@root_option
@prefix_option
@output_option
def uninstall(root: Path, prefix: Path, output: str) -> None:
    """Remove what `install` has put in place."""
    changes = units.uninstall(root=root, prefix=prefix)
    removed = any(change.action == "removed" for change in changes)
    next_steps = ["systemctl daemon-reload", "udevadm control --reload"] if removed else []
    _show(changes, {"next": next_steps}, output)


def _show(changes: list[units.Change], facts: Json, output: str) -> None:
    files = [{"path": change.path, "action": change.action} for change in changes]

    def table(answer: Json) -> None:
        out.rows(
            ("FILE", "DONE"), [(item["path"], item["action"]) for item in files], empty="no files"
        )
        if answer["next"]:
            click.echo("\nnext:")
        for step in answer["next"]:
            click.echo(f"  {step}")

    out.show({"files": files, **facts}, output, table)
