"""The store interface: where objects are kept, whatever keeps them.

The rules are those of a Kubernetes API server, so that one can stand behind the same interface:

- Every write gives the object a new, larger `resource_version`. `update` and `update_status`
  succeed only if the caller saw the newest one; else ConflictError, and the caller reads again.
- `update` writes metadata (labels, finalizers) and spec and leaves the stored status as it is;
  `update_status` writes the status only.
- `delete` removes an object without finalizers; one with finalizers gets the time of deletion
  and goes away with the update that removes the last of them. Deleting twice is fine.
- `watch` first delivers every object there is, then the newest state of whatever changes. It may
  skip states in between, never the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from blockd.node.objects import Object
from protocol.errors import ConflictError, NotFoundError

T = TypeVar("T", bound=Object)

MODIFY_TRIES_MAX = 20  # each lost round means another writer made progress


class Event:
    """One change: the object as it is now, or as it was last if `gone`."""

    __slots__ = ("gone", "object")

    def __init__(self, item: Object, *, gone: bool) -> None:
        self.object = item
        self.gone = gone


class Watch(Protocol):
    """A stream of changes of one kind; close it when done."""

    def next(self, timeout_seconds: float) -> Event | None:
        """The next change, None if there is none within the time or the watch was closed."""

    def close(self) -> None:
        """End the stream."""


class Store(Protocol):
    """Objects by kind and name."""

    def get(self, kind: type[T], name: str) -> T:
        """The object, or NotFoundError."""

    def list(self, kind: type[T]) -> list[T]:
        """All objects of a kind, by name."""

    def watch(self, kind: type[T]) -> Watch:
        """Every object of a kind, then every change."""

    def create(self, item: T) -> T:
        """Keep a new object; ConflictError if the name is taken."""

    def update(self, item: T) -> T:
        """Write metadata and spec against the resource version the caller has seen."""

    def update_status(self, item: T) -> T:
        """Write the status against the resource version the caller has seen."""

    def delete(self, kind: type[T], name: str) -> None:
        """Remove the object, at once or when its last finalizer goes; NotFoundError if absent."""


def find(store: Store, kind: type[T], name: str) -> T | None:
    """The object, None if there is none."""
    try:
        return store.get(kind, name)
    except NotFoundError:
        return None


def modify(store: Store, kind: type[T], name: str, change: Callable[[T], None]) -> T:
    """Apply `change` to the newest metadata and spec, again until nobody came in between."""
    return _again(store, kind, name, change, store.update)


def modify_status(store: Store, kind: type[T], name: str, change: Callable[[T], None]) -> T:
    """Apply `change` to the newest status; nothing is written if it changes nothing."""
    return _again(store, kind, name, change, store.update_status)


def _again(
    store: Store, kind: type[T], name: str, change: Callable[[T], None], write: Callable[[T], T]
) -> T:
    for _ in range(MODIFY_TRIES_MAX):
        before = store.get(kind, name)
        item = store.get(kind, name)
        if item.metadata.resource_version != before.metadata.resource_version:
            continue
        change(item)
        if item == before:
            return item
        try:
            return write(item)
        except ConflictError:
            continue
    raise ConflictError(
        f"{kind.kind} {name} was changed by others {MODIFY_TRIES_MAX} times in a row; try again"
    )
