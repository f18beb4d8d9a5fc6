"""The tree of a replica that comes back, made to fit the tree of the members that went on.

Called by `Copying.begin_sync`. While it was away snapshots were made, deleted and folded, the
volume was reverted. `wanted` are the logical layers of the source: those that are not removed, and
removed ones with several children. The result has all of them, with the files it has already, and
keeps layers the source does not know as removed ones where they can spare a copy:

- what lies below a wanted layer here was folded into it there, and will be here;
- the old head goes below the new one if both have the same parent: most often the one was sealed,
  deleted and folded into the other.

Where that guess is wrong, the volume was reverted meanwhile, and the zones in which the two differ
count as changed on every member; the content is compared there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from protocol.errors import StateError
from protocol.units import SNAPSHOTS_MAX
from snapshots.chain import Layers, chain
from snapshots.metadata import LayerInfo, Metadata


@dataclass(frozen=True)
class Merged:
    """A tree, and what became of the layers of before."""

    metadata: Metadata
    made: tuple[int, ...]  # ids of layers that are new and empty
    dropped: tuple[LayerInfo, ...]


def merge(own: Metadata, wanted: Layers, head_id: int) -> Merged:
    """The tree for the members' `wanted` layers; StateError if it cannot be made from its own."""
    by_id = {layer.id: layer for layer in own.layers}
    names = {layer.id: layer for layer in wanted}
    kept: dict[int, LayerInfo] = {}
    made: list[int] = []
    for layer in wanted:
        if layer.id not in by_id:
            made.append(layer.id)
            kept[layer.id] = replace(layer, slot=0)
            continue
        group = _group(own.layers, by_id[layer.id], names)
        if group[-1].parent != layer.parent:
            raise StateError(
                f"layer {layer.id} stands on layer {group[-1].parent} here and on {layer.parent} "
                "elsewhere; the replica must be filled anew"
            )
        for mine in group[1:]:
            kept[mine.id] = replace(mine, name="", removed=True)
        mine = by_id[layer.id]
        kept[layer.id] = replace(layer, slot=mine.slot, parent=mine.parent, origin=mine.origin)
    head = by_id[own.head_id]
    if head.id not in kept and head_id in made:
        group = _group(own.layers, head, names)
        if group[-1].parent == names[head_id].parent:
            for mine in group:
                kept[mine.id] = replace(mine, name="", removed=True)
            kept[head_id] = replace(kept[head_id], parent=head.id)
    layers = _with_slots(tuple(kept.values()))
    dropped = tuple(layer for layer in own.layers if layer.id not in kept)
    metadata = replace(own, layers=layers, head_id=head_id)
    return Merged(metadata, tuple(made), dropped)


def _group(layers: Layers, layer: LayerInfo, names: dict[int, LayerInfo]) -> list[LayerInfo]:
    """The layer and those below it, down to the first other one that the source knows."""
    found = [layer]
    for older in chain(layers, layer.id)[1:]:
        if older.id in names:
            break
        found.append(older)
    return found


def _with_slots(layers: Layers) -> Layers:
    """Give a slot to every layer that has none."""
    if len(layers) > SNAPSHOTS_MAX + 1:
        raise StateError(
            f"{len(layers)} layers, with those still to be folded, do not fit into "
            f"{SNAPSHOTS_MAX + 1} slots"
        )
    used = {layer.slot for layer in layers}
    free = iter(slot for slot in range(1, SNAPSHOTS_MAX + 2) if slot not in used)
    return tuple(layer if layer.slot else replace(layer, slot=next(free)) for layer in layers)
