"""The same under a node service: it starts the daemons, finds them again, and dies like they do.

The daemons are not our children: they are killed by the pids that the node service tells, and at
the end by those in its pid files, after a look at what these processes are.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx

from blockd.client import Client
from protocol.errors import BlockdError, NotFoundError
from tests.torture.faults import Fault, Scene
from tests.torture.ground import (
    REPLICAS,
    SIZE_BYTES,
    START_SECONDS_MAX,
    Answer,
    Ground,
    wait_for,
)
from tests.torture.ledger import Wrong

VOLUME = "vol"
WAIT_SECONDS = 30.0
SOURCES = str(Path(__file__).parents[2])
T = TypeVar("T")


class NodeGround(Ground):
    """One node service with one volume of three replicas."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.home = directory / "home"
        self.disks = {}
        self._service: subprocess.Popen[str] | None = None
        self._view: Answer = {}

    # ---- the node service -----------------------------------------------------------------------

    def start_service(self) -> None:
        command = [sys.executable, "-m", "blockd", "--home", str(self.home), "serve"]
        with open(self.directory / "service.log", "a") as log:
            self._service = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": SOURCES,
                },  # its daemons do not run in our directory
            )
        assert self._service.stdout is not None
        if not select.select([self._service.stdout], [], [], START_SECONDS_MAX)[0]:
            raise Wrong("the node service does not get ready")
        line = self._service.stdout.readline()
        if not line.startswith("node service ready"):
            raise Wrong(f"the node service did not start: {line!r}")

    def end_service(self, number: int) -> None:
        assert self._service is not None
        self._service.send_signal(number)
        self._service.wait(START_SECONDS_MAX)
        assert self._service.stdout is not None
        self._service.stdout.close()

    def call(self, work: Callable[[Client], T]) -> T:
        with Client.over_unix(self.home) as client:
            return work(client)

    def view(self) -> Answer:
        """What the node service says of the volume; the last answer if it says nothing."""
        with contextlib.suppress(BlockdError, OSError, httpx.HTTPError):
            self._view = self.call(lambda client: client.volume(VOLUME))
        return self._view

    def pids(self) -> dict[str, int]:
        """The daemons: "volume" and the ids of replicas."""
        view = self.view()
        found = {replica["id"]: replica["pid"] for replica in view["replicas"]}
        return {name: pid for name, pid in {**found, "volume": view["pid"]}.items() if pid}

    # ---- what sessions ask ----------------------------------------------------------------------

    def start_everything(self) -> None:
        self.start_service()
        try:
            self.call(lambda client: client.volume(VOLUME))
        except NotFoundError:
            body = {"name": VOLUME, "size_bytes": SIZE_BYTES, "replicas": REPLICAS}
            body |= {"rebuild_wait_seconds": 3600.0}
            self.call(lambda client: client.volume_create(body, wait=WAIT_SECONDS))
        self.call(lambda client: client.attach(VOLUME, "socket", wait=WAIT_SECONDS))

    def stop_everything(self) -> None:
        self.call(lambda client: client.detach(VOLUME, wait=WAIT_SECONDS))
        self.end_service(signal.SIGTERM)
        for pid in self._pids_of_files():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        wait_for("all daemons ended", lambda: not self._pids_of_files(), WAIT_SECONDS)

    def nbd(self) -> Path:
        uri = str(self._view.get("nbd_uri") or self.view().get("nbd_uri") or "")
        return Path(uri.rpartition("socket=")[2])

    def status(self) -> Answer:
        return {"ok": True, **self.view()}

    def is_healthy(self) -> bool:
        before, self._view = self._view, {}
        view = self.view()
        if not view:
            self._view = before
            return False
        states = [replica["state"] for replica in view["replicas"]]
        attached = view["state"] == "attached" and view["nbd_uri"]
        return bool(attached and view["health"] == "healthy" and states == ["IN_SYNC"] * REPLICAS)

    def path(self, number: int) -> Path:
        return Path(self._view["replicas"][number]["path"])

    def export(self, snapshot: str = "") -> str:
        return f"{VOLUME}@{snapshot}" if snapshot else VOLUME

    def snapshots(self) -> list[str]:
        listed = self.call(lambda client: client.snapshots(VOLUME))
        return [str(snapshot["name"]) for snapshot in listed]

    def _tried(self, work: Callable[[Client], Any]) -> bool:
        try:
            self.call(work)
        except (BlockdError, OSError, httpx.HTTPError):
            return False
        return True

    def make_snapshot(self, name: str) -> bool:
        """A wish that was written down comes true later: wait until it has, or is none."""
        wait = WAIT_SECONDS
        if self._tried(lambda client: client.snapshot_create(VOLUME, name, {}, wait=wait)):
            return True

        def known() -> bool:
            try:
                return bool(self.call(lambda client: client.snapshot(VOLUME, name))["ready"])
            except NotFoundError:
                return True
            except (BlockdError, OSError, httpx.HTTPError):
                return False

        wait_for(f"snapshot {name} is ready or was never asked for", known, WAIT_SECONDS)
        return False

    def remove_snapshot(self, name: str) -> None:
        def gone() -> bool:
            try:
                self.call(lambda client: client.snapshot_delete(VOLUME, name, wait=WAIT_SECONDS))
            except NotFoundError:
                return True
            except (BlockdError, OSError, httpx.HTTPError):
                return False
            return True

        wait_for(f"snapshot {name} is deleted", gone, WAIT_SECONDS)

    # ---- the end --------------------------------------------------------------------------------

    def _pids_of_files(self) -> list[int]:
        """Daemons of this home that run."""
        found = []
        for path in self.home.glob("volumes/*/*.pid"):
            with contextlib.suppress(OSError, ValueError):
                pid = int(path.read_text())
                if str(self.home).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def destroy(self) -> None:
        if self._service is not None and self._service.poll() is None:
            self.end_service(signal.SIGKILL)
        for pid in self._pids_of_files():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _ground(scene: Scene) -> NodeGround:
    assert isinstance(scene.ground, NodeGround)
    return scene.ground


