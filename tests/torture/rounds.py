"""Rounds of torture: clients at work, one fault, all in sync again, every block looked at."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.blockd.nbd_client import NbdClient
from tests.torture.compare import compare
from tests.torture.faults import Fault, Scene
from tests.torture.ground import AREAS, BLOCKS, REPLICAS, Ground
from tests.torture.ledger import BLOCK_BYTES, Ledger
from tests.torture.traffic import Counts, Traffic

COMPARE_EVERY = 10  # rounds; comparing directories costs a stop and a start of everything
SNAPSHOTS_MAX = 5
VERIFY_TURNS = 2  # reads are spread over members: whoever answers the second may be another one
BEFORE_SECONDS, AFTER_SECONDS = 0.25, 0.25  # of traffic around a fault
BUSY_SECONDS = 3.0  # how long clients stay while members are made equal, which clients slow down


@dataclass
class Told:
    """One round, for the line about it."""

    fault: str
    what: str
    counts: Counts
    healthy_seconds: float
    seconds: float
    snapshots: int

    def __str__(self) -> str:
        counts = self.counts
        name = f"{self.fault}: {self.what}" if self.what else self.fault
        return (
            f"{name}; {counts.writes} writes, {counts.trims} trims, {counts.reads} reads, "
            f"{counts.flushes} flushes, {counts.errors} errors, {counts.lost} lost; "
            f"{self.snapshots} snapshots; in sync after {self.healthy_seconds:.1f} s, "
            f"all {self.seconds:.1f} s"
        )


class Session:
    """One volume and all its rounds."""

    def __init__(self, ground: Ground, faults: Sequence[Fault], seed: int) -> None:
        self.ground = ground
        self.ledger = Ledger(BLOCKS)
        self._source = random.Random(seed)
        self._faults = [f for f in faults if not f.needs_disks or ground.disks]
        self._snapshots_made = 0
        self.rounds = 0
        self.fault = "start"

    def round(self, name: str = "") -> Told:
        """One round with a random fault, or with the one named."""
        self.rounds += 1
        faults = [fault for fault in self._faults if name in fault.name]
        fault = self._source.choices(faults, [f.weight for f in faults])[0]
        self.fault = fault.name
        seed, began = self._source.randrange(1 << 32), time.monotonic()
        source = random.Random(seed)
        scene = Scene(self.ground, self.ledger, source)
        traffic = Traffic(self.ledger, AREAS, self.ground.nbd, seed)
        traffic.errors_allowed = fault.errors_allowed
        if fault.quiet:
            what = fault.inject(scene)
            traffic.start()
            time.sleep(BEFORE_SECONDS)
            injected = time.monotonic()
            self._snapshot(source)
        else:
            traffic.start()
            try:
                time.sleep(source.uniform(0.0, BEFORE_SECONDS))
                snapshots = threading.Thread(target=self._snapshot, args=(random.Random(seed),))
                snapshots.start()
                what = fault.inject(scene)
                injected = time.monotonic()
                snapshots.join()
            except BaseException:
                traffic.abandon()
                raise
        time.sleep(AFTER_SECONDS)
        deadline = time.monotonic() + BUSY_SECONDS
        while not self.ground.is_healthy() and time.monotonic() < deadline:
            time.sleep(0.05)
        traffic.stop()
        self.ground.until_healthy()
        healthy = time.monotonic() - injected
        self.verify()
        if self.rounds % COMPARE_EVERY == 0:
            self.compare()
        seconds = time.monotonic() - began
        count = len(self.ledger.snapshots)
        return Told(fault.name, what, traffic.counts, healthy, seconds, count)

    def _snapshot(self, source: random.Random) -> None:
        """Perhaps make or delete one, with the fault going on."""
        ground, ledger = self.ground, self.ledger
        for _ in range(source.choice((0, 0, 1, 1, 2))):
            time.sleep(source.uniform(0.0, 0.2))
            names = sorted(name for name, s in ledger.snapshots.items() if not s.leaving)
            if names and (source.random() < 0.4 or len(names) >= SNAPSHOTS_MAX):
                name = source.choice(names)
                ledger.snapshots[name].leaving = True
                ground.remove_snapshot(name)
            else:
                self._snapshots_made += 1
                name = f"s{self._snapshots_made}"
                since = ledger.now()
                certain = ground.make_snapshot(name)
                ledger.snapshot_answered(name, since, certain=certain)

    def verify(self) -> None:
        """Read every block of the volume and of every snapshot."""
        ledger = self.ledger
        ledger.snapshots_are(self.ground.snapshots())
        for _ in range(VERIFY_TURNS):
            client = NbdClient(self.ground.nbd(), self.ground.export())
            for first, count in AREAS:
                content = client.read(first * BLOCK_BYTES, count * BLOCK_BYTES)
                ledger.settle(first, content)
            client.close()
            for name in sorted(ledger.snapshots):
                client = NbdClient(self.ground.nbd(), self.ground.export(name))
                for first, count in AREAS:
                    content = client.read(first * BLOCK_BYTES, count * BLOCK_BYTES)
                    ledger.settle_snapshot(name, first, content)
                client.close()

    def compare(self) -> None:
        """Stop everything, look into the directories, start everything."""
        self.ground.stop_everything()
        compare([self.ground.path(number) for number in range(REPLICAS)], self.ledger)
        self.ground.start_everything()
        self.ground.until_healthy()
