"""Proves that clones and what they come from never see each other's changes, whatever is done to
either, that a clone is whole or not there after a crash at any point, and that space is shared."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from array import array
from pathlib import Path
from random import Random

import pytest

from protocol.checksum import block_checksum
from protocol.errors import ConflictError, NotFoundError, RequestError, StateError, StorageError
from protocol.units import BLOCK_BYTES
from snapshots.cloning import Target
from snapshots.fsck import check
from snapshots.layer import LayerFile, is_shared, layer_path
from snapshots.offline import OfflineReplica
from snapshots.replica import Replica
from tests.snapshots.disk import VolatileDisk
from tests.snapshots.equalize import Sync
from tests.snapshots.killer import Killed, Killer
from tests.snapshots.model import (
    RANGES,
    SIZE_BYTES,
    ZERO,
    Content,
    Model,
    compare,
    grown,
    kill,
    read_blocks,
    write,
)
from tests.snapshots.test_full_disk import FullDisk


def target(path: Path, *, unshare: bool = False, size_bytes: int = SIZE_BYTES) -> Target:
    return Target(os.fspath(path), path.name, "volume of " + path.name, "name", size_bytes, unshare)


def clone(model: Model, layer_id: int, path: Path, *, unshare: bool = False) -> Model:
    """A clone of a snapshot, open."""
    model.replica.flush()
    made = target(path, unshare=unshare, size_bytes=model.replica.size_bytes)
    model.replica.clone(layer_id, model.next_id, made).finish()
    return Model.opened(path, model.snapshots[layer_id], model.next_id + 1)


def maintain(replica: Replica) -> None:
    for _ in range(3000):
        if not replica.maintain():
            return
    raise AssertionError("maintenance does not come to an end")


def shared_layers(replica: Replica) -> int:
    return sum(is_shared(layer_path(replica.path, info.id)) for info in replica.tree())


class Family:
    """Up to four replicas, cloned from each other; all are compared after each step."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.random = Random(seed)
        self.directory = directory
        self.members = [Model(directory / "0")]
        self.made = 1

    def step(self) -> str:
        random, model = self.random, self.random.choice(self.members)
        first, count = random.choice(RANGES)
        start = random.randrange(count)
        length = random.randint(1, count - start)
        kind = random.choices(
            ("write", "zero", "seal", "remove", "revert", "maintain", "reopen", "crash", "clone",
             "destroy", "grow", "mend"),
            (30, 8, 12, 8, 3, 12, 2, 3, 8, 2, 1, 2),
        )[0]  # fmt: skip
        if kind == "write":
            model.write(first + start, [random.randrange(1 << 20) for _ in range(length)])
        elif kind == "zero":
            model.zero(first + start, length)
        elif kind == "seal" and len(model.snapshots) < 6:
            model.seal()
        elif kind == "remove" and model.snapshots:
            model.remove(random.choice(sorted(model.snapshots)))
        elif kind == "revert" and model.snapshots:
            model.revert(random.choice(sorted(model.snapshots)))
        elif kind == "maintain":
            for _ in range(random.randint(1, 30)):
                model.replica.maintain(random.choice((1, 3, 256)))
        elif kind == "reopen":
            model.reopen()
        elif kind == "crash":
            model.crash()
        elif kind == "clone" and model.snapshots and len(self.members) < 4:
            layer_id = random.choice(sorted(model.snapshots))
            path = self.directory / str(self.made)
            self.made += 1
            self.members.append(clone(model, layer_id, path, unshare=random.random() < 0.4))
        elif kind == "destroy" and len(self.members) > 1:
            self.members.remove(model)
            kill(model.replica)
            shutil.rmtree(model.path)
        elif kind == "grow":
            model.grow(random.randint(1, 2000))
        elif kind == "mend":
            self.damage_and_mend(model)
        return kind

    def damage_and_mend(self, model: Model) -> None:
        """A flipped bit in a file of several is a flipped bit for all, and so is its mending."""
        first, count = self.random.choice(RANGES)
        block = first + self.random.randrange(count)
        slot = model.replica.index.memory[block]
        if not slot:
            return
        layer = model.replica.handles[slot] or model.replica.open_slot(slot)
        good = memoryview(bytearray(BLOCK_BYTES))
        layer.read(block, 1, good)
        layer.write(block, memoryview(bytes(good[:-1]) + bytes([good[-1] ^ 1])))
        entry = array("I", [block_checksum(good)])
        assert model.replica.mend(0, block, memoryview(entry), good) == 1

    def check(self) -> None:
        for model in self.members:
            model.check(extents=False)

    def close(self) -> None:
        for model in self.members:
            maintain(model.replica)
            model.check(extents=False)
            model.replica.close()
            with OfflineReplica(os.fspath(model.path)) as offline:
                report = check(offline)
            assert not report.damage
            assert not report.derived


