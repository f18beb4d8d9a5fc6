"""`blockd snapshot ...`: take, look at, remove and go back to snapshots, named VOL@NAME."""

from __future__ import annotations

import click

from blockd.cli import output as out
from blockd.cli.common import (
    Settings,
    hint,
    label_option,
    output_option,
    pass_settings,
    snapshot_argument,
    timeout_option,
    volume_named_vol,
    waiting,
)
from blockd.client import Json


@click.group(no_args_is_help=False)
def snapshot() -> None:
    """Take, list, remove and go back to snapshots."""


@snapshot.command(
    epilog="""\b
Examples:
  blockd snapshot create data@monday
  blockd snapshot create data@before-upgrade --label ticket=17
"""
)
@snapshot_argument
@label_option
@timeout_option
@output_option
@pass_settings
def create(
    settings: Settings,
    snapshot: tuple[str, str],
    labels: dict[str, str],
    timeout: float,
    output: str,
) -> None:
    """Take a snapshot; it is durable when this returns."""
    volume, name = snapshot
    with settings.client() as client, waiting(f"taking snapshot {volume}@{name}"):
        made = client.snapshot_create(volume, name, labels, wait=timeout)
    out.show(made, output, lambda view: out.snapshot_table([view], volume_name=volume))


@snapshot.command(
    name="ls",
    epilog="""\b
Examples:
  blockd snapshot ls data
  blockd snapshot ls data -o json
""",
)
@volume_named_vol
@output_option
@pass_settings
def list_snapshots(settings: Settings, volume: str, output: str) -> None:
    """List the snapshots of a volume, oldest first."""
    with settings.client() as client:
        snapshots = client.snapshots(volume)
    out.show(snapshots, output, lambda views: out.snapshot_table(views, volume_name=volume))


@snapshot.command(
    epilog="""\b
Example:
  blockd snapshot show data@monday -o yaml
"""
)
@snapshot_argument
@output_option
@pass_settings
def show(settings: Settings, snapshot: tuple[str, str], output: str) -> None:
    """Show a snapshot."""
    volume, name = snapshot
    with settings.client() as client:
        found = client.snapshot(volume, name)

    def table(view: Json) -> None:
        facts = {"name": f"{volume}@{name}", **view}
        facts["name"] = f"{volume}@{name}"
        facts["labels"] = out.labels_text(view.get("labels"))
        out.pairs({key.replace("_", " "): value for key, value in facts.items()})

    out.show(found, output, table)


@snapshot.command(
    epilog="""\b
Example:
  blockd snapshot rm data@monday
"""
)
@snapshot_argument
@timeout_option
@output_option
@pass_settings
def rm(settings: Settings, snapshot: tuple[str, str], timeout: float, output: str) -> None:
    """Remove a snapshot; the volume and its other snapshots stay as they are."""
    volume, name = snapshot
    with settings.client() as client, waiting(f"removing snapshot {volume}@{name}"):
        client.snapshot_delete(volume, name, wait=timeout)
    answer = {"name": f"{volume}@{name}", "removed": True}
    out.show(answer, output, lambda _: click.echo(f"snapshot {volume}@{name} is removed"))


@snapshot.command(
    epilog="""\b
Examples:
  blockd snapshot revert data@monday
  blockd snapshot revert data@monday --force    # unmounts and detaches, then puts it back
"""
)
@snapshot_argument
@click.option(
    "--force", is_flag=True, help="Do it while attached: unmount, detach, revert, put back."
)
@timeout_option
@output_option
@pass_settings
def revert(
    settings: Settings, snapshot: tuple[str, str], force: bool, timeout: float, output: str
) -> None:
    """Make a volume's content that of a snapshot again; what was written since is dropped."""
    volume, name = snapshot
    with settings.client() as client, waiting(f"reverting volume {volume} to {name}"):
        reverted = client.snapshot_revert(volume, name, force=force, wait=timeout)
    out.show(
        reverted,
        output,
        lambda _: click.echo(f"volume {volume} has the content of {volume}@{name} again"),
    )
    hint(f"all snapshots are still there; see `blockd snapshot ls {volume}`")
