"""`blockd volume ...`: make, look at, attach, mount and remove volumes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import click

from blockd.cli import images
from blockd.cli import output as out
from blockd.cli.clone import clone
from blockd.cli.common import (
    Function,
    Settings,
    frontend_option,
    hint,
    label_option,
    output_option,
    pass_settings,
    progress,
    refuse,
    replicas_option,
    timeout_option,
    volume_argument,
    wait_options,
    waiting,
    warn_unhealthy,
)
from blockd.cli.upgrade import upgrade
from blockd.client import Client, Json
from protocol.errors import DeadlineError, StateError, StorageError
from protocol.units import REPLICAS_MAX, check_name, parse_rate, parse_size

FILE_SYSTEMS = ("ext4", "xfs")
VERIFY_SECONDS = 7 * 86_400.0  # a large volume beside busy users takes days
POLL_SECONDS = 0.3  # a person sees it as continuous; each poll costs one status


def keeping_options(function: Function) -> Function:
    """The options about how replicas are kept."""
    for option in (
        click.option(
            "--min-in-sync",
            type=click.IntRange(1, REPLICAS_MAX),
            metavar="N",
            help="Answer writes only while N replicas are in sync.  [default: 1]",
        ),
        click.option(
            "--rebuild-bandwidth",
            metavar="RATE",
            help="Copy at most so much per second to a replica, such as 50M.  [default: none]",
        ),
        click.option(
            "--rebuild-wait",
            type=click.FloatRange(min=0),
            metavar="SECONDS",
            help="How long a lost replica may stay away before a new one replaces it.  "
            "[default: 60]",
        ),
    ):
        function = option(function)
    return function


@click.group(no_args_is_help=False)
def volume() -> None:
    """Make, attach, mount and remove volumes."""


volume.add_command(images.import_image)
volume.add_command(images.export)
volume.add_command(clone)
volume.add_command(upgrade)


@volume.command(
    epilog="""\b
Examples:
  blockd volume create data --size 10G
  blockd volume create db --size 512M --replicas 2 --block-size 512 --label owner=ana
"""
)
@volume_argument
@click.option(
    "--size", required=True, metavar="SIZE", help="Such as 512M, 10G, 1T; powers of 1024."
)
@replicas_option
@click.option(
    "--block-size",
    type=click.Choice(["4096", "512"]),
    default="4096",
    show_default=True,
    help="The block size the consumer sees, in bytes.",
)
@keeping_options
@label_option
@timeout_option
@output_option
@pass_settings
def create(
    settings: Settings,
    name: str,
    size: str,
    replicas: int,
    block_size: str,
    labels: dict[str, str],
    timeout: float,
    output: str,
    rebuild_wait: float | None,
    rebuild_bandwidth: str | None,
    min_in_sync: int | None,
) -> None:
    """Make a volume; it takes space only as it is written."""
    body: Json = {
        "name": check_name("volume", name),
        "size_bytes": parse_size(size),
        "replicas": replicas,
        "block_size": int(block_size),
    }
    body |= _kept(rebuild_wait, rebuild_bandwidth, min_in_sync)
    if labels:
        body["labels"] = labels
    with settings.client() as client, waiting(f"creating volume {name}"):
        made = client.volume_create(body, wait=timeout)
    out.show(made, output, lambda view: out.volume_table([view]))
    hint(f"next: blockd volume attach {name}")


@volume.command(
    name="set",
    epilog="""\b
Examples:
  blockd volume set data --rebuild-bandwidth 50M
  blockd volume set data --rebuild-bandwidth none --min-in-sync 2
