"""What every implementation of the store must do; subclass StoreConformance and give a `store`.

Collected only through its subclasses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from blockd.node.objects import Metadata, Mount, Snapshot, SnapshotSpec, Volume, VolumeSpec
from blockd.node.store import Event, Store, Watch, find, modify, modify_status
from protocol.errors import ConflictError, NotFoundError

WATCH_SECONDS = 5.0  # a change is told at once; this only bounds a failing test


def volume(name: str = "data", *, finalizers: tuple[str, ...] = ()) -> Volume:
    return Volume(
        metadata=Metadata(name=name, labels={"owner": "ana"}, finalizers=list(finalizers)),
        spec=VolumeSpec(size_bytes=1 << 30, mount=Mount("/mnt/data")),
    )


def _until(watch: Watch, wanted: Callable[[Event], bool]) -> Event:
    while True:
        event = watch.next(WATCH_SECONDS)
        assert event is not None, "the watch did not tell the change"
        if wanted(event):
            return event


class StoreConformance:
    """The suite; see blockd/node/store.py for the rules."""

    def test_a_created_object_comes_back_with_what_the_store_fills_in(self, store: Store) -> None:
        made = store.create(volume())
        assert made.metadata.uid
        assert made.metadata.created
        assert made.metadata.generation == 1
        assert store.get(Volume, "data") == made
        assert made.spec == volume().spec

    def test_a_name_is_given_once_per_kind(self, store: Store) -> None:
        first = store.create(volume())
        with pytest.raises(ConflictError, match="data exists already"):
            store.create(volume())
        assert store.get(Volume, "data") == first
        snapshot = Snapshot(metadata=Metadata(name="data"), spec=SnapshotSpec("data", "s"))
        assert store.create(snapshot).metadata.uid != first.metadata.uid

    def test_an_absent_object_is_not_found(self, store: Store) -> None:
        for call in (
            lambda: store.get(Volume, "none"),
            lambda: store.delete(Volume, "none"),
            lambda: store.update(volume("none")),
        ):
            with pytest.raises(NotFoundError, match="none"):
                call()
        assert find(store, Volume, "none") is None

    def test_objects_of_a_kind_are_listed_by_name(self, store: Store) -> None:
        for name in ("b", "a", "c"):
            store.create(volume(name))
        store.create(Snapshot(metadata=Metadata(name="a@s"), spec=SnapshotSpec("a", "s")))
        assert [item.metadata.name for item in store.list(Volume)] == ["a", "b", "c"]

    def test_an_update_against_an_old_version_is_refused(self, store: Store) -> None:
        old = store.create(volume())
        new = store.get(Volume, "data")
        new.spec.attached = True
        store.update(new)
        old.spec.replicas = 1
        with pytest.raises(ConflictError, match="changed by someone else"):
            store.update(old)
        old.status.state = "attached"
        with pytest.raises(ConflictError):
            store.update_status(old)
        assert store.get(Volume, "data").spec.replicas == 3

    def test_an_object_made_again_is_not_the_one_that_was_read(self, store: Store) -> None:
        old = store.create(volume())
        store.delete(Volume, "data")
        store.create(volume())
        with pytest.raises(ConflictError):
            store.update(old)

    def test_versions_grow_over_all_objects(self, store: Store) -> None:
        first = store.create(volume("a"))
        second = store.create(volume("b"))
        third = store.update(first)
        versions = [item.metadata.resource_version for item in (first, second, third)]
        assert versions == sorted(set(versions))

    def test_spec_and_status_are_written_apart(self, store: Store) -> None:
        item = store.create(volume())
        item.status.state = "attached"
        item.spec.attached = True
        written = store.update(item)
        assert (written.spec.attached, written.status.state) == (True, "new")
        written.status.state = "attached"
        written.spec.attached = False
        written = store.update_status(written)
        assert (written.spec.attached, written.status.state) == (True, "attached")

    def test_the_generation_grows_with_the_spec_only(self, store: Store) -> None:
        item = store.create(volume())
        item.metadata.labels["tier"] = "fast"
        item = store.update(item)
        item.status.state = "attached"
        item = store.update_status(item)
        assert item.metadata.generation == 1
        item.spec.attached = True
        assert store.update(item).metadata.generation == 2

    def test_what_a_caller_does_to_its_copy_stays_there(self, store: Store) -> None:
        made = store.create(volume())
        made.spec.replicas = 1
        made.metadata.labels["x"] = "y"
        store.get(Volume, "data").spec.replicas = 2
        kept = store.get(Volume, "data")
        assert (kept.spec.replicas, kept.metadata.labels) == (3, {"owner": "ana"})

    def test_a_deleted_object_waits_for_its_finalizers(self, store: Store) -> None:
        store.create(volume(finalizers=("one", "two")))
        store.delete(Volume, "data")
        item = store.get(Volume, "data")
        assert item.metadata.deleted
        store.delete(Volume, "data")
        assert store.get(Volume, "data").metadata.deleted == item.metadata.deleted
        modify(store, Volume, "data", lambda v: v.metadata.finalizers.remove("one"))
        item = store.get(Volume, "data")
        item.metadata.finalizers = []
        store.update(item)
        assert find(store, Volume, "data") is None

    def test_a_watch_tells_what_is_there_then_every_last_state(self, store: Store) -> None:
        store.create(volume("a"))
        watch = store.watch(Volume)
        assert _until(watch, lambda e: True).object.metadata.name == "a"
        store.create(Snapshot(metadata=Metadata(name="a@s"), spec=SnapshotSpec("a", "s")))
        store.create(volume("b"))
        assert _until(watch, lambda e: True).object.metadata.name == "b"
        for state in ("attaching", "attached"):
            modify_status(
                store, Volume, "b", lambda v, state=state: setattr(v.status, "state", state)
            )
        _until(watch, lambda e: e.object.status.state == "attached" and not e.gone)
        store.delete(Volume, "b")
        assert _until(watch, lambda e: e.gone).object.metadata.name == "b"
        watch.close()
        assert watch.next(0) is None

    def test_a_quiet_watch_ends_its_wait_when_closed(self, store: Store) -> None:
        watch = store.watch(Volume)
        results: list[Event | None] = []
        waiter = threading.Thread(target=lambda: results.append(watch.next(60)))
        waiter.start()
        watch.close()
        waiter.join(WATCH_SECONDS)
        assert results == [None]

    def test_writers_at_the_same_time_lose_no_change(self, store: Store) -> None:
        store.create(volume())

        def count() -> None:
            for _ in range(10):
                modify(
                    store,
                    Volume,
                    "data",
                    lambda v: setattr(v.spec, "size_bytes", v.spec.size_bytes + 1),
                )

        writers = [threading.Thread(target=count) for _ in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        item = store.get(Volume, "data")
        assert item.spec.size_bytes == (1 << 30) + 30
        assert item.metadata.generation == 31

    def test_a_change_that_changes_nothing_is_not_written(self, store: Store) -> None:
        made = store.create(volume())
        assert modify_status(store, Volume, "data", lambda v: None) == made
