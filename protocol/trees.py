"""The layer tree as members describe it, reduced to what they must agree on.

A removed layer with one child is being folded into it, by each member at its own pace; a removed
layer without a child is being dropped. What is left are the logical layers: those that are not
removed, and removed ones with several children. The logical parent of a layer is the nearest
logical layer below it; what lies in between belongs to the layer itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Tree = list[dict[str, Any]]
"""layers with at least id, parent, name, created, labels and removed; parents before children"""


def logical_tree(layers: Iterable[Mapping[str, Any]], head_id: int) -> Tree:
    """The logical layers of a member, parents first, with their logical parents."""
    by_id = {int(layer["id"]): layer for layer in layers}
    live = {
        layer_id for layer_id, layer in by_id.items() if layer_id == head_id or not layer["removed"]
    }
    needed: dict[
        int, set[int]
    ] = {}  # layer to its children that lead to a layer that is not removed
    for layer_id in live:
        child, parent = layer_id, int(by_id[layer_id]["parent"])
        while parent in by_id:
            children = needed.setdefault(parent, set())
            if child in children:
                break
            children.add(child)
            child, parent = parent, int(by_id[parent]["parent"])
    kept = {layer_id for layer_id in by_id if layer_id in live or len(needed.get(layer_id, ())) > 1}
    found: Tree = []
    for layer_id in sorted(kept):  # ids grow from parent to child
        parent = int(by_id[layer_id]["parent"])
        while parent and parent not in kept:
            parent = int(by_id[parent]["parent"]) if parent in by_id else 0
        found.append({**by_id[layer_id], "id": layer_id, "parent": parent})
    return found
