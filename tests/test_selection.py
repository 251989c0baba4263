import warnings

import numpy as np
import pytest
import torch

from ensemble import masks, selection, settings
from ensemble.components import BOTTOM_RIGHT, PAD, TOP_LEFT
from tests import goldens, sam2_oracle

SIDE = settings.PRIOR_MASK_SIZE


def test_fuse_weighs_the_region_logits():
    selector, region = np.float32([[0, 1, -2]]), np.float32([[10, -5, 0]])
    expected = 1 / (1 + np.exp(-(selector + 0.1 * region)))
    np.testing.assert_allclose(selection.fuse(selector, region, 0.1), expected, rtol=1e-6)
    np.testing.assert_allclose(selection.fuse(selector, region, 0), 1 / (1 + np.exp(-selector)), rtol=1e-6)


def test_fuse_is_exact_and_silent_when_logits_are_extreme():
    logits = np.float32([[-1000, -30, 30, 1000]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probabilities = selection.fuse(logits, logits, 0)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, torch.from_numpy(logits).sigmoid(), rtol=1e-6)


@pytest.mark.parametrize(
    "probabilities, chosen",
    [
        ([0.1, 0.5, 0.2, 0.9, 0.4], [1, 3, 4]),
        ([0.1, 0.3, 0.39, 0.2], [2]),
        ([0.3, 0.3], [0]),
    ],
    ids=["in proposal order", "best where none reaches the threshold", "first of equals"],
)
def test_choose_takes_proposals(probabilities, chosen):
    assert selection.choose(np.float32([probabilities]), 0.4)[0].tolist() == chosen


@pytest.mark.parametrize("above", [settings.MAX_SELECTED_BOXES, settings.MAX_SELECTED_BOXES + 1])
def test_choose_orders_by_probability_only_when_there_are_too_many(above):
    probabilities = np.full(40, 0.1, np.float32)
    probabilities[:above] = np.linspace(0.5, 0.9, above)
    in_order = list(range(settings.MAX_SELECTED_BOXES))
    best = [above - 1 - rank for rank in in_order]
    assert selection.choose(probabilities[None], 0.4)[0].tolist() == (best if above > len(in_order) else in_order)


def test_align_repeats_the_last_list_and_drops_surplus_ones():
    lists = [np.array([1]), np.array([2, 3])]
    assert [list(boxes) for boxes in selection.align(lists, 4)] == [[1], [2, 3], [2, 3], [2, 3]]
    assert [list(boxes) for boxes in selection.align(lists, 1)] == [[1]]
    assert selection.align(lists, 0) == []


HEIGHT, WIDTH, SIZE = 60, 100, 1000


@pytest.mark.parametrize(
    "box, corners",
    [
        ((10, 6, 50, 30), (10, 6, 50, 30)),
        ((-40, -6, 50, 90), (0, 0, 50, 60)),
        ((50, 30, 30, 20), (50, 30, 80, 50)),
        ((50, 20, 30, 50), (50, 20, 80, 60)),
        ((50, 20, 0, 30), (50, 20, 51, 50)),
        ((120, 20, 130, 30), (99, 20, 100, 50)),
    ],
    ids=["inside", "clipped", "read as width and height", "and clipped", "widened to a pixel", "at the edge"],
)
def test_prior_points_are_corners_of_a_box(box, corners):
    frame = np.float32([WIDTH, HEIGHT, WIDTH, HEIGHT])
    points = selection.prior_points(np.float32([box]) / frame, HEIGHT, WIDTH, SIZE)
    assert points.dtype == np.float32
    np.testing.assert_allclose(points.reshape(1, 4), np.float32([corners]) / frame * SIZE, rtol=1e-5)


def mask_of(left, top, right, bottom):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    "box, mask, score",
    [
        ((0.25, 0.25, 0.75, 0.75), mask_of(64, 64, 192, 192), 1),
        ((0.25, 0.25, 0.75, 0.75), mask_of(64, 64, 192, 128), 0.8 * 0.5 + 0.2 / (1 + np.log(2))),
        ((-0.5, -0.5, 0.5, 0.5), mask_of(0, 0, 128, 128), 1),
        ((0.25, 0.25, 0.75, 0.75), mask_of(0, 0, 0, 0), 0),
        ((0, 0, 1, 1), mask_of(0, 0, 256, 256), 0.2),
        ((0, 0, 2 / 256, 2 / 256), mask_of(0, 0, 2, 2), 0.2),
        ((0.5, 0.5, 0.5, 0.5), mask_of(64, 64, 192, 192), 0.2 / (1 + np.log(0.25 / 1e-6))),
    ],
    ids=["filled", "half filled", "box leaves the frame", "empty mask", "whole frame", "too small", "box without extent"],
)
def test_prior_score_says_how_well_a_mask_fills_its_box(box, mask, score):
    (got,) = selection.prior_scores(np.float32([box]), mask[None])
    assert got == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize(
    "scores, kept",
    [([0.2, 0.5, 0.9, 0.4], [1, 2, 3]), ([0.1, 0.3, 0.2], [1]), ([0.4, 0.9, 0.5, 0.35, 0.6], [1, 4, 2])],
    ids=["in order", "best where none passes", "by score where there are too many"],
)
def test_keep_takes_the_boxes_that_pass_the_prior_filter(scores, kept):
    assert selection.keep(np.float32(scores), 0.35, 3).tolist() == kept


