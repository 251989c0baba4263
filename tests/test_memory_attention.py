import pytest
import torch

from tests import goldens, sam2_oracle

CONFIG = sam2_oracle.config_at(128)
SAM2 = CONFIG.sam2
FRAMES, OBJECTS = 2, 3
OBJECT_FRAME = torch.tensor([1, 0, 1])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 summation order on normalised values


def memories(num_maps: int, num_pointers: int) -> tuple[torch.Tensor, ...]:
    """memory_maps, memory_rows, object_pointers, pointer_present: the conditioning frame's first, then the latest first."""
    maps = torch.randn(OBJECTS, num_maps, SAM2.memory_width, SAM2.grid, SAM2.grid)
    rows = torch.tensor([SAM2.num_maps - 1, *range(num_maps - 1)]).expand(OBJECTS, -1)
    pointers = torch.randn(OBJECTS, num_pointers, SAM2.width)
    return maps, rows, pointers, torch.ones(OBJECTS, num_pointers, dtype=torch.bool)


def upstream(oracle, frame_embeddings: torch.Tensor, frame_idx: int, memory: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """SAM2Base at `frame_idx` with the memories of frame 0 and of the frames before it, one object at a time."""
    base, (maps, _, pointers, _) = oracle.sam2, memory
    frames = frame_embeddings[OBJECT_FRAME]
    encode = base.image_encoder.neck.position_encoding
    conditioned = []
    for index in range(OBJECTS):
        ages = [frame_idx, *range(1, frame_idx)]  # frame 0, then the latest first
        past = {
            frame_idx - age: {
                "maskmem_features": maps[index : index + 1, slot] if slot < maps.shape[1] else None,
                "maskmem_pos_enc": [base.memory_encoder.position_encoding(maps[:1, 0])],
                "obj_ptr": pointers[index : index + 1, slot] if slot < pointers.shape[1] else None,
            }
            for slot, age in enumerate(ages)
        }
        conditioned += base._prepare_memory_conditioned_features(
            frame_idx=frame_idx,
            is_init_cond_frame=False,
            current_vision_feats=[sam2_oracle.flat(frames[index : index + 1])],
            current_vision_pos_embeds=[sam2_oracle.flat(encode(frames[:1]))],
            feat_sizes=[(SAM2.grid, SAM2.grid)],
            output_dict={"cond_frame_outputs": {0: past.pop(0)}, "non_cond_frame_outputs": past},
            num_frames=64,
        )
    return torch.stack(conditioned)


@pytest.mark.parametrize(("frame_idx", "num_maps", "num_pointers"), [(1, 1, 1), (3, 3, 3), (9, 7, 9), (30, 7, 16)])
def test_memory_attention_equals_sam2(frame_idx, num_maps, num_pointers):
    oracle = sam2_oracle.Oracle(CONFIG)
    frame_embeddings, memory = torch.randn(FRAMES, SAM2.width, SAM2.grid, SAM2.grid), memories(num_maps, num_pointers)
    got = oracle.build("memory_attention")(frame_embeddings, OBJECT_FRAME, *memory)
    torch.testing.assert_close(got, upstream(oracle, frame_embeddings, frame_idx, memory), **CLOSE)


def test_memory_attention_ignores_the_order_of_slots_and_those_that_are_absent():
    attention = sam2_oracle.Oracle(CONFIG).build("memory_attention")
    frame_embeddings = torch.randn(FRAMES, SAM2.width, SAM2.grid, SAM2.grid)
    maps, rows, pointers, present = memories(3, 5)
    expected = attention(frame_embeddings, OBJECT_FRAME, maps, rows, pointers, present)

    bank_maps, bank_rows, bank_pointers, bank_present = memories(7, 16)
    bank_rows, bank_present = torch.full_like(bank_rows, -1), torch.zeros_like(bank_present)
    for index in range(OBJECTS):  # each object has its memories in other slots
        map_slots, pointer_slots = torch.randperm(7)[:3], torch.randperm(16)[:5]
        bank_maps[index, map_slots], bank_rows[index, map_slots] = maps[index], rows[index]
        bank_pointers[index, pointer_slots], bank_present[index, pointer_slots] = pointers[index], True
    got = attention(frame_embeddings, OBJECT_FRAME, bank_maps, bank_rows, bank_pointers, bank_present)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_memory_attention_is_finite_and_leaves_others_alone_when_an_object_has_no_memory():
    attention = sam2_oracle.Oracle(CONFIG).build("memory_attention")
    frame_embeddings = torch.randn(FRAMES, SAM2.width, SAM2.grid, SAM2.grid)
    maps, rows, pointers, present = memories(2, 2)
    expected = attention(frame_embeddings, OBJECT_FRAME, maps, rows, pointers, present)
    without = torch.tensor([True, False, False])[:, None]
    got = attention(frame_embeddings, OBJECT_FRAME, maps, rows.masked_fill(without, -1), pointers, present & ~without)
    assert got.isfinite().all()
    torch.testing.assert_close(got[1:], expected[1:], **CLOSE)


@goldens.parametrize_cases(lambda case: "track.mem_conditioned.frame1.slice" in case.expected)
def test_conditioned_frame_1_equals_the_original(case):
    error = sam2_oracle.frame_1(case)[:, ::4, 1::6, 1::6] - torch.from_numpy(case.expected["track.mem_conditioned.frame1.slice"])
    # README: memories are rounded to bfloat16 and attention is sharp, so float32 noise of frame 0 is amplified.
    assert error.abs().max() <= 0.3
    assert error.square().mean().sqrt() <= 2e-2
