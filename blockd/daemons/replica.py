"""The replica daemon: one directory with one copy of one volume, served to its volume daemon.

It accepts several sessions but only the newest fenced one may read or write. If the process dies,
everything it answered is in the kernel's page cache and everything it flushed is on the disk; the
next start recovers the directory (snapshots/README.md).
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from blockd.daemons import addresses, memory, process
from blockd.daemons.control import Answer, ControlServer
from blockd.daemons.replica_control import describe_layer
from blockd.daemons.replica_service import ReplicaService
from blockd.daemons.replica_session import ReplicaSession
from blockd.loop import READ, Loop
from protocol.errors import BlockdError, ConflictError, NotFoundError, RequestError
from protocol.units import parse_size
from snapshots.replica import Replica

SESSIONS_MAX = 16  # one serves; others are introductions under way
DISK_FAILED = "its disk failed to make data durable; check the disk, then restart the daemon"
PROOF_SECONDS_MAX = 10.0  # for showing the key; below what an opening owner waits for a replica


class ReplicaDaemon:
    """One open replica and its sessions."""

    def __init__(
        self, loop: Loop, replica: Replica, listen: str, key: bytes, label: str = ""
    ) -> None:
        self.loop = loop
        self.service = ReplicaService(loop, replica)
        self.key = key
        self._started = process.timestamp()
        self._label = label
        self._sessions: dict[ReplicaSession, None] = {}  # oldest first
        self._control: ControlServer | None = None
        self._socket, self.address = loop.listen(listen)
        loop.register(self._socket.fileno(), READ, self._accept)

    def _accept(self, events: int) -> None:
        try:
            sock, _ = self._socket.accept()
        except OSError:
            return
        if len(self._sessions) >= SESSIONS_MAX:
            process.log(f"refused a connection: {SESSIONS_MAX} are open already")
            sock.close()
            return
        sock.setblocking(False)
        addresses.tune(sock)
        session = ReplicaSession(self, sock)
        self._sessions[session] = None
        self.loop.later(PROOF_SECONDS_MAX, session.expire)

    def session_closed(self, session: ReplicaSession, reason: str) -> None:
        """Forget a session."""
        self._sessions.pop(session, None)
        self.service.released(session)
        process.log(f"session ended: {reason}")

    def fence(self, session: ReplicaSession, content: dict[str, Any]) -> None:
        """Promise an epoch, then end older sessions."""
        self.service.promise(content)
        for other in list(self._sessions):
            if other is not session and other.fenced:
                other.close(f"fenced by epoch {self.service.epoch}")

    # ---- control socket and end -----------------------------------------------------------

    def serve_control(self, address: str) -> None:
        """Offer `status` and `stop` on a unix socket."""
        commands = {"status": self._status, "stop": self._stop}
        self._control = ControlServer(self.loop, address, commands)

    def _status(self, request: dict[str, Any], answer: Answer) -> None:
        service, replica = self.service, self.service.replica
        metadata = replica.metadata
        if metadata.unshare:
            service.worked()  # it may have stopped for want of space, and nobody may use it
        answer(
            {
                **process.common_status(self._started, self._label),
                "volume_uuid": metadata.volume_uuid,
                "volume_name": metadata.volume_name,
                "replica_uuid": metadata.replica_uuid,
                "size_bytes": metadata.size_bytes,
                "path": os.path.abspath(replica.path),
                "address": self.address,
                "allocated_bytes": replica.allocated_bytes(),
                "unsharing_bytes": replica.unsharing_bytes,
                "epoch": metadata.promised_epoch,
                "complete": replica.complete,
                "clean_start": service.clean_start,
                "layers": [describe_layer(info) for info in replica.tree()],
                "sessions": len(self._sessions),
                "counters": {
                    "reads": service.reads,
                    "writes": service.writes,
                    "flushes": service.flushing.count,
                },
                "failed": DISK_FAILED if replica.failed else None,
            }
        )

    def _stop(self, request: dict[str, Any], answer: Answer) -> None:
        answer({})
        self.loop.post(self.loop.stop)

    def close(self) -> None:
        """End every session and close the directory cleanly."""
        for session in list(self._sessions):
            session.close("the replica daemon stops")
        self.loop.unregister(self._socket.fileno())
        addresses.close(self._socket)
        if self._control is not None:
            self._control.close()
        self.service.close()


def parser() -> argparse.ArgumentParser:
    """The arguments of `blockd daemon replica`."""
    parse = argparse.ArgumentParser(
        prog="blockd daemon replica",
        description="Serve one replica directory to a volume daemon.",
        epilog="example: blockd daemon replica /srv/r1 --listen 127.0.0.1:9601 --create --size 1G",
    )
    parse.add_argument("directory", metavar="DIR", help="the replica directory")
    parse.add_argument("--listen", required=True, metavar="ADDRESS", help="unix:PATH or HOST:PORT")
    parse.add_argument("--create", action="store_true", help="make the directory if it is missing")
    parse.add_argument("--size", help="size of the volume, for --create; example: 10G")
    parse.add_argument("--replica-uuid", default="", help="identity of a new replica")
    parse.add_argument("--volume-uuid", default="", help="volume a new replica belongs to")
    parse.add_argument("--volume-name", default="", help="its name, for people")
    parse.add_argument("--key-file", help="secret shared with the volume daemon")
    parse.add_argument("--control", metavar="unix:PATH", help="control socket (status, stop)")
    parse.add_argument("--label", default="", help="shown in the status")
    parse.add_argument("--pid-file", help="write the process id here")
    return parse


def create_if_missing(options: argparse.Namespace) -> None:
    """With --create: make the directory; an existing replica must be the one that is meant."""
    if not options.create:
        return
    if not os.path.exists(os.path.join(options.directory, "replica.json")):
        if options.size is None:
            raise RequestError("--create needs --size; example: --create --size 10G")
        import uuid

        Replica.create(
            options.directory,
            size_bytes=parse_size(options.size),
            replica_uuid=options.replica_uuid or str(uuid.uuid4()),
            volume_uuid=options.volume_uuid,
            volume_name=options.volume_name,
        )


def check_identity(options: argparse.Namespace, replica: Replica) -> None:
    """ConflictError unless the directory holds the replica that the command line describes."""
    found = replica.metadata
    unused = not found.promised_epoch  # one that has had an owner learns its size from there
    size_bytes = parse_size(options.size) if options.size and unused else 0
    for what, wanted, is_now in (
        ("replica", options.replica_uuid, found.replica_uuid),
        ("a replica of volume", options.volume_uuid, found.volume_uuid),
        ("a replica of size", size_bytes, found.size_bytes),
    ):
        if wanted and is_now and wanted != is_now:
            raise ConflictError(
                f"{options.directory} holds {what} {is_now}, not {wanted}; use its own directory"
            )


def main(arguments: list[str]) -> int:
    """Run the daemon until it is told to stop."""
    options = parser().parse_args(arguments)

    def serve() -> int:
        memory.protect()
        key = process.read_key(options.key_file)
        create_if_missing(options)
        if not os.path.exists(options.directory):
            raise NotFoundError(
                f"replica directory {options.directory} does not exist; check the path, or make "
                "it with --create --size"
            )
        replica = Replica.open(options.directory)
        try:
            check_identity(options, replica)
        except BlockdError:
            replica.close()
            raise
        loop = Loop()
        try:
            daemon = ReplicaDaemon(loop, replica, options.listen, key, options.label)
        except BlockdError:
            replica.close()
            raise
        if options.control:
            daemon.serve_control(options.control)
        process.on_signals(loop, loop.stop)
        process.write_pid_file(options.pid_file)
        process.ready(f"replica {replica.metadata.replica_uuid} on {daemon.address}")
        loop.run()
        daemon.close()
        return 0

    return process.run(serve)
