"""Members that answer too late are OUT, however many other answers they give.

The clock is looked at a few times a second: each look notes how far the order has come. A member
owes an answer since the first look at which the request was there already, so a request costs
nothing. A member is never judged by the clock alone, but next to its peers, because a machine or
disk that all of them share may be slow:

- a write or trim that takes longer than the limit, and that another member in sync has applied;
- a ping that takes longer, while another member owes none that long;
- a read that takes longer, while another member reads the same block in half that time;
- over some seconds, writes that come SLOW_SECONDS late on average and PEERS_FACTOR times later than
  those of the slowest peer.

WORK_SECONDS_MAX is for everything that may wait for a disk (flushes, snapshots, copies) and stands
alone. The last member in sync is never put OUT for this. A member whose disk is full owes only
signs of life.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from protocol import replica as wire
from replication.answers import Chunks
from replication.authority import IN_SYNC
from replication.link import Reads

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link

LOOK_SECONDS = 0.25
ANSWER_SECONDS_MAX = 2.0
WORK_SECONDS_MAX = 30.0  # a flush of a slow, busy disk takes seconds; a rebuild step less
SLOW_SECONDS = 0.5
PEERS_FACTOR = 8.0
_MEMORY = 0.05  # weight of one look in the average: about five seconds


class Watch:
    """The looks at one engine; `look` is called every LOOK_SECONDS."""

    def __init__(self, engine: Engine, answer_seconds_max: float = ANSWER_SECONDS_MAX) -> None:
        self._engine = engine
        self._limit = answer_seconds_max
        self._looks: deque[tuple[float, int]] = deque()  # when, and the newest sequence then
        self._average: dict[Link, float] = {}
        self._probed: set[Link] = set()

    @property
    def idle(self) -> bool:
        """Nobody owes anything: there is nothing to look at."""
        engine = self._engine
        return not engine.pending and not any(
            link.reads or link.calls for link in engine.links.values() if link.connected
        )

    def look(self, now: float) -> None:
        """Note how far the order has come; fail who owes an answer for too long."""
        engine, looks = self._engine, self._looks
        engine.latency.wanted = True
        if not looks or looks[-1][1] != engine.sequence:
            looks.append((now, engine.sequence))
        remote = [link for link in engine.links.values() if link.connected and not link.is_local]
        late = {link: self._age(self._owed_change(link), now) for link in remote}
        pings = {link: self._age(self._owed_call(link, ping=True), now) for link in remote}
        full = engine.room.full
        for link in remote:
            if late[link] > self._limit and self._peer_applied(link):
                self._fail(link, f"a write took more than {self._limit:g} s")
            elif pings[link] > self._limit and self._someone_is_better(link, pings):
                self._fail(link, f"no sign of life for {self._limit:g} s")
            elif link in full:
                continue  # what waits for space may take as long as it takes
            elif self._age(self._owed_call(link, ping=False), now) > WORK_SECONDS_MAX:
                self._fail(link, f"a request took more than {WORK_SECONDS_MAX:g} s")
            elif self._age(min(link.reads, default=None), now) > self._limit:
                self._probe(link, now)
        self._ping_full_members()
        self._compare(late)
        while len(looks) > 1 and now - looks[0][0] > WORK_SECONDS_MAX + 2 * LOOK_SECONDS:
            looks.popleft()

    # ---- what is owed ---------------------------------------------------------------------

    def _owed_change(self, link: Link) -> int | None:
        """The oldest write or trim that a target has not applied."""
        engine = self._engine
        if link not in engine.targets or link in engine.room.full:
            return None
        return next((entry[0] for entry in engine.pending if entry[0] > link.applied), None)

    @staticmethod
    def _owed_call(link: Link, *, ping: bool) -> int | None:
        calls = [seq for seq, (answer, _) in link.calls.items() if (answer == wire.PONG) is ping]
        return min(calls, default=None)

    def _age(self, sequence: int | None, now: float) -> float:
        if sequence is None:
            return 0.0
        return next((now - when for when, newest in self._looks if newest >= sequence), 0.0)

    # ---- judging --------------------------------------------------------------------------

    def _peers(self, link: Link) -> list[Link]:
        return [
            peer
            for peer in self._engine.targets
            if peer is not link and peer.state == IN_SYNC and peer.connected
        ]

    def _peer_applied(self, link: Link) -> bool:
        owed = self._owed_change(link)
        return owed is not None and any(peer.applied >= owed for peer in self._peers(link))

    def _someone_is_better(self, link: Link, ages: dict[Link, float]) -> bool:
        return any(ages.get(peer, 0.0) < self._limit / 2 for peer in self._peers(link))

    def _fail(self, link: Link, reason: str) -> None:
        if self._peers(link) or link.state != IN_SYNC:
            self._engine.fail(link, reason)

    def _compare(self, late: dict[Link, float]) -> None:
        average = self._average = {
            link: self._average.get(link, 0.0) * (1 - _MEMORY) + age * _MEMORY
            for link, age in late.items()
        }
        for link, mine in average.items():
            peers = [average[peer] for peer in self._peers(link) if peer in average]
            if peers and mine > SLOW_SECONDS and mine > PEERS_FACTOR * max(peers):
                self._fail(link, f"its writes come {mine:.1f} s late, those of others do not")

    def _ping_full_members(self) -> None:
        """A full disk is no reason to be silent."""
        for link in list(self._engine.room.full):
            if self._owed_call(link, ping=True) is None:
                self._engine.call(link, wire.PING, lambda a, p, e: None)

    # ---- late reads -----------------------------------------------------------------------

    def _probe(self, link: Link, now: float) -> None:
        """Ask another member for the block that is late."""
        others = [peer for peer in self._engine.readers if peer is not link]
        if not others or link in self._probed:
            return
        oldest = link.reads[min(link.reads)]
        self._probed.add(link)
        probe = _Probe(self, link, oldest, now)
        reads = Reads(probe, [None], oldest.firsts[:1], [1], oldest.layer_id, (link,))
        self._engine.send_reads(reads)

    def probed(self, link: Link, oldest: Reads, seconds: float, error: int) -> None:
        """Another member has answered what `link` still owes, or could not."""
        self._probed.discard(link)
        if not error and seconds < self._limit / 2 and oldest in link.reads.values():
            self._fail(link, f"a read took more than {self._limit:g} s")


class _Probe:
    """The client of a probing read."""

    def __init__(self, watch: Watch, link: Link, oldest: Reads, began: float) -> None:
        self._watch = watch
        self._about = link, oldest
        self._began = began

    def _end(self, error: int) -> None:
        seconds = self._watch._engine.now() - self._began
        self._watch.probed(*self._about, seconds, error)

    def data(self, cookie: Any, chunks: Chunks) -> None:
        self._end(0)

    def blocks(self, cookies: Sequence[Any], cells: memoryview) -> None:
        self._end(0)

    def done(self, cookie: Any, error: int) -> None:
        self._end(error)

    def extents(self, cookie: Any, runs: Sequence[tuple[int, bool]]) -> None:
        raise AssertionError("a read returns no extents")