""",
)
@volume_argument
@keeping_options
@output_option
@pass_settings
def change(
    settings: Settings,
    name: str,
    output: str,
    rebuild_wait: float | None,
    rebuild_bandwidth: str | None,
    min_in_sync: int | None,
) -> None:
    """Change how the replicas of a volume are kept; what is not named stays."""
    changes = _kept(rebuild_wait, rebuild_bandwidth, min_in_sync)
    if not changes:
        refuse("nothing to change: name --rebuild-wait, --rebuild-bandwidth or --min-in-sync")
    with settings.client() as client:
        changed = client.volume_change(name, changes)
    out.show(changed, output, out.volume_details)


def _kept(
    rebuild_wait: float | None, rebuild_bandwidth: str | None, min_in_sync: int | None
) -> Json:
    """The fields of a body that `keeping_options` name."""
    fields: Json = {}
    if rebuild_wait is not None:
        fields["rebuild_wait_seconds"] = rebuild_wait
    if rebuild_bandwidth is not None:
        no_cap = rebuild_bandwidth == "none"
        fields["rebuild_bandwidth"] = None if no_cap else parse_rate(rebuild_bandwidth)
    if min_in_sync is not None:
        fields["min_in_sync"] = min_in_sync
    return fields


@volume.command(
    epilog="""\b
Examples:
  blockd volume resize data 200G
"""
)
@volume_argument
@click.argument("size")
@timeout_option
@output_option
@pass_settings
def resize(settings: Settings, name: str, size: str, timeout: float, output: str) -> None:
    """Make a volume larger while it is in use; it cannot shrink.

    It takes no space until it is written to. Afterwards grow the file system on it: resize2fs for
    ext4, xfs_growfs for XFS.
    """
    with settings.client() as client, waiting(f"resizing volume {name}"):
        resized = client.resize(name, parse_size(size), wait=timeout)
    out.show(resized, output, lambda view: out.volume_table([view]))
    if resized.get("frontend") in ("fuse", "nbd-client", "ublk"):
        hint(
            f"{resized['device']} has the new size when it is attached again: "
            f"blockd volume detach {name} && blockd volume attach {name}"
        )


@volume.command(
    name="ls",
    epilog="""\b
Examples:
  blockd volume ls
  blockd volume ls -o json
""",
)
@output_option
@pass_settings
def list_volumes(settings: Settings, output: str) -> None:
    """List the volumes."""
    with settings.client() as client:
        volumes = client.volumes()
    out.show(volumes, output, out.volume_table)


@volume.command(
    epilog="""\b
Examples:
  blockd volume show data
  blockd volume show data -o json | jq -r .device
"""
)
@volume_argument
@output_option
@pass_settings
def show(settings: Settings, name: str, output: str) -> None:
    """Show a volume with its replicas and snapshots."""
    with settings.client() as client:
        found = client.volume(name)
    out.show(found, output, out.volume_details)


@volume.command(
    epilog="""\b
Examples:
  blockd volume rm data
  blockd volume rm data --force      # detach it first if it is attached
"""
)
@volume_argument
@click.option("--force", is_flag=True, help="Unmount and detach it first if it is in use.")
@timeout_option
@output_option
@pass_settings
def rm(settings: Settings, name: str, force: bool, timeout: float, output: str) -> None:
    """Remove a volume with all its replicas and snapshots; its data is gone for good."""
    with settings.client() as client, waiting(f"removing volume {name}"):
        client.volume_delete(name, force=force, wait=timeout)
    answer = {"name": name, "removed": True}
    out.show(answer, output, lambda _: click.echo(f"volume {name} is removed"))


@volume.command(
    epilog="""\b
Examples:
  blockd volume attach data                      # a block device
  blockd volume attach data --frontend socket    # an NBD address only; needs no root
"""
)
@volume_argument
@frontend_option
@timeout_option
@output_option
@pass_settings
def attach(settings: Settings, name: str, frontend: str, timeout: float, output: str) -> None:
    """Attach a volume: start its daemon and give it a device or an NBD address."""
    with settings.client() as client, waiting(f"attaching volume {name}"):
        attached = client.attach(name, frontend, wait=timeout)
    out.show(attached, output, lambda view: out.volume_table([view]))
    warn_unhealthy(attached)
    if attached.get("device"):
        hint(f"next: blockd volume mount {name}")
    elif attached.get("nbd_uri"):
        hint(f"next: nbdinfo '{attached['nbd_uri']}'")


@volume.command(
    epilog="""\b
Example:
  blockd volume detach data
