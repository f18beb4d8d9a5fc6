"""Proves that the daemons of a volume are replaced while it is in use, that a program that does not
work changes nothing, and that `--all` goes back when it fails."""

from __future__ import annotations

import os
import signal
import stat
import sys
import venv
from pathlib import Path

import pytest

import blockd
from blockd.cli import main
from blockd.node import control
from blockd.node.objects import Volume
from protocol.errors import BlockdError, NotFoundError, RequestError, StateError
from tests.blockd.node_harness import WAIT_SECONDS, NodeHarness, until
from tests.blockd.test_handover import BLOCK, BLOCKS, Load

BROKEN = "broken for"


def installation(directory: Path, name: str, fails: str = "", fails_for: str = "") -> str:
    """The Python of another installation; `fails`: what it says in place of running daemons;
    `fails_for`: a word on the command line of daemons that it does not run."""
    if fails:
        program = directory / name
        program.write_text(f"#!/bin/sh\necho 'blockd: {fails}' >&2\nexit 1\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return str(program)
    venv.create(directory / name, symlinks=True)
    (packages,) = (directory / name).glob("lib/python3*/site-packages")
    shared = [path for path in sys.path if path.endswith("site-packages")]
    root = Path(blockd.__file__).parent.parent
    (packages / "blockd.pth").write_text("\n".join([str(root), *shared]) + "\n")
    if fails_for:  # lines that begin with `import` are run when Python starts
        said = f"blockd: {BROKEN} {fails_for}"
        code = f"import sys; {fails_for!r} in sys.orig_argv and sys.exit({said!r})"
        (packages / "broken.pth").write_text(code + "\n")
    return str(directory / name / "bin" / "python")


def load(node: NodeHarness, name: str) -> Load:
    """A client of an attached volume that reads and writes."""
    volume = node.view(name)
    sockets = node.service.context.home.socket_directory(name, volume.uid)
    client = Load(sockets / "nbd.sock", 7)
    client.start()
    return client


def pids(node: NodeHarness, name: str) -> list[int | None]:
    view = node.view(name)
    return [view.pid, *[replica.pid for replica in view.replicas]]


@pytest.mark.parametrize("replicas", [1, 3])
def test_all_daemons_are_replaced_under_load(node: NodeHarness, replicas: int) -> None:
    node.create("data", replicas=replicas, rebuild_wait_seconds=3600)
    node.attach("data")
    before, busy = pids(node, "data"), load(node, "data")
    view = node.operations.upgrade("data", None, WAIT_SECONDS)
    until(lambda: busy.count > 1000, "the client goes on")
    busy.end()
    assert not set(before) & set(pids(node, "data"))
    assert view.epoch == 1  # the volume was not opened anew
    assert node.view("data").health == "healthy"
    busy.client.flush()
    assert busy.client.read(0, BLOCKS * BLOCK) == b"".join(busy.model)


def test_replicas_are_replaced_one_at_a_time(
    node: NodeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.create("data", replicas=3, rebuild_wait_seconds=3600)
    node.attach("data")
    supervisor, seen = node.service.context.supervisor, []
    stop = supervisor.stop

    def watched(spec: object) -> None:
        view = node.view("data")
        seen.append([replica.state for replica in view.replicas if replica.connected])
        stop(spec)  # type: ignore[arg-type]

    monkeypatch.setattr(supervisor, "stop", watched)
    node.operations.upgrade("data", None, WAIT_SECONDS)
    assert seen == [["IN_SYNC"] * 3] * 3


def test_a_detached_volume_is_upgraded_too(node: NodeHarness) -> None:
    node.create("data", replicas=2)
    before = pids(node, "data")
    node.operations.upgrade("data", None, WAIT_SECONDS)
    until(lambda: None not in pids(node, "data")[1:], "its replica daemons run")
    assert not set(before[1:]) & set(pids(node, "data"))
    node.attach("data")
    assert node.view("data").health == "healthy"


def test_a_program_that_does_not_work_changes_nothing(node: NodeHarness, tmp_path: Path) -> None:
    broken = installation(tmp_path, "broken", "no module named blockd")
    node.create("data", replicas=2, rebuild_wait_seconds=3600)
    node.attach("data")
    before, busy = pids(node, "data"), load(node, "data")
    with pytest.raises(StateError, match="did not take over: no module named blockd"):
        node.operations.upgrade("data", broken, WAIT_SECONDS)
    assert pids(node, "data") == before
    with pytest.raises(RequestError, match="not an executable file"):
        node.operations.upgrade("data", str(tmp_path / "absent"), WAIT_SECONDS)
    with pytest.raises(NotFoundError):
        node.operations.upgrade("other", None, WAIT_SECONDS)
    busy.end()
    # A daemon that dies later is not started with it either.
    os.kill(before[0] or 0, signal.SIGKILL)
    until(lambda: node.view("data").pid not in (None, before[0]), "a new volume daemon")
    until(lambda: node.view("data").health == "healthy", "healthy")
    assert node.view("data").program == sys.executable


def test_an_upgrade_outlives_the_node_service(node: NodeHarness, tmp_path: Path) -> None:
    """It is finished by the next one; a successor that took over meanwhile is found."""
    node.create("data", replicas=3, rebuild_wait_seconds=3600)
    node.attach("data")
    before = pids(node, "data")
    with pytest.raises(BlockdError, match="is not upgraded"):
        node.operations.upgrade("data", installation(tmp_path, "new"), 0.01)
    node.restart()
    store = node.service.context.store

    def ended() -> bool:
        volume = store.get(Volume, "data")
        assert volume.spec.upgrade is not None
        return volume.status.upgrade_id == volume.spec.upgrade.id

    until(ended, "the upgrade has ended")
    assert not set(before) & set(pids(node, "data"))
    volume = node.view("data")
    sockets = node.service.context.home.socket_directory("data", volume.uid)
    assert control.status(sockets / "volume.control")["label"]


@pytest.mark.parametrize("attached", [False, True])
def test_replica_daemons_that_do_not_start_end_it(
    node: NodeHarness, tmp_path: Path, attached: bool
) -> None:
    """The first one fails; the others are left alone, and it runs again with the old program."""
    new = installation(tmp_path, "new", fails_for="replica")
    node.create("data", replicas=3, rebuild_wait_seconds=3600)
    if attached:
        node.attach("data")
    before = pids(node, "data")
    with pytest.raises(StateError, match=r"does not run: .*ended"):
        node.operations.upgrade("data", new, WAIT_SECONDS)
    assert len(set(before[1:]) & set(pids(node, "data"))) == 2
    if not attached:
        node.attach("data")
    node.until_healthy("data", 3)


def test_a_volume_daemon_that_lingers_is_no_obstacle(node: NodeHarness) -> None:
    node.create("data", replicas=2, rebuild_wait_seconds=3600)
    node.operations.snapshot_create("data", "one", {}, WAIT_SECONDS)
    node.operations.upgrade("data", None, WAIT_SECONDS)
    assert [each.name for each in node.view("data").snapshots] == ["one"]


def test_all_go_back_if_one_fails(
    node: NodeHarness, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two volumes work with the new program, the third does not."""
    old, new = installation(tmp_path, "old"), installation(tmp_path, "new", fails_for="c")
    for name in ("a", "b", "c"):
        node.create(name, replicas=1)
        node.attach(name)
        node.operations.upgrade(name, old, WAIT_SECONDS)
    before = {name: node.view(name).pid for name in ("a", "b", "c")}
    node.service.listen(None, None, demo=False)
    code = main(["--home", str(node.root), "volume", "upgrade", "--all", "--program", new])
    said = capsys.readouterr().err
    assert code == 1
    assert "volume c was not upgraded" in said
    assert "back at the old program" in said
    for name in ("a", "b", "c"):
        assert (node.view(name).pid == before[name]) is (name == "c")
        volume = node.service.context.store.get(Volume, name)
        assert volume.status.program == old
    new = installation(tmp_path, "newer")
    code = main(["--home", str(node.root), "volume", "upgrade", "--all", "--program", new])
    assert code == 0
    table = capsys.readouterr().out
    assert all(name in table for name in before)
    for name in ("a", "b", "c"):
        volume = node.service.context.store.get(Volume, name)
        assert volume.status.program == new
