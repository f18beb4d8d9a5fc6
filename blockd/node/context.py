"""What all reconcilers of a node share, and how the daemons of a volume are started."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace

from blockd.frontends.base import Target
from blockd.node import control
from blockd.node.home import Home
from blockd.node.objects import (
    Metadata,
    Replica,
    ReplicaSpec,
    Snapshot,
    Volume,
    new_uid,
)
from blockd.node.store import Store, find, modify
from blockd.node.supervisor import DaemonSpec, Supervisor
from replication.authority import Authority

log = logging.getLogger("blockd")

VOLUME_FINALIZER = "blockd/daemons"  # daemons are stopped and directories removed first
REPLICA_FINALIZER = "blockd/directory"
SNAPSHOT_FINALIZER = "blockd/layer"


@dataclass(frozen=True)
class Context:
    """The parts of one node service."""

    home: Home
    store: Store
    authority: Authority
    supervisor: Supervisor
    node_name: str

    def replicas_of(self, volume: str) -> list[Replica]:
        """The replicas of a volume, oldest first."""
        found = [item for item in self.store.list(Replica) if item.spec.volume == volume]
        return sorted(found, key=lambda item: (item.metadata.created, item.metadata.name))

    def snapshots_of(self, volume: str) -> list[Snapshot]:
        """The snapshots of a volume, oldest first."""
        found = [item for item in self.store.list(Snapshot) if item.spec.volume == volume]
        return sorted(found, key=_snapshot_age)

    def new_replica(self, volume: str, *, source: str | None = None) -> Replica:
        """Make the object of one more replica; a pass starts its daemon."""
        uid = new_uid()
        return self.store.create(
            Replica(
                metadata=Metadata(name=uid, uid=uid, finalizers=[REPLICA_FINALIZER]),
                spec=ReplicaSpec(
                    volume=volume,
                    node=self.node_name,
                    disk=f"{self.node_name}-replicas",
                    path=str(self.home.replicas_directory(volume) / uid),
                    source=source,
                ),
            )
        )

    def drop_replica(self, replica: Replica) -> None:
        """Let the object of a replica go whose directory is gone."""

        def change(item: Replica) -> None:
            item.metadata.finalizers = []

        self.store.delete(Replica, replica.metadata.name)
        if find(self.store, Replica, replica.metadata.name) is not None:
            modify(self.store, Replica, replica.metadata.name, change)

    def replica_daemon(self, volume: Volume, replica: Replica) -> DaemonSpec:
        """The daemon of one replica. It makes the directory only the first time."""
        name, uid = volume.metadata.name, volume.metadata.uid
        short = replica.metadata.name[:8]
        sockets = self.home.socket_directory(name, uid)
        files = self.home.volume_directory(name)
        control = sockets / f"r-{short}.control"
        pid_file = files / f"r-{short}.pid"
        arguments = ["replica", replica.spec.path, "--listen", f"unix:{sockets}/r-{short}.sock"]
        arguments += ["--control", f"unix:{control}", "--pid-file", str(pid_file)]
        arguments += ["--key-file", str(self.home.key_path(name)), *_label(volume)]
        if not replica.status.provisioned:
            arguments += ["--create", "--size", str(volume.spec.size_bytes)]
            arguments += ["--replica-uuid", replica.metadata.name]
            arguments += ["--volume-uuid", uid, "--volume-name", name]
        return DaemonSpec(
            key=f"replica daemon {short} of volume {name}",
            volume=name,
            arguments=tuple(arguments),
            control=control,
            log=files / f"r-{short}.log",
            pid_file=pid_file,
            identity=("replica_uuid", replica.metadata.name),
            program=_program(volume),
        )

    def volume_daemon(
        self, volume: Volume, addresses: list[str], *, consumer_alive: bool = False
    ) -> DaemonSpec:
        """The volume daemon; `addresses` are those of its replicas."""
        name, uid = volume.metadata.name, volume.metadata.uid
        sockets = self.home.socket_directory(name, uid)
        files = self.home.volume_directory(name)
        control = sockets / "volume.control"
        arguments = ["volume", name, "--volume-uuid", uid, "--state", str(self.home.state_path)]
        for address in addresses:
            arguments += ["--replica", address]
        arguments += ["--nbd", f"unix:{sockets}/nbd.sock", "--nbd", f"unix:{sockets}/device.sock"]
        arguments += ["--control", f"unix:{control}"]
        arguments += ["--key-file", str(self.home.key_path(name))]
        arguments += ["--block-size", str(volume.spec.block_size)]
        arguments += ["--pid-file", str(files / "volume.pid"), *_label(volume)]
        arguments += ["--consumer-alive"] if consumer_alive else []
        return DaemonSpec(
            key=f"volume daemon of {name}",
            volume=name,
            arguments=tuple(arguments),
            control=control,
            log=files / "volume.log",
            pid_file=files / "volume.pid",
            identity=("volume_uuid", uid),
            program=_program(volume),
        )

    def target(self, volume: Volume, epoch: int, snapshot: str = "") -> Target:
        """The volume, or one of its snapshots, as a front end sees it."""
        name, uid = volume.metadata.name, volume.metadata.uid
        sockets = self.home.socket_directory(name, uid)
        directory = self.home.volume_directory(name)
        return Target(
            export=f"{name}@{snapshot}" if snapshot else name,
            identity=f"{uid}@{snapshot}" if snapshot else uid,
            directory=directory / "snapshots" / snapshot if snapshot else directory,
            nbd_socket=sockets / "nbd.sock",
            control=sockets / "volume.control",
            device_socket=sockets / "device.sock",
            block_size=volume.spec.block_size,
            daemon=str(epoch),
            read_only=bool(snapshot),
        )

    def served_target(self, volume: Volume, epoch: int, snapshot: str = "") -> Target:
        """The same with what the volume daemon says of it now; PeerError if it does not answer."""
        target = self.target(volume, epoch, snapshot)
        answer = control.status(self.volume_daemon(volume, []).control)
        # A daemon of an earlier version has no address for devices, and does not count.
        clients = answer.get("clients", {}).get(f"unix:{target.device_socket}", {})
        served = [
            device["snapshot"] for device in answer.get("devices", [])
        ]  # by the daemon itself
        waits = answer["held"] or answer["paused"] or answer["suspended"]
        return replace(
            target,
            # A device that grows first has all its requests answered: not while those wait.
            size_bytes=0 if waits else int(answer["size_bytes"]),
            device_connections=int(clients.get(target.export, 0)) + served.count(snapshot),
            server=int(answer["pid"]),
        )


def _label(volume: Volume) -> tuple[str, ...]:
    """Daemons carry the id of the newest upgrade: who has another one has to be upgraded."""
    upgrade = volume.spec.upgrade
    return ("--label", upgrade.id) if upgrade is not None else ()


def _program(volume: Volume) -> str:
    """The Python that runs the daemons of a volume."""
    upgrade, status = volume.spec.upgrade, volume.status
    if upgrade is None:
        return sys.executable
    failed = status.upgrade_id == upgrade.id and status.upgrade_problem is not None
    return (status.program if failed else upgrade.program) or sys.executable


def replica_address(spec: DaemonSpec) -> str:
    """Where a replica daemon listens."""
    return spec.arguments[spec.arguments.index("--listen") + 1]


def _snapshot_age(item: Snapshot) -> tuple[int, str, str]:
    layer = item.status.layer_id
    return (layer if layer is not None else 1 << 30, item.metadata.created, item.metadata.name)
