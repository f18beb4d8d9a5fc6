"""Proves with real daemons that damage on a disk is noticed, never served, repaired and counted:
when it is read, and by a verification of the whole volume while it is in use.
"""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest

from protocol.checksum import block_checksum
from tests.blockd.daemon_harness import Cluster, cluster, poll
from tests.blockd.nbd_client import NbdClient

BLOCK = 4096
HEAD = 1  # id of the first layer


def layer_path(made: Cluster, number: int, layer_id: int = HEAD) -> Path:
    (path,) = (made.directory / f"replica{number}" / "layers").glob(f"*{layer_id:x}*.layer")
    return path


def data_offset(block: int) -> int:
    return (block + block // 1024 + 2) * BLOCK


def entry_offset(block: int) -> int:
    return (block // 1024 * 1025 + 1) * BLOCK + block % 1024 * 4


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """One bit changes under the daemon."""
    with open(path, "r+b", buffering=0) as file:
        (byte,) = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)


def block_of(path: Path, block: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), BLOCK, data_offset(block))


def counters(made: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = made.status()["counters"]
    return found


def verify(made: Cluster) -> dict[str, Any]:
    made.volume.must("verify")
    poll("the verification ended", lambda: not made.status()["verify"]["running"])
    report: dict[str, Any] = made.status()["verify"]
    assert report["error"] is None, report
    return report


def read_often(client: NbdClient, block: int, expected: bytes) -> None:
    """More reads than one member gets in a row."""
    for _ in range(200):
        assert client.read(block * BLOCK, BLOCK) == expected


def test_a_damaged_block_is_read_elsewhere_and_repaired(tmp_path: Path) -> None:
    with cluster(tmp_path, size="32M") as made:
        client = NbdClient(made.nbd)
        contents = {block: Random(block).randbytes(BLOCK) for block in (0, 5, 1500)}
        for block, content in contents.items():
            client.write(block * BLOCK, content)
        flip(layer_path(made, 0), data_offset(0) + 17)
        flip(layer_path(made, 1), data_offset(5) + BLOCK - 1, 7)
        flip(layer_path(made, 2), entry_offset(1500) + 2)
        for block, content in contents.items():
            read_often(client, block, content)
        poll("all are repaired", lambda: counters(made)["repaired_blocks"] == 3)
        assert counters(made)["failed_repairs"] == 0
        for number in range(3):
            for block, content in contents.items():
                assert block_of(layer_path(made, number), block) == content
        assert sorted(m["repaired_blocks"] for m in made.status()["members"]) == [1, 1, 1]
        assert {m["state"] for m in made.status()["members"]} == {"IN_SYNC"}
        errors = counters(made)["checksum_errors"]
        for block, content in contents.items():
            read_often(client, block, content)
        assert counters(made)["checksum_errors"] == errors
        client.close()


def test_what_no_member_can_read_is_an_error_and_no_data(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=2, size="32M") as made:
        client = NbdClient(made.nbd)
        client.write(0, b"1" * BLOCK)
        client.write(BLOCK, b"2" * BLOCK)
        for number in range(2):
            flip(layer_path(made, number), data_offset(0))
        for _ in range(3):
            try:
                client.read(0, BLOCK)
            except OSError:
                continue
            raise AssertionError("damaged data was served")
        assert client.read(BLOCK, BLOCK) == b"2" * BLOCK
        poll("it is given up", lambda: counters(made)["failed_repairs"] >= 1)
        report = verify(made)
        assert (report["bad_blocks"], report["unrepaired_blocks"]) == (2, 2)
        client.write(0, b"3" * BLOCK)  # new content heals it
        read_often(client, 0, b"3" * BLOCK)
        assert verify(made)["bad_blocks"] == 0
        client.close()


def test_a_verification_finds_and_repairs_what_nobody_reads(tmp_path: Path) -> None:
    with cluster(tmp_path, size="64M") as made:
        client = NbdClient(made.nbd)
        random = Random(7)
        contents = {block: random.randbytes(BLOCK) for block in random.sample(range(12288), 300)}
        blocks = list(contents)
        for block in blocks[:200]:
            client.write(block * BLOCK, contents[block])
        client.flush()
        made.volume.must("snapshot-create", name="old")
        for block in blocks[100:]:
            client.write(block * BLOCK, contents[block])
        client.flush()
        clean = verify(made)
        assert (clean["bad_blocks"], clean["differing_blocks"]) == (0, 0)
        assert clean["layers"] == 2
        assert clean["checked_blocks"] == clean["total_blocks"] >= 300
        for number in range(3):
            for layer_id, block in ((1, blocks[3 * number]), (2, blocks[299 - number])):
                flip(layer_path(made, number, layer_id), data_offset(block) + 100)
            entry = entry_offset(blocks[50 + number])
            flip(layer_path(made, number, 1), entry)
        with subprocess.Popen(
            ["fio", "--name=x", "--rw=randwrite", "--ioengine=nbd", f"--uri={made.uri()}",
             "--bs=4k", "--iodepth=8", "--offset=48M", "--size=16M", "--time_based", "--runtime=3"],
            stdout=subprocess.DEVNULL,
        ) as load:  # fmt: skip
            report = verify(made)
            assert load.wait() == 0
        assert (report["bad_blocks"], report["repaired_blocks"]) == (9, 9)
        assert report["differing_blocks"] == 0
        assert sum(report["members"].values()) == 9
        again = verify(made)
        assert (again["bad_blocks"], again["differing_blocks"]) == (0, 0)
        client.close()


def test_sound_blocks_that_differ_are_made_equal(tmp_path: Path) -> None:
    with cluster(tmp_path, size="32M") as made:
        client = NbdClient(made.nbd)
        client.write(0, b"1" * BLOCK)
        client.flush()
        path, wrong = layer_path(made, 1), b"2" * BLOCK
        with open(path, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), wrong, data_offset(0))
            entry = struct.pack("<I", block_checksum(memoryview(wrong)))
            os.pwrite(file.fileno(), entry, entry_offset(0))
        report = verify(made)
        assert (report["bad_blocks"], report["differing_blocks"]) == (0, 1)
        assert list(report["members"]) == [made.member(1)["replica_uuid"]]
        poll("it was put OUT", lambda: "other data" in made.volume.log.read_text())
        made.rebuild(1)
        read_often(client, 0, b"1" * BLOCK)
        assert verify(made)["differing_blocks"] == 0
        client.close()


