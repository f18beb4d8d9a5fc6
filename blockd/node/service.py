"""The node service: puts the parts together, runs them, and ends them in order.

It owns no data path. Ending or killing it leaves every volume serving; the next one finds them by
their control sockets, pid files and what the kernel knows of devices and mounts.

With `demo`, it makes and mounts a first volume, and stops everything when it ends.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import signal
import sys
import threading
from pathlib import Path

from blockd import __version__
from blockd.frontends import availability
from blockd.node import boot, server
from blockd.node import demo as demo_parts
from blockd.node.api import make_app
from blockd.node.api_types import StatusView
from blockd.node.context import Context, log
from blockd.node.home import Home
from blockd.node.objects import (
    Disk,
    DiskSpec,
    Metadata,
    Node,
    NodeStatus,
    Replica,
    Snapshot,
    Volume,
    utc_now,
)
from blockd.node.operations import Operations
from blockd.node.reconcile import Workers, WorkQueue
from blockd.node.reconcile_volumes import VolumeReconciler
from blockd.node.sqlite_store import SqliteStore
from blockd.node.store import find, modify, modify_status
from blockd.node.supervisor import Supervisor
from blockd.node.watchdog import Watchdog, api_stuck
from blockd.notify import Notifier
from protocol.errors import BlockdError, ConflictError
from replication.authority import SqliteAuthority

DEFAULT_LISTEN = "127.0.0.1:9500"
DISK_SECONDS = 60.0  # how often the space of the disks is written down
WATCH_SECONDS = 1.0
NAMED_MAX = 5  # volumes in a line for people


def serve(
    *,
    home: Path,
    listen: str | None = None,
    token_file: Path | None = None,
    demo: bool = False,
) -> int:
    """Run the node service until SIGTERM or SIGINT; the exit code."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    log.setLevel(logging.INFO)
    notifier = Notifier()  # before anything is started that would inherit the way to the manager
    service = NodeService(Home(home))
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        service.start()
        service.listen(listen, token_file, demo)
        if demo:
            demo_parts.show(service.operations, service.context, service.addresses, stop)
        else:
            demo_parts.say(f"node service ready: {', '.join(service.addresses)}")
        notifier.tell("STATUS=attaching the volumes that should be")
        boot.wait_until_settled(service.context.store, stop)
        watchdog = Watchdog(notifier, service.stuck, service.status)
        watchdog.start()
        stop.wait()
        watchdog.stop()
        service.stop_doors()
        if demo:
            stop.clear()
            return 0 if demo_parts.stop_everything(service.context, stop) else 1
        count = service.attached_count()
        if count:
            demo_parts.say(f"node service stopped; {count} attached volume(s) go on serving")
        return 0
    finally:
        service.close()