def guided(case):
    return "sel.prob" in case.expected


def per_token(case, prefix):
    """The arrays `prefix`0, `prefix`1, ... of a case."""
    names = [f"{prefix}{index}" for index in range(len(case.expected["sel.prob"]))]
    return [case.expected[name] for name in names if name in case.expected]


def region_logits(case):
    """What `fuse` adds to the selector's logits, and how much of it."""
    if not case.options["roi_helper"]:
        return case.expected["sel.logits_old"], 0
    return case.expected["sel.roi_logits"], float(case.expected["sel.gamma"])


def test_rank_orders_queries_by_the_product_of_their_scores():
    coco, sa1b = np.float32([0.9, 0.1, 0.5, 0.5]), np.float32([0.1, 0.9, 0.5, 0.5])
    boxes, features = np.arange(16, dtype=np.float32).reshape(4, 4), np.arange(8, dtype=np.float32).reshape(4, 2)
    detected = {"query_boxes": boxes, "query_features": features, "coco_scores": coco, "sa1b_scores": sa1b}
    ranked = selection.rank(detected, 3, 0.3, 0.7)
    order = [2, 3, 1]  # 0.5, 0.5 in their order, 0.1^0.3 0.9^0.7 = 0.465, 0.9^0.3 0.1^0.7 = 0.193
    np.testing.assert_array_equal(ranked["proposal_boxes"], boxes[order])
    np.testing.assert_array_equal(ranked["proposal_features"], features[order])
    np.testing.assert_allclose(ranked["proposal_scores"], [0.5, 0.5, 0.1**0.3 * 0.9**0.7], rtol=1e-6)
    assert selection.rank(detected, 9, 1, 0)["proposal_scores"].tolist() == pytest.approx([0.9, 0.5, 0.5, 0.1])


def golden_masks(case):
    """[K, S, S] bool prior masks of each token."""
    packed = per_token(case, "prior.mask256.tok")
    return [np.unpackbits(bits, axis=1).reshape(-1, SIDE, SIDE).astype(bool) for bits in packed]


@goldens.parametrize_cases(guided)
def test_probabilities_and_chosen_boxes_equal_the_original(case):
    expected, boxes = case.expected, case.expected["ddetr.boxes"]
    probabilities = selection.fuse(expected["sel.logits_old"], *region_logits(case))
    np.testing.assert_allclose(probabilities, expected["sel.prob"], atol=1e-6)
    chosen = [boxes[indices] for indices in selection.choose(probabilities, case.options["selection_threshold"])]
    for got, want in zip(chosen, per_token(case, "sel.raw_boxes.tok"), strict=True):
        np.testing.assert_array_equal(got, want)
    before = per_token(case, "sel.before.tok")
    for got, want in zip(selection.align(chosen, len(before)), before, strict=True):
        np.testing.assert_array_equal(got, want)


@goldens.parametrize_cases(guided)
def test_prior_masks_equal_the_original(case):
    config, size = goldens.checkpoint(case.pack).config, case.frames.shape[1:3]
    for boxes, want in zip(per_token(case, "sel.before.tok"), golden_masks(case), strict=True):
        points = torch.from_numpy(selection.prior_points(boxes, *size, config.sam2.image_size))
        points = torch.cat([points, torch.zeros(len(points), 1, 2)], 1)
        with torch.inference_mode():
            logits, *_ = sam2_oracle.decode_golden(case, 0, [TOP_LEFT, BOTTOM_RIGHT, PAD], points)
        # As the goldens' README has it: bits of the masks flip where a logit is all but zero.
        assert (masks.prior_masks(logits.numpy(), *size, SIDE) == want).mean() >= 0.9998


@goldens.parametrize_cases(guided)
def test_prior_scores_and_kept_boxes_equal_the_original(case):
    limits = case.options["box_prior_min_score"], case.options["box_prior_max_keep"]
    tokens = [per_token(case, f"{name}.tok") for name in ("sel.before", "sel.after", "prior.scores")]
    for mask, boxes, after, want in zip(golden_masks(case), *tokens, strict=True):
        scores = selection.prior_scores(boxes, mask)
        np.testing.assert_allclose(scores, want, atol=1e-5)
        np.testing.assert_array_equal(boxes[selection.keep(scores, *limits)], after)
