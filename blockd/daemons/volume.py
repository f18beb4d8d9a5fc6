"""The volume daemon: the one process that owns an open volume.

It wires the engine to sockets: NBD clients on one side, a session per replica on the other, the
authority in a worker thread, a control socket for its node service. Everything but the authority
and reconnecting runs in the loop.

If the process dies, answered writes are on every member that the record calls IN_SYNC; the next
open fences this one and compares the members (opening.py).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from blockd.daemons import addresses, process
from blockd.daemons.block_status import CHANGED_CONTEXT
from blockd.daemons.control import Command, ControlServer
from blockd.daemons.members import Introduced, Members
from blockd.daemons.nbd_server import NbdConnection, NbdServer
from blockd.daemons.options import Options
from blockd.daemons.ublk import UblkDevice
from blockd.daemons.ublk_devices import UblkDevices
from blockd.daemons.volume_commands import VolumeCommands
from blockd.loop import Loop
from protocol.errors import (
    BlockdError,
    ConflictError,
)
from protocol.nbd import constants as nbd
from protocol.nbd.exports import Export
from replication.authority import Authority, Record
from replication.catchup import CatchUp
from replication.choosing import Choice
from replication.engine import Engine
from replication.ledger import Ledger
from replication.room import WAITING_BYTES_MAX
from replication.structure import Structure

STOP_SECONDS_MAX = 15.0  # for the last answers and the last flush
CONGESTION_BYTES = 16 << 20  # unsent bytes of one member after which clients are not read
FENCED_EXIT_CODE = ConflictError.exit_code


class VolumeDaemon:
    """One open volume and everything connected to it."""

    def __init__(
        self,
        loop: Loop,
        authority: Authority,
        record: Record,
        sessions: Mapping[str, Introduced],
        options: Options,
        sequence: int = 0,
    ) -> None:
        """`sequence`: where the order of changes goes on."""
        self.loop = loop
        self.options = options
        self.ledger = Ledger(authority, record, loop, self._fenced)
        self.ledger.on_change = self.send_everything
        self.engine = Engine(self.ledger, loop.now)
        self.engine.sequence = self.engine.all_applied = sequence
        self.structure = Structure(self.engine, process.timestamp)
        self.connections: list[NbdConnection] = []
        self.devices: list[UblkDevice] = []
        self.waiting: list[NbdConnection | UblkDevice] = []
        self.servers: list[NbdServer] = []
        self.congested = False
        self.exit_code = 0
        self.started = process.timestamp()
        self.stopping = False
        self.handing_over = False
        self.control: ControlServer | None = None
        self.engine.room.on_room = self.member_drained
        self.members = Members(self, sessions)
        self.ublk = UblkDevices(self)

    def catch_up(self, choice: Choice, done: Callable[[BlockdError | None], None]) -> None:
        """Before `serve`: repeat the last changes of a dead owner on members that lack them."""
        links = self.engine.links
        ranges = {place for lacking in choice.behind.values() for place in lacking}
        CatchUp(self.engine, ranges, [links[uuid] for uuid in choice.behind], done).start()
        self.send_everything()

    def serve(self) -> None:
        """Start listening."""
        for address in self.options.nbd:
            self.servers.append(NbdServer(self, address))
        if self.options.control:
            self.control = ControlServer(self.loop, self.options.control, self._commands())

    def serve_on(self, listening: Mapping[str, socket.socket]) -> None:
        """Go on listening: with these sockets, by their addresses on the command line.

        Nobody else serves the volume any more, so an address that cannot be had is only logged.
        """
        have = dict(listening)
        for address in self.options.nbd:
            try:
                self.servers.append(NbdServer(self, address, have.pop(address, None)))
            except BlockdError as error:
                process.log(str(error))
        address = self.options.control or ""
        if address in have:
            self.control = ControlServer(self.loop, address, self._commands(), have.pop(address))
        for unwanted in have.values():
            addresses.close(unwanted)

    def _commands(self) -> dict[str, Command]:
        return VolumeCommands(self).table()

    # ---- exports (ExportSource of the NBD handshake) ----------------------------------------

    def list(self) -> Sequence[str]:
        """The live volume, then its snapshots."""
        record = self.engine.record
        names = [f"{record.volume_name}@{layer.name}" for layer in record.layers if layer.name]
        return [record.volume_name, *names]

    def find(self, name: str) -> Export | None:
        """The export of that name; the empty name is the live volume."""
        record = self.engine.record
        volume, at, snapshot = name.partition("@")
        if volume not in ("", record.volume_name):
            return None
        layer = record.layer_named(snapshot)
        if at and layer is None:
            return None
        others = [other.name for other in record.layers if other.name and other is not layer]
        return Export(
            name=f"{record.volume_name}@{snapshot}" if at else record.volume_name,
            size_bytes=record.size_bytes,
            read_only=bool(at),
            minimum_block=1,  # smaller writes are completed to whole blocks here
            preferred_block=self.options.block_size,
            description=f"snapshot {snapshot}" if at else "live volume",
            contexts=(nbd.BASE_ALLOCATION, *[CHANGED_CONTEXT + name for name in others]),
        )

    def layer_of(self, export_name: str) -> int:
        """The layer a client of `export_name` reads; 0 is the live volume."""
        _, at, snapshot = export_name.partition("@")
        return self.structure.find(snapshot).id if at else 0

    def readers_of(self, layer_id: int) -> int:
        """How many clients use the export of a snapshot, or with 0 of the live volume."""
        users: list[NbdConnection | UblkDevice] = [*self.connections, *self.devices]
        return sum(1 for user in users if user.layer_id == layer_id)

    def clients(self) -> dict[str, dict[str, int]]:
        """How many connections use which export, by the address they came in at."""
        counts: dict[str, dict[str, int]] = {server.address: {} for server in self.servers}
        for connection in self.connections:
            if connection.export is not None:
                here = counts.setdefault(connection.address, {})
                here[connection.export.name] = here.get(connection.export.name, 0) + 1
        return counts

    # ---- sending --------------------------------------------------------------------------

    def send_to_members(self) -> bool:
        """Send all outboxes of members; True if nothing is left in them."""
        sent = True
        for member in tuple(self.members.sockets.values()):  # one that fails to send leaves
            if member.link.queue and not member.flush():
                sent = False
        if not sent:
            self._look_for_congestion()
        return sent

    def _look_for_congestion(self) -> None:
        self.congested = self.engine.room.waiting_bytes > WAITING_BYTES_MAX or any(
            member.link.outbox.size_bytes() > CONGESTION_BYTES
            for member in self.members.sockets.values()
        )

    def send_to_clients(self) -> bool:
        """Send all outboxes of clients; True if nothing is left in them."""
        sent = True
        for connection in tuple(self.connections):
            if connection.outbox.queue and not connection.flush():
                sent = False
            if connection.backlog:
                self.loop.post(connection.go_on)
        for device in self.devices:
            if device.answers:
                device.flush()
        return sent

    def send_everything(self) -> bool:
        """Members first (a local one answers at once), then clients; True if those took all."""
        self.send_to_members()
        return self.send_to_clients()

    def sending(self, call: Callable[[], None]) -> Callable[[], None]:
        """`call`, and then what it has queued is sent; for timers and posts."""

        def run() -> None:
            call()
            self.send_everything()

        return run

    def answers_waiting(self) -> bool:
        """Does any client still have unsent answers?"""
        for connection in self.connections:  # noqa: SIM110 - a generator costs more than the loop
            if connection.outbox.queue:
                return True
        return False

    def member_drained(self) -> None:
        """A member took what was waiting for it."""
        self._look_for_congestion()
        if not self.congested:
            waiting, self.waiting = self.waiting, []
            for connection in waiting:
                connection.resume()

    def connection_closed(self, connection: NbdConnection, reason: str) -> None:
        """Forget an NBD client."""
        if connection in self.connections:
            self.connections.remove(connection)
        process.log(f"NBD client left: {reason}")

    def device_stopped(self, device: UblkDevice) -> None:
        """Somebody removed the block device: forget its server."""
        if device in self.devices:
            self.devices.remove(device)
            process.log(f"{device.info.path} was stopped")
        device.close()

    # ---- the end --------------------------------------------------------------------------

    def _fenced(self, reason: str) -> None:
        process.log(reason)
        self.exit_code = FENCED_EXIT_CODE
        self.loop.stop()

    def stop(self) -> None:
        """Answer what is under way, flush, record the clean end, leave the loop."""
        if self.stopping:
            return
        self.stopping = True
        for server in self.servers:
            server.close()
        for device in self.devices:
            device.pause()  # what it asks from now on is for the next volume daemon
        self.loop.later(STOP_SECONDS_MAX, self._give_up)
        self._drain()

    def abort_walks(self, reason: str) -> None:
        """End rebuilds and a verification; what opens or takes over the volume begins rebuilds."""
        engine = self.engine
        for rebuild in sorted(engine.rebuilds, key=lambda each: each.link.replica_uuid):
            rebuild.abort(reason)
        if engine.scrub is not None:
            engine.scrub.abort(reason)

    def _drain(self) -> None:
        engine = self.engine
        if (
            engine.pending
            or engine.locks.held
            or self.structure.busy
            or engine.rebuilds
            or engine.scrub
        ):
            self.abort_walks("the volume daemon stops")
            self.send_everything()
            self.loop.later(0.02, self._drain)
            return
        for connection in list(self.connections):
            connection.close("the volume daemon stops")
        self.engine.flush_then(self._flushed)
        self.send_to_members()

    def _flushed(self, error: BlockdError | None) -> None:
        if error is not None:
            process.log(f"stopped without a clean end: {error}")
            self.loop.stop()
            return
        self.ledger.change(lambda record: replace(record, clean=True), lambda e: self.loop.stop())

    def _give_up(self) -> None:
        process.log(f"stopped without a clean end: not done after {STOP_SECONDS_MAX:.0f} s")
        self.exit_code = 1
        self.loop.stop()

    def close(self) -> None:
        """Close what is still open."""
        if self.control is not None:
            self.control.close()
        for device in self.devices:
            device.close()
        self.members.close()
