"""Putting good blocks of another member in place of damaged ones.

A block is damaged when its data does not match its map entry, whichever of the two was hit. Only
such blocks are touched, in the layer that holds them, so nothing that was written meanwhile is
lost. The caller holds back writes to blocks of the live volume. If the process dies in between, the
block is damaged still or mended.
"""

from __future__ import annotations

from array import array

from protocol.checksum import ZEROS, block_checksum
from protocol.errors import StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, BLOCKS_PER_ZONE
from snapshots.copying import Copying
from snapshots.layer import LayerFile, entry_number
from snapshots.masks import SLOT_RUNS


class Mending(Copying):
    """See the module text."""

    def mend(self, layer_id: int, first: int, entries: memoryview, data: memoryview) -> int:
        """Compare blocks of the live volume (0) or of a snapshot with good ones; how many were bad.

        `entries` are u32 and `data` is dense, as `read_into` gives them; the caller has checked
        that they match.
        """
        self.check_open()
        self._check_readable()
        mended = position = 0
        for number, entry in enumerate(entries):
            good = data[position : position + BLOCK_BYTES] if entry > ZEROS else None
            position += BLOCK_BYTES if good is not None else 0
            mended += self._mend_block(layer_id, first + number, entry, good)
        return mended

    def _mend_block(self, layer_id: int, block: int, entry: int, good: memoryview | None) -> bool:
        slots = self._slots_of(block, 1, layer_id, 0)
        if not slots or not slots[0]:
            return False  # it reads as zeros here, which cannot be damaged
        layer = self._handle(slots[0])
        if self._is_sound(layer, block):
            return False
        region = block // BLOCKS_PER_REGION
        zone = block // BLOCKS_PER_ZONE
        self.mark_dirty([zone])
        layer.make_writable(region)
        if good is not None:
            layer.write(block, good)
        elif layer is self.head and self.layered:
            self.marks.make_writable(zone)
            self.marks.mark(block, 1, durable=False)
        layer.store(block, memoryview(array("I", [entry])))
        if good is None:
            layer.punch(block, 1)
            if self._index[block] == layer.slot:
                self._index[block : block + 1] = SLOT_RUNS[0][:1]
        self.changed(layer)
        self.layers_changed()
        if layer is not self.head:
            self.content_replaced()  # folding may have stopped at it
        return True

    @staticmethod
    def _is_sound(layer: LayerFile, block: int) -> bool:
        content = memoryview(bytearray(BLOCK_BYTES))
        try:
            layer.read(block, 1, content)
        except StorageError:
            return False
        return block_checksum(content) == layer.map[entry_number(block)]
