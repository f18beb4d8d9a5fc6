"""The root of the command line: options for all commands, and the groups below it."""

from __future__ import annotations

from pathlib import Path

import click

from blockd import __version__
from blockd.cli.common import make_settings
from blockd.cli.doctor import doctor
from blockd.cli.node import node
from blockd.cli.replica import replica
from blockd.cli.service import daemon, serve, status
from blockd.cli.snapshot import snapshot
from blockd.cli.volume import volume

EPILOG = """\b
Examples:
  blockd serve --demo
  blockd volume create data --size 10G --replicas 3
  blockd volume attach data && blockd volume mount data /srv/data
  blockd snapshot create data@monday
  blockd --home /var/lib/blockd status -o json

Shell completion: eval "$(_BLOCKD_COMPLETE=bash_source blockd)", or zsh_source, fish_source.

\b
Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 conflict, 5 timeout, 6 degraded, 7 writes that
were not flushed may be lost.
"""


@click.group(
    invoke_without_command=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="BLOCKD_HOME",
    show_envvar=True,
    metavar="DIR",
    help="Where the node service keeps its state.  [default: ./run]",
)
@click.option(
    "--url",
    envvar="BLOCKD_URL",
    show_envvar=True,
    metavar="URL",
    help="Talk to a node service over TCP instead, such as http://127.0.0.1:9500.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="BLOCKD_TOKEN_FILE",
    show_envvar=True,
    metavar="FILE",
    help="The token for --url.  [default: HOME/token]",
)
@click.version_option(__version__, prog_name="blockd", message="%(prog)s %(version)s")
@click.pass_context
def app(
    context: click.Context, home: Path | None, url: str | None, token_file: Path | None
) -> None:
    """Replicated, snapshotted block volumes in userspace."""
    context.obj = make_settings(home, url, token_file)
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (serve, status, doctor, volume, snapshot, replica, node, daemon):
    app.add_command(command)