"""
)
@volume_argument
@timeout_option
@output_option
@pass_settings
def detach(settings: Settings, name: str, timeout: float, output: str) -> None:
    """Detach a volume: remove its device and stop its daemon."""
    with settings.client() as client, waiting(f"detaching volume {name}"):
        detached = client.detach(name, wait=timeout)
    out.show(detached, output, lambda view: out.volume_table([view]))


@volume.command(
    epilog="""\b
Examples:
  blockd volume mount data                     # at HOME/mnt/data
  blockd volume mount data /srv/data --fs xfs
"""
)
@volume_argument
@click.argument("directory", metavar="[DIR]", required=False)
@click.option(
    "--fs",
    type=click.Choice(FILE_SYSTEMS),
    default="ext4",
    show_default=True,
    help="The file system to make if the volume is blank.",
)
@timeout_option
@output_option
@pass_settings
def mount(
    settings: Settings, name: str, directory: str | None, fs: str, timeout: float, output: str
) -> None:
    """Mount an attached volume; a blank one gets a file system first."""
    path = _directory_on_node(settings, directory)
    with settings.client() as client, waiting(f"mounting volume {name}"):
        mounted = client.mount(name, path, fs, wait=timeout)
    out.show(mounted, output, lambda view: out.volume_table([view]))
    warn_unhealthy(mounted)


def _directory_on_node(settings: Settings, directory: str | None) -> str | None:
    """The mount point as an absolute path, which the node service needs."""
    if directory is None:
        return None
    if settings.url is not None and not os.path.isabs(directory):
        refuse(
            f"mount point {directory!r} is a relative path, and with --url it would be looked up "
            "on another machine; give an absolute path"
        )
    return os.path.abspath(directory)


@volume.command(
    epilog="""\b
Example:
  blockd volume umount data
"""
)
@volume_argument
@timeout_option
@output_option
@pass_settings
def umount(settings: Settings, name: str, timeout: float, output: str) -> None:
    """Unmount a volume; it stays attached."""
    with settings.client() as client, waiting(f"unmounting volume {name}"):
        unmounted = client.umount(name, wait=timeout)
    out.show(unmounted, output, lambda view: out.volume_table([view]))


@volume.command(
    epilog="""\b
Examples:
  blockd volume verify data
  blockd volume verify data --no-wait && blockd volume show data -o json
"""
)
@volume_argument
@wait_options("has ended", "the verification", VERIFY_SECONDS)
@output_option
@pass_settings
def verify(settings: Settings, name: str, wait: bool, timeout: float, output: str) -> None:
    """Check every block on every replica, snapshots included, while the volume is in use.

    Blocks that do not match their checksum are repaired from another replica; a replica that holds
    other data than the others is compared and made equal. It gives way to the volume's users. Exit
    code 1 if a block is bad on every replica, or if it could not go to the end.
    """
    with settings.client() as client:
        started = client.verify(name)
        if wait:
            with progress(f"verifying {name}") as report:
                started = _follow(client, name, timeout, report)
    out.show(started, output, out.verify_table)
    found = started["verify"]
    if found["error"]:
        raise StorageError(f"the verification of volume {name} ended early: {found['error']}")
    if found["unrepaired_blocks"] and not found["running"]:
        raise StorageError(
            f"{found['unrepaired_blocks']} blocks of volume {name} are damaged on every replica "
            "that has them; restore what they hold from a backup, or write it anew"
        )


def _follow(
    client: Client, name: str, timeout: float, report: Callable[[float, str], None]
) -> Json:
    """Watch until the verification has ended; the volume then."""
    begin = time.monotonic()
    while True:
        view = client.volume(name)
        found = view.get("verify")
        if found is None:
            raise StateError(
                f"the volume daemon of {name} was restarted, which ends a verification; "
                f"begin it again: `blockd volume verify {name}`"
            )
        if not found["running"]:
            return view
        if time.monotonic() - begin > timeout:
            raise DeadlineError(
                f"verification of volume {name} has not ended after {timeout:g} s and goes on; "
                f"see `blockd volume show {name} -o json`"
            )
        report(found["checked_blocks"] / max(1, found["total_blocks"]), "")
        time.sleep(POLL_SECONDS)
