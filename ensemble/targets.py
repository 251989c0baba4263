"""Target-specific features: crops of the target and the medoids of their features (spec 1.7)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import settings
from .errors import InvalidInput
from .tensors import Array


def crop_targets(frames: Array, indices: Sequence[int], rows: Array) -> list[Array]:
    """One crop per frame that the vision towers see.

    Args:
        frames: [T, H, W, 3] uint8, the whole clip.
        indices: which of them are seen; the last one repeated, as short clips are filled up, is cropped once.
        rows: [R, 4] float32 pixels, xyxy or xywh (see `boxes_xyxy`), a row per frame of the clip; the last one serves those behind it.
    Returns:
        Arrays [h, w, 3] uint8, at least one pixel a side.
    Raises:
        InvalidInput: a value is not finite.
    """
    if not np.isfinite(rows).all():
        raise InvalidInput("sparrow.target_boxes: got a value that is not finite, expected pixels. Send 4 numbers a row.")
    height, width = frames.shape[1:3]
    boxes = boxes_xyxy(rows, height, width)
    crops = []
    for index in dict.fromkeys(indices):
        x1, y1, x2, y2 = boxes[min(index, len(boxes) - 1)]
        left, top = int(np.clip(np.floor(x1), 0, width - 1)), int(np.clip(np.floor(y1), 0, height - 1))
        right, bottom = int(np.clip(np.ceil(x2), left + 1, width)), int(np.clip(np.ceil(y2), top + 1, height))
        crops.append(frames[index, top:bottom, left:right])
    return crops


def boxes_xyxy(rows: Array, height: int, width: int) -> Array:
    """Rows as xyxy: every row votes for the readings that give a box and for those inside the frame, ties go to xywh (chat.py)."""
    first, last = rows[:, :2], rows[:, 2:]
    moved = np.concatenate([first, first + last], 1)
    limits = np.tile(np.array([width, height], np.float32), 2)
    corners, sizes = (last > first).all(1), (last > 0).all(1)
    corners_inside, sizes_inside = (((boxes >= 0) & (boxes <= limits)).all(1) for boxes in (rows, moved))
    xyxy = corners.sum() + (corners & corners_inside).sum() + (sizes & ~sizes_inside).sum()
    xywh = 2 * (~corners).sum() + sizes.sum() + (corners & ~corners_inside).sum() + (sizes & sizes_inside).sum()
    return rows if xyxy > xywh else moved


def medoids(features: Array, k: int = settings.TARGET_TOKENS, steps: int = settings.TARGET_KMEANS_STEPS) -> Array:
    """The samples nearest to the k-means centres of `features`, in the order of the centres.

    Args:
        features: [n, C] float32.
        k: clusters; all samples are returned where n <= k.
        steps: most k-means updates.
    Returns:
        [min(n, k), C] float32.
    """
    if len(features) <= k:
        return features
    centres = features[np.round(np.linspace(0, len(features) - 1, k)).astype(int)]
    for _ in range(steps):
        nearest = distances(features, centres).argmin(1)
        updated = np.stack(
            [features[nearest == index].mean(0) if (nearest == index).any() else centre for index, centre in enumerate(centres)]
        )
        settled = np.allclose(updated, centres, rtol=1e-4, atol=1e-4)
        centres = updated
        if settled:
            break
    return np.asarray(features[distances(features, centres).argmin(0)])


def distances(samples: Array, centres: Array) -> Array:
    """Euclidean distances: [n, C], [k, C] -> [n, k]."""
    return np.asarray(np.linalg.norm(samples[:, None] - centres[None], axis=2))
