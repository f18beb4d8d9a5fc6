"""What the control socket of a volume daemon understands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from blockd.daemons import addresses, process
from blockd.daemons.control import Answer, Command
from blockd.daemons.diff import Diff
from blockd.daemons.handover import HandOver
from blockd.daemons.ublk import UblkDevice
from blockd.daemons.usage import UsageCount
from protocol.errors import BlockdError, ConflictError, NotFoundError, StateError
from protocol.units import REPLICAS_MAX, check_min_in_sync, check_rate
from replication.authority import IN_SYNC, OUT, Member, Record
from replication.cloning import Order, clone
from replication.link import Link
from replication.scrub import Report

if TYPE_CHECKING:
    from blockd.daemons.volume import VolumeDaemon


class VolumeCommands:
    """One method per command."""

    def __init__(self, daemon: VolumeDaemon) -> None:
        self._daemon = daemon
        self._engine = daemon.engine

    def table(self) -> dict[str, Command]:
        """Commands by name; what they queue on members is sent right away."""
        commands: dict[str, Command] = {
            "status": self._status,
            "stop": self._stop,
            "snapshot-create": self._snapshot_create,
            "snapshot-remove": self._snapshot_remove,
            "snapshot-revert": self._snapshot_revert,
            "diff": self._diff,
            "clone": self._clone,
            "grow": self._grow,
            "usage": self._usage,
            "member-add": self._member_add,
            "member-remove": self._member_remove,
            "member-address": self._member_address,
            "rebuild": self._rebuild,
            "configure": self._configure,
            "hand-over": self._hand_over,
            "verify": self._verify,
            "ublk-attach": self._ublk_attach,
            "ublk-detach": self._ublk_detach,
        }
        return {name: self._sending(command) for name, command in commands.items()}

    def _sending(self, command: Command) -> Command:
        def run(request: dict[str, Any], answer: Answer) -> None:
            command(request, answer)
            self._daemon.send_everything()

        return run

    # ---- status ---------------------------------------------------------------------------

    def _status(self, request: dict[str, Any], answer: Answer) -> None:
        daemon, engine = self._daemon, self._engine
        record = engine.record
        answer(
            {
                **process.common_status(daemon.started, daemon.options.label),
                "volume_uuid": record.volume_uuid,
                "volume_name": record.volume_name,
                "size_bytes": record.size_bytes,
                "epoch": record.epoch,
                "health": self.health(),
                "nbd": [server.address for server in daemon.servers],
                "devices": daemon.ublk.status(),
                "connections": daemon.readers_of(0),
                "clients": daemon.clients(),
                "members": [
                    _member(replica_uuid, member, engine.links.get(replica_uuid))
                    for replica_uuid, member in record.members.items()
                ],
                "snapshots": [
                    {
                        "id": layer.id,
                        "name": layer.name,
                        "created": layer.created,
                        "labels": dict(layer.labels),
                        "parent": layer.parent,
                        "connections": daemon.readers_of(layer.id),
                    }
                    for layer in record.layers
                    if layer.name
                ],
                "layers": len(record.layers),
                "head_id": record.head_id,
                "counters": {
                    "reads": engine.reads_total,
                    "read_bytes": engine.read_bytes,
                    "writes": engine.writes_total,
                    "written_bytes": engine.written_bytes,
                    "trims": engine.zeros_total,
                    "flushes": engine.flushes_total,
                    "checksum_errors": engine.checksum_errors,
                    "repaired_blocks": engine.repairs.repaired_blocks,
                    "failed_repairs": engine.repairs.failed,
                },
                "verify": _report(daemon.members.verified),
                "held": daemon.ledger.held,
                "paused": self._paused(),
                "suspended": engine.suspended,
                "min_in_sync": record.min_in_sync,
                "rebuild_bandwidth": daemon.members.bytes_per_second,
            }
        )

    def _paused(self) -> str | None:
        """Why writes wait, if they do."""
        full = [link.replica_uuid for link in self._engine.room.full]
        if not full:
            return None
        return (
            f"no space left on the disk of replica {', '.join(full)}: writes wait; free space "
            "there, trim the volume or delete snapshots, and they go on"
        )

    def health(self) -> str:
        """healthy: all members in sync; degraded: some; faulted: none can be read."""
        if not self._engine.readers:
            return "faulted"
        members = self._engine.record.members.values()
        connected = len(self._engine.readers)
        return "healthy" if connected == len(members) else "degraded"

    def _hand_over(self, request: dict[str, Any], answer: Answer) -> None:
        """Give the open volume to a successor; answered only if that comes to nothing."""
        HandOver(self._daemon, request, answer)

    def _stop(self, request: dict[str, Any], answer: Answer) -> None:
        answer({})
        self._daemon.stop()

    # ---- snapshots ------------------------------------------------------------------------

    def _snapshot_create(self, request: dict[str, Any], answer: Answer) -> None:
        name = str(request["name"])
        labels = dict(request.get("labels") or {})

        def done(error: BlockdError | None) -> None:
            layer = self._engine.record.layer_named(name)
            if error is not None or layer is None:
                answer(error or StateError(f"snapshot {name} was not recorded"))
            else:
                answer({"snapshot": asdict(layer)})

        self._daemon.structure.create(name, labels, done)

    def _snapshot_remove(self, request: dict[str, Any], answer: Answer) -> None:
        name = str(request["name"])
        self._refuse_if_read(name, "deleted")
        self._daemon.structure.remove(name, _answer_with(answer))

    def _snapshot_revert(self, request: dict[str, Any], answer: Answer) -> None:
        name = str(request["name"])
        live = self._daemon.readers_of(0)
        if live and not request.get("force"):
            raise ConflictError(
                f"{live} NBD clients use volume {self._engine.record.volume_name}; disconnect "
                "them first (unmount, detach), or force the revert"
            )
        revert_id = str(request.get("id") or "")
        self._daemon.structure.revert(name, _answer_with(answer), revert_id)

    def _diff(self, request: dict[str, Any], answer: Answer) -> None:
        """Extents in which `snapshot` (empty: the live volume) may differ from snapshot `base`."""
        structure, to = self._daemon.structure, str(request["snapshot"])
        base_id = structure.find(str(request["base"])).id
        layer_id = structure.find(to).id if to else 0
        offset = int(request["offset"])

        def post(call: Callable[[], None]) -> None:
            self._daemon.loop.post(self._daemon.sending(call))

        Diff(self._engine, base_id, layer_id, offset, answer, post).go_on()

    def _usage(self, request: dict[str, Any], answer: Answer) -> None:
        UsageCount(self._engine, answer).start()

    def _clone(self, request: dict[str, Any], answer: Answer) -> None:
        """Make the replicas of a new volume; `targets` maps members to (replica uuid, path)."""
        order = Order(
            snapshot=str(request["snapshot"]),
            volume_uuid=str(request["volume_uuid"]),
            volume_name=str(request["volume_name"]),
            size_bytes=int(request["size_bytes"]),
            targets={str(uid): (str(a), str(b)) for uid, (a, b) in request["targets"].items()},
            unshare=bool(request["unshare"]),
        )
        clone(self._daemon.structure, order, _answer_with(answer))

    def _grow(self, request: dict[str, Any], answer: Answer) -> None:
        """Make the volume `size_bytes` long; clients that are there may use all of it."""

        def done(error: BlockdError | None) -> None:
            if error is None:
                for connection in self._daemon.connections:
                    connection.volume_grew(self._engine.record.size_bytes)
            _answer_with(answer)(error)

        self._daemon.structure.grow(int(request["size_bytes"]), done)

    def _refuse_if_read(self, name: str, what: str) -> None:
        layer = self._daemon.structure.find(name)
        users = self._daemon.readers_of(layer.id)
        if users:
            raise ConflictError(
                f"snapshot {self._engine.record.volume_name}@{name} is exported to {users} NBD "
                f"clients and cannot be {what}; disconnect them first"
            )

    # ---- devices --------------------------------------------------------------------------

    def _ublk_attach(self, request: dict[str, Any], answer: Answer) -> None:
        """Serve the live volume or `snapshot` as a ublk device, or go on with a dead daemon's."""

        def done(device: UblkDevice | None, error: BlockdError | None) -> None:
            if device is None:
                answer(error or StateError("no device was made"))
            else:
                answer({"id": device.info.id, "path": device.info.path})

        queues = int(request.get("queues") or 1)
        self._daemon.ublk.attach(str(request.get("snapshot") or ""), queues, done)

    def _ublk_detach(self, request: dict[str, Any], answer: Answer) -> None:
        """Remove a ublk device; whether somebody uses it is for the asker to know."""
        self._daemon.ublk.detach(str(request.get("snapshot") or ""), _answer_with(answer))

    # ---- members --------------------------------------------------------------------------

    def _member_add(self, request: dict[str, Any], answer: Answer) -> None:
        replica_uuid, address = str(request["replica_uuid"]), _address(request)
        engine = self._engine

        def change(record: Record) -> Record:
            if replica_uuid in record.members:
                raise ConflictError(f"replica {replica_uuid} is a member already")
            if len(record.members) >= REPLICAS_MAX:
                raise ConflictError(
                    f"volume {record.volume_name} has {len(record.members)} replicas, the limit "
                    f"is {REPLICAS_MAX}; remove one first"
                )
            members = {**record.members, replica_uuid: Member(OUT, address)}
            return replace(record, members=members, config_seq=record.config_seq + 1)

        def done(error: BlockdError | None) -> None:
            if error is None:
                engine.links[replica_uuid] = Link(replica_uuid, address)
                self._daemon.members.reconnect(replica_uuid)
            _answer_with(answer)(error)

        engine.ledger.change(change, done)

    def _member_remove(self, request: dict[str, Any], answer: Answer) -> None:
        link = self._link(request)
        engine = self._engine

        def change(record: Record) -> Record:
            members = dict(record.members)
            member = members.pop(link.replica_uuid)
            others = [other for other in members.values() if other.state == IN_SYNC]
            if member.state == IN_SYNC and not others:
                raise StateError(
                    f"replica {link.replica_uuid} is the last one in sync of volume "
                    f"{record.volume_name}; rebuild another one first"
                )
            return replace(record, members=members, config_seq=record.config_seq + 1)

        def done(error: BlockdError | None) -> None:
            if error is None:
                link.state = OUT
                engine.set_members(
                    [target for target in engine.targets if target is not link],
                    [reader for reader in engine.readers if reader is not link],
                )
                engine.fail(link, "it was removed from the volume")
                engine.links.pop(link.replica_uuid, None)
            _answer_with(answer)(error)

        engine.ledger.change(change, done)

    def _member_address(self, request: dict[str, Any], answer: Answer) -> None:
        link, address = self._link(request), _address(request)

        def change(record: Record) -> Record:
            member = replace(record.members[link.replica_uuid], address=address)
            return replace(record, members={**record.members, link.replica_uuid: member})

        def done(error: BlockdError | None) -> None:
            if error is None:
                link.address = address
                if not link.connected:
                    self._daemon.members.reconnect(link.replica_uuid)
            _answer_with(answer)(error)

        self._engine.ledger.change(change, done)

    def _rebuild(self, request: dict[str, Any], answer: Answer) -> None:
        """Now, whatever failed before; fine if it is under way."""
        self._daemon.members.rebuild_now(self._link(request))
        answer({})

    def _verify(self, request: dict[str, Any], answer: Answer) -> None:
        """Compare all members, block by block; `status` shows the progress."""
        self._daemon.members.verify()
        answer({})

    def _configure(self, request: dict[str, Any], answer: Answer) -> None:
        """Set `min_in_sync` and `rebuild_bandwidth` (bytes per second; null: no cap)."""
        wanted = int(request["min_in_sync"])
        rate = request.get("rebuild_bandwidth")
        check_min_in_sync(wanted)
        engine, members = self._engine, self._daemon.members
        members.bytes_per_second = check_rate(int(rate)) if rate is not None else None

        def done(error: BlockdError | None) -> None:
            if error is None:
                engine.set_members(engine.targets, engine.readers)
            _answer_with(answer)(error)

        engine.ledger.change(lambda record: replace(record, min_in_sync=wanted), done)

    def _link(self, request: dict[str, Any]) -> Link:
        replica_uuid = str(request["replica_uuid"])
        link = self._engine.links.get(replica_uuid)
        if link is None:
            raise NotFoundError(
                f"replica {replica_uuid} is no member of volume "
                f"{self._engine.record.volume_name}; `blockd replica ls` shows the members"
            )
        return link


def _address(request: dict[str, Any]) -> str:
    """The address of a replica, or RequestError: the record must never hold an unusable one."""
    address = str(request["address"])
    if not address.startswith("dir:"):
        addresses.parse(address)
    return address


def _member(replica_uuid: str, member: Member, link: Link | None) -> dict[str, Any]:
    if link is None:
        return {"replica_uuid": replica_uuid, **asdict(member), "connected": False}
    return {
        "replica_uuid": replica_uuid,
        "address": link.address,
        "state": member.state,
        "connected": link.connected,
        "failure": link.failure,
        "rebuild": link.rebuild.progress() if link.rebuild is not None else None,
        "reads": link.reads_total,
        "errors": link.errors,
        "repaired_blocks": link.repaired_blocks,
    }


def _report(report: Report | None) -> dict[str, Any] | None:
    """What a verification found, or has found so far."""
    if report is None:
        return None
    return {**asdict(report), "unrepaired_blocks": report.unrepaired_blocks}


def _answer_with(answer: Answer) -> Callable[[BlockdError | None], None]:
    return lambda error: answer(error if error is not None else {})
