import pytest
import torch

from ensemble.components import components
from tests import goldens, sam2_oracle

CONFIGS = {"sam2.0": sam2_oracle.config_at(128), "sam2.1": sam2_oracle.config_at(128, sam21=True)}
SAM2 = CONFIGS["sam2.0"].sam2
FRAMES, OBJECTS = 2, 3
OBJECT_FRAME = torch.tensor([1, 0, 1])
CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # float32 summation order on normalised values; seen 1e-6


@pytest.fixture(params=CONFIGS)
def oracle(request):
    return sam2_oracle.Oracle(CONFIGS[request.param])


def memories(frame_idx: int, num_maps: int, num_pointers: int) -> tuple[torch.Tensor, ...]:
    """memory_maps, memory_rows, object_pointers, pointer_distances: the conditioning frame's first, then the latest first."""
    maps = torch.randn(OBJECTS, num_maps, SAM2.memory_width, SAM2.grid, SAM2.grid)
    rows = torch.tensor([SAM2.num_maps - 1, *range(num_maps - 1)]).expand(OBJECTS, -1)
    pointers = torch.randn(OBJECTS, num_pointers, SAM2.width)
    distances = torch.tensor([frame_idx, *range(1, num_pointers)]).expand(OBJECTS, -1)
    return maps, rows, pointers, distances


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
            num_frames=2000,
        )
    return torch.stack(conditioned)


@pytest.mark.parametrize(("frame_idx", "num_maps", "num_pointers"), [(1, 1, 1), (3, 3, 3), (9, 7, 9), (30, 7, 16), (1000, 7, 16)])
def test_memory_attention_equals_sam2(oracle, frame_idx, num_maps, num_pointers):
    frame_embeddings, memory = torch.randn(FRAMES, SAM2.width, SAM2.grid, SAM2.grid), memories(frame_idx, num_maps, num_pointers)
    got = oracle.build("memory_attention")(frame_embeddings, OBJECT_FRAME, *memory)
    torch.testing.assert_close(got, upstream(oracle, frame_embeddings, frame_idx, memory), **CLOSE)


def test_memory_attention_ignores_the_order_of_slots(oracle):
    attention = oracle.build("memory_attention")
    frame_embeddings = torch.randn(FRAMES, SAM2.width, SAM2.grid, SAM2.grid)
    memory = memories(9, 7, 9)
    expected = attention(frame_embeddings, OBJECT_FRAME, *memory)
    maps, pointers = torch.randperm(7), torch.randperm(9)
    got = attention(
        frame_embeddings, OBJECT_FRAME, *(tensor[:, order] for tensor, order in zip(memory, (maps, maps, pointers, pointers), strict=True))
    )
    torch.testing.assert_close(got, expected, **CLOSE)


def test_memory_attention_heeds_the_distance_of_pointers_in_sam21_only(oracle):
    attention, frame_embeddings = oracle.build("memory_attention"), torch.randn(FRAMES, SAM2.width, SAM2.grid, SAM2.grid)
    *memory, distances = memories(20, 7, 16)
    near, far = (attention(frame_embeddings, OBJECT_FRAME, *memory, own) for own in (distances, distances + 1))
    change = (near - far).abs().max()
    assert change > 1e-3 if oracle.config.sam2.pointer_positions else change == 0  # far beyond CLOSE


@pytest.mark.parametrize("version", CONFIGS)
def test_onnx_graph_equals_torch_module_at_every_size(version, tmp_path):
    module, contract = sam2_oracle.Oracle(CONFIGS[version]).build("memory_attention"), components(CONFIGS[version])["memory_attention"]
    sizes = [{"memories": 1, "pointers": 1}, {"objects": 3, "frames": 2, "memories": 4, "pointers": 9}, {"objects": 7, "frames": 5}]
    samples = [contract.sample(seed, **own) for seed, own in enumerate(sizes)]
    sam2_oracle.assert_onnx_equals_torch(module, "memory_attention", tmp_path / "graph.onnx", samples)


@goldens.parametrize_cases(lambda case: "track.mem_conditioned.frame1.slice" in case.expected)
def test_conditioned_frame_1_equals_the_original(case):
    error = sam2_oracle.frame_1(case)[:, ::4, 1::6, 1::6] - torch.from_numpy(case.expected["track.mem_conditioned.frame1.slice"])
    # README: memories are rounded to bfloat16 and attention is sharp, so float32 noise of frame 0 is amplified.
    assert error.abs().max() <= 0.3
    assert error.square().mean().sqrt() <= 2e-2
