"""J and F against figures worked out by hand, and against distances between all pairs of boundary pixels."""

import itertools
import math

import numpy as np
import pytest

from benchmarks.evaluation import davis


def square(top, left, side, height=60, width=80):
    """[1, H, W]"""
    mask = np.zeros((1, height, width), bool)
    mask[0, max(top, 0) : top + side, max(left, 0) : left + side] = True
    return mask


def blob(seed, height=50, width=70):
    """[1, H, W]: a few discs, some of which leave the frame."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    discs = [(y - rng.integers(height)) ** 2 + (x - rng.integers(width)) ** 2 <= rng.integers(3, 14) ** 2 for _ in range(3)]
    return np.any(discs, axis=0)[None]


EMPTY, FULL = np.zeros((1, 60, 80), bool), np.ones((1, 60, 80), bool)


def boundary_pixels(mask):
    """(row, column) of every pixel that has a neighbour right, below or right below of another value."""
    height, width = mask.shape
    return [
        (y, x)
        for y, x in itertools.product(range(height), range(width))
        if any(y + dy < height and x + dx < width and mask[y + dy, x + dx] != mask[y, x] for dy, dx in ((0, 1), (1, 0), (1, 1)))
    ]


def boundary_measure(mask, annotated):
    """F of two [H, W] from the distances of all pairs."""
    limit = math.ceil(0.008 * math.hypot(*mask.shape))
    ours, theirs = (np.array(boundary_pixels(own)).reshape(-1, 2) for own in (mask, annotated))
    distances = np.linalg.norm(ours[:, None] - theirs[None], axis=2)
    precision, recall = (distances.min(1) <= limit).mean(), (distances.min(0) <= limit).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0


def test_region_similarity_is_intersection_over_union():
    np.testing.assert_array_equal(davis.region_similarity(square(10, 10, 4), square(10, 12, 4)), [8 / 24])


def test_boundary_lies_half_a_pixel_towards_the_origin():
    boundary = davis.boundary(square(2, 2, 2, 6, 6)[0])
    expected = np.zeros((6, 6), bool)
    expected[1:4, 1:4] = True
    expected[2, 2] = False
    np.testing.assert_array_equal(boundary, expected)


def test_edge_of_the_frame_is_no_boundary():
    boundary = davis.boundary(square(0, 3, 5, 5, 8)[0])  # columns 3..7, all rows
    np.testing.assert_array_equal(np.argwhere(boundary), [[row, 2] for row in range(5)])


@pytest.mark.parametrize(
    ("mask", "annotated", "j", "f"),
    [
        (EMPTY, EMPTY, 1, 1),
        (EMPTY, square(10, 10, 9), 0, 0),
        (square(10, 10, 9), EMPTY, 0, 0),
        (square(10, 10, 9), square(40, 60, 9), 0, 0),
        (square(10, 10, 9), square(10, 10, 9), 1, 1),
        (FULL, FULL, 1, 1),
        (FULL, EMPTY, 0, 1),  # neither has a boundary
    ],
)
def test_measures_of_the_extremes(mask, annotated, j, f):
    assert davis.region_similarity(mask, annotated) == [j]
    assert davis.boundary_measure(mask, annotated) == [f]


@pytest.mark.parametrize(("height", "width", "tolerance"), [(480, 854, 8), (60, 80, 1), (240, 320, 4)])
def test_boundaries_may_be_the_tolerance_apart(height, width, tolerance):
    annotated = square(20, 20, 12, height, width)
    assert davis.boundary_measure(square(20, 20 + tolerance, 12, height, width), annotated) == [1]
    assert davis.boundary_measure(square(20, 20 + tolerance + 1, 12, height, width), annotated) < [1]


@pytest.mark.parametrize(("top", "left", "side"), [(21, 20, 12), (22, 23, 12), (20, 20, 16), (26, 26, 4), (-5, 12, 12), (50, 70, 20)])
def test_boundary_measure_equals_distances_of_a_shifted_square(top, left, side):
    mask, annotated = square(top, left, side), square(20, 20, 12)
    assert davis.boundary_measure(mask, annotated) == pytest.approx([boundary_measure(mask[0], annotated[0])], abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_boundary_measure_equals_distances_of_blobs(seed):
    mask, annotated = blob(seed), blob(seed) ^ blob(seed + 1)
    expected = boundary_measure(mask[0], annotated[0])
    assert 0 < expected < 1
    assert davis.boundary_measure(mask, annotated) == pytest.approx([expected], abs=1e-12)


def test_score_is_the_mean_over_frames_and_j_and_f_the_mean_of_both():
    annotated = np.concatenate([square(10, 10, 4), square(10, 10, 4), EMPTY, EMPTY])
    masks = np.concatenate([square(10, 10, 4), EMPTY, EMPTY, FULL])
    score = davis.score(masks, annotated)
    assert (score.j, score.f, score.j_and_f) == (2 / 4, 3 / 4, 5 / 8)
