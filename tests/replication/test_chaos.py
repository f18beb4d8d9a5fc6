"""Proves that nothing acknowledged is lost and everything ends, when requests, snapshots,
deletions, folding, dying and returning members, rebuilds and an authority that comes and goes all
happen at the same time, in any order.
"""

from __future__ import annotations

import contextlib

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.errors import BlockdError
from protocol.units import BLOCK_BYTES, REGION_BYTES
from replication.authority import IN_SYNC, OUT
from tests.replication.world import VOLUME, World

SIZE_BYTES = 2 * REGION_BYTES


class Chaos:
    """A world and what may happen in it."""

    def __init__(self, seed: int) -> None:
        self.world = World(3, SIZE_BYTES, seed)
        self.random = self.world.random
        self.names = 0
        self.outcomes: list[list[BlockdError | None]] = []
        for replica in self.world.replicas.values():
            replica.defers = True

    def offset(self) -> int:
        return self.random.randrange(2) * REGION_BYTES + self.random.randrange(6 * BLOCK_BYTES)

    def write(self) -> None:
        size = self.random.choice((100, BLOCK_BYTES, 9000))
        self.world.write(self.offset(), self.random.randbytes(size), self.random.random() < 0.2)

    def zero(self) -> None:
        self.world.zero(self.offset(), self.random.choice((100, BLOCK_BYTES, 1 << 20)))

    def read(self) -> None:
        self.world.engine.next_turn()
        self.world.read(self.offset(), self.random.choice((100, BLOCK_BYTES, 2 << 20)))

    def flush(self) -> None:
        self.world.flush()

    def lose(self) -> None:
        uuid = self.random.choice(sorted(self.world.replicas))
        if self.world.link(uuid).connected:
            self.world.lose(uuid)

    def reconnect(self) -> None:
        for uuid in self.world.replicas:
            self.world.reconnect(uuid, wait=False)

    def rebuild(self) -> None:
        for uuid in self.world.replicas:
            with contextlib.suppress(BlockdError):
                self.outcomes.append(self.world.rebuild(uuid))

    def snapshot(self) -> None:
        self.names += 1
        self.outcomes.append(self.world.snapshot(f"s{self.names}"))

    def remove(self) -> None:
        named = [layer.name for layer in self.world.engine.record.layers if layer.name]
        if named:
            outcome: list[BlockdError | None] = []
            self.outcomes.append(outcome)
            self.world.structure.remove(self.random.choice(named), outcome.append)

    def fold(self) -> None:
        for replica in self.world.replicas.values():
            for layer_id, layer in list(replica.layers.items()):
                children = [c for c in replica.layers.values() if c.parent == layer_id]
                quiet = replica.complete and not replica.paused
                if quiet and layer.removed and len(children) == 1 and self.random.random() < 0.5:
                    replica.fold(layer_id)

    def forget(self) -> None:
        self.world.structure.forget_folded()

    def authority(self) -> None:
        self.world.authority.away = not self.world.authority.away
        if not self.world.authority.away and self.random.random() < 0.3:
            self.world.authority.lose_answers = 1

    def run(self, count: int) -> None:
        common = [self.write, self.write, self.zero, self.read, self.flush]
        rare = [self.lose, self.reconnect, self.reconnect, self.rebuild, self.rebuild]
        rare += [self.snapshot, self.remove, self.fold, self.forget, self.authority]
        for _ in range(count):
            self.random.choice(common if self.random.random() < 0.6 else rare)()
            self.world.steps(self.random.randrange(25))
            self.world.clock.advance(0.3)

    def calm_down(self) -> None:
        """All faults end; every member is brought back."""
        self.world.authority.away = False
        for _ in range(12):
            self.world.settle(chaotic=True)
            self.world.clock.advance(2)
            self.world.settle(chaotic=True)
            self.reconnect()
            self.world.settle(chaotic=True)
            self.rebuild()
        self.world.settle(chaotic=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32))
def test_everything_at_once_loses_nothing_and_ends(seed: int) -> None:
    chaos = Chaos(seed)
    chaos.run(80)
    chaos.calm_down()
    world = chaos.world
    assert all(world.state(uuid) == IN_SYNC for uuid in world.replicas)
    assert len(world.engine.readers) == 3
    assert all(len(outcome) == 1 for outcome in chaos.outcomes)
    assert not world.engine.changes.busy
    assert not world.engine.rebuilds
    world.check_members()
    record = world.authority.records[VOLUME]
    for replica in world.replicas.values():
        assert replica.head_id == record.head_id
        assert {layer.id for layer in record.layers if layer.name} <= set(replica.layers)
    for earlier in world.authority.history:
        assert any(member.state == IN_SYNC for member in earlier.members.values())
        assert not all(member.state == OUT for member in earlier.members.values())
