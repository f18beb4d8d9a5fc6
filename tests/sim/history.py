"""The checker: every block is a register, every write has a value of its own.

A block (or a 512-byte sector, where the client writes sectors) is judged by itself. Time is cut
into eras. Within an era the operations must be linearizable. Values are unique, so the rule of
Gibbons and Korach ("Testing shared memories", 1997) decides: the operations of one value form a
cluster; f is its first answer, s its last beginning; if f of one is before s of the other, all of
it comes before; two clusters must not come before each other, and nothing reads what was not yet
written. Zeros are written by many, so reads of zeros are judged one by one.

An era ends when a volume daemon has opened the volume (what was not answered by then either
happened or never will) or the client starts anew after a loss of power, or after a revert. The next
era begins with one of the values that the last one may have left, and the first read decides which:

- after a mere restart: any value that no answered one comes after;
- after a loss of power: any value since the last one that is known to be durable (flushed, or
  written with FUA), and mixed sectors of these;
- after a revert: any value that the block may have had while the snapshot was made.

A value that was read but whose write was never answered may be gone after a restart: a member can
show it, and be lost together with the volume daemon. In the same way a write that is answered with
an error, because the last copy was lost, may have been read before and be gone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

NEVER = float("inf")

Value = int | tuple[int, ...]
"""what a block holds: the number of a write, 0 for zeros, -1 for rubbish; a tuple: by sectors"""


@dataclass
class Op:
    """A read or a write of one register."""

    value: Value
    began: float
    ended: float = NEVER  # when it was answered well
    durable: float = NEVER  # when a flush that covers it was answered
    write: bool = False
    failed: float = NEVER  # when a write was answered with an error


@dataclass
class Era:
    """`power_lost`: what was not flushed may be gone. `revert_to`: a snapshot; `maybe`: or not."""

    began: float
    power_lost: bool = False
    revert_to: Snapshot | None = None
    maybe: bool = False


@dataclass
class Snapshot:
    """When it was made; `began` to `ended` contains the moment."""

    name: str
    began: float
    ended: float = NEVER


@dataclass(frozen=True)
class Candidates:
    """What a register may hold."""

    values: frozenset[Value]
    mixed: bool = False

    def allow(self, value: Value) -> bool:
        if value in self.values:
            return True
        return (
            self.mixed
            and isinstance(value, tuple)
            and all(any(part in _parts(v, n) for v in self.values) for n, part in enumerate(value))
        )

    def __or__(self, other: Candidates) -> Candidates:
        return Candidates(self.values | other.values, self.mixed or other.mixed)


def _parts(value: Value, number: int) -> tuple[int, ...]:
    return (value[number],) if isinstance(value, tuple) else (value,)


@dataclass
class Cluster:
    """A write of this era and its reads; or what was there before."""

    value: Value
    began: float  # of the write
    answered: float = NEVER  # of the write
    durable: float = NEVER
    first_end: float = NEVER
    last_begin: float = 0.0
    era: int = 0
    failed: float = NEVER

    def before(self, other: Cluster) -> bool:
        if self.era != other.era:
            return self.era < other.era
        return self.first_end < other.last_begin


class Register:
    """The operations of one block or sector."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.writes: list[Op] = []
        self.reads: list[Op] = []
        self.snapshot_reads: list[tuple[str, Op]] = []

    def check(self, eras: list[Era], snapshots: dict[str, Snapshot]) -> str:
        """What is wrong, or nothing."""
        return _Judge(self, eras, snapshots).judge()


@dataclass
class _Span:
    """All clusters since the last loss of power or revert, and what was there at its beginning."""

    base: Candidates
    clusters: list[Cluster] = field(default_factory=list)