def _kill_daemons(scene: Scene, pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for("they are dead", lambda: not any(map(_is_alive, pids)), WAIT_SECONDS)


def _is_alive(pid: int) -> bool:
    """Is it running? A killed child that nobody has waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def kill_service(scene: Scene) -> str:
    ground = _ground(scene)
    ground.end_service(signal.SIGKILL)
    scene.pause()
    ground.start_service()
    return ""


def restart_service(scene: Scene) -> str:
    ground = _ground(scene)
    ground.end_service(signal.SIGTERM)
    ground.start_service()
    return ""


def kill_one(scene: Scene) -> str:
    """A replica or the volume daemon: the node service starts it again."""
    name, pid = scene.source.choice(sorted(_ground(scene).pids().items()))
    _kill_daemons(scene, [pid])
    time.sleep(0.3)
    return name


def kill_some(scene: Scene) -> str:
    """Any daemons, perhaps the node service first."""
    ground, source = _ground(scene), scene.source
    pids = ground.pids()
    names = source.sample(sorted(pids), source.randint(2, len(pids)))
    with_service = source.random() < 0.5
    if with_service:
        ground.end_service(signal.SIGKILL)
    _kill_daemons(scene, [pids[name] for name in names])
    if with_service:
        ground.start_service()
    time.sleep(0.3)
    return ", ".join([*names, *(["the node service"] if with_service else [])])


NODE_FAULTS = (
    Fault("node: kill -9 of the service", 4, kill_service),
    Fault("node: restart of the service", 2, restart_service),
    Fault("node: kill -9 of a daemon", 5, kill_one),
    Fault("node: kill -9 of daemons", 5, kill_some, True),
)
