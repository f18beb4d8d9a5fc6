"""Printing answers: tables for people, JSON and YAML for programs.

JSON and YAML are exactly what the API answered. Tables pick the columns people look for and
are as wide as their content: a path or an address is only of use whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from blockd.client import Json
from protocol.units import BLOCK_BYTES

if TYPE_CHECKING:
    from rich.table import Table

TABLE_COLUMNS = 10_000  # wider than any table we print; a terminal wraps, nothing is cut off
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_STYLES = {
    "healthy": "green",
    "degraded": "yellow",
    "faulted": "red",
    "error": "red",
    "IN_SYNC": "green",
    "SYNCING": "yellow",
    "OUT": "red",
}


def show(answer: Any, output: str, table: Callable[[Any], None]) -> None:
    """Print `answer` as `output` says; `table` prints it for people."""
    if output == "json":
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
    elif output == "yaml":
        import yaml

        click.echo(yaml.safe_dump(answer, sort_keys=False, allow_unicode=True), nl=False)
    else:
        table(answer)


def size_text(size_bytes: Any) -> str:
    """A number of bytes for people: 1 GiB, 12.3 MiB; a dash when there is none."""
    if not isinstance(size_bytes, int | float):
        return "-"
    size, unit = float(size_bytes), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    digits = f"{size:.1f}".removesuffix(".0")
    return f"{digits} {_UNITS[unit]}"


def age_text(created: Any, now: datetime | None = None) -> str:
    """How long ago an ISO time was: 40s, 17m, 5h, 12d; a dash when there is none."""
    try:
        then = datetime.fromisoformat(str(created))
    except ValueError:
        return "-"
    seconds = int(((now or datetime.now(UTC)) - then).total_seconds())
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{max(0, seconds)}s"


def text(value: Any) -> str:
    """A value in a table; a dash when there is none."""
    return "-" if value is None or value == "" else str(value)


def rows(headings: Sequence[str], lines: Sequence[Sequence[Any]], *, empty: str) -> None:
    """Print a table with one line per thing, or the sentence `empty`."""
    if not lines:
        click.echo(empty)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=True, overflow="fold")
    for line in lines:
        table.add_row(*(_cell(value) for value in line))
    _print(table)


def pairs(facts: Mapping[str, Any]) -> None:
    """Print one thing as two columns, name and value."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, _cell(value))
    _print(table)


def _cell(value: Any) -> Any:
    from rich.text import Text

    written = text(value)
    return Text(written, style=_STYLES.get(written, ""))


def _print(table: Table) -> None:
    from rich.console import Console

    console = Console(width=TABLE_COLUMNS)
    with console.capture() as capture:
        console.print(table)
    # Rich pads the last column with spaces; nobody wants them in a pipe.
    for line in capture.get().splitlines():
        click.echo(line.rstrip())


# -- the tables of each kind ----------------------------------------------------------------------


def volume_table(volumes: list[Json]) -> None:
    """One line per volume."""
    rows(
        ("NAME", "SIZE", "ALLOCATED", "STATE", "HEALTH", "REPLICAS", "DEVICE", "MOUNT"),
        [
            (
                volume.get("name"),
                size_text(volume.get("size_bytes")),
                size_text(volume.get("allocated_bytes")),
                volume.get("state"),
                volume.get("health"),
                in_sync_text(volume),
                volume.get("device") or volume.get("nbd_uri"),
                mount_text(volume),
            )
            for volume in volumes
        ],
        empty="no volumes; make one with `blockd volume create NAME --size 10G`",
    )


def volume_details(volume: Json) -> None:
    """Everything about one volume."""
    facts = {
        "name": volume.get("name"),
        "size": size_text(volume.get("size_bytes")),
        "allocated": size_text(volume.get("allocated_bytes")),
        "block size": volume.get("block_size"),
        "state": volume.get("state"),
        "health": volume.get("health"),
        "front end": volume.get("frontend"),
        "device": volume.get("device"),
        "NBD address": volume.get("nbd_uri"),
        "mounted at": mount_text(volume),
        "epoch": volume.get("epoch"),
        "daemon pid": volume.get("pid"),
        "daemon version": volume.get("version"),
        "created": volume.get("created"),
        "labels": labels_text(volume.get("labels")),
        "uid": volume.get("uid"),
    }
    if volume.get("source"):
        facts["cloned from"] = volume["source"]
    if volume.get("unsharing_bytes"):
        facts["still to copy"] = size_text(volume["unsharing_bytes"])
    if volume.get("message"):
        facts["message"] = volume["message"]
    pairs(facts)
    click.echo("\nreplicas")
    replica_table(volume.get("replicas") or [])
    click.echo("\nsnapshots")
    snapshot_table(volume.get("snapshots") or [], volume_name=str(volume.get("name")))


def replica_table(replicas: list[Json]) -> None:
    """One line per replica; what there is to say about one stands below."""
    rows(
        ("ID", "STATE", "REBUILD", "PID", "ADDRESS", "PATH"),
        [
            (
                replica.get("id"),
                replica.get("state"),
                rebuild_text(replica.get("rebuild")),
                replica.get("pid"),
                replica.get("address"),
                replica.get("path"),
            )
            for replica in replicas
        ],
        empty="no replicas",
    )
    for replica in replicas:
        if replica.get("message"):
            click.echo(f"{replica.get('id')}: {replica['message']}")


