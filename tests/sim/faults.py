"""Everything that goes wrong on purpose. Each method of `Faults` that is in KINDS is one kind.

A run enables some kinds and lets one of them happen every few seconds; most end by themselves after
a while. Nothing is done that no system survives: blocks are damaged on one member only, the
`victim`, and in such a run the other members are left in peace, so that good copies exist.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tests.sim.client import Client
from tests.sim.cluster import VOLUME_UUID, Cluster, Member, VolumeProcess
from tests.sim.disk import flip_bit
from tests.sim.handover import SimHandOver
from tests.sim.kernel import Host, Process
from tests.sim.turnover import Turnover, fit_to_leave

Link = tuple[str, str]
SPLIT_SECONDS_MIN = 20.0  # a new owner waits 15 s for members, then until the lease is over
ABSENCE_SECONDS = 12.0  # the others are lost and made equal meanwhile, and members change

KINDS = (
    "delay",
    "reorder",
    "drop",
    "reset",
    "partition",
    "partition_one_way",
    "small_windows",
    "power_torn",
    "power_lost",
    "power_all",
    "fsync_error",
    "write_error",
    "disk_full",
    "slow_disk",
    "hang_member",
    "hang_volume",
    "clock_jump",
    "kill_member",
    "kill_volume",
    "kill_all",
    "restart_member",
    "long_absence",
    "replaced_disk",
    "turnover",
    "stop_volume",
    "hand_over",
    "vanish_volume",
    "authority_away",
    "authority_race",
    "authority_lost_answer",
    "authority_rolled_back",
    "two_owners",
    "split",
)
DAMAGE = ("bit_flip", "misdirected_write")
MILD = (  # may happen to other members although the victim is damaged
    "delay",
    "reorder",
    "small_windows",
    "slow_disk",
    "hang_volume",
    "clock_jump",
    "kill_volume",
    "authority_away",
    "authority_race",
    "authority_lost_answer",
)
ONCE = frozenset({"split", "long_absence", "replaced_disk", "turnover"})  # at most once in a run
ALL_KINDS = KINDS + DAMAGE


class Faults:
    """The faults of one run."""

    def __init__(self, cluster: Cluster, client: Client, enabled: list[str]) -> None:
        self.cluster = cluster
        self.client = client
        self.kernel = cluster.kernel
        self.random = cluster.kernel.random
        self.enabled = enabled
        self.count = 0
        self.kinds: dict[str, int] = {}
        self.over = False
        self.replaced = False  # a member has got an empty disk
        self.unnoticed: Member | None = None  # that one, while it still counts as in sync
        self.lasts_until = 0.0  # something that takes its time, and should not be healed before
        self.mild_until = 0.0  # something of several steps that the others would end early
        self.victim: Member | None = None
        if any(kind in DAMAGE for kind in enabled):
            self.victim = self.random.choice(cluster.members)

    def strike(self) -> None:
        """Let one fault happen."""
        kind = self.random.choice(self.enabled)
        before = self.kernel.now
        if before < self.mild_until and kind not in MILD:
            return
        if self.unnoticed not in self.cluster.in_sync():
            self.unnoticed = None
        elif kind not in MILD:
            return  # nobody knows yet that there is a copy less, and the last one could go
        if getattr(self, "_" + kind)() is not False:
            self.count += 1
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
            self.kernel.log("fault", f"{kind}")
        assert self.kernel.now == before

    def heal(self) -> None:
        """All of it ends, now."""
        self.over = True
        network = self.cluster.network
        network.slow.clear()
        network.unblock(sorted(network.blocked))
        network.window_bytes = 4 << 20
        network.break_lossy()
        authority = self.cluster.authority
        authority.away = False
        authority.away_for.clear()
        authority.lose_answers = authority.races = 0
        for member in self.cluster.members:
            member.disk.heal()

    # ---- helpers ------------------------------------------------------------------------------

    def _member(self) -> Member:
        return self.victim or self.random.choice(self.cluster.members)

    def _seconds(self, mean: float) -> float:
        return 0.02 + self.random.expovariate(1.0 / mean)

    def after(self, seconds: float, call: Callable[[], object]) -> None:
        """Call `call` later, unless the trouble is over by then."""
        self.kernel.at(seconds, None, lambda: None if self.over else call())

    def _volume(self) -> VolumeProcess | None:
        usable = [volume for volume in self.cluster.volumes if volume.process.alive]
        return self.random.choice(usable) if usable else None

    def _links(self, member: Member) -> list[Link]:
        hosts = [host.name for host in self.cluster.hosts]
        return [(a, b) for host in hosts for a, b in ((host, member.uuid), (member.uuid, host))]

    # ---- the network --------------------------------------------------------------------------

    def _delay(self) -> None:
        links = self._links(self._member())
        delay = self.random.choice((0.005, 0.05, 0.5))
        for link in links:
            self.cluster.network.slow[link] = delay
        self.after(self._seconds(2.0), lambda: self._fast_again(links))

    def _fast_again(self, links: list[Link]) -> None:
        for link in links:
            self.cluster.network.slow.pop(link, None)

    def _reorder(self) -> None:
        """Every link gets a delay of its own: order holds within a stream, nowhere else."""
        links = [link for member in self.cluster.members for link in self._links(member)]
        for link in links:
            self.cluster.network.slow[link] = self.random.choice((0.0, 0.001, 0.01, 0.1))
        self.after(self._seconds(3.0), lambda: self._fast_again(links))

    def _drop(self) -> bool:
        member, network = self._member(), self.cluster.network
        found = [s for h in self.cluster.hosts for s in network.between(h.name, member.uuid)]
        for sock in found:
            network.lose(sock, self._seconds(2.0))
        return bool(found)

    def _reset(self) -> bool:
        member, network = self._member(), self.cluster.network
        found = [s for h in self.cluster.hosts for s in network.between(h.name, member.uuid)]
        for sock in found:
            sock.break_both()
        return bool(found)

    def _block(self, links: list[Link], seconds: float) -> None:
        network = self.cluster.network
        network.block(links)
        self.after(seconds, lambda: network.unblock(links))

    def _partition(self) -> None:
        self._block(self._links(self._member()), self._seconds(3.0))

    def _partition_one_way(self) -> None:
        links = self._links(self._member())
        inward = self.random.random() < 0.5
        hosts = [host.name for host in self.cluster.hosts]
        self._block([link for link in links if (link[0] in hosts) == inward], self._seconds(3.0))

    def _small_windows(self) -> None:
        network = self.cluster.network
        network.window_bytes = self.random.choice((5000, 20000, 100000))
        self.after(self._seconds(3.0), lambda: setattr(network, "window_bytes", 4 << 20))

    # ---- power, disks -------------------------------------------------------------------------

    def _power_torn(self) -> None:
        self._member().cut_power(0.5, 0.5, self._seconds(2.0))

    def _power_lost(self) -> None:
        self._member().cut_power(self.random.choice((0.0, 0.1)), 0.0, self._seconds(2.0))

    def _power_all(self) -> None:
        """Everything, the client too."""
        for volume in list(self.cluster.volumes):
            volume.process.end()
        self.cluster.client_gives_up()
        keep, tear = self.random.choice((0.0, 0.1, 0.5, 0.9)), self.random.choice((0.0, 0.3))
        for member in self.cluster.members:
            member.cut_power(keep, tear, self._seconds(1.0))

    def _fsync_error(self) -> None:
        self._member().disk.failing_syncs += 1

    def _write_error(self) -> None:
        self._member().disk.failing_writes += 1

    def _disk_full(self) -> None:
        disk = self._member().disk
        disk.free_pages = self.random.choice((0, 0, 5, 50))
        self.after(self._seconds(3.0), lambda: setattr(disk, "free_pages", None))

    def _slow_disk(self) -> None:
        disk = self._member().disk
        disk.slow_seconds = self.random.choice((0.001, 0.01, 0.1))
        self.after(self._seconds(2.0), lambda: setattr(disk, "slow_seconds", 0.0))

    def _bit_flip(self) -> bool:
        assert self.victim is not None
        if len(self.cluster.in_sync()) < 2:
            return False
        layers = [f for path, f in sorted(self.victim.disk.files.items()) if path.endswith("layer")]
        return bool(layers) and flip_bit(self.random.choice(layers), self.random) is not None

    def _misdirected_write(self) -> bool:
        assert self.victim is not None
        if len(self.cluster.in_sync()) < 2:
            return False
        self.victim.disk.misdirect_next = True
        return True

    # ---- processes, clocks --------------------------------------------------------------------

    def _hang_member(self) -> bool:
        process = self._member().process
        return process is not None and self._hang(process)

    def _hang(self, process: Process) -> bool:
        """It does nothing for a while; never one pause after the other."""
        if process.stopped_until > self.kernel.now - 2.0:
            return False
        process.stop_for(self._seconds(2.0))
        return True

    def _hang_volume(self) -> bool:
        volume = self._volume()
        return volume is not None and self._hang(volume.process)

    def _clock_jump(self) -> None:
        """The clock of the day goes anywhere, the monotonic one only forward."""
        hosts: list[Host] = [member.host for member in self.cluster.members]
        host = self.random.choice(hosts + self.cluster.hosts)
        host.wall_jumped_seconds += self.random.uniform(-3600, 3600)
        host.jumped_seconds += self.random.choice((0.0, 0.5, 5.0, 60.0))

    def _kill_member(self) -> bool:
        member = self._member()
        member.kill()
        return True

    def _kill_volume(self) -> bool:
        volume = self._volume()
        if volume is not None:
            volume.process.end()
        return volume is not None

    def _vanish_volume(self) -> bool:
        """The host of the volume daemon is gone: its peers hear nothing. The client lives on."""
        volume = self._volume()
        if volume is None:
            return False
        host = volume.process.host
        host.up = False
        self.cluster.network.power_lost(host.name)
        for other in list(self.cluster.volumes):
            if other.process.host is host:
                other.process.end()
        host.up = True
        return True

    def _kill_all(self) -> None:
        for volume in list(self.cluster.volumes):
            volume.process.end()
        for member in self.cluster.members:
            member.kill()

    def _restart_member(self) -> bool:
        member = self._member()
        process = member.process
        if process is None:
            return False
        self.kernel.at(0.0, process, member.stop)
        return True

    def _long_absence(self) -> bool:
        """A member is away while much happens to the others."""
        if self.lasts_until or len(self.cluster.members) < 2:
            return False  # once in a run
        seconds = self._seconds(ABSENCE_SECONDS)
        self.lasts_until = self.kernel.now + seconds
        self._member().cut_power(self.random.choice((0.0, 0.5)), 0.0, seconds)
        return True

    def _replaced_disk(self) -> bool:
        """A member comes back empty; once in a run, because the others must hold everything."""
        return self.replace_disk(self._member())

    def replace_disk(self, member: Member) -> bool:
        """Give it an empty disk, if nothing is lost by that."""
        if self.replaced or not self.cluster.is_spare(member) or not member.host.up:
            return False
        if self.cluster.network.blocked or not self._another_is_well(member):
            return False
        self.replaced = True
        self.kernel.log("world", f"{member.uuid} gets an empty disk")
        member.replace_disk()
        self.unnoticed = member
        return True

    def _turnover(self) -> bool:
        members = self.cluster.members
        if self.lasts_until or self.replaced or len(members) != 3:
            return False  # once in a run
        grounds = fit_to_leave(self.client)
        if len(self.cluster.in_sync()) != 3 or not grounds:
            return False
        Turnover(self, self.random.sample(members, 3), self.random.choice(grounds))
        return True

    def _another_is_well(self, member: Member) -> bool:
        """Is another one in sync that really serves the owner, on a disk without surprises?"""
        daemon = self.cluster.volumes[0].daemon
        assert daemon is not None
        return any(
            other.daemon is not None
            and other.daemon.service.epoch == daemon.engine.record.epoch
            and not (other.disk.failing_syncs or other.disk.failing_writes)
            for other in self.cluster.in_sync()
            if other is not member
        )

    def _stop_volume(self) -> bool:
        volume = self._volume()
        if volume is None or not volume.usable or volume.daemon is None:
            return False
        self.kernel.at(0.0, volume.process, volume.daemon.stop)
        return True

    def _hand_over(self) -> bool:
        """The volume daemon is replaced while it is used; now and then the new one fails."""
        volume = self._volume()
        if volume is None or not volume.usable or volume.daemon is None:
            return False
        fails = self.random.random() < 0.2
        begin = partial(SimHandOver, volume, self.client, fails)
        self.kernel.at(0.0, volume.process, begin)
        return True

    # ---- the authority and owners -------------------------------------------------------------

    def _authority_away(self) -> None:
        authority = self.cluster.authority
        authority.away = True
        self.after(self._seconds(3.0), lambda: setattr(authority, "away", False))

    def _authority_race(self) -> None:
        self.cluster.authority.races += 2

    def _authority_lost_answer(self) -> None:
        self.cluster.authority.lose_answers += 1

    def _authority_rolled_back(self) -> bool:
        """An old backup is restored while no daemon runs; the newest comes back later."""
        authority, cluster = self.cluster.authority, self.cluster
        newest = authority.records.get(VOLUME_UUID)
        if newest is None or cluster.rolled_back:
            return False
        replicas = [m.daemon.service.replica for m in cluster.members if m.daemon is not None]
        olds = [
            record
            for record in authority.history
            if any(
                record.epoch < replica.metadata.promised_epoch
                or record.config_seq < replica.config_seq
                for replica in replicas
            )
        ]  # those that somebody can know to be old
        if not olds or len(replicas) < len(cluster.members):
            return False
        if cluster.network.blocked or cluster.network.slow or self.over:
            return False
        for volume in list(cluster.volumes):
            volume.process.end()
        old = self.random.choice(olds[-3:])
        authority.records[VOLUME_UUID] = old
        self.kernel.log("authority", f"rolled back to version {old.version}")
        cluster.reopening = False
        cluster.rolled_back = True
        cluster.open()

        def look() -> None:
            """It was refused: restore."""
            if cluster.volumes:
                self.kernel.at(0.2, None, look)
                return
            authority.records[VOLUME_UUID] = newest
            self.kernel.log("authority", f"version {newest.version} is restored")
            cluster.rolled_back = False
            cluster.reopening = True
            cluster.soon(cluster.reopen)

        self.kernel.at(0.2, None, look)
        return True

    def _two_owners(self) -> bool:
        """A second volume daemon, without the first one knowing."""
        if len(self.cluster.volumes) != 1 or not self.cluster.volumes[0].usable:
            return False
        first = self.cluster.volumes[0].process.host
        others = [host for host in self.cluster.hosts if host is not first]
        self.cluster.open(self.random.choice(others))
        return True

    def _split(self) -> bool:
        """The owner and some members on one side; a new owner, the authority, others beyond.

        Some members may be reached from both sides.
        """
        cluster = self.cluster
        if len(cluster.volumes) != 1 or not cluster.volumes[0].usable or len(cluster.members) < 2:
            return False
        if self.lasts_until:
            return False  # once in a run
        old = cluster.volumes[0].process.host
        new = next(host for host in cluster.hosts if host is not old)
        members = list(cluster.members)
        self.random.shuffle(members)
        cut = self.random.randint(1, len(members) - 1)
        between = self.random.choice((cut, len(members), self.random.randint(cut, len(members))))
        links: list[Link] = []
        for number, member in enumerate(members):
            if cut <= number < between:
                continue
            away = new if number < cut else old
            links += [(away.name, member.uuid), (member.uuid, away.name)]
        seconds = SPLIT_SECONDS_MIN + self._seconds(5.0)
        self.lasts_until = self.kernel.now + seconds
        self.mild_until = self.kernel.now + SPLIT_SECONDS_MIN
        self._block(links, seconds)
        cluster.authority.away_for.add(old.name)
        self.after(seconds, lambda: cluster.authority.away_for.discard(old.name))
        cluster.open(new)
        return True
