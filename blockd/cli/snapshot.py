"""`blockd snapshot ...`: take, look at, remove and go back to snapshots, named VOL@NAME."""

from __future__ import annotations

import click

from blockd.cli import output as out
from blockd.cli.common import (
    Settings,
    frontend_option,
    hint,
    label_option,
    output_option,
    pass_settings,
    refuse,
    snapshot_argument,
    snapshots_argument,
    timeout_option,
    volume_named_vol,
    waiting,
)
from blockd.client import Json
from protocol.errors import NotFoundError
from protocol.units import SNAPSHOTS_MAX


@click.group(no_args_is_help=False)
def snapshot() -> None:
    """Take, list, remove and go back to snapshots."""


@snapshot.command(
    epilog="""\b
Examples:
  blockd snapshot create data@monday
  blockd snapshot create data@before-upgrade --label ticket=17
  blockd snapshot create data@nightly --freeze
"""
)
@snapshot_argument
@label_option
@click.option(
    "--freeze",
    is_flag=True,
    help="Freeze the file system that blockd has mounted meanwhile: it is whole in the snapshot.",
)
@timeout_option
@output_option
@pass_settings
def create(
    settings: Settings,
    snapshot: tuple[str, str],
    labels: dict[str, str],
    freeze: bool,
    timeout: float,
    output: str,
) -> None:
    """Take a snapshot; it is durable when this returns."""
    volume, name = snapshot
    with settings.client() as client, waiting(f"taking snapshot {volume}@{name}"):
        made = client.snapshot_create(volume, name, labels, freeze=freeze, wait=timeout)
    out.show(made, output, lambda view: out.snapshot_table([view], volume_name=volume))


@snapshot.command(
    name="ls",
    epilog="""\b
Examples:
  blockd snapshot ls data
  blockd snapshot ls data --sizes
  blockd snapshot ls data -o json
""",
)
@volume_named_vol
@click.option(
    "--sizes", is_flag=True, help="Also how much data each shows, and what its removal frees."
)
@output_option
@pass_settings
def list_snapshots(settings: Settings, volume: str, sizes: bool, output: str) -> None:
    """List the snapshots of a volume, oldest first.

    With --sizes, DATA is the data seen in a snapshot, and FREES what each replica gets back when
    this one alone is removed. The volume must be attached; on a large volume it takes seconds.
    """
    with settings.client() as client:
        snapshots = client.snapshots(volume)
        if sizes:
            with waiting(f"counting the data of {volume}"):
                used = client.usage(volume)["snapshots"]
            snapshots = [
                {**view, **used.get(out.bare_snapshot_name(view), {})} for view in snapshots
            ]
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
Examples:
  blockd snapshot rm data@monday
  blockd snapshot rm data@monday..friday       # these and all taken in between
  blockd snapshot rm data --keep-last 7        # all but the seven newest
"""
)
@snapshots_argument
@click.option(
    "--keep-last",
    type=click.IntRange(0, SNAPSHOTS_MAX),
    metavar="N",
    help="With VOL alone: remove all snapshots but the N newest.",
)
@timeout_option
@output_option
@pass_settings
def rm(
    settings: Settings,
    target: tuple[str, str, str],
    keep_last: int | None,
    timeout: float,
    output: str,
) -> None:
    """Remove snapshots; the volume and its other snapshots stay as they are."""
    volume, first, last = target
    if bool(first) == (keep_last is not None):
        refuse("name the snapshots as VOL@NAME or VOL@FIRST..LAST, or give VOL and --keep-last N")
    with settings.client() as client:
        names = [first]
        if first != last or keep_last is not None:
            there = [out.bare_snapshot_name(view) for view in client.snapshots(volume)]
            names = chosen_names(volume, there, first, last, keep_last)
        removed = []
        for name in names:
            with waiting(f"removing snapshot {volume}@{name}"):
                client.snapshot_delete(volume, name, wait=timeout)
            removed.append({"name": f"{volume}@{name}", "removed": True})

    def table(_: object) -> None:
        for one in removed:
            click.echo(f"snapshot {one['name']} is removed")
        if not removed:
            click.echo("no snapshot is to be removed")

    single = first == last and keep_last is None
    out.show(removed[0] if single else removed, output, table)


def chosen_names(
    volume: str, there: list[str], first: str, last: str, keep_last: int | None
) -> list[str]:
    """Which of the snapshots that are there, oldest first, are meant."""
    if keep_last is not None:
        return there[: len(there) - keep_last] if keep_last < len(there) else []
    if f"{first}..{last}" in there:
        return [f"{first}..{last}"]  # dots may be part of a name
    for name in (first, last):
        if name not in there:
            raise NotFoundError(
                f"snapshot {volume}@{name} does not exist; see `blockd snapshot ls {volume}`"
            )
    start, stop = there.index(first), there.index(last)
    if start > stop:
        refuse(f"{first} is newer than {last}; give the older one first: {volume}@{last}..{first}")
    return there[start : stop + 1]


@snapshot.command(
    epilog="""\b
