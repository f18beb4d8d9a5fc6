"""Proves that a volume reads as a plain byte array would, over NBD, through snapshots and faults.

A seed drives a few hundred operations of every kind and every alignment against three replicas, and
then each replica alone must hold exactly the model: no member may differ from another one.
"""

from __future__ import annotations

import json
import random
import sqlite3
from pathlib import Path

import pytest

from tests.blockd.daemon_harness import Cluster, cluster
from tests.blockd.nbd_client import FLUSH, FUA, NO_HOLE, TRIM, WRITE, WRITE_ZEROES, NbdClient

MIB = 1 << 20
SIZE = 32 * MIB
HOT = 6 * MIB  # most requests go here, so that they overlap


class Model:
    """The volume and its snapshots as plain bytes."""

    def __init__(self) -> None:
        self.head = bytearray(SIZE)
        self.snapshots: dict[str, bytes] = {}


def place(source: random.Random) -> tuple[int, int]:
    """An offset and a length: whole blocks, sectors, odd bytes, small and large, near the ends."""
    unit = source.choice((4096, 4096, 512, 1))
    longest = source.choice((8192, 65536, 400_000, 3 * MIB))
    length = max(unit, source.randrange(longest) // unit * unit)
    limit = source.choice((HOT, HOT, HOT, SIZE)) - length
    offset = limit if source.random() < 0.03 else source.randrange(limit) // unit * unit
    return offset, length


def read_all(made: Cluster, export: str = "vol") -> bytes:
    client = NbdClient(made.nbd, export)
    content = b"".join(client.read(offset, MIB) for offset in range(0, SIZE, MIB))
    client.close()
    return content


def same(found: bytes, wanted: bytes | bytearray, what: str) -> None:
    """Equal, or the first offset that is not (without a 32 MiB message)."""
    if found != wanted:
        first = next(i for i in range(len(wanted)) if found[i] != wanted[i])
        raise AssertionError(f"{what} differs first at {first} (block {first // 4096})")


def step(client: NbdClient, model: Model, source: random.Random) -> None:
    """One request and its effect on the model."""
    offset, length = place(source)
    kind = source.random()
    if kind < 0.5:
        data = source.randbytes(length)
        client.write(offset, data, FUA if source.random() < 0.1 else 0)
        model.head[offset : offset + length] = data
    elif kind < 0.65:
        client.trim(offset, length)
        model.head[offset : offset + length] = bytes(length)
    elif kind < 0.8:
        client.run(WRITE_ZEROES, offset, length, flags=source.choice((0, NO_HOLE)))
        model.head[offset : offset + length] = bytes(length)
    elif kind < 0.97:
        same(client.read(offset, length), model.head[offset : offset + length], f"{offset=}")
    else:
        client.flush()


def burst(client: NbdClient, model: Model, source: random.Random) -> None:
    """Many overlapping requests in flight at once; the client only waits at the end.

    Overlapping requests in flight may take effect in any order (NBD), so those of one burst touch
    places of their own, sector by sector, while sharing blocks.
    """
    start = source.randrange(HOT // 512) * 512
    sent: dict[int, tuple[int, bytes]] = {}
    for number in range(64):
        offset = start + number * 700
        kind = source.choice((WRITE, WRITE, WRITE, TRIM, WRITE_ZEROES))
        data = source.randbytes(700) if kind == WRITE else bytes(700)
        cookie = client.send(kind, offset, 700, data if kind == WRITE else b"")
        sent[cookie] = (offset, data)
    sent[client.send(FLUSH)] = (0, b"")
    while sent:
        cookie, error, _ = client.receive({})
        assert error == 0
        offset, data = sent.pop(cookie)
        model.head[offset : offset + len(data)] = data


def change_tree(made: Cluster, model: Model, source: random.Random, number: int) -> None:
    """Create, delete or revert to a snapshot."""
    kind = source.random()
    if kind < 0.6 or not model.snapshots:
        made.volume.must("snapshot-create", name=f"s{number}")
        model.snapshots[f"s{number}"] = bytes(model.head)
        return
    name = source.choice(sorted(model.snapshots))
    if kind < 0.8:
        made.volume.must("snapshot-remove", name=name)
        del model.snapshots[name]
    else:
        made.volume.must("snapshot-revert", name=name, force=True)
        model.head[:] = model.snapshots[name]


def compare(made: Cluster, model: Model, who: str) -> None:
    same(read_all(made), model.head, f"{who}: the live volume")
    assert {one["name"] for one in made.status()["snapshots"]} == set(model.snapshots)
    for name, content in model.snapshots.items():
        same(read_all(made, f"vol@{name}"), content, f"{who}: snapshot {name}")


def compare_each_replica_alone(made: Cluster, model: Model) -> None:
    """Open the volume from one replica at a time, with a record that names no other."""
    uuids = [made.member(number)["replica_uuid"] for number in range(len(made.replicas))]
    assert made.volume.end() == 0
    for number, uuid in enumerate(uuids):
        state = made.directory / f"alone{number}.db"
        with sqlite3.connect(made.directory / "state.db") as database:
            database.execute("VACUUM INTO ?", [str(state)])
        with sqlite3.connect(state) as database:
            record = json.loads(database.execute("SELECT record FROM authority").fetchone()[0])
            record["members"] = {uuid: record["members"][uuid]}
            database.execute("UPDATE authority SET record = ?", [json.dumps(record)])
        made.volume = made.volume_daemon([made.replica_address(number)], state).start()
        assert [one["replica_uuid"] for one in made.status()["members"]] == [uuid]
        compare(made, model, f"replica {number} alone")
        assert made.volume.end() == 0


@pytest.mark.parametrize("seed", [11])
def test_three_replicas_read_like_a_plain_array_each_of_them_alone(
    tmp_path: Path, seed: int
) -> None:
    source, model = random.Random(seed), Model()
    with cluster(tmp_path, size="32M") as made:
        client = NbdClient(made.nbd)
        for number in range(260):
            step(client, model, source)
            if source.random() < 0.06:
                burst(client, model, source)
            if source.random() < 0.05:
                change_tree(made, model, source, number)
            if number == 120:
                made.replicas[seed % 3].kill()
            if number == 180:
                made.replicas[seed % 3].start()
                made.rebuild(seed % 3)
        client.flush()
        client.close()
        compare(made, model, "all three")
        compare_each_replica_alone(made, model)


def test_a_local_replica_reads_like_a_plain_array(tmp_path: Path) -> None:
    source, model = random.Random(21), Model()
    with cluster(tmp_path, replicas=1, size="32M", local=True) as made:
        client = NbdClient(made.nbd)
        for number in range(200):
            step(client, model, source)
            if source.random() < 0.06:
                burst(client, model, source)
            if source.random() < 0.08:
                change_tree(made, model, source, number)
        compare(made, model, "local")
        made.volume.kill()
        client.close()
        made.volume.start()
        compare(made, model, "after kill -9")
        assert made.volume.end() == 0
        made.volume.start()
        assert made.status()["health"] == "healthy"
        compare(made, model, "after a clean stop")