class _Judge:
    def __init__(self, register: Register, eras: list[Era], snapshots: dict[str, Snapshot]) -> None:
        self._register = register
        self._eras = eras
        self._snapshots = snapshots
        self._starts = [era.began for era in eras]
        self._snapshot_values: dict[str, Candidates] = {}

    def _by_era(self, ops: Iterable[Op]) -> list[list[Op]]:
        found: list[list[Op]] = [[] for _ in self._eras]
        for op in ops:
            found[bisect_right(self._starts, op.began) - 1].append(op)
        return found

    def judge(self) -> str:
        register = self._register
        writes, reads = self._by_era(register.writes), self._by_era(register.reads)
        initial = Candidates(frozenset([0]))
        span = _Span(initial)
        clusters: list[Cluster] = []
        for number, era in enumerate(self._eras):
            if number:
                initial = self._initial(era, span, clusters, initial)
                if era.power_lost or (era.revert_to is not None and not era.maybe):
                    span = _Span(initial)
                elif era.revert_to is not None:
                    reverted = self._snapshot_values.get(era.revert_to.name, initial)
                    span.clusters += [Cluster(v, era.began, era=number) for v in reverted.values]
            clusters, trouble = self._era(number, era, initial, writes[number], reads[number])
            if trouble:
                return f"{register.name}: {trouble}"
            span.clusters += clusters[1:]
            if clusters[0].last_begin > era.began:  # a read has shown what was there
                initial = Candidates(frozenset([clusters[0].value]))
                if not number or era.power_lost or (era.revert_to is not None and not era.maybe):
                    span.base = initial
            self._note_snapshots(number, era, clusters, initial)
        for name, op in register.snapshot_reads:
            allowed = self._snapshot_values.get(name)
            if allowed is not None and not allowed.allow(op.value):
                shown = sorted(map(str, allowed.values))
                return f"{register.name}: snapshot {name} has {op.value}, allowed are {shown}"
            if allowed is not None:
                self._snapshot_values[name] = Candidates(frozenset([op.value]))
        return ""

    # ---- between eras -------------------------------------------------------------------------

    def _initial(
        self, era: Era, span: _Span, clusters: list[Cluster], initial: Candidates
    ) -> Candidates:
        if era.power_lost:
            durable = [c for c in span.clusters if c.durable <= era.began]
            values = [
                c.value
                for c in span.clusters
                if not any(c.before(other) for other in durable if other is not c)
            ]
            left = Candidates(frozenset(values), True)
            if not durable:
                left |= span.base
        else:
            left = self._last(clusters, initial)
        if era.revert_to is None:
            return left
        reverted = self._snapshot_values.get(era.revert_to.name, left)
        return reverted | left if era.maybe else reverted

    @staticmethod
    def _last(clusters: list[Cluster], initial: Candidates, end: float = NEVER) -> Candidates:
        """What may have been there at `end`, given what was answered before that."""
        sure = [c for c in clusters[1:] if c.answered < NEVER and c.answered <= end]
        new = [c for c in clusters[1:] if c.began <= end]
        values = frozenset(
            c.value for c in new if not any(c.before(other) for other in sure if other is not c)
        )
        left = Candidates(values)
        return left if sure else left | initial

    def _note_snapshots(
        self, number: int, era: Era, clusters: list[Cluster], initial: Candidates
    ) -> None:
        end = self._starts[number + 1] if number + 1 < len(self._eras) else NEVER
        for snapshot in self._snapshots.values():
            if era.began <= snapshot.began < end:
                # Values that were overwritten for sure before it began are out.
                sure = [c for c in clusters[1:] if c.answered < snapshot.began]
                new = [c for c in clusters[1:] if c.began <= min(snapshot.ended, end)]
                found = Candidates(
                    frozenset(
                        c.value
                        for c in new
                        if not any(c.before(other) for other in sure if other is not c)
                    )
                )
                self._snapshot_values[snapshot.name] = found if sure else found | initial

    # ---- within an era ------------------------------------------------------------------------

    def _era(
        self, number: int, era: Era, initial: Candidates, writes: list[Op], reads: list[Op]
    ) -> tuple[list[Cluster], str]:
        old = Cluster(0, era.began, era.began, era.began, era.began, era.began, number)
        clusters = [old]
        by_value: dict[Value, Cluster] = {}
        zero_reads = []
        for op in writes:
            cluster = Cluster(op.value, op.began, op.ended, op.durable, op.ended, era=number)
            cluster.failed = op.failed
            if op.ended < NEVER:
                cluster.last_begin = op.began
            clusters.append(cluster)
            if op.value != 0:
                by_value[op.value] = cluster
        pinned: Value | None = None
        some_zeros = any(op.value == 0 for op in writes)
        for op in reads:
            found = by_value.get(op.value)
            if found is not None:
                if op.ended < found.began:
                    return clusters, f"{op.value} was read at {op.ended:.6f} before it was written"
                if op.ended <= found.failed < NEVER:
                    continue  # shown by a member that was lost before the write failed
                found.first_end = min(found.first_end, op.ended)
                found.last_begin = max(found.last_begin, op.began)
            elif op.value == 0 and some_zeros:
                zero_reads.append(op)
            elif not initial.allow(op.value):
                shown = sorted(map(str, initial.values))
                return clusters, (
                    f"{op.value} was read at {op.began:.6f} in the era from {era.began:.6f} on; "
                    f"it began with one of {shown}"
                )
            elif pinned is not None and pinned != op.value:
                return clusters, f"{op.value} was read at {op.began:.6f}, {pinned} before that"
            else:
                pinned = old.value = op.value
                old.last_begin = max(old.last_begin, op.began)
        trouble = self._order(clusters)
        return clusters, trouble or self._zeros(clusters, zero_reads, initial)

    @staticmethod
    def _order(clusters: list[Cluster]) -> str:
        live = [c for c in clusters if c.last_begin]
        for index, one in enumerate(live):
            for other in live[index + 1 :]:
                if one.before(other) and other.before(one):
                    return (
                        f"{one.value} and {other.value} come before each other: answered at "
                        f"{one.first_end:.6f} and {other.first_end:.6f}, asked for again at "
                        f"{one.last_begin:.6f} and {other.last_begin:.6f}"
                    )
        return ""

    @staticmethod
    def _zeros(clusters: list[Cluster], reads: list[Op], initial: Candidates) -> str:
        for op in reads:
            sure = [c for c in clusters[1:] if c.answered < op.began]
            zeros = [c for c in clusters[1:] if c.value == 0 and c.began <= op.ended]
            if any(not any(z.answered < c.began for c in sure) for z in zeros):
                continue
            if not sure and initial.allow(0):
                continue
            return f"zeros were read at {op.began:.6f}, but they were overwritten"
        return ""