Example:
  blockd snapshot tree data
"""
)
@volume_named_vol
@output_option
@pass_settings
def tree(settings: Settings, volume: str, output: str) -> None:
    """Draw which snapshot was taken on which, and where the volume is now."""
    with settings.client() as client:
        view = client.volume(volume)
    out.show(view, output, out.snapshot_tree)


@snapshot.command(
    epilog="""\b
Examples:
  blockd snapshot diff data@monday data@friday -o json
  blockd snapshot diff data@monday             # what changed since, up to now
"""
)
@snapshot_argument
@click.argument("later", metavar="[VOL@LATER]", required=False)
@output_option
@pass_settings
def diff(settings: Settings, snapshot: tuple[str, str], later: str | None, output: str) -> None:
    """Show where a volume, or a later snapshot, may differ from a snapshot.

    As extents in bytes; the same is the NBD metadata context `blockd:changed:NAME` of every export
    of the volume. Blocks written with the same content again are among them.
    """
    volume, base = snapshot
    other, at, to = (later or volume).partition("@")
    if other != volume or bool(at) != bool(to):
        refuse(f"{later!r} is not a snapshot of volume {volume}; name it as {volume}@NAME")
    with settings.client() as client:
        extents = [
            {"offset": offset, "length": length}
            for offset, length in client.snapshot_diff(volume, base, to)
        ]
    answer = {
        "base": f"{volume}@{base}",
        "to": f"{volume}@{to}" if to else volume,
        "changed_bytes": sum(extent["length"] for extent in extents),
        "extents": extents,
    }
    out.show(answer, output, out.diff_table)


@snapshot.command(
    epilog="""\b
Examples:
  blockd snapshot attach data@monday
  blockd snapshot attach data@monday --frontend socket    # an NBD address only; needs no root
"""
)
@snapshot_argument
@frontend_option
@timeout_option
@output_option
@pass_settings
def attach(
    settings: Settings, snapshot: tuple[str, str], frontend: str, timeout: float, output: str
) -> None:
    """Give a snapshot a read-only device, beside the volume and other snapshots."""
    volume, name = snapshot
    with settings.client() as client, waiting(f"attaching {volume}@{name}"):
        attached = client.snapshot_attach(volume, name, frontend, wait=timeout)
    out.show(attached, output, lambda view: out.snapshot_table([view], volume_name=volume))
    if attached.get("device"):
        hint(f"next: mount -o ro,noload {attached['device']} DIR   (xfs: -o ro,norecovery,nouuid)")


@snapshot.command(
    epilog="""\b
Example:
  blockd snapshot detach data@monday
"""
)
@snapshot_argument
@timeout_option
@output_option
@pass_settings
def detach(settings: Settings, snapshot: tuple[str, str], timeout: float, output: str) -> None:
    """Remove a snapshot's device; refused while something uses it."""
    volume, name = snapshot
    with settings.client() as client, waiting(f"detaching {volume}@{name}"):
        detached = client.snapshot_detach(volume, name, wait=timeout)
    out.show(detached, output, lambda view: out.snapshot_table([view], volume_name=volume))


@snapshot.command(
    epilog="""\b
Examples:
  blockd snapshot revert data@monday
  blockd snapshot revert data@monday --force-unmount    # unmounts it and mounts it again
"""
)
@snapshot_argument
@click.option(
    "--force-unmount",
    "force",
    is_flag=True,
    help="Do it although it is mounted or has NBD clients: unmount it, end them, mount it again.",
)
@timeout_option
@output_option
@pass_settings
def revert(
    settings: Settings, snapshot: tuple[str, str], force: bool, timeout: float, output: str
) -> None:
    """Make a volume's content that of a snapshot again; what was written since is dropped.

    The device of an attached volume is gone for a moment; one that is in use is not taken away.
    """
    volume, name = snapshot
    with settings.client() as client, waiting(f"reverting volume {volume} to {name}"):
        reverted = client.snapshot_revert(volume, name, force=force, wait=timeout)
    out.show(
        reverted,
        output,
        lambda _: click.echo(f"volume {volume} has the content of {volume}@{name} again"),
    )
    hint(f"all snapshots are still there; see `blockd snapshot ls {volume}`")