class NodeService:
    """The parts of one node service and their life."""

    def __init__(self, home: Home) -> None:
        home.prepare()
        home.lock()
        self._queue = WorkQueue()
        self._closing = threading.Event()
        self._listeners: list[server.Listener] = []
        self._threads: list[threading.Thread] = []
        self.context = Context(
            home=home,
            store=(store := SqliteStore(home.state_path)),
            authority=SqliteAuthority(str(home.state_path)),
            supervisor=Supervisor(self._queue.add),
            node_name=platform.node().lower() or "localhost",
        )
        self._store = store
        home.state_path.chmod(0o600)
        self.operations = Operations(self.context)
        self._workers = Workers(self._queue, VolumeReconciler(self.context).reconcile)
        self._view = StatusView(
            version=__version__,
            node=self.context.node_name,
            pid=os.getpid(),
            started=utc_now(),
            home=str(home.root),
            socket=str(home.api_socket),
            listen=None,
            volume_count=0,
            attached_count=0,
            front_ends={},
        )

    @property
    def addresses(self) -> list[str]:
        """Where the API is."""
        return [listener.address for listener in self._listeners]

    def start(self) -> None:
        """Register the node and begin to reconcile."""
        self._register()
        for kind in (Volume, Replica, Snapshot):
            self._spawn(f"watch-{kind.kind}", self._watch, kind)
        self._spawn("disks", self._measure_disks)
        self._workers.start()

    def listen(self, address: str | None, token_file: Path | None, demo: bool) -> None:
        """Open the API on the unix socket, and on TCP if asked."""
        home = self.context.home
        if address is None and demo:
            address = DEFAULT_LISTEN
            try:
                tcp = server.tcp_socket(address)
            except ConflictError as error:
                log.warning("the API is on the unix socket only: %s", error)
                address = None
        elif address is not None:
            tcp = server.tcp_socket(address)
        self._view.listen = address
        unix = server.unix_socket(home.api_socket)
        app = make_app(self.context, self._view, None)
        self._listeners.append(server.Listener(app, unix, f"unix:{home.api_socket}"))
        if address is not None:
            token = home.token(token_file)
            app = make_app(self.context, self._view, token)
            self._listeners.append(server.Listener(app, tcp, f"http://{address}"))
        for listener in self._listeners:
            listener.start()

    def stuck(self) -> str | None:
        """Why the service is not alive, None if it is."""
        for thread in self._threads:
            if not thread.is_alive():
                return f"thread {thread.name} has ended"
        if not self.context.supervisor.is_watching():
            return "the supervisor of the daemons has ended"
        return self._workers.stuck() or api_stuck(self.context.home.api_socket)

    def status(self) -> str:
        """How the volumes are, in one line."""
        volumes = self._store.list(Volume)
        attached = sum(item.status.state == "attached" for item in volumes)
        bad = [v.metadata.name for v in volumes if v.status.health in ("degraded", "faulted")]
        text = f"{len(volumes)} volumes, {attached} attached"
        return f"{text}; not healthy: {', '.join(bad[:NAMED_MAX])}" if bad else text

    def attached_count(self) -> int:
        """How many volumes are attached."""
        return sum(item.spec.attached for item in self._store.list(Volume))

    def stop_doors(self) -> None:
        """Take no more requests and end the passes that run."""
        while self._listeners:
            self._listeners.pop().close()
        self._workers.close()

    def close(self) -> None:
        """End; the daemons go on."""
        self._closing.set()
        self.stop_doors()
        self.context.home.api_socket.unlink(missing_ok=True)
        self.context.supervisor.close()
        self._store.close()
        self.context.home.unlock()

    def _spawn(self, name: str, target: object, *arguments: object) -> None:
        assert callable(target)
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _watch(self, kind: type[Volume] | type[Replica] | type[Snapshot]) -> None:
        """Queue the volume of every object whose wish changed; statuses are our own doing."""
        watch = self._store.watch(kind)
        seen: dict[str, tuple[object, ...]] = {}
        while not self._closing.is_set():
            event = watch.next(WATCH_SECONDS)
            if event is None:
                continue
            item = event.object
            metadata = item.metadata
            wish = (metadata.uid, metadata.generation, metadata.deleted, event.gone)
            if seen.get(metadata.name) == wish:
                continue
            seen[metadata.name] = wish
            if event.gone:
                del seen[metadata.name]
            volume = metadata.name
            if isinstance(item, Replica | Snapshot):
                volume = item.spec.volume
            elif isinstance(item, Volume) and item.spec.source is not None:
                self._queue.add(item.spec.source.volume)  # it makes the clone
            self._queue.add(volume)

    def _register(self) -> None:
        context, name = self.context, self.context.node_name
        if find(context.store, Node, name) is None:
            context.store.create(Node(metadata=Metadata(name=name)))
        boot_id = boot.forget_other_boot(context.store, name)
        status = NodeStatus(__version__, os.getpid(), utc_now(), availability(), boot_id)
        modify_status(context.store, Node, name, lambda n: setattr(n, "status", status))
        disk, path = f"{name}-replicas", str(context.home.root / "replicas")
        if find(context.store, Disk, disk) is None:
            context.store.create(Disk(metadata=Metadata(name=disk), spec=DiskSpec(name, path)))
        modify(context.store, Disk, disk, lambda d: setattr(d.spec, "path", path))

    def _measure_disks(self) -> None:
        while True:
            for disk in self._store.list(Disk):
                try:
                    modify_status(self._store, Disk, disk.metadata.name, _measure)
                except (OSError, BlockdError) as error:
                    log.warning("disk %s: %s", disk.metadata.name, error)
            if self._closing.wait(DISK_SECONDS):
                return


def _measure(disk: Disk) -> None:
    usage = shutil.disk_usage(disk.spec.path)
    disk.status.total_bytes, disk.status.free_bytes = usage.total, usage.free