@pytest.mark.parametrize("seed", range(30))
def test_families_never_see_each_other(seed: int, tmp_path: Path) -> None:
    family = Family(tmp_path, seed)
    for number in range(120):
        kind = family.step()
        try:
            family.check()
        except AssertionError as error:
            raise AssertionError(f"step {number}, {kind}: {error}") from error
    family.close()


def test_a_clone_takes_no_space_and_gives_back_what_it_alone_has(tmp_path: Path) -> None:
    source = Model(tmp_path / "a")
    for block in range(0, 1000, 2):
        write(source.replica, block, [block + 1])
    layer_id = source.seal()
    source.replica.flush()
    before = source.replica.allocated_bytes()
    made = clone(source, layer_id, tmp_path / "b")
    both = source.replica.allocated_bytes() + made.replica.allocated_bytes()
    assert both - before < 256 << 10
    source.replica.remove(layer_id)
    maintain(source.replica)
    maintain(made.replica)
    assert shared_layers(source.replica) == 1, "shared: it is not folded on either side"
    kill(source.replica)
    shutil.rmtree(source.path)
    maintain(made.replica)
    made.replica.flush()
    assert [info.id for info in made.replica.tree()] == [made.replica.metadata.head_id]
    assert read_blocks(made.replica, 998, 1) != [ZERO]
    assert made.replica.allocated_bytes() < before + (256 << 10)


@pytest.mark.parametrize("budget", [1, 7, 256])
def test_a_full_clone_shares_nothing_in_the_end_and_resumes(budget: int, tmp_path: Path) -> None:
    source = grown(tmp_path / "a", 5)
    layer_id = source.seal()
    made = clone(source, layer_id, tmp_path / "b", unshare=True)
    left = made.replica.unsharing_bytes
    assert left
    for _ in range(6):
        made.replica.maintain(budget)
    made.crash()
    made.check()
    before = {path: path.read_bytes() for path in (source.path / "layers").glob("*.layer")}
    maintain(made.replica)
    made.replica.flush()
    made.check()
    assert shared_layers(made.replica) == shared_layers(source.replica) == 0
    assert made.replica.unsharing_bytes == 0
    assert not made.replica.metadata.unshare
    assert {path: path.read_bytes() for path in (source.path / "layers").glob("*.layer")} == before
    made.reopen()
    assert len(made.replica.tree()) == 1
    source.check()


def test_killed_before_any_system_call_the_clone_is_whole_or_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = Killer(monkeypatch)
    source = grown(tmp_path / "source", 11)
    layer_id = source.seal()
    source.replica.flush()
    for calls in range(1000):
        path = tmp_path / str(calls)
        killer.calls_left = calls
        try:
            source.replica.clone(layer_id, source.next_id, target(path)).finish()
        except Killed:
            finished = False
        else:
            finished = True
        killer.calls_left = -1
        source.crash()
        source.check(extents=False)
        if not (path / "replica.json").exists():
            assert not finished
            source.replica.clone(layer_id, source.next_id, target(path)).finish()
        made = Model.opened(path, source.snapshots[layer_id], source.next_id + 1)
        made.check(extents=False)
        made.replica.close()
        source.replica.clone(layer_id, source.next_id, target(path)).finish()  # is there: nothing
        if finished:
            assert calls > 15
            return
    raise AssertionError("a clone is never done")


