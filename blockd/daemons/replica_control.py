"""What the fenced owner of a replica can ask for by CONTROL.

Each request is a JSON object whose `do` names a method here; its answer is given to `done`, at once
or when a thread has ended. Changes of the layer tree and what is asked at a point of the order
happen before this returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from protocol.errors import BlockdError, RequestError
from snapshots.cloning import Target
from snapshots.usage import usage

if TYPE_CHECKING:
    from blockd.daemons.replica_service import ReplicaService

Content = dict[str, Any]
Done = Callable[[Content | BlockdError], None]

STAMP_ZONES_PER_ANSWER = 1 << 16  # at most a mebibyte of JSON
USAGE_SECONDS = 0.002  # of counting before other requests come in between
INDEX_SECONDS = 0.002  # of making index pages in one turn of the loop


class ReplicaControl:
    """One method per request."""

    def __init__(self, service: ReplicaService) -> None:
        self._service = service
        self._replica = service.replica
        self.folding_paused_by: set[object] = set()

    def run(self, content: Content, user: object, done: Done) -> None:
        """Carry out one request of the owner's session `user`."""
        what = str(content.get("do"))
        method: Callable[[Content, object, Done], None] | None
        method = getattr(self, f"_do_{what}", None)
        if method is None:
            raise RequestError(f"unknown control request {what!r}")
        method(content, user, done)

    # ---- the layer tree -------------------------------------------------------------------

    def _do_tree(self, content: Content, user: object, done: Done) -> None:
        replica = self._replica
        layers = [describe_layer(info) for info in replica.tree()]
        self._service.worked()  # files may have become this directory's own: folding goes on
        done({"layers": layers, "head_id": replica.metadata.head_id})

    def _do_seal(self, content: Content, user: object, done: Done) -> None:
        self._replica.seal(
            int(content["new_head_id"]),
            str(content["name"]),
            str(content["created"]),
            dict(content["labels"]),
        )
        done({})

    def _do_remove(self, content: Content, user: object, done: Done) -> None:
        self._replica.remove(int(content["layer_id"]))
        self._service.worked()
        done({})

    def _do_revert(self, content: Content, user: object, done: Done) -> None:
        self._replica.revert(int(content["layer_id"]), int(content["new_head_id"]))
        self._service.worked()
        done({})

    def _do_grow(self, content: Content, user: object, done: Done) -> None:
        """What takes long is done in threads before: little is left that holds requests up."""
        service, replica, size_bytes = self._service, self._replica, int(content["size_bytes"])

        def flushed(error: BlockdError | None) -> None:
            if error is not None:
                done(error)
            else:
                service.loop.in_thread(replica.prepare_to_grow(size_bytes), prepared)

        def prepared(result: None, failure: BaseException | None) -> None:
            try:
                service.flushing.wait()
                replica.grow(size_bytes)
            except BlockdError as error:
                done(error)
                return
            service.worked()
            done({})

        service.flush(flushed)

    def _do_clone(self, content: Content, user: object, done: Done) -> None:
        """Links at one moment after a flush; the rest in a thread."""
        service, replica = self._service, self._replica
        target = Target(
            path=str(content["path"]),
            replica_uuid=str(content["replica_uuid"]),
            volume_uuid=str(content["volume_uuid"]),
            volume_name=str(content["volume_name"]),
            size_bytes=int(content["size_bytes"]),
            unshare=bool(content["unshare"]),
        )

        def flushed(error: BlockdError | None) -> None:
            try:
                if error is None:
                    layer_id, head_id = int(content["layer_id"]), int(content["new_head_id"])
                    clone = replica.clone(layer_id, head_id, target)
                    service.loop.in_thread(clone.finish, finished)
            except BlockdError as failure:
                error = failure
            if error is not None:
                done(error)

        def finished(result: None, failure: BaseException | None) -> None:
            done(_expected(failure) or {})

        service.flush(flushed)

    def _do_fold(self, content: Content, user: object, done: Done) -> None:
        if content["paused"]:
            self.folding_paused_by.add(user)
        else:
            self.folding_paused_by.discard(user)
            self._service.worked()
        done({})

    # ---- being copied from ----------------------------------------------------------------

    def _do_zones(self, content: Content, user: object, done: Done) -> None:
        """Which zones a member that was lost at configuration `since` may not have."""
        done({"zones": runs_of(self._replica.dirty.changed_since(int(content["since"])))})

    def _do_stamps(self, content: Content, user: object, done: Done) -> None:
        """(first zone, count, stamp) runs from zone `first` on; where the next answer begins."""
        dirty = self._replica.dirty
        first, config_seq = int(content["first"]), int(content["config_seq"])
        stop = min(first + STAMP_ZONES_PER_ANSWER, len(dirty.zones))
        found: list[list[int]] = []
        for zone in range(max(0, first), stop):
            stamp = dirty.stamp(zone, config_seq)
            if found and found[-1][2] == stamp:
                found[-1][1] += 1
            else:
                found.append([zone, 1, stamp])
        next_zone = stop if stop < len(dirty.zones) else None
        done({"stamps": [run for run in found if run[2]], "next": next_zone})

    def _do_layer_regions(self, content: Content, user: object, done: Done) -> None:
        layer_id, parent_id = int(content["layer_id"]), int(content["parent_id"])
        found = self._replica.layer_regions(layer_id, parent_id, int(content["first"]))
        last = sum(found[-1]) if found else None
        done({"regions": found, "next": last})

    def _do_layer_check(self, content: Content, user: object, done: Done) -> None:
        layer_id, parent_id = int(content["layer_id"]), int(content["parent_id"])
        first, count = int(content["first"]), int(content["count"])
        done({"digest": self._replica.layer_check(layer_id, parent_id, first, count)})

    def _do_usage(self, content: Content, user: object, done: Done) -> None:
        """What some regions add to what each layer shows and holds; where to go on."""
        loop = self._service.loop
        deadline = loop.now() + USAGE_SECONDS
        found, region = usage(self._replica, int(content["first"]), lambda: loop.now() > deadline)
        done({"usage": list(found.items()), "next": region})

    # ---- becoming equal -------------------------------------------------------------------

    def _do_begin_sync(self, content: Content, user: object, done: Done) -> None:
        self._service.flushing.wait()
        zones, new = self._replica.begin_sync(
            list(content["layers"]),
            int(content["head_id"]),
            str(content["volume_uuid"]),
            str(content["volume_name"]),
            int(content["size_bytes"]),
            fresh=bool(content["fresh"]),
        )
        done({"zones": runs_of(zones), "new": new})

    def _do_stamp(self, content: Content, user: object, done: Done) -> None:
        """Take over what `stamps` said elsewhere; durable with `end_sync`."""
        stamps = {}
        for first, count, stamp in content["stamps"]:
            stamps.update(dict.fromkeys(range(int(first), int(first) + int(count)), int(stamp)))
        if any(zone < 0 for zone in stamps):
            raise RequestError("a stamp for a zone that the volume does not have")
        count = len(self._replica.dirty.zones)  # the source may be larger than the volume
        self._replica.dirty.raise_stamps({z: stamp for z, stamp in stamps.items() if z < count})
        done({})

    def _do_end_sync(self, content: Content, user: object, done: Done) -> None:
        """Index every dirty zone, a few per turn of the loop, flush, and be readable."""
        service, replica, loop = self._service, self._replica, self._service.loop
        left = replica.dirty.dirty_zones()

        def index() -> None:
            deadline = loop.now() + INDEX_SECONDS
            try:
                while left:
                    replica.index_zone(left.pop())
                    if loop.now() > deadline:
                        loop.post(index)
                        return
            except BlockdError as error:
                done(error)
                return
            service.flush(flushed)

        def flushed(error: BlockdError | None) -> None:
            if error is not None:
                done(error)
            else:
                loop.in_thread(replica.sync_tables, synced)

        def synced(result: None, failure: BaseException | None) -> None:
            problem = _expected(failure)
            try:
                if problem is None:
                    replica.end_sync()
                    service.accepted()
                    service.trusted()
            except BlockdError as error:
                problem = error
            done(problem or {})

        index()

    def _do_trust(self, content: Content, user: object, done: Done) -> None:
        """The record of this epoch calls this replica IN_SYNC."""
        self._service.trusted()
        done({})

    def _do_config(self, content: Content, user: object, done: Done) -> None:
        """Durably know of a member configuration."""
        self._replica.note_config(int(content["config_seq"]))
        done({})


def _expected(failure: BaseException | None) -> BlockdError | None:
    """What ended a thread's work, unless it is a bug: that is raised."""
    if failure is not None and not isinstance(failure, BlockdError):
        raise failure
    return failure


def describe_layer(info: Any) -> Content:
    """A layer as JSON."""
    return {
        "id": info.id,
        "parent": info.parent,
        "name": info.name,
        "created": info.created,
        "labels": dict(info.labels),
        "removed": info.removed,
        "allocated_bytes": info.allocated_bytes,
    }


def runs_of(numbers: Iterable[int]) -> list[list[int]]:
    """[first, count] of each run of ascending numbers."""
    found: list[list[int]] = []
    for number in numbers:
        if found and sum(found[-1]) == number:
            found[-1][1] += 1
        else:
            found.append([number, 1])
    return found
