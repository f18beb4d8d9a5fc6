"""`blockd serve`, `blockd status` and `blockd daemon`: the processes themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from blockd.cli import output as out
from blockd.cli.common import hint, make_settings, output_option, settings
from blockd.client import Json
from protocol.errors import DegradedError

DEFAULT_LISTEN = "127.0.0.1:9500"


@click.command(
    epilog="""\b
Examples:
  blockd serve
  blockd serve --demo                       # a volume to try, mounted at HOME/mnt/demo
  blockd serve --home /var/lib/blockd --listen 127.0.0.1:9500

A stopped node service leaves its volumes running, and finds them again when it is started. With
--demo, Ctrl-C unmounts, detaches and stops everything.
"""
)
@click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where to keep the state, as before the command.",
)
@click.option(
    "--listen",
    is_flag=False,
    flag_value=DEFAULT_LISTEN,
    default=None,
    metavar="[HOST:PORT]",
    help=f"Serve the API on TCP too, {DEFAULT_LISTEN} unless told otherwise; a token is asked for.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The token TCP callers must show; made if missing.  [default: HOME/token]",
)
@click.option("--demo", is_flag=True, help="Make, attach and mount a volume `demo` to try.")
@click.pass_context
def serve(
    context: click.Context,
    home: Path | None,
    listen: str | None,
    token_file: Path | None,
    demo: bool,
) -> None:
    """Run the node service: the API and the daemons, devices and mounts of this machine."""
    before = settings(context)
    chosen = make_settings(home or before.home, None, token_file or before.token_file)
    from blockd.node import service

    code = service.serve(home=chosen.home, listen=listen, token_file=chosen.token_file, demo=demo)
    context.exit(code or 0)


@click.command(
    epilog="""\b
Examples:
  blockd status
  blockd status --check && echo all healthy
  blockd status -o json
"""
)
@click.option(
    "--check",
    is_flag=True,
    help="End with exit code 6 if a volume is degraded or faulted, for scripts and monitors.",
)
@output_option
@click.pass_context
def status(context: click.Context, check: bool, output: str) -> None:
    """Show the node service and its volumes."""
    with settings(context).client() as client:
        facts = client.status()
        volumes = client.volumes()
    answer = {**facts, "volumes": volumes}

    def table(answer: Json) -> None:
        shown = {key: value for key, value in answer.items() if key != "volumes"}
        if isinstance(shown.get("front_ends"), dict):
            shown["front_ends"] = out.front_ends_text(shown["front_ends"])
        out.pairs({key.replace("_", " "): value for key, value in shown.items()})
        click.echo()
        out.volume_table(volumes)

    out.show(answer, output, table)
    unhealthy = [str(view["name"]) for view in volumes if _is_unhealthy(view)]
    if check and unhealthy:
        raise DegradedError(
            f"not healthy: {', '.join(unhealthy)}; see `blockd replica ls {unhealthy[0]}`"
        )
    if not volumes:
        hint("next: blockd volume create data --size 10G")


def _is_unhealthy(volume: Json) -> bool:
    return volume.get("health") in ("degraded", "faulted")


def _daemon_main(arguments: list[str]) -> int:
    from blockd.daemons import main

    return main(arguments)


@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
    short_help="Run a replica or volume daemon by hand or from a unit.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def daemon(context: click.Context, arguments: tuple[Any, ...]) -> None:
    """Run a replica or volume daemon by hand or from a unit; no node service is needed.

    The daemons parse their own options: `blockd daemon replica --help`, `blockd daemon volume
    --help`.
    """
    context.exit(_daemon_main([str(argument) for argument in arguments]))
