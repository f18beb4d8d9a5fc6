"""A node service inside the test's process, with real daemons below a temporary directory."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from blockd.node.demo import stop_everything
from blockd.node.home import Home
from blockd.node.objects import VolumeSpec
from blockd.node.service import NodeService
from blockd.node.views import VolumeView

MIB = 1 << 20
PATIENCE = float(os.environ.get("BLOCKD_TEST_PATIENCE", "1"))  # an emulated machine is slow
WAIT_SECONDS = 30.0 * PATIENCE  # far more than anything here takes; bounds a failing test
POLL_SECONDS = 0.02


def until(wanted: Callable[[], object], what: str) -> None:
    """Poll until `wanted()` is true."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not wanted():
        assert time.monotonic() < deadline, f"not within {WAIT_SECONDS:g} s: {what}"
        time.sleep(POLL_SECONDS)


class NodeHarness:
    """One home; its node service can be left and started again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.service = self._started()

    def _started(self) -> NodeService:
        service = NodeService(Home(self.root))
        service.start()
        self.operations = service.operations
        return service

    def restart(self) -> None:
        """End the node service and start the next one; the daemons go on."""
        self.service.close()
        self.start()

    def start(self) -> None:
        """Start a node service after the last one was closed."""
        self.service = self._started()

    def close(self) -> None:
        """Stop everything."""
        self.service.stop_doors()
        stop_everything(self.service.context, threading.Event())
        self.service.close()

    def client(self, listen: str | None = None) -> httpx.Client:
        """A client of the API on the unix socket."""
        self.service.listen(listen, None, demo=False)
        transport = httpx.HTTPTransport(uds=str(self.root / "blockd.sock"))
        return httpx.Client(transport=transport, base_url="http://blockd", timeout=WAIT_SECONDS)

    def create(
        self,
        name: str,
        *,
        replicas: int = 1,
        size_bytes: int = 64 * MIB,
        rebuild_wait_seconds: float = 0.0,
        block_size: int = 4096,
    ) -> VolumeView:
        """A volume; its lost replicas are rebuilt at once."""
        spec = VolumeSpec(
            size_bytes=size_bytes,
            replicas=replicas,
            rebuild_wait_seconds=rebuild_wait_seconds,
            block_size=block_size,
        )
        return self.operations.create(name, spec, {}, WAIT_SECONDS)

    def attach(self, name: str, frontend: str = "socket") -> VolumeView:
        """Attach and return the view."""
        return self.operations.attach(name, frontend, WAIT_SECONDS)

    def view(self, name: str) -> VolumeView:
        """The volume now."""
        return self.operations.volume(name)

    def until_healthy(self, name: str, replicas: int) -> None:
        """Wait until that many replicas are in sync and none is left over."""
        until(
            lambda: (
                [item.state for item in self.view(name).replicas] == ["IN_SYNC"] * replicas
                and self.view(name).health == "healthy"
            ),
            f"{name} has {replicas} replicas in sync",
        )


def write(view: VolumeView, content: bytes, path: Path) -> None:
    """Write `content` to the start of an attached volume."""
    path.write_bytes(content)
    assert view.nbd_uri
    subprocess.run(["nbdcopy", str(path), view.nbd_uri], check=True, timeout=WAIT_SECONDS)


def read(view: VolumeView, path: Path) -> bytes:
    """The whole content of an attached volume."""
    assert view.nbd_uri
    subprocess.run(["nbdcopy", view.nbd_uri, str(path)], check=True, timeout=WAIT_SECONDS)
    return path.read_bytes()
