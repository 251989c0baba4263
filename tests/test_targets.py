import math
from collections import Counter

import numpy as np
import pytest

from ensemble.errors import InvalidInput
from ensemble.targets import boxes_xyxy, crop_targets, medoids


def slow_centres(samples, k, steps):
    """K-means of spec 1.7 in plain Python, double precision."""
    positions = [round(index * (len(samples) - 1) / (k - 1)) for index in range(k)]  # half to even, as torch and NumPy round
    centres = [samples[position] for position in positions]
    for _ in range(steps):
        members = [[] for _ in centres]
        for sample in samples:
            members[min(range(k), key=lambda index: math.dist(sample, centres[index]))].append(sample)
        moved = [
            [sum(axis) / len(own) for axis in zip(*own, strict=True)] if own else centre
            for own, centre in zip(members, centres, strict=True)
        ]
        pairs = [pair for rows in zip(moved, centres, strict=True) for pair in zip(*rows, strict=True)]
        centres = moved
        if all(abs(new - old) <= 1e-4 + 1e-4 * abs(old) for new, old in pairs):
            break
    return centres


@pytest.mark.parametrize("seed", range(20))
def test_medoids_are_the_samples_nearest_to_the_centres_of_a_slow_k_means(seed):
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((int(rng.integers(5, 17)), 3)).astype(np.float32)
    k, steps = int(rng.integers(2, 5)), int(rng.integers(1, 9))
    found = medoids(samples, k, steps)
    centres = slow_centres(samples.tolist(), k, steps)
    assert len(found) == k
    for medoid, centre in zip(found.tolist(), centres, strict=True):
        assert medoid in samples.tolist()
        # The two members of a cluster of two are equally near: either may come out.
        assert math.dist(medoid, centre) == pytest.approx(min(math.dist(sample, centre) for sample in samples.tolist()), abs=1e-5)


def test_medoids_of_clear_groups_are_their_middles_in_the_order_of_the_first_centres():
    line = np.float32([[0], [1], [2.1], [100], [101], [102.1], [200], [201], [202.1]])
    np.testing.assert_array_equal(medoids(line, k=3), [[1], [101], [201]])
    np.testing.assert_array_equal(medoids(line[::-1], k=3), [[201], [101], [1]])


def test_medoids_keep_the_centre_of_a_cluster_without_members():
    # The centres start at samples 0, 1, 3 and 4; the first two are equal, and the first of them takes all members.
    samples = np.float32([[5], [5], [5], [20], [30]])
    np.testing.assert_array_equal(medoids(samples, k=4), [[5], [5], [20], [30]])


@pytest.mark.parametrize("n", [1, 3, 4])
def test_medoids_are_all_samples_when_there_are_no_more_than_clusters(n):
    samples = np.random.default_rng(0).standard_normal((n, 5)).astype(np.float32)
    assert medoids(samples, k=4) is samples


def slow_reading(rows, height, width):
    """The original's votes, row by row: a reading gains by giving a box and by staying in the frame, else the other one gains."""
    votes = {"xyxy": 0, "xywh": 0}
    for x, y, c, d in rows.tolist():
        for name, is_box, right, bottom in (("xyxy", c > x and d > y, c, d), ("xywh", c > 0 and d > 0, x + c, y + d)):
            other = "xywh" if name == "xyxy" else "xyxy"
            if is_box:
                inside = 0 <= x <= width and 0 <= right <= width and 0 <= y <= height and 0 <= bottom <= height
                votes[name] += 1
                votes[name if inside else other] += 1
            elif name == "xyxy":
                votes["xywh"] += 2
    return "xyxy" if votes["xyxy"] > votes["xywh"] else "xywh"


