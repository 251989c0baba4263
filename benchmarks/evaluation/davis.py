"""J and F, the measures of DAVIS 2017: how masks agree with annotated ones in area and along the boundary.

As in the official toolkit, both are 1 where both masks are empty; a mask that fills the frame has no boundary, so F takes it for empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.008
"""Part of the frame's diagonal that boundaries may lie apart."""

Masks = NDArray[np.bool_]
Floats = NDArray[np.float64]


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
    ours, theirs = boundaries(masks), boundaries(annotated)
    height, width = masks.shape[1:]
    radius = int(np.ceil(TOLERANCE * np.hypot(height, width)))
    precision = matched_part(ours, dilate(theirs, radius))
    recall = matched_part(theirs, dilate(ours, radius))
    measure: Floats = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    return measure


def boundaries(masks: Masks) -> Masks:
    """The pixels that differ from the one to the right, below, or right below; frames end without a boundary: [T, H, W] -> [T, H, W]."""
    padded = np.pad(masks, ((0, 0), (0, 1), (0, 1)), "edge")
    right, below, right_below = padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]
    return np.asarray((masks != right) | (masks != below) | (masks != right_below))


def dilate(masks: Masks, radius: int) -> Masks:
    """All pixels within a radius of a mask: [T, H, W] -> [T, H, W]."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x * x + y * y <= radius * radius).astype(np.uint8)
    dilated: Masks = np.stack([cv2.dilate(mask.view(np.uint8), disk) for mask in masks]).view(bool)
    return dilated


def matched_part(boundary: Masks, near: Masks) -> Floats:
    """The part of a boundary that lies near the other one; an empty one is matched whatever the other is: two [T, H, W] -> [T]."""
    length = boundary.sum((1, 2))
    return np.where(length > 0, (boundary & near).sum((1, 2)) / np.maximum(length, 1), 1.0)
