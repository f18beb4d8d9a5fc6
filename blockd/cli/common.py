"""What every command shares: how to reach the node service, options, waiting, naming.

Invariant: standard output carries only the answer; progress, hints and errors go to standard
error, and progress only when that is a terminal, so output can always be piped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem

from blockd.client import TOKEN_NAME, WAIT_SECONDS, WAIT_SECONDS_MAX, Client, Json
from protocol.errors import BlockdError, NotFoundError, RequestError
from protocol.units import NAME_PATTERN, REPLICAS_MAX

Function = TypeVar("Function", bound=Callable[..., Any])

FORMATS = ("table", "json", "yaml")
FRONTENDS = ("auto", "nbd", "ublk", "nbd-client", "fuse", "socket")
REPLICA_PREFIX_MIN = 4  # shorter beginnings of a replica id are too easy to mistype


@dataclass(frozen=True)
class Settings:
    """Where the node service is; made from the options before the command."""

    home: Path
    url: str | None
    token_file: Path | None

    def client(self) -> Client:
        """A client of that node service; nothing is sent yet."""
        if self.url is None:
            return Client.over_unix(self.home)
        return Client.over_tcp(self.url, self._token())

    def _token(self) -> str:
        path = self.token_file or self.home / TOKEN_NAME
        try:
            return path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise RequestError(
                f"token file {path} cannot be read ({reason}); "
                "name the file the node service wrote with --token-file"
            ) from None


def settings(context: click.Context) -> Settings:
    """The settings of this run of the program."""
    found = context.find_object(Settings)
    assert found is not None, "the root group sets it before any command runs"
    return found


pass_settings = click.make_pass_decorator(Settings)


# -- options and arguments ------------------------------------------------------------------------


def output_option(function: Function) -> Function:
    """Add `-o table|json|yaml`, passed on as `output`."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(FORMATS),
        default="table",
        show_default=True,
        help="How to print the answer.",
    )(function)


def timeout_option(function: Function) -> Function:
    """Add `--timeout SECONDS`, passed on as `timeout`."""
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0, max=WAIT_SECONDS_MAX),
        default=WAIT_SECONDS,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait until it is done (then: exit code 5); 0 does not wait.",
    )(function)


def volume_argument(function: Function) -> Function:
    """Add the argument NAME, completed with the names of the volumes."""
    return click.argument("name", metavar="NAME", shell_complete=_complete_volumes)(function)


def volume_named_vol(function: Function) -> Function:
    """Add the argument VOL, passed on as `volume`."""
    return click.argument("volume", metavar="VOL", shell_complete=_complete_volumes)(function)


def snapshot_argument(function: Function) -> Function:
    """Add the argument VOL@NAME, passed on as `snapshot`, the pair (VOL, NAME)."""

    def parse(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, str]:
        volume, separator, name = value.partition("@")
        if not (separator and NAME_PATTERN.fullmatch(volume) and NAME_PATTERN.fullmatch(name)):
            raise click.BadParameter(
                f"{value!r} does not name a snapshot as VOL@NAME (each 1 to 63 characters "
                "a-z 0-9 . _ -); example: demo@before-upgrade"
            )
        return volume, name

    return click.argument(
        "snapshot", metavar="VOL@NAME", callback=parse, shell_complete=_complete_snapshots
    )(function)


def snapshots_argument(function: Function) -> Function:
    """Add the argument VOL@NAME, VOL@FIRST..LAST or VOL, passed on as `target`: (VOL, FIRST, LAST);
    names are empty where there is none."""

    def parse(
        _context: click.Context, _parameter: click.Parameter, value: str
    ) -> tuple[str, str, str]:
        volume, _, names = value.partition("@")
        first, dots, last = names.partition("..")
        last = last if dots else first
        wanted = [volume, first, last] if "@" in value else [volume]
        if not all(NAME_PATTERN.fullmatch(name) for name in wanted):
            raise click.BadParameter(
                f"{value!r} is not VOL@NAME, VOL@FIRST..LAST or VOL (names are 1 to 63 characters "
                "a-z 0-9 . _ -); example: demo@before-upgrade"
            )
        return volume, first, last

    return click.argument(
        "target", metavar="VOL@NAME", callback=parse, shell_complete=_complete_snapshots
    )(function)


def replicas_option(function: Function) -> Function:
    """Add `--replicas`, how many copies a new volume has."""
    return click.option(
        "--replicas",
        type=click.IntRange(1, REPLICAS_MAX),
        default=3,
        show_default=True,
        help="How many full copies to keep.",
    )(function)


