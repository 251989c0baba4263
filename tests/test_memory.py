import numpy as np
import pytest

from ensemble import settings
from ensemble.config import FULL
from ensemble.memory import MemoryBank, ring_slot, slot_distances, temporal_rows

NUM_MAPS, NUM_POINTERS = FULL.sam2.num_maps, FULL.sam2.num_pointers


def visible_maps(frame_idx):
    """Spec 7.5, from the definition: {frame: temporal row} of what frame `frame_idx` attends to."""
    recent = {frame_idx - ago: ago - 1 for ago in range(1, NUM_MAPS) if frame_idx - ago >= 1}
    return {0: NUM_MAPS - 1, **recent}


def visible_pointers(frame_idx):
    """Spec 7.5: {frame: frames ago} of frame 0 and t-1, t-2, ... as far as 16 pointers reach."""
    return {frame: frame_idx - frame for frame in (0, *range(max(1, frame_idx - settings.MAX_RECENT_POINTERS), frame_idx))}


def test_sizes_are_those_of_the_specification():
    assert (NUM_MAPS, NUM_POINTERS, settings.MAX_RECENT_POINTERS) == (7, 16, 15)


@pytest.mark.parametrize("num_maps", [2, 7])
def test_ring_never_overwrites_the_conditioning_slot_and_keeps_the_latest_frames(num_maps):
    recent = num_maps - 1
    slots = [0] + [None] * recent  # slot -> frame it holds
    for frame_idx in range(1, 1001):
        slots[ring_slot(frame_idx, recent)] = frame_idx
        assert slots[0] == 0
        assert {frame for frame in slots[1:] if frame} == set(range(max(1, frame_idx - recent + 1), frame_idx + 1))


def test_temporal_rows_equal_a_simulation_that_keeps_every_frame():
    slots = {0: 0}
    for frame_idx in range(1, 1001):
        rows = temporal_rows(frame_idx, NUM_MAPS)
        assert {slots[slot]: row for slot, row in enumerate(rows)} == visible_maps(frame_idx)
        slots[ring_slot(frame_idx, NUM_MAPS - 1)] = frame_idx


@pytest.mark.parametrize("slots_in_all", [2, NUM_MAPS, NUM_POINTERS])
def test_slot_distances_equal_a_simulation_that_keeps_every_frame(slots_in_all):
    slots = {0: 0}
    for frame_idx in range(1, 1001):
        distances = slot_distances(frame_idx, slots_in_all)
        assert distances.dtype == np.int64
        assert distances.tolist() == [frame_idx - slots[slot] for slot in range(min(frame_idx, slots_in_all))]
        slots[ring_slot(frame_idx, slots_in_all - 1)] = frame_idx


def frame_memory(frame_idx, num_objects=2):
    """Maps [O, 3, 2, 2] and pointers [O, 5] that tell their frame and object."""
    value = np.float32(frame_idx) + np.arange(num_objects, dtype=np.float32) / 10
    return np.broadcast_to(value[:, None, None, None], (num_objects, 3, 2, 2)).copy(), np.broadcast_to(
        -value[:, None], (num_objects, 5)
    ).copy()


def test_bank_holds_the_conditioning_frame_and_the_latest_frames_of_every_object():
    bank = MemoryBank(*frame_memory(0), NUM_MAPS)
    for frame_idx in range(1, 1001):
        assert bank.frame_idx == frame_idx
        assert bank.maps.shape[1] == len(bank.rows) == len(visible_maps(frame_idx))
        assert bank.pointers.shape[1] == len(visible_pointers(frame_idx))
        for index in range(2):
            own = bank.maps[index, :, 0, 0, 0] - np.float32(index / 10)
            assert dict(zip(own.round(3).tolist(), bank.rows.tolist(), strict=True)) == visible_maps(frame_idx)
            own = -bank.pointers[index, :, 0] - np.float32(index / 10)
            assert dict(zip(own.round(3).tolist(), bank.pointer_distances.tolist(), strict=True)) == visible_pointers(frame_idx)
        bank.append(*frame_memory(frame_idx))


def test_bank_stays_in_the_memory_it_started_with():
    bank = MemoryBank(*frame_memory(0), NUM_MAPS)
    maps, pointers = bank.maps, bank.pointers
    for frame_idx in range(1, 100):
        bank.append(*frame_memory(frame_idx))
    assert np.shares_memory(maps, bank.maps)
    assert np.shares_memory(pointers, bank.pointers)
    assert bank.maps.shape == (2, NUM_MAPS, 3, 2, 2)
    assert bank.pointers.shape == (2, NUM_POINTERS, 5)


def test_bank_copies_what_it_is_given():
    maps, pointers = frame_memory(0)
    bank = MemoryBank(maps, pointers, NUM_MAPS)
    later = frame_memory(1)
    bank.append(*later)
    for array in (maps, pointers, *later):
        array[:] = 99
    assert bank.maps.max() < 2
    assert bank.pointers.max() < 2
