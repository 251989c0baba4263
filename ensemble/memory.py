"""Per-object memory of a tracking session: a fixed bank however long the video is (spec 7.5, 7.6)."""

from __future__ import annotations

import numpy as np

from . import settings
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
    """Memory maps and pointers of the objects of one session.

    Args:
        maps: [O, C, g, g] float32, the conditioning frame's memory maps.
        pointers: [O, D] float32, the conditioning frame's object pointers.
        num_maps: maps kept per object.
    """

    def __init__(self, maps: Array, pointers: Array, num_maps: int) -> None:
        self.frame_idx = 1
        """Next frame."""
        self._maps = np.zeros((len(maps), num_maps, *maps.shape[1:]), maps.dtype)
        self._pointers = np.zeros((len(pointers), 1 + settings.MAX_RECENT_POINTERS, pointers.shape[1]), pointers.dtype)
        self._maps[:, 0], self._pointers[:, 0] = maps, pointers

    @property
    def maps(self) -> Array:
        """[O, M, C, g, g]: the slots in use; M grows to num_maps."""
        return self._maps[:, : min(self.frame_idx, self._maps.shape[1])]

    @property
    def rows(self) -> Array:
        """[M] int64: temporal row of each map as the next frame sees it."""
        return temporal_rows(self.frame_idx, self._maps.shape[1])

    @property
    def pointers(self) -> Array:
        """[O, P, D]: the slots in use; P grows to 1 + MAX_RECENT_POINTERS."""
        return self._pointers[:, : min(self.frame_idx, self._pointers.shape[1])]

    @property
    def pointer_distances(self) -> Array:
        """[P] int64: how many frames before the next one each pointer was made."""
        return slot_distances(self.frame_idx, self._pointers.shape[1])

    def append(self, maps: Array, pointers: Array) -> None:
        """Stores the frame just tracked over the oldest recent one.

        Args:
            maps: [O, C, g, g] float32.
            pointers: [O, D] float32.
        """
        self._maps[:, ring_slot(self.frame_idx, self._maps.shape[1] - 1)] = maps
        self._pointers[:, ring_slot(self.frame_idx, settings.MAX_RECENT_POINTERS)] = pointers
        self.frame_idx += 1
