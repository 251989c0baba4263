from dataclasses import dataclass

import pytest
import torch

from ensemble.components import ABSENT, BOTTOM_RIGHT, NEGATIVE, PAD, POSITIVE, TEXT, TOP_LEFT
from export.models.mask_decoder import is_stable
from tests import goldens, sam2_oracle

CONFIG = sam2_oracle.config_at(128)
FRAMES, EMBEDDINGS, OBJECTS = 2, 4, 8
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 summation order on logits up to 10


@dataclass(frozen=True)
class Layout:
    """A row of the specification's appendix B: our labels, and which of them upstream takes as points, box and text."""

    labels: tuple[int, ...]
    points: int = 0
    box: bool = False
    multimask: bool = False
    mask_prompt: bool = False


LAYOUTS = {
    "framewise_guided": Layout((TOP_LEFT, BOTTOM_RIGHT, TEXT), box=True),
    "framewise_unguided": Layout((TEXT,)),
    "box_prior": Layout((TOP_LEFT, BOTTOM_RIGHT, PAD), points=2),
    "track_text": Layout((PAD, PAD, TEXT), points=1, multimask=True),
    "track_box": Layout((TOP_LEFT, BOTTOM_RIGHT, PAD), points=2, mask_prompt=True),
    "track": Layout((PAD, PAD), points=1, multimask=True),
    "click": Layout((POSITIVE, PAD), points=1, multimask=True),
    "clicks": Layout((POSITIVE, NEGATIVE, PAD), points=2, mask_prompt=True),
}


