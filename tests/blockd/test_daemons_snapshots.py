"""Proves that up to 254 snapshots of a running volume keep their bytes, in any order of deletion.

Everything is written and read over NBD; a plain dictionary says what must come back.
"""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

from protocol.units import SNAPSHOTS_MAX
from tests.blockd.daemon_harness import Cluster, cluster, poll
from tests.blockd.nbd_client import NbdClient

BLOCK = 4096
BLOCKS = (64 << 20) // BLOCK
PLACES = 600  # few blocks written over and over, so that layers shadow each other

Model = dict[int, bytes]


def wrong_blocks(made: Cluster, export: str, model: Model) -> list[int]:
    """The places where an export differs from the model."""
    client = NbdClient(made.nbd, export)
    content = client.read(0, PLACES * BLOCK)
    client.close()
    return [
        place
        for place in range(PLACES)
        if content[place * BLOCK : (place + 1) * BLOCK] != model.get(place, bytes(BLOCK))
    ]


def change(client: NbdClient, model: Model, source: random.Random) -> None:
    for _ in range(6):
        place = source.randrange(PLACES)
        if source.random() < 0.25:
            client.trim(place * BLOCK, BLOCK)
            model.pop(place, None)
        else:
            data = source.randbytes(16) * (BLOCK // 16)
            client.write(place * BLOCK, data)
            model[place] = data


def test_254_snapshots_are_kept_the_next_is_refused_and_any_may_go(tmp_path: Path) -> None:
    source = random.Random(254)
    with cluster(tmp_path, size="64M") as made:
        client, head = NbdClient(made.nbd), Model()
        kept: dict[str, Model] = {}
        for number in range(SNAPSHOTS_MAX):
            change(client, head, source)
            made.volume.must("snapshot-create", name=f"s{number}", labels={"n": str(number)})
            kept[f"s{number}"] = dict(head)
        change(client, head, source)
        refused = made.volume.ask("snapshot-create", name="one-too-many")
        assert not refused["ok"]
        assert refused["code"] in ("state", "conflict", "bad_request")
        assert "254" in refused["message"]
        assert made.status()["health"] == "healthy"
        assert len(made.status()["snapshots"]) == SNAPSHOTS_MAX
        for name, model in kept.items():
            assert wrong_blocks(made, f"vol@{name}", model) == [], name

        names = list(kept)
        source.shuffle(names)
        for number, name in enumerate(names[:200]):
            made.volume.must("snapshot-remove", name=name)
            del kept[name]
            if number % 10 == 0:
                change(client, head, source)
                for sample in source.sample(sorted(kept), 4):
                    assert wrong_blocks(made, f"vol@{sample}", kept[sample]) == [], sample
                assert wrong_blocks(made, "vol", head) == []
        for name, model in kept.items():
            assert wrong_blocks(made, f"vol@{name}", model) == [], name
        poll("folding goes on", lambda: made.status()["layers"] < SNAPSHOTS_MAX - 20)
        for number in range(3):
            layers = made.replicas[number].must("status")["layers"]
            present = {layer["name"] for layer in layers if not layer["removed"]}
            assert present - {""} == set(kept)
        made.volume.must("snapshot-create", name="one-more")
        kept["one-more"] = dict(head)

        victim = sorted(kept)[7]
        client.close()
        poll("left", lambda: made.status()["connections"] == 0)
        made.volume.must("snapshot-revert", name=victim)
        assert made.volume.end() == 0
        made.volume.start()
        assert wrong_blocks(made, "vol", kept[victim]) == []
        for name, model in kept.items():
            assert wrong_blocks(made, f"vol@{name}", model) == [], name
        assert {one["name"] for one in made.status()["snapshots"]} == set(kept)


def test_revert_keeps_the_tree_and_space_comes_back(tmp_path: Path) -> None:
    with cluster(tmp_path, size="64M") as made:
        client = NbdClient(made.nbd)
        for name in ("a", "b", "c"):
            client.write(0, name.encode() * (1 << 20))
            client.write(ord(name) << 16, name.encode() * 512)
            made.volume.must("snapshot-create", name=name)
        refused = made.volume.ask("snapshot-revert", name="a")
        assert not refused["ok"]
        assert refused["code"] == "conflict"
        client.close()
        poll("left", lambda: made.status()["connections"] == 0)
        made.volume.must("snapshot-revert", name="a")
        parents = {one["name"]: one["parent"] for one in made.status()["snapshots"]}
        ids = {one["name"]: one["id"] for one in made.status()["snapshots"]}
        assert (parents["b"], parents["c"]) == (ids["a"], ids["b"])
        client = NbdClient(made.nbd)
        assert client.read(0, 1 << 20) == b"a" * (1 << 20)
        assert client.read(ord("b") << 16, 512) == bytes(512)
        client.write(0, b"d" * (1 << 20))
        made.volume.must("snapshot-create", name="d")
        assert {s["name"]: s["parent"] for s in made.status()["snapshots"]}["d"] == ids["a"]
        made.volume.must("snapshot-revert", name="c", force=True)
        fresh = NbdClient(made.nbd)
        assert fresh.read(0, 1 << 20) == b"c" * (1 << 20)
        for name in "abcd":
            export = NbdClient(made.nbd, f"vol@{name}")
            assert export.read(0, 1 << 20) == name.encode() * (1 << 20), name
            export.close()
        before = made.replicas[0].must("status")["allocated_bytes"]
        made.volume.must("snapshot-remove", name="d")
        poll(
            "the space of d is back",
            lambda: made.replicas[0].must("status")["allocated_bytes"] < before - (1 << 19),
        )
        assert fresh.read(0, 1 << 20) == b"c" * (1 << 20)
        fresh.close()
        client.close()


def test_snapshot_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=2, size="64M") as made:
        made.volume.must("snapshot-create", name="one")
        for command, name, code in (
            ("snapshot-create", "one", "conflict"),
            ("snapshot-create", "No Good", "bad_request"),
            ("snapshot-create", "", "bad_request"),
            ("snapshot-create", "a" * 64, "bad_request"),
            ("snapshot-create", "a@b", "bad_request"),
            ("snapshot-remove", "nosuch", "not_found"),
            ("snapshot-revert", "nosuch", "not_found"),
        ):
            answer = made.volume.ask(command, name=name)
            assert not answer["ok"], (command, name)
            assert answer["code"] == code, answer
            assert str(name) in answer["message"], answer
            assert "\n" not in answer["message"]
        answer = made.volume.ask("snapshot-create", name="two", labels="no map")
        assert answer.get("code") == "bad_request", answer
        assert [one["name"] for one in made.status()["snapshots"]] == ["one"]
        assert made.status()["health"] == "healthy"


def test_a_snapshot_being_read_goes_on_or_is_refused_when_removed(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=2, size="64M") as made:
        client = NbdClient(made.nbd)
        client.write(0, b"s" * BLOCK)
        made.volume.must("snapshot-create", name="one")
        client.write(0, b"h" * BLOCK)
        reader = NbdClient(made.nbd, "vol@one")
        answer = made.volume.ask("snapshot-remove", name="one")
        if not answer["ok"]:
            assert answer["code"] == "conflict"
            assert reader.read(0, BLOCK) == b"s" * BLOCK
        else:
            with contextlib.suppress(OSError):  # an error is honest, other bytes are not
                assert reader.read(0, BLOCK) == b"s" * BLOCK
        assert client.read(0, BLOCK) == b"h" * BLOCK
        reader.close()
        client.close()
