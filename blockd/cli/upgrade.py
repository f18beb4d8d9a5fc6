"""`blockd volume upgrade`: other daemons for volumes in use, a few volumes at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

import click

from blockd.cli import output as out
from blockd.cli.common import (
    Settings,
    hint,
    output_option,
    pass_settings,
    timeout_option,
    waiting,
)
from blockd.client import Client, Json
from protocol.errors import BlockdError, DeadlineError, RequestError, StateError

AT_A_TIME = 3  # members of these volumes are made equal at the same time


@click.command(
    epilog="""\b
Examples:
  blockd volume upgrade data
  blockd volume upgrade --all
  blockd volume upgrade --all --program /opt/blockd-1.1/bin/python

The volume daemon hands over to its successor: whoever uses the volume sees a pause and no error.
Then its replica daemons are replaced, one at a time, each made equal before the next one. If the
successor cannot take over, the old daemon goes on. With --all, the first failure ends it, and the
volumes that were upgraded before go back to the program that they ran, if that is another one.
"""
)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All volumes, a few at a time.")
@click.option(
    "--program",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="PYTHON",
    help="The Python of the installation to run.  [default: that of the node service]",
)
@timeout_option
@output_option
@pass_settings
def upgrade(
    settings: Settings,
    names: tuple[str, ...],
    everything: bool,
    program: Path | None,
    timeout: float,
    output: str,
) -> None:
    """Replace the daemons of volumes by those of another version, without interruption."""
    if bool(names) == everything:
        raise RequestError("name the volumes to upgrade, or give --all")
    wanted = str(program.absolute()) if program is not None else None
    with settings.client() as client:
        before = {name: client.volume(name) for name in names}
        if everything:
            before = {str(view["name"]): view for view in client.volumes()}
        if not before:
            hint("there are no volumes")
        with waiting(f"upgrading {', '.join(before)}"):
            done, failure = _upgrade(client, list(before), wanted, timeout)
        if failure is not None:
            name, error = failure
            touched = [str(view["name"]) for view in done]
            if isinstance(error, DeadlineError):
                touched.append(name)  # a part of it may have been upgraded
            with waiting("going back to the old program"):
                words = _go_back(client, [before[each] for each in touched], timeout)
            raise StateError(f"volume {name} was not upgraded: {error}; {words}") from error
    out.show(done, output, out.volume_table)


def _upgrade(
    client: Client, names: Sequence[str], program: str | None, timeout: float
) -> tuple[list[Json], tuple[str, BlockdError] | None]:
    """The upgraded volumes, and the first one that was not, with its reason."""
    done: list[Json] = []
    failure: tuple[str, BlockdError] | None = None
    left = list(names)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        running: dict[Future[Json], str] = {}
        while left or running:
            while left and failure is None and len(running) < AT_A_TIME:
                name = left.pop(0)
                running[pool.submit(client.upgrade, name, program, wait=timeout)] = name
            if not running:
                break
            ended = next(as_completed(running))
            name = running.pop(ended)
            try:
                done.append(ended.result())
            except BlockdError as error:
                failure = failure or (name, error)
    return done, failure


def _go_back(client: Client, views: Sequence[Json], timeout: float) -> str:
    """Run the volumes with the programs they ran before; what came of it, in words."""
    back, stay = [], []
    for view in views:
        name, old = str(view["name"]), view["program"]
        try:
            if old is None or old == client.volume(name)["program"]:
                stay.append(name)  # its daemons did not run, or the program was replaced in place
                continue
            client.upgrade(name, old, wait=timeout)
            back.append(name)
        except BlockdError as error:
            stay.append(f"{name} ({error})")
    parts = [f"back at the old program: {', '.join(back)}"] if back else []
    if stay:
        parts.append(f"upgraded and left so: {', '.join(stay)}")
    return "; ".join(parts) or "no other volume was touched"
