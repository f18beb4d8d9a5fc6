"""The processes of one volume: production daemons on virtual hosts, and who starts them again.

`Cluster` does what node services do: it starts replica daemons again that ended or whose disk
failed, and opens the volume again when its daemon is gone. As long as the client lives the volume
is opened for a living consumer; when that is refused because every member may have lost unflushed
writes, or the last copy does not come back, the client starts anew.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

from blockd.daemons import opening, process
from blockd.daemons.options import Options, parser
from blockd.daemons.replica import ReplicaDaemon
from blockd.daemons.volume import VolumeDaemon
from protocol.errors import BlockdError
from replication.authority import IN_SYNC, Record
from snapshots import metadata
from snapshots.replica import Replica
from tests.sim import handover
from tests.sim.authority import SimAuthority
from tests.sim.disk import Disk, Disks
from tests.sim.kernel import Host, Kernel, Process, Violation
from tests.sim.loop import VirtualEvent, VirtualLoop
from tests.sim.network import Network, VirtualSocket

VOLUME_UUID = "11111111-1111-1111-1111-111111111111"
VOLUME_NAME = "vol"
RESTART_SECONDS = 0.5  # mean time until a supervisor notices
FAULTED_SECONDS = 8.0  # without a copy for so long, the client gives up
OPTIONS = Options(parser().parse_args([VOLUME_NAME, "--replica", "-", "--control", "unix:-"]))


class Member:
    """A replica: its host, disk and daemon."""

    def __init__(self, cluster: Cluster, number: int, size_bytes: int) -> None:
        self.cluster = cluster
        self.uuid = f"r{number}"
        self.host = Host(self.uuid)
        self.path = os.path.join(cluster.directory, self.uuid, "replica")
        self.disk: Disk = cluster.disks.add(os.path.dirname(self.path))
        self.address = f"tcp:{self.uuid}:9000"
        self.process: Process | None = None
        self.daemon: ReplicaDaemon | None = None
        self.refused = ""
        os.makedirs(os.path.dirname(self.path))
        Replica.create(self.path, size_bytes=size_bytes, replica_uuid=self.uuid)

    def start(self) -> None:
        """A new process of the replica daemon, unless there is one."""
        kernel = self.cluster.kernel
        if self.process is not None or not self.host.up:
            return
        started = self.process = Process(kernel, self.uuid, self.host)
        started.at_death.append(self._ended)
        loop = VirtualLoop(kernel, self.cluster.network, started)
        loop.on_stop = self.stop

        def run() -> None:
            try:
                replica = Replica.open(self.path)
            except BlockdError as error:
                kernel.log(self.uuid, f"does not start: {error}")
                self.refused = str(error)
                kernel.at(0.0, None, started.end)
                return
            self.refused = ""
            self.daemon = ReplicaDaemon(loop, replica, self.address, b"")  # type: ignore[arg-type]
            kernel.log(self.uuid, "serves")

        kernel.at(0.0, started, run)

    def _ended(self) -> None:
        daemon, self.daemon, self.process = self.daemon, None, None
        if daemon is not None:
            daemon.service.replica.abandon()  # what the kernel does with its lock
        self.cluster.soon(self.start)

    def stop(self) -> None:
        """A clean end; called in the name of the process."""
        if self.daemon is not None and self.process is not None:
            self.daemon.close()
            self.cluster.kernel.log(self.uuid, "stopped cleanly")
            self.process.end()

    def replace_disk(self) -> None:
        """An empty directory in the place of the old one, for the same replica."""
        self.kill()
        self.refused = ""
        self.path += "-new"
        self.disk.heal()
        Replica.create(self.path, size_bytes=self.cluster.size_bytes, replica_uuid=self.uuid)

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.cluster.kernel.log("world", f"kill {self.uuid}")
            self.process.end()

    def cut_power(self, keep: float, tear: float, seconds: float) -> None:
        """The host loses power and is back after a while."""
        kernel, network = self.cluster.kernel, self.cluster.network
        if not self.host.up:
            return
        kernel.log("world", f"power of {self.uuid} is cut for {seconds:.3f} s")
        self.host.up = False
        network._dark = network._dark | {self.address}
        streams = network.power_lost(self.host.name)
        if self.process is not None:
            self.process.end()
        self.disk.cut_power(keep, tear)
        self.host.boots += 1
        self.disk.failing_syncs = self.disk.failing_writes = 0

        def on() -> None:
            self.host.up = True
            network._dark = network._dark - {self.address}
            for sock in streams:
                kernel.at(kernel.random.random(), None, sock.break_both)
            self.start()

        kernel.at(seconds, None, on)


class VolumeProcess:
    """One process of the volume daemon, from opening to its end."""

    def __init__(
        self,
        cluster: Cluster,
        host: Host,
        consumer_alive: bool,
        given: tuple[dict[str, Any], list[VirtualSocket]] | None = None,
    ) -> None:
        """`given`: what the volume daemon before this one hands over."""
        self.cluster = cluster
        self.consumer_alive = consumer_alive
        self.number = cluster.volumes_started
        self.name = f"v{self.number}"
        self.process = Process(cluster.kernel, self.name, host)
        self.daemon: VolumeDaemon | None = None
        self.serving = False
        self.error: BlockdError | None = None
        self.faulted_since = -1.0
        self.loop = VirtualLoop(cluster.kernel, cluster.network, self.process)
        self.loop.on_stop = self._finish
        self.process.at_death.append(lambda: cluster.volume_ended(self))
        if given is None:
            self.process.spawn(self._main)
        else:
            state, sockets = given
            for sock in sockets:
                sock.process = self.process  # what arrives meanwhile waits for it
            cluster.kernel.at(0.0, self.process, lambda: self._take_over(state, sockets))

    def log(self, message: str) -> None:
        self.cluster.kernel.log(self.name, message)

    def _main(self) -> None:
        cluster = self.cluster
        wanted = opening.Wanted(
            VOLUME_NAME,
            VOLUME_UUID,
            tuple(member.address for member in cluster.members),
            b"",
            self.loop,  # type: ignore[arg-type]
            self.consumer_alive,
            cluster.min_in_sync,
        )
        try:
            opened = opening.open_volume(cluster.authority, wanted, self.log)
            self.daemon = VolumeDaemon(
                self.loop,  # type: ignore[arg-type]
                cluster.authority,
                opened.record,
                opened.sessions,
                OPTIONS,  # type: ignore[arg-type]
            )
            self.daemon.catch_up(opened.choice, self._caught_up)
        except BlockdError as error:
            self._failed(error)

    def _take_over(self, state: dict[str, Any], sockets: list[VirtualSocket]) -> None:
        self.daemon = handover.take_over(self, OPTIONS, state, sockets)
        self._caught_up(None)

    def _failed(self, error: BlockdError) -> None:
        self.error = error
        self.log(f"does not serve: {error}")
        self.loop.stop()

    def _caught_up(self, error: BlockdError | None) -> None:
        if error is not None:
            self._failed(error)
            return
        self.serving = True
        self.log("serves")
        self.cluster.volume_serves(self)

    def _finish(self) -> None:
        if self.daemon is not None:
            self.daemon.close()
        self.log("ends")
        self.process.end()

    @property
    def usable(self) -> bool:
        if self.daemon is not None and self.daemon.handing_over:
            return False  # its clients are not read
        return self.serving and self.process.alive


class Cluster:
    """All of one run but the client and the faults."""

    def __init__(
        self, kernel: Kernel, disks: Disks, directory: str, count: int, size_bytes: int
    ) -> None:
        self.kernel = kernel
        self.network = Network(kernel)
        self.disks = disks
        self.directory = directory
        self.authority = SimAuthority(kernel)
        self.min_in_sync = 1
        self.size_bytes = size_bytes
        self.hosts = [Host("va"), Host("vb")]  # where volume daemons run
        self.members = [Member(self, number, size_bytes) for number in range(1, count + 1)]
        self.volumes: list[VolumeProcess] = []  # alive ones, oldest first
        self.volumes_started = 0
        self.reopening = True  # somebody wants the volume to be open
        self.rolled_back = False  # the authority holds an old record: nobody may open
        self.consumer_alive = False
        self.on_serves: Callable[[VolumeProcess], None] = lambda volume: None
        self.on_ended: Callable[[VolumeProcess], None] = lambda volume: None
        self._stack = ExitStack()
        self._refusals = 0

    def __enter__(self) -> Cluster:
        kernel = self.kernel

        def log(message: str) -> None:
            kernel.log(kernel.current.name if kernel.current else "world", message)

        def timestamp() -> str:
            host = kernel.current.host if kernel.current else self.hosts[0]
            return f"2026-01-01T{kernel.now + host.wall_jumped_seconds:015.3f}Z"

        def boot_id() -> str:
            return kernel.current.host.boot_id if kernel.current else ""

        VirtualEvent.kernel = kernel
        for where, name, function in (
            (process, "log", log),
            (process, "timestamp", timestamp),
            (metadata, "boot_id", boot_id),
            (threading, "Event", VirtualEvent),
        ):
            self._stack.enter_context(mock.patch.object(where, name, function))
        return self

    def __exit__(self, *details: object) -> None:
        for volume in list(self.volumes):
            volume.process.end()
        for member in self.members:
            if member.process is not None:
                member.process.end()
        self._stack.close()

    def soon(self, call: Callable[[], object]) -> None:
        """When a supervisor has noticed."""
        self.kernel.at(self.kernel.random.expovariate(1.0 / RESTART_SECONDS), None, call)

    @property
    def record(self) -> Record | None:
        return self.authority.records.get(VOLUME_UUID)

    @property
    def newest(self) -> VolumeProcess | None:
        return self.volumes[-1] if self.volumes else None

    def in_sync(self) -> list[Member]:
        """Members that the record calls IN_SYNC and whose daemon runs."""
        record = self.record
        if record is None:
            return list(self.members)
        return [
            member
            for member in self.members
            if member.uuid in record.members and record.members[member.uuid].state == IN_SYNC
        ]

    def is_spare(self, member: Member) -> bool:
        """Would its loss lose nothing: does the only volume daemon read from another one?

        After a crash of everything one member is the source, although the record names others.
        """
        if len(self.volumes) != 1 or not self.volumes[0].usable:
            return False
        daemon = self.volumes[0].daemon
        assert daemon is not None
        in_sync = {other.uuid for other in self.in_sync()} - {member.uuid}
        return any(link.replica_uuid in in_sync for link in daemon.engine.readers)

    # ---- the node service ---------------------------------------------------------------------

    def open(self, host: Host | None = None) -> None:
        """Start a volume daemon."""
        self.volumes_started += 1
        self.volumes.append(VolumeProcess(self, host or self.hosts[0], self.consumer_alive))

    def hand_over(
        self, old: VolumeProcess, state: dict[str, Any], sockets: list[VirtualSocket]
    ) -> None:
        """The successor of a volume daemon, which ends."""
        self.volumes_started += 1
        given = state, sockets
        self.kernel.log("world", f"{old.name} hands over")
        self.volumes.append(VolumeProcess(self, old.process.host, self.consumer_alive, given))
        old.process.end()

    def volume_serves(self, volume: VolumeProcess) -> None:
        self._refusals = 0
        if self.rolled_back:
            raise Violation(f"{volume.name} serves with a record that is older than the data")
        self.on_serves(volume)
        self.consumer_alive = True

    def volume_ended(self, volume: VolumeProcess) -> None:
        self.volumes.remove(volume)
        self.on_ended(volume)
        if volume.error is not None and "rebooted" in str(volume.error):
            self._refusals += 1
            if self._refusals > 3 and all(member.daemon for member in self.members):
                self.client_gives_up()
        self.soon(self.reopen)

    def reopen(self) -> None:
        if self.reopening and not self.volumes:
            self.open()

    def client_gives_up(self) -> None:
        """The consumer starts anew, from what is on the disks."""
        self.kernel.log("client", "gives up what it has not flushed")
        self.consumer_alive = False

    def look(self) -> None:
        """Every second: replace what has failed for good, as its messages ask for."""
        for member in self.members:
            daemon = member.daemon
            if daemon is not None and daemon.service.replica.failed:
                self.kernel.log("world", f"the daemon of {member.uuid} is replaced")
                member.kill()
            if "rebuild this replica" in member.refused and self.is_spare(member):
                self.kernel.log("world", f"{member.uuid} is damaged beyond use and replaced")
                member.replace_disk()
        for volume in list(self.volumes):
            self._look_at(volume)
        self.kernel.at(1.0, None, self.look)

    def _look_at(self, volume: VolumeProcess) -> None:
        if not volume.usable or volume.daemon is None:
            return
        if volume.daemon.engine.readers:
            volume.faulted_since = -1.0
        elif volume.faulted_since < 0:
            volume.faulted_since = self.kernel.now
        elif self.kernel.now - volume.faulted_since > FAULTED_SECONDS:
            self.client_gives_up()
            volume.process.end()
