"""Which boxes prompt the mask decoder: fusion, threshold, fallbacks and the box-prior filter (spec 5.3-5.5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import settings
from .tensors import Array, Arrays

EPS = 1e-6


def rank(detected: Arrays, topk: int, coco_power: float, sa1b_power: float) -> Arrays:
    """The proposals: the `topk` best queries by the product of both heads' scores, each to its power (spec 4.3).

    Args:
        detected: outputs of proposal_detector.
    Returns:
        The proposal_* inputs of proposal_selector, best first.
    """
    scores = detected["coco_scores"] ** np.float32(coco_power) * detected["sa1b_scores"] ** np.float32(sa1b_power)
    best = np.argsort(-scores, kind="stable")[:topk]
    boxes, features = detected["query_boxes"][best], detected["query_features"][best]
    return {"proposal_boxes": boxes, "proposal_features": features, "proposal_scores": scores[best]}


def fuse(selector_logits: Array, roi_logits: Array, gamma: float) -> Array:
    """Probability that a proposal is what a token means: [M, P] float32 logits to [M, P] in 0..1."""
    logits = selector_logits + np.float32(gamma) * roi_logits
    return np.asarray(np.exp(-np.logaddexp(0, -logits)))  # the sigmoid, without overflow


def choose(probabilities: Array, threshold: float) -> list[Array]:
    """Proposals of each token: all at or above the threshold in proposal order, the best one where there is none, and the
    MAX_SELECTED_BOXES best in order of probability where there are more.

    Args:
        probabilities: [M, P] float32.
    Returns:
        M arrays of proposal indices.
    """
    chosen = []
    for row in probabilities:
        indices = np.flatnonzero(row >= threshold)
        if not len(indices):
            indices = np.array([row.argmax()])
        elif len(indices) > settings.MAX_SELECTED_BOXES:
            indices = indices[np.argsort(-row[indices], kind="stable")][: settings.MAX_SELECTED_BOXES]
        chosen.append(indices)
    return chosen


def align(lists: Sequence[Array], num_objects: int) -> list[Array]:
    """One list per object: surplus lists are dropped, the last one serves the objects behind it."""
    return [lists[min(index, len(lists) - 1)] for index in range(num_objects)]


def prior_points(boxes: Array, height: int, width: int, size: int) -> Array:
    """Corner prompts of the prior masks: boxes clipped to the frame, degenerate ones widened to a pixel (spec 5.5 step 2).

    Args:
        boxes: [K, 4] float32 xyxy, normalised, unclamped.
        size: side of the square grounding frame.
    Returns:
        [K, 2, 2] float32 x, y in pixels of the grounding frame.
    """
    frame = np.array([width, height], np.float32)
    boxes = np.clip(boxes, 0, 1) * np.tile(frame, 2)
    first, last = boxes[:, :2], boxes[:, 2:]
    flat = (last <= first).any(1, keepdims=True)
    last = np.clip(np.where(flat, first + last, last), 0, frame)  # the original reads such a pair as width and height
    flat = last <= first
    first = np.where(flat, np.minimum(first, frame - 1), first)
    last = np.where(flat, first + 1, last)
    return np.stack([first, last], 1) / frame * np.float32(size)


def prior_scores(boxes: Array, masks: Array) -> Array:
    """How well the mask decoded from each box fills that box, 0..1.

    Args:
        boxes: [K, 4] float32 xyxy, normalised, unclamped.
        masks: [K, S, S] bool, S = PRIOR_MASK_SIZE.
    Returns:
        [K] float32: 0.8 IoU of box and tight mask box + 0.2 area agreement; a fifth of it for extreme areas; 0 for no mask.
    """
    side = masks.shape[1]
    return np.array([_prior_score(box, mask, side) for box, mask in zip(np.clip(boxes, 0, 1), masks, strict=True)], np.float32)


def _prior_score(box: Array, mask: Array, side: int) -> float:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0.0
    tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32) / side
    fill = float(mask.mean())
    width, height = max(box[2] - box[0], EPS), max(box[3] - box[1], EPS)
    agreement = 1 / (1 + abs(np.log(max(fill, EPS) / max(width * height, EPS))))
    score = 0.8 * iou(box, tight) + 0.2 * agreement
    return float(score * 0.2 if fill < 1e-4 or fill > 0.9 else score)


def iou(a: Array, b: Array) -> float:
    """Intersection over union of two xyxy boxes; areas and union are at least EPS."""
    overlap = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    areas = [max(float((box[2:] - box[:2]).prod()), EPS) for box in (a, b)]
    return float(overlap / max(sum(areas) - overlap, EPS))


def keep(scores: Array, min_score: float, max_keep: int) -> Array:
    """Indices that pass the prior filter: those at or above `min_score` in order, the best one where there is none, and the
    `max_keep` best in order of score where there are more.
    """
    indices = np.flatnonzero(scores >= min_score)
    if not len(indices):
        return np.array([scores.argmax()])
    if len(indices) > max_keep:
        return indices[np.argsort(-scores[indices], kind="stable")][:max_keep]
    return indices
