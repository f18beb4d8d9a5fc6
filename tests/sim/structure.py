"""Snapshots are made, deleted, read, cloned and gone back to, the volume grows, one by one.

A revert replaces what the client sees, so the client is quiet meanwhile: nothing is under way when
it is asked for. If its answer does not come, it may have happened, at the latest when the volume is
opened again.
"""

from __future__ import annotations

from collections.abc import Callable

from blockd.daemons.volume import VolumeDaemon
from protocol.errors import BlockdError, PeerError, StorageError
from protocol.units import BLOCK_BYTES
from replication.cloning import Order, clone
from tests.sim.client import Client
from tests.sim.cluster import Cluster, VolumeProcess
from tests.sim.history import Era, Snapshot

SNAPSHOTS_MAX = 10  # made in one run
CLONES_MAX = 3
SIZE_BYTES_MAX = 200 << 20
QUIET_SECONDS_MAX = 5.0  # for requests under way before a revert


class StructureUser:
    """Whoever asks for changes of the layer tree."""

    def __init__(self, cluster: Cluster, client: Client, eras: list[Era]) -> None:
        self._cluster = cluster
        self._client = client
        self._eras = eras
        self._kernel = cluster.kernel
        self._busy_with: VolumeProcess | None = None
        self.quiet = False  # the client must not ask for anything
        self.size_bytes = cluster.size_bytes  # which the volume was said to have
        self._reverting: Snapshot | None = None  # asked for, and not known to be over
        self.clones: list[tuple[str, dict[str, str]]] = []  # snapshot; member to directory
        self._asked = 0  # for clones

    def act(self, volume: VolumeProcess) -> None:
        """Change something; called in the name of the volume daemon's process."""
        daemon = volume.daemon
        if not volume.usable or daemon is None or self._busy_with is not None or daemon.stopping:
            return
        random = self._kernel.random
        names = [layer.name for layer in daemon.engine.record.layers if layer.name]
        dice = random.random()
        if dice < 0.5 or not names:
            if len(self._client.snapshots) < SNAPSHOTS_MAX:
                self._busy_with = volume
                self._client.snapshot(volume, lambda well: self._done())
        elif dice < 0.6:
            self._grow(volume, daemon)
        elif dice < 0.7:
            self._ask("delete", random.choice(names), volume, daemon.structure.remove)
        elif dice < 0.8:
            if len(self.clones) < CLONES_MAX:
                self._clone(random.choice(names), volume, daemon)
        elif len(self._cluster.volumes) == 1 and not self.quiet:
            self.quiet = True
            self._busy_with = volume
            name = random.choice(names)
            self._await_quiet(volume, name, self._kernel.now + QUIET_SECONDS_MAX)

    def _clone(self, name: str, volume: VolumeProcess, daemon: VolumeDaemon) -> None:
        """Have members make replicas of another volume; who is in sync may be lost meanwhile."""
        self._asked += 1
        paths: dict[str, str] = {}
        for link in daemon.engine.readers:
            disk = next(m.disk for m in self._cluster.members if m.uuid == link.replica_uuid)
            paths[link.replica_uuid] = f"{disk.directory}/clone-{self._asked}"

        def ask(text: str, done: Callable[[BlockdError | None], None]) -> None:
            def ended(error: BlockdError | None) -> None:
                if error is None:
                    self.clones.append((name, paths))
                done(error)

            order = Order(
                snapshot=name,
                volume_uuid=f"clone {self._asked}",
                volume_name="clone",
                size_bytes=daemon.engine.record.size_bytes,
                targets={uuid: (f"c{self._asked}-{uuid}", path) for uuid, path in paths.items()},
                unshare=self._kernel.random.random() < 0.4,
            )
            clone(daemon.structure, order, ended)

        self._ask("clone", name, volume, ask)

    def _grow(self, volume: VolumeProcess, daemon: VolumeDaemon) -> None:
        wanted = (
            daemon.engine.record.size_bytes + self._kernel.random.randint(1, 4096) * BLOCK_BYTES
        )
        if wanted > SIZE_BYTES_MAX:
            return

        def grow(text: str, done: Callable[[BlockdError | None], None]) -> None:
            def ended(error: BlockdError | None) -> None:
                if error is None:
                    self.size_bytes = max(self.size_bytes, wanted)
                done(error)

            daemon.structure.grow(wanted, ended)

        self._ask("grow", f"to {wanted}", volume, grow)

    def _done(self) -> None:
        self._busy_with = None
        self.quiet = False

    def _ask(
        self,
        what: str,
        name: str,
        volume: VolumeProcess,
        call: Callable[[str, Callable[[BlockdError | None], None]], None],
    ) -> None:
        self._busy_with = volume

        def done(error: BlockdError | None) -> None:
            self._kernel.log("client", f"{what} {name}: {error or 'done'}")
            if what == "revert":
                self._reverted(error)
            self._done()

        self._kernel.log("client", f"{what} {name}")
        try:
            call(name, done)
        except BlockdError as error:
            done(error)
        assert volume.daemon is not None
        volume.daemon.send_everything()

    # ---- going back ---------------------------------------------------------------------------

    def _await_quiet(self, volume: VolumeProcess, name: str, deadline: float) -> None:
        if not volume.usable or volume.daemon is None or self._busy_with is not volume:
            return
        if self._client.under_way and self._kernel.now < deadline:
            self._kernel.at(0.02, volume.process, lambda: self._await_quiet(volume, name, deadline))
        elif self._client.under_way or len(self._cluster.volumes) > 1:
            self._done()
        else:
            self._reverting = self._client.snapshots[name]
            self._ask("revert", name, volume, volume.daemon.structure.revert)

    def _reverted(self, error: BlockdError | None) -> None:
        """Without an error it happened; if members were lost it may have, or may still."""
        if error is not None and not isinstance(error, PeerError | StorageError):
            self._reverting = None
        elif self._reverting is not None:
            maybe = error is not None
            self._eras.append(Era(self._kernel.now, revert_to=self._reverting, maybe=maybe))
            if not maybe:
                self._reverting = None

    def volume_ended(self, volume: VolumeProcess) -> None:
        if volume is self._busy_with:
            self._done()

    def volume_serves(self, volume: VolumeProcess) -> None:
        """What was not answered by now either happened or never will."""
        self._eras.append(
            Era(
                self._kernel.now,
                power_lost=not volume.consumer_alive,
                revert_to=self._reverting,
                maybe=True,
            )
        )
        self._reverting = None
