"""What shapes-rvos makes of an answer: the figures' ingredients, worked out by hand."""

import numpy as np
import pytest

from benchmarks.evaluation import shapes_rvos
from benchmarks.evaluation.davis import Score, score
from tests.test_evaluation import annotation


def test_matched_score_counts_an_object_without_a_track_as_zero():
    ids = annotation(0)
    wanted = np.stack([ids == 1, ids == 2])
    shifted = np.roll(wanted[0], 2, 2)
    assert shapes_rvos.matched_score(wanted[::-1], wanted) == Score(1, 1)
    assert shapes_rvos.matched_score(wanted[1:], wanted) == Score(0.5, 0.5)
    assert shapes_rvos.matched_score(wanted[:0], wanted) == Score(0, 0)
    alone = score(shifted, wanted[0])
    found = shapes_rvos.matched_score(np.stack([shifted, wanted[1], np.zeros_like(shifted)]), wanted)
    assert (found.j, found.f) == (pytest.approx((alone.j + 1) / 2), pytest.approx((alone.f + 1) / 2))


def test_right_object_is_covered_by_half_and_better_than_any_other():
    ids = np.zeros((10, 20), np.uint8)
    ids[2:8, 2:8], ids[2:8, 8:12] = 1, 2
    one, two = ids == 1, ids == 2
    nothing = np.zeros_like(one)
    upper = one & (np.arange(10)[:, None] < 5)
    assert shapes_rvos.is_right_object(one, ids, 1)
    assert shapes_rvos.is_right_object(one | two, ids, 1)  # 36 of 60 pixels
    assert shapes_rvos.is_right_object(upper, ids, 1)  # half of it
    assert not shapes_rvos.is_right_object(one | two, ids, 2)
    assert not shapes_rvos.is_right_object(upper & (np.arange(20) > 2), ids, 1)
    assert not shapes_rvos.is_right_object(nothing, ids, 1)
    assert not shapes_rvos.is_right_object(nothing, ids, 3)  # which is not there
    assert not shapes_rvos.is_right_object(nothing, nothing.astype(np.uint8), 1)


def test_object_is_covered_by_a_proposal_of_half_its_box():
    ids = np.zeros((10, 20), np.uint8)
    ids[2:6, 4:12], ids[8, 0] = 1, 3
    box = np.float32([4 / 20, 2 / 10, 12 / 20, 6 / 10])
    half, less = box.copy(), box.copy()
    half[2], less[2] = 8 / 20, 7.8 / 20
    assert shapes_rvos.covered_objects(np.stack([box]), ids) == [True, False]
    assert shapes_rvos.covered_objects(np.stack([less, half + np.float32([0, 0, 1e-4, 0])]), ids) == [True, False]
    assert shapes_rvos.covered_objects(np.stack([less]), ids) == [False, False]
    assert shapes_rvos.covered_objects(np.concatenate([np.tile(less, (100, 1)), box[None]]), ids) == [False, False]
    assert shapes_rvos.covered_objects(np.zeros((0, 4), np.float32), ids) == [False, False]
    assert shapes_rvos.covered_objects(np.stack([box]), np.zeros_like(ids)) == []


def test_object_is_hidden_that_once_shows_less_than_half():
    shown = np.zeros((3, 4, 10), bool)
    shown[:, :, :8] = True
    assert not shapes_rvos.is_hidden(shown)
    shown[1, :, 4:] = False
    assert not shapes_rvos.is_hidden(shown)
    shown[1, 0, 3] = False
    assert shapes_rvos.is_hidden(shown)
    shown[2] = False
    assert shapes_rvos.is_hidden(shown)
