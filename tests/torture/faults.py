"""What is done to the daemons while clients use the volume, one fault per round.

A fault leaves everything running again; that all members get back in sync is waited for afterwards.
`ledger.cut` is called between the death of a volume daemon and the start of the next.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blockd.daemons.volume import FENCED_EXIT_CODE
from tests.torture.flip import flip_a_bit
from tests.torture.ground import (
    ANSWER_SECONDS,
    REPLICAS,
    START_SECONDS_MAX,
    Ground,
    Process,
    wait_for,
)
from tests.torture.ledger import Ledger, Wrong


@dataclass
class Scene:
    """What a fault works on."""

    ground: Ground
    ledger: Ledger
    source: random.Random

    def pause(self, most: float = 0.3) -> None:
        """Let clients and daemons get anywhere."""
        time.sleep(self.source.uniform(0.0, most))

    def somebody(self) -> int:
        return self.source.randrange(REPLICAS)


Inject = Callable[[Scene], str]


@dataclass(frozen=True)
class Fault:
    """`inject` says what it did. `quiet`: no other client uses the volume meanwhile."""

    name: str
    weight: int
    inject: Inject
    errors_allowed: bool = False
    quiet: bool = False
    needs_disks: bool = False


def kill_replica(scene: Scene) -> str:
    number = scene.somebody()
    replica = scene.ground.replicas[number]
    replica.kill()
    scene.pause()
    scene.ground.start([replica])
    return f"replica {number}"


def kill_volume(scene: Scene) -> str:
    scene.ground.volume.kill()
    scene.ledger.cut()
    scene.ground.volume = scene.ground.next_volume()
    scene.ground.start([scene.ground.volume])
    return ""


def kill_volume_and_replicas(scene: Scene) -> str:
    """Some or all replicas with their owner, in any order, all but at once."""
    ground, source = scene.ground, scene.source
    numbers = source.sample(range(REPLICAS), source.randint(1, REPLICAS))
    victims = [ground.volume, *(ground.replicas[number] for number in numbers)]
    source.shuffle(victims)
    for victim in victims:
        victim.signal(signal.SIGKILL)
        if source.random() < 0.3:
            scene.pause(0.05)
    for victim in victims:
        victim.kill()
    scene.ledger.cut()
    ground.volume = ground.next_volume()
    ground.start([ground.volume, *(ground.replicas[number] for number in numbers)])
    return f"replicas {sorted(numbers)}"


def kill_one_after_another(scene: Scene) -> str:
    """Until none is left; the last one is the truth."""
    ground, source = scene.ground, scene.source
    numbers = source.sample(range(REPLICAS), REPLICAS)
    for number in numbers:
        ground.replicas[number].kill()
        scene.pause()
    if source.random() < 0.5:
        ground.volume.kill()
        scene.ledger.cut()
        ground.volume = ground.next_volume()
        ground.start([*ground.replicas, ground.volume])
    else:
        source.shuffle(numbers)
        for number in numbers:
            ground.start([ground.replicas[number]])
            scene.pause(0.1)
    return f"in the order {numbers}"


def kill_during_rebuild(scene: Scene) -> str:
    """A member is being made equal slowly when it, its source or the owner dies."""
    ground, source = scene.ground, scene.source
    number = scene.somebody()
    ground.ask("configure", min_in_sync=1, rebuild_bandwidth=1 << 20)
    ground.replicas[number].kill()
    wait_for("it is OUT", lambda: ground.member(number).get("state") == "OUT", 10)
    scene.pause(0.5)
    ground.start([ground.replicas[number]])

    def syncing() -> bool:
        ground.is_healthy()  # asks for the rebuild
        return ground.member(number).get("state") in ("SYNCING", "IN_SYNC")

    wait_for("it is made equal", syncing, 20)
    scene.pause(0.4)
    state = ground.member(number).get("state")
    if source.random() < 0.3:
        told = kill_volume(scene) or "the volume daemon"
    else:
        victim = scene.somebody()
        ground.replicas[victim].kill()
        scene.pause(0.1)
        ground.start([ground.replicas[victim]])
        told = f"replica {victim}"
    ground.ask("configure", min_in_sync=1, rebuild_bandwidth=None)
    return f"replica {number} was {state}, then {told}"


@contextlib.contextmanager
def stopped(process: Process) -> Iterator[None]:
    process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


def stop_replica_shortly(scene: Scene) -> str:
    number, seconds = scene.somebody(), scene.source.uniform(0.05, ANSWER_SECONDS * 0.6)
    with stopped(scene.ground.replicas[number]):
        time.sleep(seconds)
    return f"replica {number} for {seconds:.2f} s"


def stop_replica_long(scene: Scene) -> str:
    number = scene.somebody()
    with stopped(scene.ground.replicas[number]):
        wait_for(
            "the silent member is OUT",
            lambda: scene.ground.member(number).get("state") == "OUT",
            ANSWER_SECONDS + 10,
        )
        scene.pause()
    return f"replica {number} until it was OUT"


def stop_volume(scene: Scene) -> str:
    seconds = scene.source.uniform(0.1, 1.0)
    with stopped(scene.ground.volume):
        time.sleep(seconds)
    return f"for {seconds:.2f} s"


def fence_volume(scene: Scene) -> str:
    """A second owner opens while the first one sleeps, which then wakes up."""
    ground = scene.ground
    old = ground.volume
    with stopped(old):
        ground.volume = ground.next_volume()
        ground.start([ground.volume])
        scene.ledger.cut()
        scene.pause()
    assert old.process is not None
    try:
        code = old.process.wait(START_SECONDS_MAX)
    except Exception:
        raise Wrong("a fenced volume daemon goes on") from None
    if code != FENCED_EXIT_CODE:
        raise Wrong(f"a fenced volume daemon ended with code {code}, not {FENCED_EXIT_CODE}")
    return ""


def fill_disk(scene: Scene) -> str:
    """No byte is left under one or two members; perhaps somebody dies meanwhile."""
    ground, source = scene.ground, scene.source
    numbers = source.sample(sorted(ground.disks), source.randint(1, len(ground.disks)))
    with contextlib.ExitStack() as full:
        for number in numbers:
            full.enter_context(_no_space(ground, number))
        scene.pause(0.5)
        told = ""
        fate = source.random()
        if fate < 0.25:
            victim = scene.somebody()
            ground.replicas[victim].kill()
            scene.pause(0.2)
            ground.start([ground.replicas[victim]])
            told = f", replica {victim} killed"
        elif fate < 0.4:
            kill_volume(scene)
            told = ", the volume daemon killed"
        scene.pause(0.3)
    return f"of replicas {numbers}{told}"


@contextlib.contextmanager
def _no_space(ground: Ground, number: int) -> Iterator[None]:
    ballast, size = ground.disks[number] / "ballast", 1 << 20
    fd = os.open(ballast, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while size >= 512:
            try:
                os.write(fd, bytes(size))
            except OSError:
                size //= 2
        yield
    finally:
        os.close(fd)
        ballast.unlink()


def flip(scene: Scene) -> str:
    return flip_a_bit(scene.ground, scene.ledger, scene.source)


def restart_cleanly(scene: Scene) -> str:
    """The volume daemon, a replica, or everything."""
    ground, choice = scene.ground, scene.source.randrange(3)
    if choice == 0:
        number = scene.somebody()
        ground.replicas[number].end()
        scene.pause()
        ground.start([ground.replicas[number]])
        return f"replica {number}"
    ground.volume.end()
    scene.ledger.cut()
    if choice == 2:
        for replica in ground.replicas:
            replica.end()
        ground.start(ground.replicas)
    ground.volume = ground.next_volume()
    ground.start([ground.volume])
    return "everything" if choice == 2 else "the volume daemon"


def revert(scene: Scene) -> str:
    """The volume goes back to a snapshot."""
    names = sorted(scene.ledger.snapshots)
    if not names:
        return "to nothing: there is no snapshot"
    name = scene.source.choice(names)
    scene.ground.volume.must("snapshot-revert", name=name)
    scene.ledger.reverted(name)
    return f"to {name}"


FAULTS = (
    Fault("kill -9 of a replica", 12, kill_replica),
    Fault("kill -9 of the volume daemon", 10, kill_volume),
    Fault("kill -9 of the volume daemon and replicas", 14, kill_volume_and_replicas, True),
    Fault("kill -9 of one after another", 6, kill_one_after_another, True),
    Fault("kill -9 during a rebuild", 8, kill_during_rebuild, True),
    Fault("SIGSTOP, short", 5, stop_replica_shortly),
    Fault("SIGSTOP until OUT", 8, stop_replica_long),
    Fault("SIGSTOP of the volume daemon", 3, stop_volume),
    Fault("a second owner", 6, fence_volume, True),
    Fault("full disk", 12, fill_disk, True, needs_disks=True),
    Fault("flipped bit", 8, flip, quiet=True),
    Fault("clean restart", 8, restart_cleanly, True),
    Fault("revert", 4, revert, quiet=True),
)
