"""The layer tree as plain values: who is whose parent, which slot is free, what a change yields.

Functions take the layers of a `Metadata` and return new ones; nothing here touches a file.
"""

from __future__ import annotations

from dataclasses import replace

from protocol.errors import ConflictError, NotFoundError, RequestError, StateError
from protocol.units import SNAPSHOTS_MAX
from snapshots.metadata import LayerInfo, Metadata

Layers = tuple[LayerInfo, ...]


def find(layers: Layers, layer_id: int) -> LayerInfo:
    """The layer with this id."""
    for layer in layers:
        if layer.id == layer_id:
            return layer
    raise NotFoundError(f"layer {layer_id} does not exist; list the snapshots and pick one")


def chain(layers: Layers, layer_id: int) -> list[LayerInfo]:
    """The layer and its ancestors, youngest first."""
    by_id = {layer.id: layer for layer in layers}
    found = []
    while layer_id:
        found.append(by_id[layer_id])
        layer_id = by_id[layer_id].parent
    return found


def between(layers: Layers, layer_id: int, parent_id: int) -> list[LayerInfo]:
    """A logical layer: the layer and the removed ones below it, down to but without `parent_id`.

    Youngest first. Members fold removed layers at their own pace; what they hold together is the
    same on all. `parent_id` 0: down to the end.
    """
    find(layers, layer_id)
    found: list[LayerInfo] = []
    for layer in chain(layers, layer_id):
        if layer.id == parent_id:
            return found
        if found and not layer.removed:
            raise StateError(
                f"layer {layer.id} lies between layer {layer_id} and layer {parent_id}; the trees "
                "of these members differ"
            )
        found.append(layer)
    if parent_id:
        raise NotFoundError(f"layer {parent_id} is not below layer {layer_id}")
    return found


def children(layers: Layers, layer_id: int) -> list[LayerInfo]:
    """The layers whose parent this is."""
    return [layer for layer in layers if layer.parent == layer_id]


def removed(layers: Layers) -> list[tuple[LayerInfo, LayerInfo | None]]:
    """The removed layers with at most one child, and that child."""
    found = [layer for layer in layers if layer.removed]
    if not found:
        return []
    below: dict[int, list[LayerInfo]] = {}
    for layer in layers:
        below.setdefault(layer.parent, []).append(layer)
    pairs = [(layer, below.get(layer.id, [])) for layer in found]
    return [(layer, next(iter(its), None)) for layer, its in pairs if len(its) <= 1]


def replaced(layers: Layers, changed: LayerInfo) -> Layers:
    """The layers with one of them changed."""
    return tuple(changed if layer.id == changed.id else layer for layer in layers)


def check_new_name(layers: Layers, name: str, besides: int = 0) -> None:
    """Refuse a snapshot name that another layer (not removed) has."""
    for layer in layers:
        if name and layer.name == name and layer.id != besides and not layer.removed:
            raise ConflictError(f"snapshot {name!r} exists already; choose another name")


def with_new_head(metadata: Metadata, new_head_id: int, parent: int) -> Metadata:
    """A new, empty head on top of `parent`."""
    layers = metadata.layers
    if not 0 < new_head_id < 1 << 32 or any(layer.id == new_head_id for layer in layers):
        raise RequestError(f"new head id {new_head_id} is in use or outside 1 to 2^32 - 1")
    used = {layer.slot for layer in layers}
    slot = next((slot for slot in range(1, SNAPSHOTS_MAX + 2) if slot not in used), 0)
    if slot == 0:
        waiting = sum(layer.removed for layer in layers)
        raise StateError(
            f"the volume has {len(layers) - 1} sealed layers ({waiting} of them deleted snapshots "
            f"still being folded), the limit is {SNAPSHOTS_MAX}; delete a snapshot"
            + (" or wait for the folding" if waiting else "")
        )
    head = LayerInfo(id=new_head_id, slot=slot, parent=parent)
    return replace(metadata, layers=(*layers, head), head_id=new_head_id)


def without(layers: Layers, layer_id: int) -> Layers:
    """The layers without one; its children become its parent's."""
    gone = find(layers, layer_id)
    return tuple(
        replace(layer, parent=gone.parent) if layer.parent == layer_id else layer
        for layer in layers
        if layer.id != layer_id
    )
