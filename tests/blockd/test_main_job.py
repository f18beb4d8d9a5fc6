"""Proves the main job as a user sees it, with `blockd serve --demo` and the command line: files
and a database on the mounted volume are byte for byte what was written, whatever is killed,
reverted, stopped or lost. Needs root, FUSE and loop devices."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from blockd.frontends import processes, tools
from blockd.frontends.fuse import FuseFrontEnd
from tests.blockd.node_harness import until

REASON = FuseFrontEnd().unavailable() or tools.missing("mount", "umount", "blkid", "mkfs.ext4")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no block device here: {REASON}")

LIBRARY = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = {"test", "site-packages", "dist-packages", "__pycache__"}
FILES_MAX = 3000
ROWS = 2000
START_SECONDS = 60.0


class Demo:
    """`blockd serve --demo` in a home of its own, and the user next to it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.mount = home / "mnt" / "demo"
        self.said: list[str] = []
        self.start()

    def start(self) -> None:
        """Start the node service and wait until it has told what to try next."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "blockd", "--home", str(self.home), "serve", "--demo"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = []
        reader = threading.Thread(target=self._listen, args=(self.process,), daemon=True)
        reader.start()
        until(lambda: any("Ctrl-C unmounts" in line for line in self.said), "it is ready")
        assert self.mount.is_mount(), "".join(self.said)

    def _listen(self, process: subprocess.Popen[str]) -> None:
        said = self.said
        assert process.stdout is not None
        said.extend(iter(process.stdout.readline, ""))

    def interrupt(self) -> None:
        """Ctrl-C; everything must have been stopped."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(START_SECONDS) == 0, "".join(self.said)
        assert not self.mount.is_mount()
        assert _processes_of(self.home) == []

    def blockd(self, *arguments: str) -> Any:
        """Run one command, which must succeed; its JSON answer."""
        command = [sys.executable, "-m", "blockd", "--home", str(self.home), *arguments]
        done = subprocess.run(
            [*command, "-o", "json"], capture_output=True, text=True, timeout=START_SECONDS
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def replicas(self) -> dict[str, Any]:
        """The replicas of the volume by id."""
        return {replica["id"]: replica for replica in self.blockd("replica", "ls", "demo")}

    def states(self) -> list[str]:
        """The member states."""
        return sorted(replica["state"] for replica in self.replicas().values())

    def kill_replica(self, uid: str) -> None:
        """kill -9 of one replica daemon; waits until another one runs in its place."""
        pid = self.replicas()[uid]["pid"]
        os.kill(int(pid), signal.SIGKILL)
        until(lambda: self.replicas()[uid]["pid"] not in (None, pid), "its daemon is back")

    @contextmanager
    def without(self, uids: list[str]) -> Iterator[None]:
        """The disks of some replicas are gone for a while."""
        for uid in uids:
            replica = self.replicas()[uid]
            Path(replica["path"]).rename(self.home / uid)
            os.kill(int(replica["pid"]), signal.SIGKILL)
            until(lambda uid=uid: self.replicas()[uid]["state"] == "OUT", f"{uid} is OUT")
        yield
        for uid in uids:
            (self.home / uid).rename(self.replicas()[uid]["path"])

    def heal(self) -> None:
        """Wait until everything is equal again, which needs no request."""
        until(lambda: self.states() == ["IN_SYNC"] * 3, "three replicas in sync")

    def set_rebuild_wait(self, seconds: float) -> None:
        """How long lost replicas stay OUT."""
        transport = httpx.HTTPTransport(uds=str(self.home / "blockd.sock"))
        with httpx.Client(transport=transport, base_url="http://blockd") as client:
            body = {"rebuild_wait_seconds": seconds}
            answer = client.patch("/v1/volumes/demo/settings", json=body)
            assert answer.status_code == 200, answer.text

    def remount(self) -> None:
        """Drop what the kernel's page cache holds of the file system."""
        self.blockd("volume", "umount", "demo")
        self.blockd("volume", "mount", "demo")

    def check(self, copies: tuple[str, ...] = ("first",)) -> None:
        """Everything on the volume is what was written to it."""
        for copy in copies:
            _assert_same_tree(self.mount / copy / "tree")
            assert _dump(self.mount / copy / "data.db") == _dump(self.home / "data.db")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """A demo with a first copy of the files and of the database on it."""
    demo = Demo(tmp_path_factory.mktemp("home"))
    try:
        _fill_database(demo.home / "data.db")
        _copy(demo.mount / "first")
        yield demo
    finally:
        if demo.process.poll() is not None:
            demo.start()
        demo.set_rebuild_wait(0)
        demo.interrupt()


def test_the_first_copy_is_equal(demo: Demo) -> None:
    demo.remount()
    demo.check()


def test_a_replica_killed_during_a_copy_costs_nothing(demo: Demo) -> None:
    demo.heal()
    victim, pid = next((uid, r["pid"]) for uid, r in demo.replicas().items())
    copying = threading.Thread(target=_copy, args=(demo.mount / "second",))
    copying.start()
    until(lambda: sum(1 for _ in (demo.mount / "second").rglob("*")) > 50, "the copy runs")
    os.kill(pid, signal.SIGKILL)
    assert copying.is_alive(), "the kill came in the middle"
    copying.join(START_SECONDS)
    assert not copying.is_alive()
    assert demo.replicas()[victim]["pid"] != pid
    demo.remount()
    demo.check(("first", "second"))
    shutil.rmtree(demo.mount / "second")


def test_a_killed_node_service_finds_everything_and_restarts_nothing(demo: Demo) -> None:
    demo.heal()
    before, running = demo.blockd("volume", "show", "demo"), _processes_of(demo.home)
    demo.process.kill()
    demo.process.wait()
    demo.check()  # nobody needs it for reading and writing
    (demo.mount / "meanwhile").write_text("still here")
    demo.start()
    after = demo.blockd("volume", "show", "demo")
    assert _processes_of(demo.home) == running
    for same in ("pid", "epoch", "device", "mount", "nbd_uri", "state", "health"):
        assert after[same] == before[same]
    pids = {replica["id"]: replica["pid"] for replica in before["replicas"]}
    assert {replica["id"]: replica["pid"] for replica in after["replicas"]} == pids
    demo.remount()
    assert (demo.mount / "meanwhile").read_text() == "still here"
    demo.check()


def test_what_was_destroyed_after_a_snapshot_comes_back(demo: Demo) -> None:
    demo.blockd("snapshot", "create", "demo@before")
    shutil.rmtree(demo.mount / "first" / "tree")
    with sqlite3.connect(demo.mount / "first" / "data.db") as database:
        database.execute("DELETE FROM facts")
    database.close()
    (demo.mount / "later").write_text("not in the snapshot")
    demo.blockd("snapshot", "revert", "demo@before", "--force-unmount")
    demo.check()
    assert not (demo.mount / "later").exists()


def test_a_stop_by_ctrl_c_keeps_everything(demo: Demo) -> None:
    demo.interrupt()
    demo.start()
    demo.check()


def test_a_rebuilt_replica_alone_holds_everything(demo: Demo) -> None:
    demo.set_rebuild_wait(3600)
    demo.heal()
    rebuilt, *others = demo.replicas()
    with demo.without([rebuilt]):
        shutil.copytree(demo.mount / "first", demo.mount / "second", symlinks=True)
    demo.heal()
    with demo.without(others):
        states = {uid: replica["state"] for uid, replica in demo.replicas().items()}
        assert states == {rebuilt: "IN_SYNC", **dict.fromkeys(others, "OUT")}
        demo.remount()
        demo.check(("first", "second"))
        assert demo.states() == ["IN_SYNC", "OUT", "OUT"], "nothing was read from the others"
    demo.heal()


def _tree() -> list[Path]:
    """Files of the interpreter's library, relative to it."""
    found: list[Path] = []
    for directory, names, files in os.walk(LIBRARY):
        names[:] = sorted(set(names) - LEFT_OUT)
        paths = (Path(directory, name) for name in sorted(files))
        found += [path.relative_to(LIBRARY) for path in paths if path.is_file()]
    return found[:FILES_MAX]


def _copy(where: Path) -> None:
    """Copy the files and write the database, row by row in transactions of its own."""
    (where / "tree").mkdir(parents=True)
    for path in _tree():
        (where / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(LIBRARY / path, where / "tree" / path)
    _fill_database(where / "data.db")


def _fill_database(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE facts (number INTEGER PRIMARY KEY, name TEXT, content BLOB)")
    for begin in range(0, ROWS, 100):
        with database:
            for number in range(begin, begin + 100):
                content = number.to_bytes(4, "little") * (number % 300)
                database.execute("INSERT INTO facts VALUES (?, ?, ?)", (number, "x", content))
    database.close()


def _dump(path: Path) -> list[str]:
    """All of a database that SQLite itself finds intact."""
    database = sqlite3.connect(path)
    try:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return list(database.iterdump())
    finally:
        database.close()


def _assert_same_tree(copy: Path) -> None:
    paths = _tree()
    assert len(paths) > 500, f"{LIBRARY} is no library"
    found = {path.relative_to(copy) for path in copy.rglob("*") if path.is_file()}
    assert found == set(paths)
    filecmp.clear_cache()
    _, different, unreadable = filecmp.cmpfiles(
        LIBRARY, copy, [str(path) for path in paths], shallow=False
    )
    assert (different, unreadable) == ([], [])


def _processes_of(home: Path) -> list[int]:
    """The daemons and front ends of this home (not the node service), as /proc tells."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        ours = b"daemon" in words or any(word.endswith(b"nbdfuse") for word in words)
        if ours and str(home).encode() in b" ".join(words):
            found.append(int(entry.parent.name))
    return sorted(pid for pid in found if not processes.wait_for_end(pid, 0))