def decoder_inputs(layout: Layout) -> dict[str, torch.Tensor]:
    """Random inputs of the contract; objects share embeddings and frames."""
    sam2 = CONFIG.sam2
    width, grid = sam2.width, sam2.grid
    draw = torch.Generator().manual_seed(1)
    return {
        "image_embeddings": torch.randn(EMBEDDINGS, width, grid, grid, generator=draw),
        "high_res_1": torch.randn(FRAMES, width // 4, 2 * grid, 2 * grid, generator=draw),
        "high_res_0": torch.randn(FRAMES, width // 8, 4 * grid, 4 * grid, generator=draw),
        "object_embedding": torch.randint(EMBEDDINGS, (OBJECTS,), generator=draw),
        "object_frame": torch.randint(FRAMES, (OBJECTS,), generator=draw),
        "has_memory": torch.arange(OBJECTS) % 2 == 0,
        "multimask": torch.full((OBJECTS,), layout.multimask),
        "prompt_points": torch.rand(OBJECTS, len(layout.labels), 2, generator=draw) * 1.2 * sam2.image_size,
        "prompt_labels": torch.tensor([layout.labels] * OBJECTS),
        "text_embeddings": torch.randn(OBJECTS, width, generator=draw),
        "mask_prompts": torch.randn(OBJECTS, sam2.low_res, sam2.low_res, generator=draw) * 10,
        "has_mask_prompt": torch.full((OBJECTS,), layout.mask_prompt),
    }


def upstream(oracle: sam2_oracle.Oracle, layout: Layout, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What SAM2Base computes for `decoder_inputs`: mask logits, IoU, object score, pointer."""
    base = oracle.sam2
    prompts = base.sam_prompt_encoder
    points, labels = inputs["prompt_points"], inputs["prompt_labels"]
    prompts.points = (points[:, : layout.points], labels[:, : layout.points]) if layout.points else None
    prompts.boxes = points[:, :2].flatten(1) if layout.box else None
    prompts.text = inputs["text_embeddings"] if TEXT in layout.labels else None
    image = inputs["image_embeddings"][inputs["object_embedding"]]
    image = torch.where(inputs["has_memory"][:, None, None, None], image, image + base.no_mem_embed.reshape(1, -1, 1, 1))
    high_res = [inputs[name][inputs["object_frame"]] for name in ("high_res_0", "high_res_1")]
    mask_prompt = inputs["mask_prompts"][:, None] if layout.mask_prompt else None
    _, _, iou, mask, _, pointer, score = base._forward_sam_heads(image, None, mask_prompt, high_res, layout.multimask)
    return [mask[:, 0], iou.amax(1), score[:, 0], pointer]


def assert_same_decode(got, expected):
    mask, iou, score, pointer = got
    torch.testing.assert_close(score, expected[2], **CLOSE)
    torch.testing.assert_close(sam2_oracle.gated(mask, score), expected[0], **CLOSE)
    torch.testing.assert_close(iou, expected[1], **CLOSE)
    torch.testing.assert_close(pointer, expected[3], **CLOSE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_mask_decoder_equals_sam2(name):
    layout, oracle = LAYOUTS[name], sam2_oracle.Oracle(CONFIG)
    inputs = decoder_inputs(layout)
    got = oracle.build("mask_decoder")(*inputs.values())
    assert 0 < (got[2] > 0).sum() < OBJECTS  # pointers of objects that are there and of some that are not
    assert_same_decode(got, upstream(oracle, layout, inputs))


def test_mask_decoder_replaces_single_masks_that_are_unstable():
    layout, oracle = LAYOUTS["framewise_guided"], sam2_oracle.Oracle(CONFIG)
    for mlp in oracle.sam2.sam_mask_decoder.output_hypernetworks_mlps:
        for parameter in mlp.layers[-1].parameters():
            parameter.mul_(8)  # sharp enough that some of the masks are stable
    decoder, inputs = oracle.build("mask_decoder"), decoder_inputs(layout)
    got = decoder(*inputs.values())
    best = decoder(*{**inputs, "multimask": torch.ones(OBJECTS, dtype=torch.bool)}.values())
    replaced = (got[0] == best[0]).flatten(1).all(1)
    assert 0 < replaced.sum() < OBJECTS
    assert_same_decode(got, upstream(oracle, layout, inputs))


def test_is_stable_when_no_pixel_is_near_or_above_the_threshold():
    logits = torch.tensor([-1.0, -0.04, 1.0])[:, None, None].expand(-1, 2, 2)
    assert is_stable(logits).tolist() == [True, False, True]


def test_mask_decoder_ignores_absent_slots_and_neighbours_in_a_batch_of_all_layouts():
    decoder = sam2_oracle.Oracle(CONFIG).build("mask_decoder")
    alone, batch = [], []
    for layout in LAYOUTS.values():
        inputs = decoder_inputs(layout)
        alone.append(decoder(*inputs.values()))
        points, labels = torch.rand(OBJECTS, 5, 2), torch.full((OBJECTS, 5), ABSENT)
        slots = torch.randperm(5)[: len(layout.labels)].sort().values
        points[:, slots], labels[:, slots] = inputs["prompt_points"], inputs["prompt_labels"]
        batch.append({**inputs, "prompt_points": points, "prompt_labels": labels})
    shared = ("image_embeddings", "high_res_1", "high_res_0")
    together = {name: batch[0][name] if name in shared else torch.cat([inputs[name] for inputs in batch]) for name in batch[0]}
    for got, expected in zip(decoder(*together.values()), map(torch.cat, zip(*alone, strict=True)), strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


def assert_equals_golden(got, expected):
    """Goldens' README: 2e-3 absolute; the whole masks are stored as fp16, which adds half an ulp."""
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), atol=2e-3, rtol=2**-11)


@goldens.parametrize_cases(lambda case: "frame.low_res.first" in case.expected)
def test_framewise_masks_equal_the_original(case):
    labels, image_size = LAYOUTS["framewise_guided"].labels, goldens.checkpoint(case.pack).config.sam2.image_size
    # [SEG] embeddings are refined only where no [BOX] chose the boxes (spec 5.3).
    texts = torch.from_numpy(case.expected["seg.emb" if "box.emb" in case.expected else "sel.refined"])
    for n, text in enumerate(texts):
        boxes = torch.from_numpy(case.expected[f"sel.after.tok{n}"]).reshape(-1, 2, 2) * image_size
        points = torch.cat([boxes, torch.zeros(len(boxes), 1, 2)], 1)
        mask = sam2_oracle.decode_golden(case, 0, labels, points, text.expand(len(boxes), -1))[0].amax(0)
        assert_equals_golden(mask, case.expected["frame.low_res.first"][n])
        assert_equals_golden(mask[1::4, 1::4], case.expected["frame.low_res.f32_stride4"][0, n])


@goldens.parametrize_cases(lambda case: "track.init.obj0.text.low_res" in case.expected)
def test_masks_and_pointers_of_the_conditioning_frame_equal_the_original(case):
    for step, (mask, pointer) in sam2_oracle.conditioning_steps(case).items():
        assert_equals_golden(mask[0], case.expected[step + ".low_res"])
        assert_equals_golden(pointer[0], case.expected[step + ".obj_ptr"])


@goldens.parametrize_cases(lambda case: case.name == "vid10_track_text_then_boxes")
def test_masks_and_pointers_of_a_tracked_frame_equal_the_original(case):
    conditioned = sam2_oracle.frame_1(case)
    mask, _, score, pointer = sam2_oracle.decode_golden(case, 1, LAYOUTS["track"].labels, multimask=True, conditioned=conditioned)
    error = sam2_oracle.gated(mask, score)[:, 1::4, 1::4] - torch.from_numpy(case.expected["track.low_res.f32_stride4"][1])
    assert error.abs().max() <= 0.3  # README: memory attention amplifies the noise of frame 0
    assert error.square().mean().sqrt() <= 2e-2
    torch.testing.assert_close(pointer, torch.from_numpy(case.expected["track.obj_ptr"][1]), atol=1e-2, rtol=0)
