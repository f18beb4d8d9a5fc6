"""`blockd replica ...`: look at, rebuild, add and remove the copies of a volume."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import click

from blockd.cli import output as out
from blockd.cli.common import (
    Settings,
    hint,
    output_option,
    pass_settings,
    progress,
    replica_named,
    timeout_option,
    volume_named_vol,
    wait_options,
    waiting,
)
from blockd.client import WAIT_SECONDS, Client, Json
from protocol.errors import ConflictError, DeadlineError, DegradedError, StorageError

REBUILD_SECONDS = 86_400.0  # 8 TiB at 100 MB/s, the largest volume over a 1 Gbit/s network
START_SECONDS = 30.0  # a rebuild that shows no sign of life by then failed
POLL_SECONDS = 0.3  # a person sees it as continuous; each poll costs one status


@click.group(no_args_is_help=False)
def replica() -> None:
    """List, rebuild, add and remove the copies of a volume."""


@replica.command(
    name="ls",
    epilog="""\b
Examples:
  blockd replica ls data
  blockd replica ls data -o json
""",
)
@volume_named_vol
@output_option
@pass_settings
def list_replicas(settings: Settings, volume: str, output: str) -> None:
    """List the replicas of a volume."""
    with settings.client() as client:
        replicas = client.replicas(volume)
    out.show(replicas, output, out.replica_table)


@replica.command(
    epilog="""\b
Example:
  blockd replica add data && blockd replica rebuild data
"""
)
@volume_named_vol
@timeout_option
@output_option
@pass_settings
def add(settings: Settings, volume: str, timeout: float, output: str) -> None:
    """Add a replica; it counts once it has been filled, which begins at once."""
    with settings.client() as client, waiting(f"adding a replica to volume {volume}"):
        client.replica_add(volume, wait=timeout)
        replicas = client.replicas(volume)
    out.show(replicas, output, out.replica_table)
    hint(f"to wait until it is in sync: blockd replica rebuild {volume}")


@replica.command(
    epilog="""\b
Example:
  blockd replica rm data 3f2a        # the id or its beginning, from `blockd replica ls data`
"""
)
@volume_named_vol
@click.argument("replica_text", metavar="REPLICA")
@timeout_option
@output_option
@pass_settings
def rm(settings: Settings, volume: str, replica_text: str, timeout: float, output: str) -> None:
    """Remove a replica and its data; the last one in sync is refused."""
    with settings.client() as client, waiting(f"removing a replica of volume {volume}"):
        replica_id = replica_named(client.volume(volume), replica_text)
        client.replica_delete(volume, replica_id, wait=timeout)
    answer = {"id": replica_id, "volume": volume, "removed": True}
    out.show(answer, output, lambda _: click.echo(f"replica {replica_id} of {volume} is removed"))


@replica.command(
    epilog="""\b
Examples:
  blockd replica rebuild data
  blockd replica rebuild data --replica 3f2a
  blockd replica rebuild data --no-wait && blockd replica ls data
