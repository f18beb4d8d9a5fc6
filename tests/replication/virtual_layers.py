"""The layers of a virtual replica: snapshots, folding, and becoming equal to another member.

Layers are dictionaries from block number to data or None (None: explicitly zero; no key: look in
the parent). A zone is dirty until its owner says that what was written is stable.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from protocol import replica as wire
from protocol.checksum import ABSENT, ZEROS, block_checksums
from protocol.errors import (
    BlockdError,
    ConflictError,
    NotFoundError,
    RequestError,
    StateError,
    StorageError,
)
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, BLOCKS_PER_ZONE

Blocks = dict[int, bytes | None]


@dataclass
class Layer:
    """One layer and its place in the tree."""

    parent: int
    name: str = ""
    removed: bool = False
    blocks: Blocks = field(default_factory=dict)


class VirtualLayers:
    """Base of the virtual replica."""

    size_bytes: int

    def __init__(self) -> None:
        self.layers: dict[int, Layer] = {1: Layer(0)}
        self.head_id = 1
        self.complete = True
        self.hollow = False
        self.paused = False
        self.order: list[int] = []
        self.dirty: dict[int, int] = {}  # zone to the place in the order of its last change
        self.stamps: dict[int, int] = {}
        self.config_seq = 0
        self.copied = 0  # blocks stored by LAYER_WRITE
        self.controls: list[dict[str, Any]] = []
        self.refuse_control: dict[str, BlockdError] = {}
        self.refuse_layer_read: set[tuple[int, int]] = set()

    # ---- zones ----------------------------------------------------------------------------

    def touch(self, numbers: Iterable[int]) -> None:
        """Blocks change."""
        now = len(self.order)
        self.dirty.update({number // BLOCKS_PER_ZONE: now for number in numbers})

    def note_stable(self, covered: int, config_seq: int) -> None:
        """What stands in the order up to `covered` is durable on all members."""
        for zone, changed in list(self.dirty.items()):
            if changed <= covered:
                del self.dirty[zone]
                self.stamps[zone] = max(config_seq, self.stamps.get(zone, 0))

    # ---- control --------------------------------------------------------------------------

    def _control(self, content: dict[str, Any]) -> dict[str, Any]:
        what = content["do"]
        if what in self.refuse_control:
            raise self.refuse_control[what]
        self.controls.append(content)
        method = getattr(self, f"_do_{what}", None)
        if method is None:
            raise RequestError(f"unknown control request {what!r}")
        answer: dict[str, Any] | None = method(content)
        return answer or {}

    def _do_seal(self, content: dict[str, Any]) -> None:
        new_head = content["new_head_id"]
        if new_head in self.layers:
            raise ConflictError(f"layer {new_head} exists")
        self.layers[self.head_id].name = content["name"]
        self.layers[new_head] = Layer(self.head_id)
        self.head_id = new_head

    def _do_remove(self, content: dict[str, Any]) -> None:
        layer = self._layer(content["layer_id"])
        layer.removed, layer.name = True, ""

    def _do_revert(self, content: dict[str, Any]) -> None:
        target = content["layer_id"]
        self._layer(target)
        before, after = set(self._chain(self.head_id)), set(self._chain(target))
        for layer_id in before ^ after:
            self.touch(self.layers[layer_id].blocks)
        del self.layers[self.head_id]
        self.head_id = content["new_head_id"]
        self.layers[self.head_id] = Layer(target)

    def _do_tree(self, content: dict[str, Any]) -> dict[str, Any]:
        layers = [
            {
                "id": layer_id,
                "parent": layer.parent,
                "name": layer.name,
                "created": "",
                "labels": {},
                "removed": layer.removed,
            }
            for layer_id, layer in self.layers.items()
        ]
        return {"layers": layers, "head_id": self.head_id}

    def _do_grow(self, content: dict[str, Any]) -> None:
        self.size_bytes = content["size_bytes"]

    def _do_fold(self, content: dict[str, Any]) -> None:
        self.paused = content["paused"]

    def _do_config(self, content: dict[str, Any]) -> None:
        self.config_seq = max(self.config_seq, content["config_seq"])

    def _do_zones(self, content: dict[str, Any]) -> dict[str, Any]:
        late = [zone for zone, stamp in self.stamps.items() if stamp >= content["since"]]
        return {"zones": [[zone, 1] for zone in sorted({*late, *self.dirty})]}

    def _do_stamps(self, content: dict[str, Any]) -> dict[str, Any]:
        stamps = {**self.stamps, **dict.fromkeys(self.dirty, content["config_seq"])}
        return {"stamps": [[zone, 1, stamp] for zone, stamp in stamps.items()], "next": None}

    def _do_stamp(self, content: dict[str, Any]) -> None:
        for zone, _, stamp in content["stamps"]:
            self.stamps[zone] = max(stamp, self.stamps.get(zone, 0))

    def _do_layer_regions(self, content: dict[str, Any]) -> dict[str, Any]:
        blocks = self.logical(content["layer_id"], content["parent_id"])
        regions = sorted({number // BLOCKS_PER_REGION for number in blocks})
        late = [region for region in regions if region >= content["first"]]
        return {"regions": [[r, 1] for r in late[:1]], "next": late[0] + 1 if late else None}

    def _do_layer_check(self, content: dict[str, Any]) -> dict[str, Any]:
        first = content["first"] * BLOCKS_PER_REGION
        count = content["count"] * BLOCKS_PER_REGION
        values = self.canonical(content["layer_id"], content["parent_id"], first, count)
        return {"digest": blake2b(repr(values).encode()).hexdigest()}

    def _do_begin_sync(self, content: dict[str, Any]) -> dict[str, Any]:
        wanted = {layer["id"]: layer for layer in content["layers"]}
        kept: dict[int, Blocks] = {}
        for layer_id, layer in wanted.items():
            if layer_id in self.layers and not content["fresh"]:
                below = [older for older in self._chain(layer_id)[1:] if older in wanted]
                if (below[0] if below else 0) != layer["parent"]:
                    raise StateError("the trees do not fit")
                for older in self._chain(layer_id):
                    if older in wanted and older != layer_id:
                        break
                    kept[layer_id] = {**self.layers[older].blocks, **kept.get(layer_id, {})}
        self.hollow = self.hollow or content["fresh"]
        self.complete = False
        self.layers = {
            layer_id: Layer(
                layer["parent"], layer["name"], layer["removed"], kept.get(layer_id, {})
            )
            for layer_id, layer in wanted.items()
        }
        self.head_id = content["head_id"]
        new = [layer_id for layer_id in wanted if layer_id not in kept or self.hollow]
        return {"zones": [[zone, 1] for zone in self.dirty], "new": new}

    def _do_end_sync(self, content: dict[str, Any]) -> None:
        self.complete, self.hollow = True, False

    # ---- folding --------------------------------------------------------------------------

    def fold(self, layer_id: int) -> None:
        """What background work does with a removed layer that has one child."""
        layer = self._layer(layer_id)
        assert layer.removed
        (child,) = [other for other in self.layers.values() if other.parent == layer_id]
        self.touch(layer.blocks)
        child.blocks = {**layer.blocks, **child.blocks}
        child.parent = layer.parent
        del self.layers[layer_id]

    def _layer(self, layer_id: int) -> Layer:
        if layer_id not in self.layers:
            raise NotFoundError(f"layer {layer_id} does not exist")
        return self.layers[layer_id]

    def _chain(self, layer_id: int) -> list[int]:
        found = []
        while layer_id:
            found.append(layer_id)
            layer_id = self._layer(layer_id).parent
        return found

    # ---- logical layers -------------------------------------------------------------------

    def logical(self, layer_id: int, parent_id: int) -> Blocks:
        """The blocks of a layer and of the removed ones below it, down to its logical parent."""
        blocks: Blocks = {}
        for older in self._chain(layer_id):
            if older == parent_id:
                return blocks
            if older != layer_id and not self.layers[older].removed:
                raise StateError(f"layer {older} lies between")
            blocks = {**self.layers[older].blocks, **blocks}
        if parent_id:
            raise NotFoundError(f"layer {parent_id} is not below layer {layer_id}")
        return blocks

    def canonical(self, layer_id: int, parent_id: int, first: int, count: int) -> list[bytes | int]:
        """Each block: ABSENT, ZEROS or its data."""
        blocks = self.logical(layer_id, parent_id)
        values: list[bytes | int] = []
        for number in range(first, first + count):
            block = blocks.get(number)
            if block is not None and any(block):
                values.append(block)
            else:
                values.append(ZEROS if number in blocks and parent_id else ABSENT)
        return values

    def copying(self, frame: wire.Frame) -> bytes:
        """LAYER_READ, LAYER_HASH and LAYER_WRITE."""
        operation, flags, _, offset, sequence, argument, payload = frame
        layer_id, parent_id, first, count = wire.place_of(flags, offset, argument)
        if operation == wire.LAYER_WRITE:
            assert payload is not None
            self._layer_write(layer_id, parent_id, first, count, payload)
            return wire.json_frame(wire.ANSWER, sequence, {})
        if (layer_id, first // BLOCKS_PER_REGION) in self.refuse_layer_read:
            raise StorageError("a bad sector", errno=errno.EIO)
        values = self.canonical(layer_id, parent_id, first, count)
        if operation == wire.LAYER_HASH:
            digests = [
                blake2b(value, digest_size=16).digest()
                if isinstance(value, bytes)
                else value.to_bytes(16, "big")
                for value in values
            ]
            return wire.covered_frame(wire.LAYER_DIGESTS, sequence, b"".join(digests))
        entries, data = [], []
        for value in values:
            if isinstance(value, bytes):
                entries += block_checksums(memoryview(value))
                data.append(value)
            else:
                entries.append(value)
        body = struct.pack(f"<{count}I", *entries) + b"".join(data)
        head = wire.map_frame(
            wire.LAYER_DATA, sequence, memoryview(body), count, offset=offset, argument=argument
        )
        return head + body

    def _layer_write(
        self, layer_id: int, parent_id: int, first: int, count: int, payload: memoryview
    ) -> None:
        if self.complete:
            raise StateError("layers are only written during a rebuild")
        self.logical(layer_id, parent_id)  # it must be there
        layer = self._layer(layer_id).blocks
        entries = struct.unpack_from(f"<{count}I", payload)
        position = 4 * count
        self.touch(range(first, first + count))
        self.copied += count
        for index, entry in enumerate(entries):
            number = first + index
            layer.pop(number, None)
            if entry == ZEROS:
                layer[number] = None
            elif entry:
                block = payload[position : position + BLOCK_BYTES]
                if block_checksums(block) != [entry]:
                    raise StorageError("a block does not match its checksum at the source")
                layer[number] = bytes(block)
                position += BLOCK_BYTES
