"""How much data each snapshot shows, and how much its deletion gives back.

Counted region by region from the maps of all layers, in bounded steps. A block of a snapshot is its
own if every snapshot taken on it, and the volume, have something else in its place; one that is
still seen from there moves into the child when the snapshot is deleted. A deleted snapshot on which
several others stand stays until one is left: its deletion gives nothing back at first, and that of
one of the others may give back more than its own. What a clone has, too, is not given back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from protocol.trees import logical_tree
from protocol.units import BLOCK_BYTES
from snapshots.chain import Layers, between
from snapshots.layer import LayerFile, look_ahead
from snapshots.logical import Logical
from snapshots.masks import EVERY_BLOCK, masks

Usage = dict[int, list[int]]
"""layer id to [bytes of data that one sees there, bytes that its deletion gives back]"""


def usage(
    store: Logical, first_region: int, out_of_time: Callable[[], bool]
) -> tuple[Usage, int | None]:
    """What the regions from `first_region` on add to each layer's usage, and where to go on."""
    files = {info.id: store.layer_file(info.id) for info in store.metadata.layers}
    logical = logical_layers(store.metadata.layers, store.metadata.head_id)
    shared = {layer_id for layer_id, file in files.items() if file.shared}
    kept = {layer.layer_id for layer in logical if shared.intersection(layer.group)}
    found: Usage = {layer.layer_id: [0, 0] for layer in logical}
    nexts = [-1] * len(files)
    region = first_region
    while True:
        look_ahead(list(files.values()), nexts, region)
        region = min(nexts)
        if region >= store.head.region_count:
            return found, None
        ahead = zip(files.items(), nexts, strict=True)
        here = {layer_id: file for (layer_id, file), at in ahead if at == region}
        _count(logical, here, region, kept, found)
        region += 1
        if out_of_time():
            return found, region


@dataclass(frozen=True)
class LogicalLayer:
    """A layer with the removed ones that will be folded into it, youngest first."""

    layer_id: int
    parent_id: int
    group: tuple[int, ...]
    children: tuple[int, ...]


def logical_layers(layers: Layers, head_id: int) -> list[LogicalLayer]:
    """The logical layers, parents first; deleted ones that nothing stands on are left out."""
    parents = {
        layer["id"]: layer["parent"]
        for layer in logical_tree([vars(info) for info in layers], head_id)
    }
    return [
        LogicalLayer(
            layer_id,
            parent_id,
            tuple(info.id for info in between(layers, layer_id, parent_id)),
            tuple(child for child, below in parents.items() if below == layer_id),
        )
        for layer_id, parent_id in parents.items()
    ]


def _count(
    logical: list[LogicalLayer],
    here: dict[int, LayerFile],
    region: int,
    kept: set[int],
    found: Usage,
) -> None:
    """Add one region; `here` are the layers that have anything in it, `kept` shared with clones."""
    contents = {layer_id: masks(file.map_block(region)) for layer_id, file in here.items()}
    present: dict[int, int] = {}
    data: dict[int, int] = {}
    seen: dict[int, int] = {0: 0}
    for layer in logical:
        has, holds = 0, 0
        for member in layer.group:
            its_present, its_data = contents.get(member, (0, 0))
            holds |= its_data & ~has
            has |= its_present
        present[layer.layer_id], data[layer.layer_id] = has, holds
        seen[layer.layer_id] = seen[layer.parent_id] & ~has | holds
    for layer in logical:
        gives = len(layer.children) < 2 and layer.layer_id not in kept
        own = data[layer.layer_id] if gives else 0
        for child in layer.children:
            own &= present[child]
        found[layer.layer_id][0] += _bytes(seen[layer.layer_id])
        found[layer.layer_id][1] += _bytes(own)


def _bytes(mask: int) -> int:
    return (mask & EVERY_BLOCK).bit_count() // 8 * BLOCK_BYTES
