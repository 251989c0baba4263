"""Mask logits to masks at the frame's own size, and their encodings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco

from .errors import InvalidInput
from .tensors import Array, Arrays

MASK_FORMATS = ("rle", "bits")


def resize(maps: Array, height: int, width: int) -> Array:
    """Bilinear, half-pixel centres, no antialiasing: [N, h, w] float32 -> [N, height, width] (torch `interpolate`)."""
    resized = [cv2.resize(map, (width, height), interpolation=cv2.INTER_LINEAR) for map in maps]
    return np.stack(resized) if resized else np.zeros((0, height, width), maps.dtype)


def binary_masks(logits: Array, height: int, width: int) -> Array:
    """[N, h, w] float32 logits to [N, height, width] bool."""
    return resize(logits, height, width) > 0


def prior_masks(logits: Array, height: int, width: int, side: int) -> Array:
    """Masks at the frame's size, brought to `side` by `side` as the original's prior filter does (spec 5.5 step 2)."""
    return resize(binary_masks(logits, height, width).astype(np.float32), side, side) > 0.5


def mask_format(parameters: Mapping[str, Any]) -> str:
    """The format that a request asks for, rle where it does not say; raises InvalidInput when it is not one of MASK_FORMATS."""
    asked: str = parameters.get("mask_format", "rle")
    if asked not in MASK_FORMATS:
        raise InvalidInput(f"mask_format: got {asked!r}, expected one of {', '.join(MASK_FORMATS)}.")
    return asked


def respond(masks: Array, scores: Arrays, parameters: Mapping[str, Any]) -> Arrays:
    """The mask tensors of a response.

    Args:
        masks: [N, H, W] bool.
        scores: holds predicted_iou and object_scores, [N] float32 each.
        parameters: of the request; see `mask_format`.
    Returns:
        `mask_rle` [N] bytes (COCO compressed RLE counts) and `mask_bits` [N, ceil(H*W/8)] uint8, of which the format that was
        not asked for is empty (an ensemble has to return all its outputs); scores; visible [N] bool.
    Raises:
        InvalidInput: another mask_format.
    """
    counts = np.full(len(masks), b"", object)
    bits = np.zeros((len(masks), 0), np.uint8)
    if mask_format(parameters) == "bits":
        bits = np.packbits(masks.reshape(len(masks), masks.shape[1] * masks.shape[2]), axis=1)
    else:
        counts[:] = [coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"] for mask in masks]
    return {
        "mask_rle": counts,
        "mask_bits": bits,
        "predicted_iou": scores["predicted_iou"],
        "object_scores": scores["object_scores"],
        "visible": masks.any((1, 2)) & (scores["object_scores"] > 0),
    }
