"""`blockd volume clone`: a new volume with the content of a snapshot."""

from __future__ import annotations

import time
from collections.abc import Callable

import click

from blockd.cli import output as out
from blockd.cli.common import (
    Settings,
    label_option,
    output_option,
    pass_settings,
    progress,
    snapshot_argument,
    wait_options,
    waiting,
)
from blockd.client import Client, Json
from protocol.errors import DeadlineError
from protocol.units import REPLICAS_MAX, check_name, parse_size

COPY_SECONDS = 86_400.0  # what --full waits for
POLL_SECONDS = 0.3


@click.command(
    epilog="""\b
Examples:
  blockd volume clone data@monday test
  blockd volume clone data@monday archive --full --replicas 2

A clone is there at once and takes no space: it shares what the snapshot holds on the disks of the
volume it comes from. Either of them can be removed first. What a snapshot shares is given back when
the last volume that has it is gone. With --full the clone copies everything in the background and
shares nothing in the end.
"""
)
@snapshot_argument
@click.argument("new", metavar="NEW")
@click.option("--full", is_flag=True, help="Copy in the background what is shared at first.")
@click.option(
    "--replicas",
    type=click.IntRange(1, REPLICAS_MAX),
    help="How many full copies to keep.  [default: as many as VOL]",
)
@click.option("--size", metavar="SIZE", help="Larger than VOL.  [default: the size of VOL]")
@label_option
@wait_options("is there, and copied if that was asked for", "copying", COPY_SECONDS)
@output_option
@pass_settings
def clone(
    settings: Settings,
    snapshot: tuple[str, str],
    new: str,
    full: bool,
    replicas: int | None,
    size: str | None,
    labels: dict[str, str],
    wait: bool,
    timeout: float,
    output: str,
) -> None:
    """Make a volume with the content of a snapshot, at once."""
    body: Json = {"name": check_name("volume", new), "full": full}
    if replicas is not None:
        body["replicas"] = replicas
    if size is not None:
        body["size_bytes"] = parse_size(size)
    if labels:
        body["labels"] = labels
    source = "@".join(snapshot)
    with settings.client() as client:
        with waiting(f"cloning {source}"):
            made = client.snapshot_clone(*snapshot, body)
        if full and wait:
            with progress(f"copying {source} to {new}") as report:
                made = _follow(client, new, timeout, report)
    out.show(made, output, lambda view: out.volume_table([view]))


def _follow(
    client: Client, name: str, timeout: float, report: Callable[[float, str], None]
) -> Json:
    """Wait until nothing is shared any more; the volume then."""
    begin, most = time.monotonic(), 1
    while True:
        view = client.volume(name)
        left = int(view["unsharing_bytes"])
        if not left:
            return view
        if time.monotonic() - begin > timeout:
            raise DeadlineError(
                f"volume {name} still shares {left} bytes after {timeout:g} s and goes on copying; "
                f"see `blockd volume show {name}`"
            )
        most = max(most, left)
        report(1 - left / most, "")
        time.sleep(POLL_SECONDS)