@pytest.mark.parametrize("seed", range(12))
def test_a_clone_is_durable_when_it_is_done(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = VolatileDisk(tmp_path, monkeypatch)
    random = Random(seed)
    source = grown(tmp_path / "a", seed)
    layer_id = source.seal()
    content = dict(source.snapshots[layer_id])
    made = clone(source, layer_id, tmp_path / "b", unshare=seed % 2 == 1)
    kept = dict(source.snapshots)
    for _ in range(random.randrange(12)):
        source.replica.maintain(random.choice((1, 16)))
        made.replica.maintain(random.choice((1, 16)))
    kill(source.replica)
    kill(made.replica)
    disk.cut_power(random)
    for path, live in ((tmp_path / "a", None), (tmp_path / "b", content)):
        replica = Replica.open(path)
        if live is not None:
            compare(replica, live)
        else:
            for snapshot, expected in kept.items():
                compare(replica, expected, snapshot)
        maintain(replica)
        if live is not None:
            compare(replica, live)
        replica.close()


def test_layers_that_a_clone_has_are_not_overwritten_by_a_resync(tmp_path: Path) -> None:
    source, other = grown(tmp_path / "a", 3), Model(tmp_path / "b")
    layer_id = source.seal()
    source.replica.flush()
    Sync(source.replica, other.replica, 0).run()
    other.snapshots, other.next_id = dict(source.snapshots), source.next_id
    made = clone(other, layer_id, tmp_path / "c")
    layer = source.replica.layer_file(layer_id)
    block = RANGES[0][0]
    layer.make_writable(0)
    layer.write(block, memoryview(bytes([7]) * BLOCK_BYTES))
    checksum = block_checksum(memoryview(bytes([7]) * BLOCK_BYTES))
    layer.store(block, memoryview(array("I", [checksum])))
    source.replica.layers_changed()
    sync = Sync(source.replica, other.replica, 0)
    sync.begin()
    sync.zones.add(0)
    with pytest.raises(StateError, match="clone"):
        sync.copy()
    made.check(extents=False)
    Sync(source.replica, other.replica, 0, fresh=True).run()
    made.check(extents=False)
    assert shared_layers(other.replica) == 0


def test_what_cannot_be_cloned_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = grown(tmp_path / "a", 9)
    layer_id = source.seal()
    replica = source.replica
    replica.flush()
    wanted = target(tmp_path / "b")
    gone = source.seal()
    replica.remove(gone)
    with pytest.raises(RequestError, match="no snapshot"):
        replica.clone(gone, source.next_id, wanted)
    with pytest.raises(NotFoundError):
        replica.clone(4711, source.next_id, wanted)
    with pytest.raises(RequestError, match="no snapshot"):
        replica.clone(replica.metadata.head_id, source.next_id, wanted)
    with pytest.raises(RequestError, match="larger"):
        replica.clone(layer_id, source.next_id, target(tmp_path / "b", size_bytes=1 << 40))
    (tmp_path / "b" / "letters").mkdir(parents=True)
    with pytest.raises(RequestError, match="not empty"):
        replica.clone(layer_id, source.next_id, wanted)
    (tmp_path / "b" / "letters").rmdir()
    Replica.create(tmp_path / "c", size_bytes=SIZE_BYTES, replica_uuid="else")
    with pytest.raises(ConflictError, match="already"):
        replica.clone(layer_id, source.next_id, target(tmp_path / "c"))
    with monkeypatch.context() as patch:

        def other_disk(*_: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        patch.setattr(os, "link", other_disk)
        with pytest.raises(StorageError, match="same file system"):
            replica.clone(layer_id, source.next_id, wanted)
    replica.clone(layer_id, source.next_id, wanted).finish()
    with contextlib.closing(Replica.open(tmp_path / "b")) as made:
        compare(made, source.snapshots[layer_id])


def test_a_clone_under_way_has_its_directory_for_itself(tmp_path: Path) -> None:
    source = grown(tmp_path / "a", 9)
    layer_id = source.seal()
    source.replica.flush()
    first = source.replica.clone(layer_id, source.next_id, target(tmp_path / "b"))
    with pytest.raises(ConflictError, match="in use"):
        source.replica.clone(layer_id, source.next_id, target(tmp_path / "b"))
    source.remove(layer_id)
    maintain(source.replica)
    first.finish()
    made = Replica.open(tmp_path / "b")
    made.close()


def test_254_layers_can_be_cloned(tmp_path: Path) -> None:
    source = Model(tmp_path / "a")
    content: Content = {}
    for number in range(254):
        block = RANGES[number % len(RANGES)][0] + number % 5
        source.write(block, [number + 1])
        layer_id = source.seal()
    content = dict(source.live)
    made = clone(source, layer_id, tmp_path / "b")
    assert made.live == content
    made.check()
    with pytest.raises(StateError, match="254"):
        made.seal()
    kill(source.replica)
    shutil.rmtree(source.path)
    maintain(made.replica)
    made.replica.flush()
    made.seal()
    made.check()


def test_a_clone_that_finds_no_space_anywhere_leaves_the_source_alone_and_is_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = grown(tmp_path / "source", 11)
    layer_id = source.seal()
    source.replica.flush()
    disk = FullDisk(monkeypatch)
    for requests in range(100):
        path = tmp_path / str(requests)
        disk.requests_left = requests
        try:
            source.replica.clone(layer_id, source.next_id, target(path)).finish()
        except StorageError:
            finished = False
        else:
            finished = True
        assert (path / "replica.json").exists() == finished
        disk.requests_left = -1
        source.check(extents=False)
        source.replica.clone(layer_id, source.next_id, target(path)).finish()
        made = Model.opened(path, source.snapshots[layer_id], source.next_id + 1)
        made.check(extents=False)
        made.replica.close()
        if finished:
            assert requests > 4
            return
    raise AssertionError("there is never enough space")


@pytest.mark.parametrize("budget", [2, 64])
def test_a_full_clone_refused_space_anywhere_goes_on_later(
    budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = grown(tmp_path / "source", 11)
    layer_id = source.seal()
    disk = FullDisk(monkeypatch)
    for requests in range(0, 40, 2):
        disk.requests_left = -1
        made = clone(source, layer_id, tmp_path / f"{budget} {requests}", unshare=True)
        disk.requests_left = requests
        for _ in range(30):
            with contextlib.suppress(StorageError):
                made.replica.maintain(budget)
        disk.requests_left = -1
        made.check(extents=False)
        maintain(made.replica)
        made.replica.flush()
        made.check(extents=False)
        assert shared_layers(made.replica) == 0
        made.replica.close()


def test_a_file_that_two_replicas_make_longer_is_locked_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tmp_path / "replica")
    model.replica.flush()
    real, looked = os.ftruncate, []

    def ftruncate(fd: int, length: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.endswith(".layer") and os.fstat(fd).st_size:
            with open(path, "rb") as other, contextlib.suppress(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                raise AssertionError("nobody holds the lock")
            looked.append(path)
        real(fd, length)

    monkeypatch.setattr(os, "ftruncate", ftruncate)
    model.replica.grow(2 * SIZE_BYTES)
    assert looked


def test_a_layer_that_was_cut_short_under_a_replica_is_an_error(tmp_path: Path) -> None:
    model = Model(tmp_path / "replica")
    path = layer_path(os.fspath(model.path), 1)
    os.truncate(path, 4096)
    with pytest.raises(StorageError, match="too short"):
        LayerFile(path, 1, SIZE_BYTES)
    kill(model.replica)


def test_a_first_start_without_space_does_not_write_everything_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = grown(tmp_path / "a", 5)
    layer_id = source.seal()
    source.replica.flush()
    source.replica.clone(layer_id, source.next_id, target(tmp_path / "b")).finish()
    disk = FullDisk(monkeypatch)
    disk.requests_left = 1
    with pytest.raises(StorageError) as caught:
        Replica.open(tmp_path / "b")
    assert caught.value.errno == 28
    disk.requests_left = -1
    monkeypatch.setattr("snapshots.distrust.rewrite", None)
    made = Model.opened(tmp_path / "b", source.snapshots[layer_id], source.next_id + 1)
    made.check(extents=False)