def test_boxes_are_read_as_the_original_does():
    rng, readings = np.random.default_rng(0), Counter()
    for _ in range(2000):
        rows = rng.integers(-5, 110, (rng.integers(1, 5), 2, 2))
        rows = np.where(rng.random((len(rows), 1, 1)) < 0.8, np.sort(rows, 1), rows).reshape(-1, 4).astype(np.float32)
        readings[reading := slow_reading(rows, 60, 100)] += 1
        expected = rows if reading == "xyxy" else np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:]], 1)
        np.testing.assert_array_equal(boxes_xyxy(rows, height=60, width=100), expected)
    assert min(readings.values()) > 200


@pytest.mark.parametrize(
    ("rows", "as_xyxy"),
    [
        ([[60, 40, 90, 50]], True),  # as width and height it would leave the frame
        ([[60, 40, 20, 10]], False),  # as corners it is no box
        ([[0, 0, 100, 60]], False),  # the whole frame, edges included, fits both ways, and a tie goes to xywh
        ([[60, 40, 90, 50], [60, 40, 20, 10]], False),  # what is no box as corners weighs double
    ],
)
def test_boxes_are_read_the_way_that_gives_boxes_in_the_frame(rows, as_xyxy):
    rows = np.float32(rows)
    expected = rows if as_xyxy else np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:]], 1)
    np.testing.assert_array_equal(boxes_xyxy(rows, height=60, width=100), expected)


def numbered_frames(num_frames, height=60, width=100):
    """Every pixel of every frame differs: frame, row, column."""
    return np.stack(np.broadcast_arrays(*np.ogrid[:num_frames, :height, :width]), -1).astype(np.uint8)


def test_crops_are_rounded_outwards():
    (crop,) = crop_targets(numbered_frames(1), [0], np.float32([[60.9, 20.1, 70.1, 29.5]]))
    assert crop[0, 0].tolist() == [0, 20, 60]
    assert crop[-1, -1].tolist() == [0, 29, 70]


def test_last_row_serves_the_frames_behind_it():
    crops = crop_targets(numbered_frames(4), range(4), np.float32([[60, 20, 70, 30], [80, 40, 90, 50]]))
    assert [crop[0, 0].tolist() for crop in crops] == [[0, 20, 60], [1, 40, 80], [2, 40, 80], [3, 40, 80]]


def test_rows_are_those_of_the_frames_that_are_seen():
    rows = np.float32([[index, 10, index + 60, 50] for index in range(20)])
    crops = crop_targets(numbered_frames(20), [0, 7, 19], rows)
    assert [crop[0, 0].tolist() for crop in crops] == [[0, 10, 0], [7, 10, 7], [19, 10, 19]]


def test_repeated_frames_are_cropped_once():
    assert len(crop_targets(numbered_frames(3), [0, 1, 2, 2, 2], np.float32([[60, 20, 70, 30]]))) == 3


@pytest.mark.parametrize(
    ("row", "first", "last"),
    [
        ([-50, -50, 500, 500], (0, 0), (59, 99)),
        ([-50, -50, -40, -40], (0, 0), (0, 0)),
        ([500, 500, 600, 600], (59, 99), (59, 99)),
        ([30, 20, 30, 20], (20, 30), (20, 30)),
        ([70, 50, 60, 40], (50, 70), (50, 70)),
        ([1e30, 1e30, 1e30, 1e30], (59, 99), (59, 99)),
    ],
)
def test_crops_stay_in_the_frame_and_have_at_least_a_pixel(row, first, last):
    votes = [[60, 40, 90, 50]] * 4  # so that the rows are read as xyxy
    crop = crop_targets(numbered_frames(1), [0], np.float32([row, *votes]))[0]
    assert tuple(crop[0, 0, 1:]) == first
    assert tuple(crop[-1, -1, 1:]) == last


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_crops_are_refused_when_a_number_is_not_finite(value):
    with pytest.raises(InvalidInput, match=r"sparrow.target_boxes: got a value that is not finite"):
        crop_targets(numbered_frames(1), [0], np.float32([[0, 0, 10, value]]))
