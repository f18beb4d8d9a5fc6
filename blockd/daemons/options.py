"""The command line of the volume daemon."""

from __future__ import annotations

import argparse
import os
import uuid

from blockd.daemons import process
from protocol.errors import NotFoundError, RequestError
from protocol.units import check_min_in_sync, check_name, parse_rate
from replication.watch import ANSWER_SECONDS_MAX


class Options:
    """The command line, checked."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.name = check_name("volume", arguments.name)
        self.replicas: tuple[str, ...] = tuple(arguments.replica)
        self.nbd: tuple[str, ...] = tuple(arguments.nbd or ())
        self.state: str = arguments.state or f"{self.name}.db"
        self.volume_uuid: str = arguments.volume_uuid
        self.key = process.read_key(arguments.key_file)
        self.control: str | None = arguments.control
        self.block_size: int = arguments.block_size
        self.pid_file: str | None = arguments.pid_file
        self.label: str = arguments.label
        self.take_over: bool = arguments.take_over
        self.consumer_alive: bool = arguments.consumer_alive
        self.min_in_sync: int = arguments.min_in_sync
        self.answer_seconds_max: float = arguments.answer_timeout
        self.rebuild_bytes_per_second: float | None = None
        if arguments.rebuild_bandwidth is not None:
            self.rebuild_bytes_per_second = parse_rate(arguments.rebuild_bandwidth)
        check_min_in_sync(self.min_in_sync)
        if not self.answer_seconds_max > 0:
            raise RequestError(f"--answer-timeout {self.answer_seconds_max} is not above 0 seconds")
        if len(set(self.replicas)) < len(self.replicas):
            raise RequestError("a replica is named twice; every copy needs an address of its own")
        if not self.replicas and not self.take_over:
            raise RequestError("a volume needs a replica; name each with --replica ADDRESS")
        if self.take_over and not self.control:
            raise RequestError("--take-over asks at the control socket; give --control")
        if not self.nbd and not self.control:
            raise RequestError("nobody could reach the volume; give --nbd or --control")
        if self.volume_uuid:
            try:
                uuid.UUID(self.volume_uuid)
            except ValueError:
                raise RequestError(f"--volume-uuid {self.volume_uuid!r} is no UUID") from None
        directory = os.path.dirname(os.path.abspath(self.state))
        if not os.path.isdir(directory):
            raise NotFoundError(f"directory {directory} of the state file does not exist")


def parser() -> argparse.ArgumentParser:
    """The arguments of `blockd daemon volume`."""
    parse = argparse.ArgumentParser(
        prog="blockd daemon volume",
        description="Own a volume: serve it over NBD and drive its replicas.",
        epilog="example: blockd daemon volume data --replica 127.0.0.1:9601 "
        "--replica 127.0.0.1:9602 --nbd unix:/tmp/data.sock --state /var/lib/data.db",
    )
    parse.add_argument("name", metavar="NAME", help="name of the volume, also its export name")
    parse.add_argument(
        "--replica",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a replica (repeat): unix:PATH or HOST:PORT of its daemon, or dir:PATH here",
    )
    parse.add_argument(
        "--nbd", action="append", metavar="ADDRESS", help="listen for NBD clients (repeat)"
    )
    parse.add_argument("--state", metavar="FILE", help="SQLite file of member states (NAME.db)")
    parse.add_argument("--volume-uuid", default="", help="the volume in that file, or of a new one")
    parse.add_argument("--key-file", help="secret shared with the replica daemons")
    parse.add_argument("--control", metavar="unix:PATH", help="control socket")
    parse.add_argument("--block-size", type=int, choices=(512, 4096), default=4096)
    parse.add_argument("--label", default="", help="shown in the status")
    parse.add_argument("--pid-file", help="write the process id here")
    parse.add_argument(
        "--consumer-alive",
        action="store_true",
        help="the volume's user still runs: open nothing that may have lost unflushed writes",
    )
    parse.add_argument(
        "--take-over",
        action="store_true",
        help="replace the volume daemon at --control, without a pause clients would notice",
    )
    parse.add_argument(
        "--min-in-sync",
        type=int,
        default=1,
        metavar="N",
        help="of a new volume: answer writes only while N replicas are in sync (1)",
    )
    parse.add_argument(
        "--answer-timeout",
        type=float,
        default=ANSWER_SECONDS_MAX,
        metavar="SECONDS",
        help="put a replica out that takes longer while others do not (2)",
    )
    parse.add_argument(
        "--rebuild-bandwidth",
        metavar="RATE",
        help="copy at most so much per second to a replica; example: 50M",
    )
    return parse
