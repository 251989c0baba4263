"""J and F, the measures of DAVIS 2017: how masks agree with annotated ones in area and along the boundary.

As in the official toolkit, both are 1 where both masks are empty; a mask that fills the frame has no boundary, so F takes it for empty.
Pixels that do not count (void) are taken from both masks beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

from .samples import Floats, Masks

TOLERANCE = 0.008
"""Part of the frame's diagonal that boundaries may lie apart."""


@dataclass(frozen=True)
class Score:
    """J and F of an object, means over its frames, 0..1."""

    j: float
    f: float

    @property
    def j_and_f(self) -> float:
        return (self.j + self.f) / 2


def score(masks: Masks, annotated: Masks) -> Score:
    """Of an object's masks on the frames of a clip, both [T, H, W]."""
    return Score(float(region_similarity(masks, annotated).mean()), float(boundary_measure(masks, annotated).mean()))


def region_similarity(masks: Masks, annotated: Masks) -> Floats:
    """J: intersection over union, 1 where both are empty: two [T, H, W] -> [T]."""
    intersection = (masks & annotated).sum((1, 2))
    union = (masks | annotated).sum((1, 2))
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def boundary_measure(masks: Masks, annotated: Masks) -> Floats:
    """F: harmonic mean of the parts of each boundary that lie close to the other one: two [T, H, W] -> [T]."""
    height, width = masks.shape[1:]
    radius = int(np.ceil(TOLERANCE * np.hypot(height, width)))
    return np.array([frame_boundary_measure(*pair, radius) for pair in zip(masks, annotated, strict=True)])


def frame_boundary_measure(mask: Masks, annotated: Masks, radius: int) -> float:
    """F of a frame, two [H, W], whose boundaries may lie `radius` pixels apart."""
    window = around(mask | annotated)
    ours, theirs = boundary(mask[window]), boundary(annotated[window])
    precision = matched_part(ours, dilate(theirs, radius))
    recall = matched_part(theirs, dilate(ours, radius))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def around(mask: Masks) -> tuple[slice, slice]:
    """The rows and columns, [H, W], that hold a mask and its boundary: all else tells nothing and takes time."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return tuple(slice(max(own[0] - 1, 0), own[-1] + 2) if len(own) else slice(1) for own in (rows, columns))  # type: ignore[return-value]


def boundary(mask: Masks) -> Masks:
    """The pixels that differ from the one to the right, below, or right below; frames end without a boundary: [H, W] -> [H, W]."""
    padded = np.pad(mask, ((0, 1), (0, 1)), "edge")
    right, below, right_below = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return np.asarray((mask != right) | (mask != below) | (mask != right_below))


def dilate(mask: Masks, radius: int) -> Masks:
    """All pixels within a radius of a mask: [H, W] -> [H, W]."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x * x + y * y <= radius * radius).astype(np.uint8)
    return np.asarray(cv2.dilate(mask.view(np.uint8), disk).view(bool))


def matched_part(boundary: Masks, near: Masks) -> float:
    """The part of a boundary that lies near the other one; an empty one is matched whatever the other is: two [H, W]."""
    length = boundary.sum()
    return float((boundary & near).sum() / length) if length else 1.0


@dataclass(frozen=True)
class Statistics:
    """What the toolkit says of a measure of one object over its frames: mean, the part of frames above 0.5, and how much is lost from the
    first quarter to the last.
    """

    mean: float
    recall: float
    decay: float


def statistics(measure: Floats) -> Statistics:
    """Of one measure, [T]."""
    ends = np.round(np.linspace(1, len(measure), 5) + 1e-10).astype(int) - 1
    first, *_, last = (measure[start : end + 1] for start, end in pairwise(ends))
    return Statistics(float(measure.mean()), float((measure > 0.5).mean()), float(first.mean() - last.mean()))