def snapshot_table(snapshots: list[Json], *, volume_name: str) -> None:
    """One line per snapshot; with sizes if they are known, with devices if there are any."""
    sizes = any("exclusive_bytes" in snapshot for snapshot in snapshots)
    attached = any(snapshot.get("nbd_uri") for snapshot in snapshots)
    extra = (("DATA", "FREES") if sizes else ()) + (("DEVICE",) if attached else ())
    rows(
        ("NAME", "CREATED", "AGE", "ID", *extra, "LABELS"),
        [
            (
                f"{volume_name}@{bare_snapshot_name(snapshot)}",
                snapshot.get("created"),
                age_text(snapshot.get("created")),
                snapshot.get("id"),
                *(
                    (
                        size_text(snapshot.get("data_bytes")),
                        size_text(snapshot.get("exclusive_bytes")),
                    )
                    if sizes
                    else ()
                ),
                *((snapshot.get("device") or snapshot.get("nbd_uri"),) if attached else ()),
                labels_text(snapshot.get("labels")),
            )
            for snapshot in snapshots
        ],
        empty=f"no snapshots; take one with `blockd snapshot create {volume_name}@NAME`",
    )


def diff_table(diff: Json) -> None:
    """Where two snapshots differ."""
    rows(
        ("OFFSET", "LENGTH"),
        [(extent["offset"], extent["length"]) for extent in diff["extents"]],
        empty="nothing has changed",
    )


def snapshot_tree(volume: Json) -> None:
    """The snapshots of a volume as a tree, the volume itself where it is now.

    What was taken on the one above stands below it; only where several were taken on the same one
    the tree goes into branches.
    """
    children: dict[int, list[tuple[int, str]]] = {}
    for snapshot in volume["snapshots"]:
        name = f"{bare_snapshot_name(snapshot)}  {snapshot.get('created') or ''}".rstrip()
        children.setdefault(snapshot.get("parent") or 0, []).append((snapshot["id"], name))
    children.setdefault(volume.get("head_parent") or 0, []).append((-1, "(the volume now)"))

    def draw(parent: int, indent: str) -> None:
        below = children.get(parent, [])
        while len(below) == 1:
            click.echo(indent + below[0][1])
            below = children.get(below[0][0], [])
        for number, (layer_id, name) in enumerate(below):
            last = number == len(below) - 1
            click.echo(f"{indent}{'└─ ' if last else '├─ '}{name}")
            draw(layer_id, indent + ("   " if last else "│  "))

    draw(0, "")


def bare_snapshot_name(snapshot: Json) -> str:
    """The name of a snapshot without its volume's."""
    return str(snapshot.get("name")).rpartition("@")[2]


def verify_table(view: Json) -> None:
    """What a verification found, in total and by replica."""
    report = view["verify"]
    facts = {
        "checked": size_text(report["checked_blocks"] * BLOCK_BYTES),
        "layers": report["layers"],
        "bad blocks": report["bad_blocks"],
        "repaired": report["repaired_blocks"],
        "not repaired": report["unrepaired_blocks"],
        "differing blocks": report["differing_blocks"],
    }
    for replica, count in report["members"].items():
        facts[f"on replica {replica}"] = f"{count} bad or differing"
    pairs(facts)


def check_table(report: Json) -> None:
    """What a check of a replica directory found."""
    pairs(
        {
            "path": report["path"],
            "layers": report["layers"],
            "checked": size_text(report["blocks"] * BLOCK_BYTES),
            "closed cleanly": "no" if report["unclean"] else "yes",
            "dirty zones": report["dirty_zones"],
            "damage": report["damage_count"],
            "index, log, files": ("repaired" if report["repaired"] else len(report["derived"])),
        }
    )
    for line in [*report["damage"], *report["derived"]]:
        click.echo(line)


def rebuild_text(rebuild: Json | None) -> str:
    """How far a rebuild is, for people: 42%, 3 min left."""
    if not rebuild:
        return "-"
    return ", ".join(filter(None, [f"{rebuild['fraction']:.0%}", time_left_text(rebuild)]))


def time_left_text(*rebuilds: Json) -> str:
    """How long the longest of some rebuilds will take; empty while that is not known."""
    left = [rebuild.get("seconds_left") for rebuild in rebuilds]
    if not left or None in left:
        return ""
    seconds = math.ceil(max(filter(None, left), default=0.0))
    if seconds < 100:
        return f"{seconds} s left"
    return f"{seconds // 60} min left" if seconds < 6000 else f"{seconds // 3600} h left"


def labels_text(labels: Any) -> str:
    """Labels in one line: a=1,b=2."""
    return ",".join(f"{key}={value}" for key, value in (labels or {}).items())


def in_sync_text(volume: Json) -> str:
    """How many of the replicas a volume should have are in sync: 2/3."""
    replicas = volume.get("replicas") or []
    in_sync = sum(replica.get("state") == "IN_SYNC" for replica in replicas)
    return f"{in_sync}/{volume.get('replica_count') or len(replicas)}"


def front_ends_text(front_ends: dict[str, str | None]) -> str:
    """Which front ends can be used here, and why others cannot: fuse, socket; not nbd: ..."""
    usable = ", ".join(name for name, reason in front_ends.items() if reason is None)
    others = [f"not {name}: {reason}" for name, reason in front_ends.items() if reason]
    return "; ".join([usable or "none", *others])


def mount_text(volume: Json) -> str:
    """Where a volume is mounted."""
    mount = volume.get("mount")
    return text(mount.get("path") if isinstance(mount, dict) else mount)
