"""One seed: a volume in trouble, then peace, then the checks.

Each run draws the number of members, the speed of the network, the blocks in use and the kinds of
fault it enables. The client works until it has asked OPERATIONS times and the faults are over. Then
everything heals; all members must become equal within PEACE_SECONDS of virtual time; each is read
through the volume daemon and, after a clean end, from its directory.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from random import Random

from protocol.checksum import ZEROS, block_checksum
from protocol.errors import BlockdError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_ZONE, ZONE_BYTES
from replication.authority import IN_SYNC
from snapshots.replica import Replica
from tests.sim.client import Client
from tests.sim.cluster import Cluster, VolumeProcess
from tests.sim.disk import Disks
from tests.sim.faults import DAMAGE, KINDS, MILD, ONCE, Faults
from tests.sim.history import Era, Op
from tests.sim.kernel import Kernel, Violation
from tests.sim.structure import StructureUser

OPERATIONS = 520
FAULTS_MIN = 5
FAULTS_MANY = 50  # from here on they become rarer: the client must get on
EAGER_SECONDS = 5e-4
SLOW_SECONDS = 0.1
TROUBLE_SECONDS = 300.0
PEACE_SECONDS = 900.0  # a rebuild that failed eight times waits for minutes
SIZE_BYTES = 100 << 20  # seven zones, 25 regions; the last zone has one
WANDER_SECONDS = 1.5  # mean time in which a client that wanders uses one zone
TRACE_SHOWN = 60
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


@dataclass
class Result:
    """What became of a seed."""

    seed: int
    error: str = ""
    trace: list[str] = field(default_factory=list)
    digest: str = ""
    operations: int = 0
    faults: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    virtual_seconds: float = 0.0
    events: int = 0


class Run:
    """See the module text."""

    def __init__(self, seed: int, directory: str) -> None:
        self.seed = seed
        self.kernel = Kernel(seed)
        self.kernel.hidden = directory
        random = self.random = self.kernel.random
        self.disks = Disks(self.kernel)
        count = random.choice((1, 2, 2, 3, 3, 3, 3, 4))
        with self.disks:
            self.cluster = Cluster(self.kernel, self.disks, directory, count, SIZE_BYTES)
        self.cluster.min_in_sync = random.choice((1, 1, 1, min(2, count)))
        network = self.cluster.network
        network.mean_delay = random.choice((5e-5, 2e-4, 2e-3))
        for host in (*self.cluster.hosts, *(m.host for m in self.cluster.members)):
            host.rate = random.uniform(0.98, 1.02)
        grounds = _grounds(random)
        self.client = Client(self.cluster, grounds, random.sample(grounds[0][:12], 3))
        self.faults = Faults(self.cluster, self.client, _kinds(random, count))
        self.eras = [Era(0.0)]
        self.fault_seconds = random.choice((0.5, 1.0, 2.0, 4.0))
        self.client_seconds = self.fault_seconds * random.uniform(0.02, 0.04)  # between bursts
        self.eager = random.random() < 0.5  # works harder while a member is being made equal
        self.structural = random.choice((0.0, 0.02, 0.1))  # changes of the tree per burst
        self.structure = StructureUser(self.cluster, self.client, self.eras)
        self.cluster.on_serves = self.structure.volume_serves
        self.cluster.on_ended = self._ended

    def _ended(self, volume: VolumeProcess) -> None:
        self.client.volume_ended(volume)
        self.structure.volume_ended(volume)

    # ---- the client and the faults, as events -------------------------------------------------

    def _tick(self) -> None:
        """Some requests at a time."""
        if self.faults.over:
            return
        volumes = [volume for volume in self.cluster.volumes if volume.usable]
        if volumes and not self.structure.quiet:
            volume = self.random.choice(volumes)
            count = self.random.choice((1, 1, 2, 5))
            for _ in range(count):
                self.kernel.at(0.0, volume.process, lambda: self.client.act(volume))
            if self.random.random() < self.structural:
                self.kernel.at(0.0, volume.process, lambda: self.structure.act(volume))
        seconds = self.random.expovariate(1.0 / self.client_seconds)
        if self.kernel.now < self.faults.lasts_until:
            seconds = max(seconds, SLOW_SECONDS)
        elif self.eager and self.client.serial < OPERATIONS and self._copying():
            seconds = min(seconds, self.random.expovariate(1.0 / EAGER_SECONDS))
        self.kernel.at(seconds, None, self._tick)

    def _wander(self) -> None:
        """The client goes on elsewhere: what it leaves becomes clean, and stays as it is."""
        self.client.ground = self.random.choice(self.client.grounds)
        self.kernel.at(self.random.expovariate(1.0 / WANDER_SECONDS), None, self._wander)

    def _copying(self) -> bool:
        """Is a member being made equal?"""
        daemons = [volume.daemon for volume in self.cluster.volumes if volume.usable]
        return any(daemon is not None and daemon.engine.rebuilds for daemon in daemons)

    def _strike(self) -> None:
        if not self.faults.over:
            self.faults.strike()
            mean = self.fault_seconds * max(1.0, self.faults.count / FAULTS_MANY)
            self.kernel.at(self.random.expovariate(1.0 / mean), None, self._strike)

    # ---- the phases ---------------------------------------------------------------------------

    def run(self) -> None:
        """All of it; raises Violation."""
        with self.disks, self.cluster:
            for member in self.cluster.members:
                member.start()
            self.cluster.open()
            self.kernel.at(1.0, None, self.cluster.look)
            self.kernel.run(lambda: bool(self.cluster.volumes[0].usable), 60.0)
            self.kernel.at(0.0, None, self._tick)
            self.kernel.at(0.5, None, self._strike)
            if len(self.client.grounds) > 1:
                self.kernel.at(0.0, None, self._wander)
            self.kernel.run(self._enough, TROUBLE_SECONDS)
            self._peace()
            self._check_directories()
        self._check_history()

    def _enough(self) -> bool:
        return (
            self.client.serial >= OPERATIONS
            and self.faults.count >= FAULTS_MIN
            and self.kernel.now >= self.faults.lasts_until
        )

    def _peace(self) -> None:
        self.faults.heal()
        self.kernel.log("world", "peace")
        self.kernel.run(lambda: False, 3.0)  # what was begun takes its course
        if not self._becomes_well():
            record = self.cluster.record
            states = {u: m.state for u, m in record.members.items()} if record else {}
            raise Violation(f"not all members are in sync {PEACE_SECONDS:.0f} s later: {states}")
        volume = self.cluster.volumes[-1]
        first = self.client.used[0]
        # This one renews the read lease: reads that wait for it all go to one member.
        self.kernel.at(0.0, volume.process, lambda: self.client.read_at(volume, first))
        self.kernel.run(lambda: not self.client.under_way, 1.0)
        self.kernel.at(0.0, volume.process, lambda: self._read_all(volume))
        self.kernel.run(lambda: False, 10.0)
        if self.client.under_way:
            raise Violation(f"{len(self.client.under_way)} requests were never answered")
        if self.client.failed_in_peace:
            raise Violation(f"{self.client.failed_in_peace} reads failed in peace")
        assert volume.daemon is not None
        self.cluster.reopening = False
        self.kernel.at(0.0, volume.process, volume.daemon.stop)
        if not self.kernel.run(lambda: not self.cluster.volumes, 60.0):
            raise Violation("the volume daemon does not stop")
        for member in self.cluster.members:
            assert member.process is not None
            self.kernel.at(0.0, member.process, member.stop)
        self.kernel.run(lambda: not any(m.process for m in self.cluster.members), 5.0)

    def _becomes_well(self) -> bool:
        """All is well, and stays so: a process that hung a moment ago has had its say."""
        while self.kernel.run(self._all_well, PEACE_SECONDS):
            self.kernel.run(lambda: False, 3.0)
            if self._all_well():
                return True
        return False

    def _all_well(self) -> bool:
        cluster = self.cluster
        record = cluster.record
        if record is None or len(cluster.volumes) != 1 or not cluster.volumes[0].usable:
            return False
        daemon = cluster.volumes[0].daemon
        processes = [cluster.volumes[0].process, *(member.process for member in cluster.members)]
        if any(process and process.stopped_until > self.kernel.now for process in processes):
            return False  # somebody hangs, and nobody has noticed yet
        return (
            daemon is not None
            and not daemon.stopping
            and all(member.state == IN_SYNC for member in record.members.values())
            and len(daemon.engine.readers) == len(record.members)
            and not daemon.engine.rebuilds
            and not daemon.structure.busy
            and not any(r.volume is not cluster.volumes[0] for r in self.client.under_way.values())
        )

    def _read_all(self, volume: VolumeProcess) -> None:
        """Every block, from every member."""
        assert volume.daemon is not None
        engine = volume.daemon.engine
        self.client.peaceful = True
        for reader in list(engine.readers):
            for block in self.client.used:
                engine.reader = reader
                self.client.read_at(volume, block)

    # ---- the checks ---------------------------------------------------------------------------

    def _check_directories(self) -> None:
        """Each member, read from its files alone: all equal, and as the history allows."""
        record = self.cluster.record
        assert record is not None
        if record.size_bytes < self.structure.size_bytes:
            raise Violation(f"{record.size_bytes} bytes, but {self.structure.size_bytes} were said")
        named = {layer.id: layer.name for layer in record.layers if layer.name}
        first: dict[tuple[str, int], bytes] = {}
        damaged = self.faults.victim
        for member in self.cluster.members:
            try:
                replica = Replica.open(member.path)
            except BlockdError as error:
                raise Violation(f"{member.uuid} cannot be opened: {error}") from None
            if replica.size_bytes < record.size_bytes:
                raise Violation(f"{member.uuid} has {replica.size_bytes} bytes, too few")
            layers = {
                layer.id
                for layer in replica.metadata.layers
                if layer.id != replica.metadata.head_id and not layer.removed and layer.name
            }
            if layers != set(named):
                raise Violation(f"{member.uuid} has snapshots {layers}, the record {set(named)}")
            for layer_id, name in ((0, ""), *named.items()):
                self._compare(replica, layer_id, name, member is damaged, first)
            replica.abandon()
        self._check_clones(first)

    def _compare(
        self,
        replica: Replica,
        layer_id: int,
        name: str,
        damaged: bool,
        first: dict[tuple[str, int], bytes],
    ) -> None:
        """A view of snapshot `name`, the same wherever it is."""
        for block in self.client.used:
            data = _read(replica, block, layer_id) if block < replica.block_count else None
            if data is None:
                if damaged or block >= replica.block_count:
                    continue
                raise Violation(f"{replica.path}: block {block} is damaged")
            if first.setdefault((name, block), data) != data:
                raise Violation(
                    f"{replica.path}: block {block} of snapshot {name!r} is not as elsewhere"
                )
            self._note(block, name, data)

    def _check_clones(self, first: dict[tuple[str, int], bytes]) -> None:
        """Every clone shows its snapshot, before and after what is its own was folded."""
        for name, paths in self.structure.clones:
            for member in self.cluster.members:
                if member.uuid not in paths:
                    continue
                try:
                    replica = Replica.open(paths[member.uuid])
                    damaged = member is self.faults.victim
                    self._compare(replica, 0, name, damaged, first)
                    while replica.maintain():
                        pass
                    self._compare(replica, 0, name, damaged, first)
                except BlockdError as error:
                    raise Violation(f"{paths[member.uuid]} cannot be used: {error}") from None
                replica.abandon()

    def _note(self, block: int, snapshot: str, data: bytes) -> None:
        now = self.kernel.now
        for place, at, size in self.client.places(block * BLOCK_BYTES, BLOCK_BYTES):
            start = at - block * BLOCK_BYTES
            value = self.client.decode(data[start : start + size], place)
            register = self.client.registers[place]
            if snapshot:
                register.snapshot_reads.append((snapshot, Op(value, now, now)))
            else:
                register.reads.append(Op(value, now, now))

    def _check_history(self) -> None:
        for register in self.client.registers.values():
            trouble = register.check(self.eras, self.client.snapshots)
            if trouble:
                raise Violation(trouble)


def _read(replica: Replica, block: int, layer_id: int) -> bytes | None:
    """One block; None if its checksum does not match."""
    target = memoryview(bytearray(4 + BLOCK_BYTES))
    used = replica.read_into(block, 1, target, layer_id)
    entry = int.from_bytes(target[:4], "little")
    if entry <= ZEROS:
        return bytes(BLOCK_BYTES)
    data = bytes(target[4:used])
    return data if block_checksum(data) == entry else None


def _grounds(random: Random) -> list[list[int]]:
    """The blocks in use, hot ones first: around some borders, or some in each of the zones.

    In a run that wanders between zones these have different histories.
    """
    if random.random() < 0.4:
        zones = range(SIZE_BYTES // ZONE_BYTES + 1)
        starts = [zone * BLOCKS_PER_ZONE + random.choice((0, 500)) for zone in zones]
        return [random.sample(range(start, start + 12), 8) for start in starts]
    places = [range(24), range(1016, 1032), range(2040, 2056), range(4088, 4104)]
    chosen = [block for part in random.sample(places, 3) for block in part]
    random.shuffle(chosen)
    return [chosen[: random.choice((16, 32, 48))]]


def _kinds(random: Random, members: int) -> list[str]:
    """Some of the kinds of fault; damage only where the rest leaves good copies."""
    if members > 1 and random.random() < 0.15:
        return [*DAMAGE, *random.sample(MILD, random.randint(2, len(MILD)))]
    count = random.choice((1, 3, 6, 12, len(KINDS)))
    while True:
        kinds = random.sample(KINDS, count)
        if not ONCE.issuperset(kinds):
            return kinds


def run_seed(seed: int) -> Result:
    """Run one seed and clean up."""
    directory = tempfile.mkdtemp(prefix="blockd-sim-", dir=MEMORY)
    result = Result(seed)
    gc.disable()
    run: Run | None = None
    try:
        run = Run(seed, directory)
        run.run()
    except Violation as violation:
        result.error = str(violation)
    except Exception as error:
        import traceback

        result.error = f"{error!r}\n{traceback.format_exc()}"
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if run is not None:
        kernel = run.kernel
        result.trace = [f"{at:10.6f} {who:9} {what}" for at, who, what in kernel.trace]
        result.digest = kernel.digest.hexdigest()
        result.operations = run.client.serial
        result.faults = run.faults.count
        result.kinds = run.faults.kinds
        result.virtual_seconds = kernel.now
        result.events = kernel.events
    del run
    gc.collect()
    return result
