import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from ensemble import masks


@pytest.mark.parametrize(("height", "width"), [(480, 854), (64, 64), (33, 17), (8, 301), (1, 1)])
def test_resize_equals_torch_up_and_down(height, width):
    maps = np.random.default_rng(0).standard_normal((3, 64, 64)).astype(np.float32) * 10
    expected = torch.nn.functional.interpolate(torch.from_numpy(maps)[None], (height, width), mode="bilinear", align_corners=False)[0]
    # OpenCV rounds source positions differently in the last bits of float32; logits of about 10 move by this much.
    np.testing.assert_allclose(masks.resize(maps, height, width), expected.numpy(), atol=2e-3)


def test_resize_of_no_maps_has_the_size_asked_for():
    assert masks.resize(np.zeros((0, 64, 64), np.float32), 30, 40).shape == (0, 30, 40)


def test_binary_masks_hold_what_is_above_zero_after_resizing():
    logits = np.full((1, 4, 4), -1, np.float32)
    logits[0, :, 2:] = 1
    assert masks.binary_masks(logits, 4, 4)[0, 0].tolist() == [False, False, True, True]
    # Half-pixel centres: at twice the width the boundary stays in the middle.
    assert masks.binary_masks(logits, 8, 8)[0, 0].tolist() == [False] * 4 + [True] * 4
    assert not masks.binary_masks(np.zeros((1, 4, 4), np.float32), 8, 8).any()


def test_prior_masks_binarise_at_the_frame_size_first_and_again_at_half():
    logits = np.random.default_rng(0).standard_normal((2, 16, 16)).astype(np.float32)
    logits[:, ::4] *= 100  # resized directly, such peaks would spread
    frame = torch.from_numpy(masks.binary_masks(logits, 40, 30)).float()[None]
    expected = torch.nn.functional.interpolate(frame, (24, 24), mode="bilinear", align_corners=False)[0]
    clear = abs(expected.numpy() - 0.5) > 1e-3
    got = masks.prior_masks(logits, 40, 30, 24)
    np.testing.assert_array_equal(got[clear], expected.numpy()[clear] > 0.5)
    assert (got != masks.binary_masks(logits, 24, 24)).any()


def responded(chosen, scores=None, mask_format="rle"):
    """The response to logits that are positive where `chosen` is, at the frame's size."""
    scores = np.ones(len(chosen), np.float32) if scores is None else np.float32(scores)
    logits = np.where(chosen, np.float32(1), np.float32(-1))
    return masks.respond(logits, {"predicted_iou": scores / 2, "object_scores": scores}, chosen.shape[1:], mask_format)


@pytest.fixture
def chosen():
    """[4, 37, 23] bool: noise, empty, full, and a block; neither side is a multiple of 8."""
    chosen = np.random.default_rng(0).random((4, 37, 23)) < 0.3
    chosen[1], chosen[2], chosen[3] = False, True, False
    chosen[3, 10:20, 5:9] = True
    return chosen


def test_rle_gives_the_masks_back_through_pycocotools(chosen):
    response = responded(chosen)
    decoded = [coco.decode({"size": [37, 23], "counts": counts}) for counts in response["mask_rle"]]
    np.testing.assert_array_equal(np.stack(decoded), chosen)
    assert response["mask_rle"].dtype == object
    assert all(isinstance(counts, bytes) for counts in response["mask_rle"])


def test_bits_give_the_masks_back(chosen):
    response = responded(chosen, mask_format="bits")
    assert response["mask_bits"].shape == (4, (37 * 23 + 7) // 8)
    np.testing.assert_array_equal(np.unpackbits(response["mask_bits"], axis=1, count=37 * 23).reshape(4, 37, 23), chosen)


def test_logits_are_handed_through_at_their_own_size():
    logits = np.random.default_rng(0).standard_normal((2, 16, 16)).astype(np.float32)
    ones = np.ones(2, np.float32)
    response = masks.respond(logits, {"predicted_iou": ones, "object_scores": ones}, (37, 23), "logits")
    np.testing.assert_array_equal(response["mask_logits"], logits)
    np.testing.assert_array_equal(response["mask_areas"], masks.binary_masks(logits, 37, 23).sum((1, 2)))


@pytest.mark.parametrize("mask_format", masks.MASK_FORMATS)
def test_only_the_format_that_was_asked_for_has_masks(chosen, mask_format):
    response = responded(chosen, mask_format=mask_format)
    lengths = {name: len(response[f"mask_{name}"]) for name in masks.MASK_FORMATS}
    assert lengths == {name: 4 if name == mask_format else 0 for name in masks.MASK_FORMATS}


def test_boxes_and_areas_are_those_of_the_masks(chosen):
    response = responded(chosen)
    assert response["mask_areas"].tolist() == chosen.sum((1, 2)).tolist()
    assert response["mask_boxes"][1:].tolist() == [[0, 0, 0, 0], [0, 0, 23, 37], [5, 10, 9, 20]]
    x1, y1, x2, y2 = response["mask_boxes"][0]
    assert chosen[0, y1:y2, x1:x2].sum() == chosen[0].sum()
    assert all(line.any() for line in (chosen[0, y1], chosen[0, y2 - 1], chosen[0, :, x1], chosen[0, :, x2 - 1]))


def test_bits_run_row_by_row_with_the_high_bit_first():
    chosen = np.zeros((1, 2, 5), bool)
    chosen[0, 0, 0] = chosen[0, 1, 1] = True
    assert responded(chosen, mask_format="bits")["mask_bits"].tolist() == [[0b10000010, 0]]


def test_object_is_visible_when_its_mask_is_not_empty_and_its_score_is_positive(chosen):
    assert responded(chosen, [1, 1, 0, -1])["visible"].tolist() == [True, False, False, False]
    assert responded(chosen, [0.1, 3, 0.1, 5])["visible"].tolist() == [True, False, True, True]


def test_response_hands_scores_through(chosen):
    response = responded(chosen, [1, 2, 3, 4])
    assert response["object_scores"].tolist() == [1, 2, 3, 4]
    assert response["predicted_iou"].tolist() == [0.5, 1, 1.5, 2]


@pytest.mark.parametrize("mask_format", masks.MASK_FORMATS)
def test_response_without_objects_has_empty_tensors(mask_format):
    response = responded(np.zeros((0, 37, 23), bool), mask_format=mask_format)
    assert {len(array) for array in response.values()} == {0}
