"""Cloning a volume from the command line and over the API.

Proves against a fake API what `volume clone` asks and says, and with a real node service that
clones show the snapshot, attached or not, whole or degraded, that either side may go first, also
after a restart in between, and that nothing is left of one that cannot be made.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from blockd.node import control
from blockd.node.context import SNAPSHOT_FINALIZER
from blockd.node.objects import Metadata, Snapshot, SnapshotSpec
from blockd.node.reconcile_clones import clone_spec
from blockd.node.views import VolumeView
from protocol.errors import (
    ConflictError,
    DeadlineError,
    NotFoundError,
    RequestError,
    StateError,
    StorageError,
)
from snapshots.metadata import MetadataFile
from tests.blockd.cli_fake_node import Run, serving_unix, volume_view
from tests.blockd.node_harness import MIB, WAIT_SECONDS, NodeHarness, read, until, write

CONTENT = os.urandom(3 * MIB)
OTHER = os.urandom(2 * MIB)


def clone(node: NodeHarness, source: str, name: str, **wanted: Any) -> None:
    volume, snapshot = source.split("@")
    spec = clone_spec(node.service.context, volume, snapshot, **wanted)
    node.operations.create(name, spec, {}, WAIT_SECONDS)


def with_snapshot(node: NodeHarness, tmp_path: Path, replicas: int = 2) -> VolumeView:
    """An attached volume `data` with CONTENT, and its snapshot `one`."""
    node.create("data", replicas=replicas)
    view = node.attach("data")
    write(view, CONTENT, tmp_path / "in")
    node.operations.snapshot_create("data", "one", {}, WAIT_SECONDS)
    return view


def shared_files(node: NodeHarness, name: str) -> int:
    layers = node.service.context.home.replicas_directory(name).glob("*/layers/*.layer")
    return sum(path.stat().st_nlink > 1 for path in layers)


def test_the_command_asks_and_follows_the_copying(tmp_path: Path, run: Run) -> None:
    with serving_unix(tmp_path / "blockd.sock") as node:
        made = volume_view(name="new", source="data@one", unsharing_bytes=4096)
        node.answer("POST", "/v1/volumes/data/snapshots/one/clone", made)
        node.answer("GET", "/v1/volumes/new", made)
        words = ("volume", "clone", "data@one", "new", "--replicas", "2", "--size", "20G")
        code, printed, _ = run(*words, "--label", "for=test")
        assert code == 0
        assert "new" in printed
        (asked,) = node.changes()
        assert asked.body == {
            "name": "new",
            "full": False,
            "replicas": 2,
            "size_bytes": 20 << 30,
            "labels": {"for": "test"},
        }
        code, _, told = run("volume", "clone", "data@one", "new", "--full", "--timeout", "0")
        assert code == 5
        assert "4096 bytes" in told
        node.answer("GET", "/v1/volumes/new", {**made, "unsharing_bytes": 0})
        assert run("volume", "clone", "data@one", "new", "--full")[0] == 0
        assert run("volume", "clone", "data", "new")[0] == 2


def test_clones_show_the_snapshot_and_either_side_may_go_first(
    node: NodeHarness, tmp_path: Path
) -> None:
    view = with_snapshot(node, tmp_path, replicas=3)
    write(view, OTHER, tmp_path / "in")
    clone(node, "data@one", "new")
    assert len(node.view("new").replicas) == 3
    assert node.view("new").source == "data@one"
    assert shared_files(node, "new") == 3
    used = node.operations.usage("data", WAIT_SECONDS)
    assert used.snapshots["one"].exclusive_bytes == 0, "the clone has it, too"
    made = node.attach("new")
    assert read(made, tmp_path / "out")[: len(CONTENT)] == CONTENT
    write(made, OTHER[::-1], tmp_path / "in")
    node.operations.snapshot_create("new", "two", {}, WAIT_SECONDS)
    clone(node, "new@two", "newer", replicas=1)
    assert read(node.view("data"), tmp_path / "out")[: len(OTHER)] == OTHER
    node.operations.remove("data", True, WAIT_SECONDS)
    assert read(node.attach("newer"), tmp_path / "out")[: len(OTHER)] == OTHER[::-1]
    node.restart()
    until(lambda: node.view("newer").state == "attached", "attached")
    node.operations.remove("new", True, WAIT_SECONDS)
    content = read(node.view("newer"), tmp_path / "out")
    assert content[: len(OTHER)] == OTHER[::-1]
    assert content[len(OTHER) : len(CONTENT)] == CONTENT[len(OTHER) :]
    until(lambda: shared_files(node, "newer") == 0, "nothing is shared")


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_full_clone_of_a_detached_volume_shares_nothing_in_the_end(
    replicas: int, node: NodeHarness, tmp_path: Path
) -> None:
    with_snapshot(node, tmp_path)
    node.operations.detach("data", WAIT_SECONDS)
    clone(node, "data@one", "new", full=True, replicas=replicas, size_bytes=100 * MIB)
    until(lambda: shared_files(node, "new") == 0, "all is copied")
    until(lambda: node.view("new").unsharing_bytes == 0, "and said to be")
    node.operations.remove("data", False, WAIT_SECONDS)
    content = read(node.attach("new"), tmp_path / "out")
    assert (len(content), content[: len(CONTENT)]) == (100 * MIB, CONTENT)


def test_a_degraded_volume_gives_a_clone_that_is_completed(
    node: NodeHarness, tmp_path: Path
) -> None:
    view = with_snapshot(node, tmp_path)
    gone = node.view("data").replicas[0]
    assert gone.pid
    os.kill(gone.pid, signal.SIGSTOP)  # it is there and does not answer
    try:
        write(view, OTHER, tmp_path / "in")
        until(lambda: node.view("data").health == "degraded", "degraded")
        clone(node, "data@one", "new")
    finally:
        os.kill(gone.pid, signal.SIGCONT)
    node.operations.change("new", {"rebuild_wait_seconds": 0})
    assert read(node.attach("new"), tmp_path / "out")[: len(CONTENT)] == CONTENT
    node.until_healthy("new", 2)


def test_what_cannot_be_cloned_leaves_nothing(
    node: NodeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.create("data", replicas=2)
    node.operations.snapshot_create("data", "one", {}, WAIT_SECONDS)
    with node.client() as client:

        def ask(snapshot: str, **body: Any) -> tuple[int, str]:
            path = f"/v1/volumes/data/snapshots/{snapshot}/clone?wait={WAIT_SECONDS}"
            answer = client.post(path, json=body)
            return answer.status_code, answer.text

        assert ask("none", name="new")[0] == NotFoundError.http_status
        assert ask("one", name="data")[0] == ConflictError.http_status
        assert ask("one", name="No Name")[0] == RequestError.http_status
        assert ask("one", name="new", size_bytes=MIB)[0] == RequestError.http_status
        assert ask("one", name="new", replicas=99)[0] == RequestError.http_status
        real = control.ask

        def fail(path: Path, command: str, **arguments: Any) -> control.Answer:
            if command == "clone":
                raise StorageError("the layers cannot be linked: no hard links here")
            return real(path, command, **arguments)

        with monkeypatch.context() as patch:
            patch.setattr(control, "ask", fail)
            code, text = ask("one", name="new")
            assert code == StorageError.http_status
            assert "no hard links" in text
        until(lambda: len(client.get("/v1/volumes").json()) == 1, "it is gone")
    assert not node.service.context.home.replicas_directory("new").exists()
    clone(node, "data@one", "new")


def test_a_clone_waits_for_its_source_and_is_made_after_a_restart(
    node: NodeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.create("data", replicas=2)
    node.operations.snapshot_create("data", "one", {}, WAIT_SECONDS)
    real = control.ask

    def lose_the_answer(path: Path, command: str, **arguments: Any) -> control.Answer:
        answer = real(path, command, **arguments)
        if command == "clone":
            raise ConnectionResetError  # the node service dies here
        return answer

    with node.client() as client, monkeypatch.context() as patch:
        patch.setattr(control, "ask", lose_the_answer)
        path = "/v1/volumes/data/snapshots/one/clone?wait=1"
        answer = client.post(path, json={"name": "new"})
        assert answer.status_code == DeadlineError.http_status
    node.restart()
    until(lambda: node.view("new").state == "detached", "made")
    assert len(node.view("new").replicas) == 2
    assert len(list(node.service.context.home.replicas_directory("new").iterdir())) == 2


def test_a_volume_made_anew_under_the_name_of_a_waiting_clone_is_left_alone(
    node: NodeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.create("data", replicas=2)
    node.operations.snapshot_create("data", "one", {}, WAIT_SECONDS)
    spec = clone_spec(node.service.context, "data", "one")
    real, asked = control.ask, threading.Event()
    go_on, other = threading.Event(), []

    def slow(path: Path, command: str, **arguments: Any) -> control.Answer:
        if command == "clone" and not asked.is_set():
            other.append({"c1": "c2", "c2": "c1"}[arguments["volume_name"]])
            asked.set()
            assert go_on.wait(WAIT_SECONDS)
        return real(path, command, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(control, "ask", slow)
        for name in ("c1", "c2"):
            node.operations.create(name, spec, {}, 0)
        assert asked.wait(WAIT_SECONDS)
        (name,) = other  # the list that the pass works on may have it, too
        node.operations.remove(name, False, WAIT_SECONDS)
        made = node.create(name, replicas=2)
        go_on.set()
        first = "c1" if name == "c2" else "c2"
        until(lambda: node.view(first).state == "detached", "the other one is made")
    node.operations.snapshot_create("data", "two", {}, WAIT_SECONDS)  # another pass
    assert [item.id for item in node.view(name).replicas] == [item.id for item in made.replicas]
    assert all((Path(item.path) / "replica.json").exists() for item in made.replicas)
    assert node.view(name).source is None


@pytest.mark.parametrize("fails", [False, True])
def test_a_clone_removed_while_it_is_made_leaves_no_links(
    fails: bool, node: NodeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.create("data", replicas=2)
    node.operations.snapshot_create("data", "one", {}, WAIT_SECONDS)
    spec = clone_spec(node.service.context, "data", "one")
    real, done = control.ask, threading.Event()

    def removed_meanwhile(path: Path, command: str, **arguments: Any) -> control.Answer:
        if command != "clone":
            return real(path, command, **arguments)
        node.operations.remove("new", False, WAIT_SECONDS)
        answer = real(path, command, **arguments)
        done.set()
        if fails:
            raise StorageError("a member was lost")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(control, "ask", removed_meanwhile)
        node.operations.create("new", spec, {}, 0)
        assert done.wait(WAIT_SECONDS)
        until(lambda: shared_files(node, "data") == 0, "nothing is shared")
    until(lambda: not node.service.context.replicas_of("new"), "no object is left")
    clone(node, "data@one", "new")


def test_a_clone_that_is_repeated_after_a_newer_snapshot_can_be_opened(
    node: NodeHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_snapshot(node, tmp_path)
    real, tries = control.ask, []

    def one_is_late(path: Path, command: str, **arguments: Any) -> control.Answer:
        if command != "clone" or tries:
            return real(path, command, **arguments)
        (name, target), (late, _) = sorted(arguments["targets"].items())
        tries.append(late)
        real(path, command, **{**arguments, "targets": {name: target}})
        node.service.context.store.create(
            Snapshot(
                metadata=Metadata(name="data@two", finalizers=[SNAPSHOT_FINALIZER]),
                spec=SnapshotSpec("data", "two"),
            )
        )
        raise StateError(f"replica {late} was lost")

    with monkeypatch.context() as patch:
        patch.setattr(control, "ask", one_is_late)
        clone(node, "data@one", "new")
    assert tries
    until(lambda: len(node.view("data").snapshots) == 2, "a newer snapshot")
    paths = [item.path for item in node.view("new").replicas]
    assert len({MetadataFile(path).read().head_id for path in paths}) == 1
    assert read(node.attach("new"), tmp_path / "out")[: len(CONTENT)] == CONTENT


def test_a_volume_whose_only_directory_was_lost_can_be_detached(node: NodeHarness) -> None:
    view = node.create("data")
    node.attach("data")
    (Path(view.replicas[0].path) / "replica.json").unlink()
    assert node.operations.detach("data", WAIT_SECONDS).frontend is None
