import numpy as np
import pytest

from ensemble import settings
from ensemble.config import FULL, TINY
from ensemble.memory import MemoryBank, bank_bytes, ring_slot, slot_distances, temporal_rows
from ensemble.runner import Host
from export.runners import TorchDevice

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


def frame_memory(frame_idx):
    """A map [C, g, g] and a pointer [D] that tell their frame; bfloat16 holds these numbers up to 256."""
    maps = np.full((TINY.sam2.memory_width, TINY.sam2.grid, TINY.sam2.grid), frame_idx % 256, np.float32)
    return maps, np.full(TINY.sam2.width, -frame_idx, np.float32)


DEVICES = {"host": Host(), "torch": TorchDevice()}


@pytest.fixture(params=DEVICES)
def device(request):
    return DEVICES[request.param]


def new_bank(device):
    return MemoryBank(TINY.sam2, device, *map(device.put, frame_memory(0)))


def test_bank_holds_the_conditioning_frame_and_the_latest_frames(device):
    bank = new_bank(device)
    for frame_idx in range(1, 1001):
        assert bank.frame_idx == frame_idx
        held = device.host(bank.maps)[:, 0, 0, 0].tolist()
        expected = {frame % 256: row for frame, row in visible_maps(frame_idx).items()}
        assert dict(zip(held, bank.rows.tolist(), strict=True)) == expected
        distances = bank.pointer_distances
        held = -device.host(bank.pointers)[:, 0]
        assert dict(zip(held.tolist(), distances.tolist(), strict=True)) == visible_pointers(frame_idx)
        bank.append(*map(device.put, frame_memory(frame_idx)))


def test_bank_stays_in_the_memory_it_started_with(device):
    bank = new_bank(device)
    storage = bank._maps, bank._pointers
    for frame_idx in range(1, 100):
        bank.append(*map(device.put, frame_memory(frame_idx)))
    assert bank._maps is storage[0]
    assert bank._pointers is storage[1]
    assert sum(int(np.prod(array.shape)) * array.itemsize for array in storage) == bank_bytes(TINY.sam2, device)


def test_bank_copies_what_it_is_given(device):
    maps, pointer = map(device.put, frame_memory(0))
    bank = MemoryBank(TINY.sam2, device, maps, pointer)
    later = [device.put(array) for array in frame_memory(1)]
    bank.append(*later)
    for array in (maps, pointer, *later):
        array[:] = 99
    assert device.host(bank.maps).max() < 2
    assert device.host(bank.pointers).max() < 2


def test_memory_of_an_object_at_full_size_is_what_the_limit_counts_with():
    maps = 7 * 64 * 64 * 64
    assert bank_bytes(FULL.sam2, TorchDevice()) == 2 * maps + 4 * 16 * 256  # bfloat16, which holds every value
    assert bank_bytes(FULL.sam2, Host()) == 4 * maps + 4 * 16 * 256