"""
)
@volume_named_vol
@click.option(
    "--replica",
    "replica_text",
    metavar="ID",
    help="Only this one; the id or its beginning.  [default: all that are OUT]",
)
@wait_options("is in sync", "the rebuild", REBUILD_SECONDS)
@output_option
@pass_settings
def rebuild(
    settings: Settings,
    volume: str,
    replica_text: str | None,
    wait: bool,
    timeout: float,
    output: str,
) -> None:
    """Bring replicas that are OUT back in sync, while the volume is in use.

    Exit code 6 when one of them cannot be rebuilt and the volume stays degraded.
    """
    with settings.client() as client:
        before = client.volume(volume)
        replica_id = None if replica_text is None else replica_named(before, replica_text)
        targets = _to_rebuild(before, replica_id)
        if not targets:
            out.show(before["replicas"], output, out.replica_table)
            hint("nothing to rebuild: all replicas are in sync")
            return
        client.rebuild(volume, replica_id, wait=min(timeout, WAIT_SECONDS))
        if wait:
            with progress(f"rebuilding {volume}") as report:
                after = _follow(client, volume, targets, timeout, report)
        else:
            after = client.volume(volume)
    out.show(after["replicas"], output, out.replica_table)


def _to_rebuild(volume: Json, replica_id: str | None) -> set[str]:
    """The replicas that are not in sync, of all or of the one asked for."""
    return {
        str(replica["id"])
        for replica in volume["replicas"]
        if replica["state"] != "IN_SYNC" and replica_id in (None, replica["id"])
    }


def _follow(
    client: Client,
    volume: str,
    targets: set[str],
    timeout: float,
    report: Callable[[float, str], None],
) -> Json:
    """Watch until all `targets` are in sync; return the volume then.

    One that was SYNCING and is OUT again, or that is still OUT after START_SECONDS, has failed:
    DegradedError.
    """
    begin = time.monotonic()
    seen_syncing: set[str] = set()
    while True:
        view = client.volume(volume)
        replicas = {str(replica["id"]): replica for replica in view["replicas"]}
        states = {target: replicas.get(target, {}).get("state") for target in targets}
        left = {target for target, state in states.items() if state != "IN_SYNC"}
        if not left:
            report(1.0, "")
            return view
        seen_syncing |= {target for target in left if states[target] == "SYNCING"}
        passed = time.monotonic() - begin
        for target in left:
            gone = target not in replicas
            lost = states[target] == "OUT" and target in seen_syncing
            never = target not in seen_syncing and passed > START_SECONDS
            if gone or lost or never:
                what = "ended: it is gone" if gone else "stopped" if lost else "did not start"
                raise DegradedError(_failure_text(view, target, what))
        if passed > timeout:
            raise DeadlineError(
                f"rebuild of volume {volume} is not done after {timeout:g} s and goes on; "
                f"see `blockd replica ls {volume}`"
            )
        rebuilds = [replicas[target].get("rebuild") or {} for target in left]
        fractions = [rebuild.get("fraction") or 0.0 for rebuild in rebuilds]
        done = (sum(fractions) + len(targets) - len(left)) / len(targets)
        report(done, out.time_left_text(*rebuilds))
        time.sleep(POLL_SECONDS)


def _failure_text(view: Json, target: str, what: str) -> str:
    name = view.get("name")
    said = [replica.get("message") for replica in view["replicas"] if replica["id"] == target]
    message = next(filter(None, [*said, view.get("message")]), None)
    reason = f" ({message})" if message else ""
    return (
        f"rebuild of replica {target} of volume {name} {what}{reason}; the "
        f"volume is {view.get('health')}; it is tried again by itself, or at once with `blockd "
        f"replica rebuild {name}`; to replace it: `blockd replica rm {name} {target}`, `blockd "
        f"replica add {name}`"
    )


@replica.command(
    epilog="""\b
Examples:
  blockd replica check /var/lib/blockd/replicas/data/3f2a9c10
  blockd replica check DIR --repair -o json
"""
)
@click.argument("directory", metavar="DIR")
@click.option("--repair", is_flag=True, help="Make index and dirty log anew if they are damaged.")
@output_option
def check(directory: str, repair: bool, output: str) -> None:
    """Check a replica directory, without any daemon: structure, maps, every block, index.

    Nothing is changed without --repair. Damaged data can only come from another replica. Exit code
    1 if there is damage, or something to repair was left.
    """
    from snapshots import fsck
    from snapshots.offline import OfflineReplica

    with OfflineReplica(directory) as found, progress(f"checking {directory}") as report_progress:
        report = fsck.check(found, lambda done, total: report_progress(done / max(1, total), ""))
        if repair:
            fsck.repair(found, report)
    out.show({"path": directory, **vars(report)}, output, out.check_table)
    if report.damage_count:
        raise StorageError(
            f"replica {directory} has damage in {report.damage_count} places; as a member of an "
            "attached volume it is repaired from another replica by `blockd volume verify`"
        )
    if report.derived and not report.repaired:
        raise StorageError(
            f"replica {directory} has a damaged index or dirty log, or files that belong to no "
            f"layer; make them anew: `blockd replica check {directory} --repair`"
        )


@replica.command(
    epilog="""\b
Examples:
  blockd replica export /var/lib/blockd/replicas/data/3f2a9c10 data.img
  blockd replica export DIR@monday monday.img --skip-damaged
"""
)
@click.argument("source", metavar="DIR[@SNAPSHOT]")
@click.argument("file", metavar="FILE")
@click.option("--skip-damaged", is_flag=True, help="Leave damaged blocks out: they read as zeros.")
@output_option
def export(source: str, file: str, skip_damaged: bool, output: str) -> None:
    """Write the volume, or a snapshot, of a replica directory to a sparse raw file.

    Without any daemon, and nothing in the directory is changed. Exit code 1 if a block is damaged.
    """
    from snapshots import offline

    directory, name = source, ""
    if "@" in source and not os.path.isdir(source):
        directory, _, name = source.rpartition("@")
    if os.path.exists(file):
        raise ConflictError(f"{file} exists; remove it or choose another name")
    with offline.OfflineReplica(directory) as found, waiting(f"exporting {source}"):
        written, damaged = offline.export(found, name, file, skip_damaged=skip_damaged)
        size = found.size_bytes
    answer = {
        "file": file,
        "size_bytes": size,
        "data_bytes": written,
        "damaged_blocks": [block for _, block in damaged],
    }
    out.show(answer, output, lambda facts: out.pairs({**facts, "damaged_blocks": len(damaged)}))
    if damaged:
        raise StorageError(f"{len(damaged)} blocks are damaged and read as zeros in {file}")
