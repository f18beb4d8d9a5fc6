"""A replica directory checked, repaired and exported without a daemon.

Proves that a sound directory shows no damage and exports what a daemon would read, after any
history and after a power cut; that each kind of damage is found, exactly where it is; that
repairing loses nothing; and that looking changes nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

from blockd.cli import main
from protocol.errors import ConflictError, NotFoundError, StorageError
from protocol.units import BLOCK_BYTES
from snapshots import fsck, offline
from snapshots.layer import block_offset, entry_number, layer_path
from snapshots.offline import OfflineReplica
from snapshots.replica import Replica
from tests.snapshots.model import BLOCK_COUNT, BLOCKS, ZONE, Model, fill, grown, kill
from tests.snapshots.test_power_loss import History


def content_of(path: Path) -> list[bytes]:
    with open(path, "rb") as file:
        return [os.pread(file.fileno(), BLOCK_BYTES, block * BLOCK_BYTES) for block in BLOCKS]


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def flip(path: str, offset: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        (byte,) = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte ^ 4]), offset)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("clean", [True, False])
def test_a_sound_directory_is_exported_as_a_daemon_reads_it(
    tmp_path: Path, seed: int, clean: bool
) -> None:
    model = grown(tmp_path / "r", seed)
    names = {info.id: info.name for info in model.replica.metadata.layers}
    if clean:
        model.replica.close()
    else:
        kill(model.replica)
    before = files(tmp_path / "r")
    with OfflineReplica(str(tmp_path / "r")) as found:
        report = fsck.check(found)
        assert (report.damage, report.derived) == ([], [])
        assert report.unclean is not clean
        for layer_id, content in {0: model.live, **model.snapshots}.items():
            target = tmp_path / f"{layer_id}.img"
            offline.export(found, names[layer_id] if layer_id else "", str(target))
            assert os.stat(target).st_size == BLOCK_COUNT * BLOCK_BYTES
            assert content_of(target) == [fill(content.get(block, 0)) for block in BLOCKS]
    assert files(tmp_path / "r") == before


@pytest.mark.parametrize("seed", range(8))
def test_after_a_power_cut_it_shows_what_opening_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    history = History(tmp_path, Random(seed), monkeypatch)
    for _ in range(40):
        history.step()
    model = history.model
    kill(model.replica)
    history.disk.cut_power(history.random)
    with OfflineReplica(str(tmp_path / "replica")) as found:
        assert fsck.check(found).damage == []
        offline.export(found, "", str(tmp_path / "img"))
    replica = Replica.open(tmp_path / "replica")
    target = memoryview(bytearray(BLOCK_BYTES + 4))
    with open(tmp_path / "img", "rb") as image:
        for block in BLOCKS:
            used = replica.read_into(block, 1, target)
            expected = bytes(target[4:used]) if used > 4 else bytes(BLOCK_BYTES)
            assert os.pread(image.fileno(), BLOCK_BYTES, block * BLOCK_BYTES) == expected
    replica.abandon()


def damaged_model(directory: Path) -> Model:
    """A snapshot (layer 1) with block 0 and 1, a head (layer 2) with block 1 and 2."""
    model = Model(directory)
    model.write(0, [10, 11])
    model.seal()
    model.write(1, [21, 22])
    model.replica.close()
    return model


@pytest.mark.parametrize(
    ("layer_id", "block", "entry"), [(1, 0, False), (2, 2, False), (1, 1, True), (2, 1, True)]
)
def test_a_flipped_bit_is_found_where_it_is(
    tmp_path: Path, layer_id: int, block: int, entry: bool
) -> None:
    damaged_model(tmp_path / "r")
    path = layer_path(str(tmp_path / "r"), layer_id)
    flip(path, 4 * entry_number(block) if entry else block_offset(block) + 77)
    with OfflineReplica(str(tmp_path / "r")) as found:
        report = fsck.check(found)
        assert report.damaged_blocks == [(layer_id, block)]
        seen = "s1" if layer_id == 1 else ""
        with pytest.raises(StorageError, match=f"block {block} "):
            offline.export(found, seen, str(tmp_path / "img"))
        assert not (tmp_path / "img").exists()
        _, left_out = offline.export(found, seen, str(tmp_path / "img"), skip_damaged=True)
        assert left_out == [(layer_id, block)]
        with open(tmp_path / "img", "rb") as image:
            assert os.pread(image.fileno(), BLOCK_BYTES, block * BLOCK_BYTES) == bytes(BLOCK_BYTES)


def test_a_damaged_index_is_made_anew(tmp_path: Path) -> None:
    model = damaged_model(tmp_path / "r")
    flip(str(tmp_path / "r" / "index"), 1)
    with OfflineReplica(str(tmp_path / "r")) as found:
        report = fsck.check(found)
        assert (report.damage_count, len(report.derived)) == (0, 1)
        fsck.repair(found, report)
        assert report.repaired
    with OfflineReplica(str(tmp_path / "r")) as found:
        assert fsck.check(found).derived == []
    model.replica = Replica.open(tmp_path / "r")
    model.check()
    assert model.replica.dirty.dirty_zones() == []
    model.replica.close()


@pytest.mark.parametrize("name", ["index", "dirty.log"])
@pytest.mark.parametrize("how", ["missing", "short", "first page"])
def test_a_lost_file_that_is_derived_is_made_anew(tmp_path: Path, name: str, how: str) -> None:
    model = damaged_model(tmp_path / "r")
    path = tmp_path / "r" / name
    if how == "missing":
        path.unlink()
    elif how == "short":
        os.truncate(path, 100)
    else:
        flip(str(path), 2)
    with OfflineReplica(str(tmp_path / "r")) as found:
        report = fsck.check(found)
        assert report.damage_count == 0
        assert report.derived
        fsck.repair(found, report)
    model.replica = Replica.open(tmp_path / "r")
    model.check()
    everything = list(range(-(-BLOCK_COUNT // ZONE)))
    assert model.replica.dirty.dirty_zones() == (everything if name == "dirty.log" else [])
    model.write(5, [55])
    model.replica.flush()
    model.reopen()
    model.check()
    model.replica.close()


def test_without_a_dirty_log_after_an_unclean_end_nothing_is_repaired(tmp_path: Path) -> None:
    model = Model(tmp_path / "r")
    model.write(0, [1])
    kill(model.replica)
    (tmp_path / "r" / "dirty.log").unlink()
    before = files(tmp_path / "r")
    with OfflineReplica(str(tmp_path / "r")) as found:
        report = fsck.check(found)
        assert report.damage_count == 1
        with pytest.raises(StorageError, match="cannot be repaired"):
            fsck.repair(found, report)
    assert files(tmp_path / "r") == before


@pytest.mark.parametrize("how", ["missing", "short", "foreign"])
def test_a_lost_layer_is_damage_and_other_snapshots_are_exported(tmp_path: Path, how: str) -> None:
    model = damaged_model(tmp_path / "r")
    path = Path(layer_path(str(tmp_path / "r"), 2))
    if how == "missing":
        path.unlink()
    elif how == "short":
        os.truncate(path, 4096)
    else:
        flip(str(path), 20)
    with OfflineReplica(str(tmp_path / "r")) as found:
        report = fsck.check(found)
        assert report.damage_count == 1
        with pytest.raises(StorageError):
            fsck.repair(found, report)
        with pytest.raises(StorageError):
            offline.export(found, "", str(tmp_path / "live"))
        offline.export(found, "s1", str(tmp_path / "s1"))
        expected = [fill(model.snapshots[1].get(block, 0)) for block in BLOCKS]
        assert content_of(tmp_path / "s1") == expected


def test_files_of_no_layer_are_found_and_removed(tmp_path: Path) -> None:
    damaged_model(tmp_path / "r")
    stranger = tmp_path / "r" / "layers" / "9.layer"
    stranger.write_bytes(b"x")
    with OfflineReplica(str(tmp_path / "r")) as found:
        report = fsck.check(found)
        assert report.derived == [f"{stranger} belongs to no layer"]
        fsck.repair(found, report)
    assert not stranger.exists()


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    model = Model(tmp_path / "r")
    with pytest.raises(ConflictError, match="in use"):
        OfflineReplica(str(tmp_path / "r"))
    model.replica.close()


def test_an_unknown_snapshot_is_named_with_those_there_are(tmp_path: Path) -> None:
    damaged_model(tmp_path / "r")
    with OfflineReplica(str(tmp_path / "r")) as found, pytest.raises(NotFoundError, match="s1"):
        offline.export(found, "nothing", str(tmp_path / "img"))


def test_the_commands_end_with_the_codes_they_promise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged_model(tmp_path / "r")
    directory = str(tmp_path / "r")
    assert main(["replica", "check", directory]) == 0
    assert main(["replica", "export", f"{directory}@s1", str(tmp_path / "img")]) == 0
    assert main(["replica", "export", f"{directory}@s1", str(tmp_path / "img")]) == 4
    assert main(["replica", "export", f"{directory}@no", str(tmp_path / "no")]) == 3
    assert main(["replica", "check", str(tmp_path)]) == 1
    flip(str(tmp_path / "r" / "index"), 1)
    assert main(["replica", "check", directory]) == 1
    assert main(["replica", "check", directory, "--repair"]) == 0
    flip(layer_path(directory, 1), block_offset(0))
    assert main(["replica", "check", directory, "--repair", "-o", "json"]) == 1
    words = ["replica", "export", f"{directory}@s1", str(tmp_path / "img2")]
    assert main(words) == 1
    assert main([*words, "--skip-damaged"]) == 1
    assert (tmp_path / "img2").exists()
    assert "Traceback" not in capsys.readouterr().err