def test_two_verifications_at_once_are_refused_and_one_ends_with_the_daemon(
    tmp_path: Path,
) -> None:
    with cluster(tmp_path, size="256M") as made:
        client = NbdClient(made.nbd)
        for block in range(0, 65536, 512):
            client.write(block * BLOCK, b"x" * BLOCK)
        client.close()
        made.volume.must("verify")
        answer = made.volume.ask("verify")
        assert made.status()["verify"]["running"] is False or answer["code"] == "conflict"
        made.volume.end()
        assert made.volume.process is not None
        assert made.volume.process.returncode == 0


@pytest.mark.parametrize("hit", ["data", "map"])
@pytest.mark.parametrize("sealed", [False, True])
def test_the_last_members_damaged_block_is_repaired_from_the_one_that_comes_back(
    sealed: bool, hit: str, tmp_path: Path
) -> None:
    with cluster(tmp_path, replicas=2, size="32M") as made:
        client = NbdClient(made.nbd)
        content = Random(1).randbytes(8 * BLOCK)
        client.write(0, content)
        client.flush()
        if sealed:
            made.volume.must("snapshot-create", name="s")
        made.replicas[1].kill()
        client.write(20 * BLOCK, content)  # the zone is compared when it comes back
        path = layer_path(made, 0)
        flip(path, data_offset(3) + 9 if hit == "data" else entry_offset(3) + 1, 3)
        made.replicas[1].start()
        if sealed:  # all of it is compared only if its directory is another one
            poll("it is back", lambda: made.member(1)["state"] == "IN_SYNC")
            made.volume.must("verify")
        made.rebuild(1)
        poll("repaired", lambda: block_of(path, 3) == content[3 * BLOCK : 4 * BLOCK])
        read_often(client, 3, content[3 * BLOCK : 4 * BLOCK])
        client.close()


def test_a_block_that_differs_on_the_one_that_comes_back_does_not_repair_anything(
    tmp_path: Path,
) -> None:
    with cluster(tmp_path, replicas=2, size="32M") as made:
        client = NbdClient(made.nbd)
        client.write(0, b"1" * BLOCK)
        client.flush()
        made.replicas[1].kill()
        client.write(0, b"2" * BLOCK)
        flip(layer_path(made, 0), data_offset(0) + 9)
        made.replicas[1].start()
        poll("it was tried", lambda: "damaged" in (made.member(1)["failure"] or ""))
        assert made.member(1)["state"] != "IN_SYNC"
        with pytest.raises(OSError):  # noqa: PT011
            client.read(0, BLOCK)
        client.write(0, b"3" * BLOCK)  # new content heals it
        made.rebuild(1)
        read_often(client, 0, b"3" * BLOCK)
        client.close()