def frontend_option(function: Function) -> Function:
    """Add `--frontend`."""
    return click.option(
        "--frontend",
        type=click.Choice(FRONTENDS),
        default="auto",
        show_default=True,
        help="How consumers reach it: socket gives an NBD address, the others a block device.",
    )(function)


def wait_options(
    until: str, what: str, seconds: float
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add `--wait/--no-wait` and `--timeout` of a command that follows `what` until it `until`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        timeout = click.option(
            "--timeout",
            type=click.FloatRange(min=0),
            default=seconds,
            show_default=True,
            metavar="SECONDS",
            help=f"How long to wait (then: exit code 5); {what} goes on.",
        )
        wait = click.option(
            "--wait/--no-wait", default=True, show_default=True, help=f"Wait until it {until}."
        )
        return wait(timeout(function))

    return decorate


def label_option(function: Function) -> Function:
    """Add `--label KEY=VALUE`, passed on as `labels`, a dictionary."""

    def parse(
        _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
    ) -> dict[str, str]:
        labels = {}
        for text in values:
            key, separator, value = text.partition("=")
            if not separator or not key:
                raise click.BadParameter(f"{text!r} is not KEY=VALUE; example: owner=ana")
            labels[key] = value
        return labels

    return click.option(
        "--label",
        "labels",
        multiple=True,
        metavar="KEY=VALUE",
        callback=parse,
        help="A label to keep with it; may be given several times.",
    )(function)


def _complete_volumes(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The volumes whose names begin like this; none when the node service does not answer."""
    try:
        with _completion_settings(context).client() as client:
            names = [str(volume["name"]) for volume in client.volumes()]
    except BlockdError:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _complete_snapshots(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    volume, separator, _ = incomplete.partition("@")
    if not separator:
        items = _complete_volumes(context, parameter, volume)
        return [CompletionItem(f"{item.value}@") for item in items]
    try:
        with _completion_settings(context).client() as client:
            names = [f"{volume}@{snapshot['name']}" for snapshot in client.snapshots(volume)]
    except BlockdError:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _completion_settings(context: click.Context) -> Settings:
    """The settings while completing: the root group has parsed its options but not run."""
    given = context.find_root().params
    return make_settings(given.get("home"), given.get("url"), given.get("token_file"))


def make_settings(home: Path | None, url: str | None, token_file: Path | None) -> Settings:
    """Settings with the default home: $BLOCKD_HOME or ./run."""
    chosen = home or Path(os.environ.get("BLOCKD_HOME") or "run")
    return Settings(home=chosen, url=url, token_file=token_file)


# -- behaviour ------------------------------------------------------------------------------------


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show `what` with a spinner on a terminal while the block runs."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield


def hint(text: str) -> None:
    """A line for the person at the terminal, on standard error."""
    if sys.stderr.isatty():
        click.echo(text, err=True)


def warn(text: str) -> None:
    """A warning in one line on standard error."""
    click.echo(f"blockd: warning: {text}", err=True)


def warn_unhealthy(volume: Json) -> None:
    """Warn when a volume just used is degraded or faulted; the command itself succeeded."""
    health = volume.get("health")
    if health in ("degraded", "faulted"):
        name = volume.get("name")
        warn(f"volume {name} is {health}; see `blockd replica ls {name}`")


def replica_named(volume: Json, text: str) -> str:
    """The id of the replica of `volume` that `text` names: the whole id or its beginning."""
    ids = [str(replica["id"]) for replica in volume["replicas"]]
    if text in ids:
        return text
    found = [replica for replica in ids if replica.startswith(text)]
    if len(found) == 1 and len(text) >= REPLICA_PREFIX_MIN:
        return found[0]
    name = volume["name"]
    if found:
        refuse(
            f"replica {text!r} is not clear: {len(found)} of volume {name} begin with it, and at "
            f"least {REPLICA_PREFIX_MIN} characters are needed; see `blockd replica ls {name}`"
        )
    raise NotFoundError(f"volume {name} has no replica {text!r}; see `blockd replica ls {name}`")


def refuse(message: str) -> NoReturn:
    """Raise the error of a command line that cannot be carried out."""
    raise RequestError(message)


@contextmanager
def progress(what: str) -> Iterator[Callable[[float, str], None]]:
    """A progress bar on a terminal; gives the function that takes the share done and a note."""
    if not sys.stderr.isatty():
        yield lambda fraction, note: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda fraction, note: bar.update(
            task, completed=fraction, description=f"{what} {note}".rstrip()
        )
