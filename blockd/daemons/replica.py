"""The replica daemon: one directory with one copy of one volume, served to its volume daemon.

It accepts several sessions but only the newest fenced one may read or write. If the process dies,
everything it answered is in the kernel's page cache and everything it flushed is on the disk; the
next start recovers the directory (snapshots/README.md).
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from typing import Any

from snapshots.replica import Replica

from blockd.daemons import addresses, process
from blockd.daemons.control import Answer, ControlServer
from blockd.daemons.replica_session import ReplicaSession
from blockd.loop import READ, Loop
from protocol.errors import BlockdError, ConflictError, RequestError, StorageError
from protocol.units import parse_size

SESSIONS_MAX = 16  # one serves; others are introductions under way
MAINTAIN_DELAY_SECONDS = 0.05  # between steps of background work, so that requests come first


class ReplicaDaemon:
    """One open replica and its sessions."""

    def __init__(self, loop: Loop, replica: Replica, listen: str, key: bytes) -> None:
        self.loop = loop
        self.replica = replica
        self.key = key
        self.reads = 0
        self.writes = 0
        self.flushes = 0
        self._started = process.timestamp()
        self._clean_start = not replica.recovered_zones
        self._incarnation = os.urandom(8).hex()
        self._boot_id = process.boot_id()
        self._sessions: set[ReplicaSession] = set()
        self._flush_waiting: list[Callable[[BlockdError | None], None]] = []
        self._flushing = False
        self._maintaining = False
        self.epoch = 0  # of the newest fenced session
        self.position = (0, 0)  # epoch and sequence of the last write or zero applied
        self._folding_paused_by: set[ReplicaSession] = set()
        self._control: ControlServer | None = None
        self._socket, self.address = addresses.listen(listen)
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
        self._sessions.add(ReplicaSession(self, sock))

    def session_closed(self, session: ReplicaSession, reason: str) -> None:
        """Forget a session."""
        self._sessions.discard(session)
        self._folding_paused_by.discard(session)
        process.log(f"session ended: {reason}")

    # ---- what sessions ask ------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What a volume daemon needs to know of this replica."""
        metadata = self.replica.metadata
        return {
            "version": 1,
            "replica_uuid": metadata.replica_uuid,
            "volume_uuid": metadata.volume_uuid,
            "volume_name": metadata.volume_name,
            "size_bytes": metadata.size_bytes,
            "promised_epoch": metadata.promised_epoch,
            "config_seq": metadata.config_seq,
            "complete": self.replica.complete,
            "clean_start": self._clean_start,
            "incarnation": self._incarnation,
            "boot_id": self._boot_id,
            "position": list(self.position),
            "head_id": metadata.head_id,
            "layers": [_layer(info) for info in self.replica.tree()],
        }

    def fence(self, session: ReplicaSession, content: dict[str, Any]) -> None:
        """Promise an epoch durably, bind a blank replica, and end older sessions."""
        metadata = self.replica.metadata
        epoch = int(content["epoch"])
        if epoch < metadata.promised_epoch:
            raise ConflictError(
                f"epoch {epoch} is older than epoch {metadata.promised_epoch} promised by replica "
                f"{metadata.replica_uuid}: another volume daemon owns this volume"
            )
        if not metadata.volume_uuid:
            self.replica.bind(str(content["volume_uuid"]), str(content["volume_name"]))
        if epoch > metadata.promised_epoch:
            self.replica.promise(epoch)
        for other in list(self._sessions):
            if other is not session and other.fenced:
                other.close(f"fenced by epoch {epoch}")
        self.epoch = epoch

    def flush(self, done: Callable[[BlockdError | None], None]) -> None:
        """Make everything applied so far durable. Calls that come meanwhile share the next one."""
        self.flushes += 1
        self._flush_waiting.append(done)
        if not self._flushing:
            self._next_flush()

    def _next_flush(self) -> None:
        waiting, self._flush_waiting = self._flush_waiting, []
        try:
            job = self.replica.flush_begin()
        except BlockdError as error:
            for done in waiting:
                done(error)
            return
        self._flushing = True

        def ended(result: Any, failure: BaseException | None) -> None:
            self._flushing = False
            error: BlockdError | None = None
            self.replica.flush_end(job)
            if isinstance(failure, BlockdError):
                error = failure
            elif failure is not None:
                error = StorageError(f"flush failed: {failure}")
            if error is not None:
                process.log(str(error))
            for done in waiting:
                done(error)
            if self._flush_waiting:
                self._next_flush()

        self.loop.in_thread(job.run, ended)

    def control(self, content: dict[str, Any], session: ReplicaSession) -> dict[str, Any]:
        """A CONTROL request of the fenced session."""
        replica = self.replica
        what = content.get("do")
        if what == "seal":
            replica.seal(
                int(content["new_head_id"]),
                str(content["name"]),
                str(content["created"]),
                dict(content["labels"]),
            )
        elif what == "name":
            replica.name_layer(
                int(content["layer_id"]),
                str(content["name"]),
                str(content["created"]),
                dict(content["labels"]),
            )
        elif what == "remove":
            replica.remove(int(content["layer_id"]))
            self.worked()
        elif what == "revert":
            replica.revert(int(content["layer_id"]), int(content["new_head_id"]))
            self.worked()
        elif what == "tree":
            return {"layers": [_layer(info) for info in replica.tree()]}
        elif what == "layer_regions":
            return {"regions": replica.layer_regions(int(content["layer_id"]))}
        elif what == "fold":
            if content["paused"]:
                self._folding_paused_by.add(session)
            else:
                self._folding_paused_by.discard(session)
                self.worked()
        elif what == "begin_sync":
            replica.begin_sync(
                list(content["layers"]),
                int(content["head_id"]),
                str(content["volume_uuid"]),
                str(content["volume_name"]),
                int(content["size_bytes"]),
            )
        elif what == "end_sync":
            replica.end_sync()
        else:
            raise RequestError(f"unknown control request {what!r}")
        return {}

    # ---- background work ------------------------------------------------------------------

    def worked(self) -> None:
        """Something changed: folding or clean-up may be due."""
        if not self._maintaining:
            self._maintaining = True
            self.loop.later(MAINTAIN_DELAY_SECONDS, self._maintain)

    def _maintain(self) -> None:
        self._maintaining = False
        if self._folding_paused_by or self._flushing or not self.replica.complete:
            if not self._folding_paused_by:
                self.worked()
            return
        try:
            if self.replica.maintain():
                self.worked()
        except BlockdError as error:
            process.log(f"background work stopped: {error}")

    # ---- control socket and end -----------------------------------------------------------

    def serve_control(self, address: str) -> None:
        """Offer `status` and `stop` on a unix socket."""
        commands = {"status": self._status, "stop": self._stop}
        self._control = ControlServer(self.loop, address, commands)

    def _status(self, request: dict[str, Any], answer: Answer) -> None:
        metadata = self.replica.metadata
        answer(
            {
                **process.common_status(self._started),
                "volume_uuid": metadata.volume_uuid,
                "volume_name": metadata.volume_name,
                "replica_uuid": metadata.replica_uuid,
                "size_bytes": metadata.size_bytes,
                "path": os.path.abspath(self.replica.path),
                "address": self.address,
                "allocated_bytes": self.replica.allocated_bytes(),
                "epoch": metadata.promised_epoch,
                "complete": self.replica.complete,
                "clean_start": self._clean_start,
                "layers": [_layer(info) for info in self.replica.tree()],
                "sessions": len(self._sessions),
                "counters": {"reads": self.reads, "writes": self.writes, "flushes": self.flushes},
                "failed": self.replica.failed,
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
        path = self._socket.getsockname() if self._socket.family == socket.AF_UNIX else None
        self._socket.close()
        if path and os.path.exists(path):
            os.unlink(path)
        if self._control is not None:
            self._control.close()
        self.replica.close()


def _layer(info: Any) -> dict[str, Any]:
    return {
        "id": info.id,
        "parent": info.parent,
        "name": info.name,
        "created": info.created,
        "labels": dict(info.labels),
        "removed": info.removed,
        "allocated_bytes": info.allocated_bytes,
    }


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


def main(arguments: list[str]) -> int:
    """Run the daemon until it is told to stop."""
    options = parser().parse_args(arguments)

    def serve() -> int:
        key = process.read_key(options.key_file)
        create_if_missing(options)
        replica = Replica.open(options.directory)
        wanted = options.replica_uuid
        if wanted and replica.metadata.replica_uuid != wanted:
            found = replica.metadata.replica_uuid
            replica.close()
            raise ConflictError(
                f"{options.directory} holds replica {found}, not {wanted}; use its own directory"
            )
        loop = Loop()
        try:
            daemon = ReplicaDaemon(loop, replica, options.listen, key)
        except BlockdError:
            replica.close()
            raise
        if options.control:
            daemon.serve_control(options.control)
        process.on_signals(loop, loop.stop)
        process.write_pid_file(options.pid_file)
        print(f"ready replica {replica.metadata.replica_uuid} on {daemon.address}", flush=True)
        loop.run()
        daemon.close()
        return 0

    return process.run(serve)
