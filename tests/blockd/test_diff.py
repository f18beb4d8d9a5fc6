"""What changed between snapshots, over NBD, the API and the command line.

Proves with real daemons that the metadata context `blockd:changed:NAME` names exactly the blocks
that were written, that all others have the same content, and that the command line says the same.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest

from blockd.cli import main
from blockd.daemons import diff as diff_module
from protocol.errors import ConflictError, NotFoundError
from tests.blockd.daemon_harness import Cluster, cluster
from tests.blockd.nbd_client import NbdClient
from tests.blockd.node_harness import NodeHarness

BLOCK = 4096
SIZE = 64 << 20


def changed(made: Cluster, base: str, snapshot: str = "") -> set[int]:
    """The changed blocks, as nbdinfo shows them."""
    uri = made.uri(snapshot)
    command = ["nbdinfo", "--json", f"--map=blockd:changed:{base}", uri]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    found: set[int] = set()
    position = 0
    for extent in json.loads(done.stdout):
        assert extent["offset"] == position
        position += extent["length"]
        if extent["type"] == 1:
            first = extent["offset"] // BLOCK
            found.update(range(first, first + extent["length"] // BLOCK))
    assert position == SIZE
    return found


def control_blocks(made: Cluster, base: str, snapshot: str = "") -> set[int]:
    """The same from the control socket, in as many answers as it takes."""
    found: set[int] = set()
    offset: int | None = 0
    while offset is not None:
        answer = made.volume.must("diff", base=base, snapshot=snapshot, offset=offset)
        for start, length in answer["extents"]:
            found.update(range(start // BLOCK, (start + length) // BLOCK))
        offset = answer["next"]
    return found


@pytest.mark.parametrize("local", [False, True])
def test_the_context_names_what_was_written_in_between(tmp_path: Path, local: bool) -> None:
    random = Random(3)
    with cluster(tmp_path, replicas=1 if local else 2, size="64M", local=local) as made:
        client = NbdClient(made.nbd)

        def write(blocks: set[int]) -> None:
            for block in blocks:
                client.write(block * BLOCK, random.randbytes(BLOCK))

        rounds = [set(random.sample(range(SIZE // BLOCK), 40)) for _ in range(3)]
        write(rounds[0])
        made.volume.must("snapshot-create", name="a")
        write(rounds[1])
        client.trim(0, BLOCK)
        made.volume.must("snapshot-create", name="b")
        write(rounds[2])
        zeroed = {0} if 0 in rounds[0] | rounds[1] else set()
        assert changed(made, "a", "b") | zeroed == rounds[1] | zeroed
        assert changed(made, "b", "a") | zeroed == rounds[1] | zeroed
        assert changed(made, "b") == rounds[2]
        assert changed(made, "a") | zeroed == rounds[1] | rounds[2] | zeroed
        assert control_blocks(made, "b") == rounds[2]
        assert control_blocks(made, "a", "b") == changed(made, "a", "b")
        old, new = (NbdClient(made.nbd, f"vol@{name}") for name in ("a", "b"))
        differ = changed(made, "a", "b")
        for block in rounds[0] - differ:
            assert old.read(block * BLOCK, BLOCK) == new.read(block * BLOCK, BLOCK)
        for other in (client, old, new):
            other.close()


def test_contexts_are_listed_and_a_stranger_selects_nothing(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=1, size="64M") as made:
        made.volume.must("snapshot-create", name="a")
        made.volume.must("snapshot-create", name="b")
        done = subprocess.run(
            ["nbdinfo", "--json", made.uri("b")], check=True, capture_output=True, text=True
        )
        (export,) = json.loads(done.stdout)["exports"]
        assert export["contexts"] == ["base:allocation", "blockd:changed:a"]
        refused = subprocess.run(
            ["nbdinfo", "--map=blockd:changed:none", made.uri()], capture_output=True, text=True
        )
        assert refused.returncode != 0


def test_long_answers_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert diff_module.EXTENTS_MAX * 40 < 4 << 20, "one answer fits a control message"
    with cluster(tmp_path, replicas=1, size="64M") as made:
        made.volume.must("snapshot-create", name="a")
        client = NbdClient(made.nbd)
        for block in range(0, 16384, 2):
            client.write(block * BLOCK, b"x" * BLOCK)
        client.close()
        assert control_blocks(made, "a") == set(range(0, 16384, 2))


def test_the_command_line_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = NodeHarness(tmp_path / "home")
    try:
        node.service.listen(None, None, demo=False)
        node.create("data")
        node.attach("data")
        node.operations.snapshot_create("data", "a", {}, 30)
        view = node.view("data")
        assert view.nbd_uri
        client = NbdClient(Path(view.nbd_uri.partition("socket=")[2]))
        client.write(8 * BLOCK, b"x" * 2 * BLOCK)
        client.close()

        def run(*words: str) -> tuple[int, Any]:
            capsys.readouterr()
            code = main(["--home", str(tmp_path / "home"), "snapshot", "diff", *words])
            printed = capsys.readouterr()
            return code, json.loads(printed.out) if printed.out.startswith("{") else printed

        code, answer = run("data@a", "-o", "json")
        assert code == 0
        assert answer["extents"] == [{"offset": 8 * BLOCK, "length": 2 * BLOCK}]
        assert answer["changed_bytes"] == 2 * BLOCK
        assert run("data@none")[0] == 3
        assert run("data@a", "other@a")[0] == 2
        assert run("data@a", "data@none")[0] == 3
        with pytest.raises(NotFoundError):
            node.operations.snapshot_diff("data", "a", "none", 0)
        node.operations.detach("data", 30)
        with pytest.raises(ConflictError, match="not attached"):
            node.operations.snapshot_diff("data", "a", "", 0)
    finally:
        node.close()
