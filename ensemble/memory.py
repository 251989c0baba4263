"""What a tracked object's past is to its next frame: a fixed bank however long the video is (spec 7.5, 7.6)."""

from __future__ import annotations

import math

import numpy as np

from . import settings
from .config import Sam2Config
from .runner import Device, DeviceArray
from .tensors import Array


def ring_slot(frame_idx: int, recent: int) -> int:
    """Slot of a propagated frame (1, 2, ...) in a bank of one conditioning slot and `recent` others."""
    return 1 + (frame_idx - 1) % recent


def slot_distances(frame_idx: int, slots: int) -> Array:
    """How many frames before frame `frame_idx` (1, 2, ...) each slot of a bank was written.

    Returns:
        [min(frame_idx, slots)] int64, 1 or more; slot 0 is frame 0's.
    """
    distances = np.empty(min(frame_idx, slots), np.int64)
    distances[0] = frame_idx
    for distance in range(1, len(distances)):
        distances[ring_slot(frame_idx - distance, slots - 1)] = distance
    return distances


def temporal_rows(frame_idx: int, num_maps: int) -> Array:
    """What frame `frame_idx` (1, 2, ...) sees in each slot of the map bank.

    Returns:
        [min(frame_idx, num_maps)] int64: row of the temporal table; the conditioning frame has the last row, the frame d
        steps ago has row d - 1.
    """
    rows = slot_distances(frame_idx, num_maps) - 1
    rows[0] = num_maps - 1
    return rows


class MemoryBank:
    """Memory maps and pointers of one object, where its graphs run; frames count from the one that conditioned it.

    Args:
        sam2: sizes.
        device: holds the arrays.
        maps: [C, g, g], the conditioning frame's memory map; its values are representable in bfloat16.
        pointer: [D], the conditioning frame's object pointer.
    """

    def __init__(self, sam2: Sam2Config, device: Device, maps: DeviceArray, pointer: DeviceArray) -> None:
        self.frame_idx = 0
        """Next frame."""
        self._maps = device.zeros(maps_shape(sam2), "bfloat16")
        self._pointers = device.zeros((sam2.num_pointers, sam2.width), "float32")
        self._maps[0], self._pointers[0] = maps, pointer
        self.frame_idx = 1
        """Next frame."""

    @property
    def age(self) -> int:
        """Frames remembered, up to where every slot is in use: banks of one age fill the same slots."""
        return min(self.frame_idx, max(len(self._maps), len(self._pointers)))

    @property
    def maps(self) -> DeviceArray:
        """[M, C, g, g]: the slots in use; M grows to num_maps."""
        return self._maps[: min(self.frame_idx, len(self._maps))]

    @property
    def rows(self) -> Array:
        """[M] int64: temporal row of each map as the next frame sees it."""
        return temporal_rows(self.frame_idx, len(self._maps))

    @property
    def pointers(self) -> DeviceArray:
        """[P, D]: the slots in use; P grows to num_pointers."""
        return self._pointers[: min(self.frame_idx, len(self._pointers))]

    @property
    def pointer_distances(self) -> Array:
        """[P] int64: how many frames before the next one each pointer was made."""
        return slot_distances(self.frame_idx, len(self._pointers))

    def append(self, maps: DeviceArray, pointer: DeviceArray) -> None:
        """Stores the frame just tracked over the oldest recent one; arguments as of the class."""
        self._maps[ring_slot(self.frame_idx, len(self._maps) - 1)] = maps
        self._pointers[ring_slot(self.frame_idx, settings.MAX_RECENT_POINTERS)] = pointer
        self.frame_idx += 1


def maps_shape(sam2: Sam2Config) -> tuple[int, int, int, int]:
    return sam2.num_maps, sam2.memory_width, sam2.grid, sam2.grid


def bank_bytes(sam2: Sam2Config, device: Device) -> int:
    """What the memory of one object takes."""
    return math.prod(maps_shape(sam2)) * device.itemsize("bfloat16") + sam2.num_pointers * sam2.width * device.itemsize("float32")
