"""Mask logits to masks at the frame's own size, and their encodings."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco

from . import settings
from .tensors import Array, Arrays

MASK_FORMATS = ("rle", "bits", "logits")


def resize(maps: Array, height: int, width: int) -> Array:
    """Bilinear, half-pixel centres, no antialiasing: [N, h, w] float32 -> [N, height, width] (torch `interpolate`)."""
    resized = np.empty((len(maps), height, width), maps.dtype)
    for index, map in enumerate(maps):
        cv2.resize(map, (width, height), resized[index], interpolation=cv2.INTER_LINEAR)
    return resized


def binary_masks(logits: Array, height: int, width: int) -> Array:
    """[N, h, w] float32 logits to [N, height, width] bool."""
    return resize(logits, height, width) > 0


def prior_masks(logits: Array, height: int, width: int, side: int) -> Array:
    """Masks at the frame's size, brought to `side` by `side` as the original's prior filter does (spec 5.5 step 2)."""
    return resize(binary_masks(logits, height, width).astype(np.float32), side, side) > 0.5


def respond(logits: Array, scores: Arrays, size: tuple[int, int], mask_format: str) -> Arrays:
    """The mask tensors of a response.

    Args:
        logits: [N, L, L] float32.
        scores: holds predicted_iou and object_scores, [N] float32 each.
        size: height and width of the frame.
        mask_format: one of MASK_FORMATS.
    Returns:
        `mask_rle`, `mask_bits` and `mask_logits`, of which those that were not asked for hold no masks (an ensemble has to return all its
        outputs); what the contract lists behind them.
    """
    masks = binary_masks(logits, *size)
    counts = np.empty(len(masks) if mask_format == "rle" else 0, object)
    # Column by column, as COCO counts: OpenCV transposes several times as fast as NumPy.
    counts[:] = [coco.encode(cv2.transpose(mask.view(np.uint8)).T)["counts"] for mask in masks[: len(counts)]]
    bits = np.packbits(masks.reshape(len(masks), size[0] * size[1]), axis=1) if mask_format == "bits" else np.zeros((0, 0), np.uint8)
    areas = np.array([cv2.countNonZero(mask.view(np.uint8)) for mask in masks], np.int32)
    return {
        "mask_rle": counts,
        "mask_bits": bits,
        "mask_logits": logits if mask_format == "logits" else logits[:0],
        "mask_boxes": tight_boxes(masks),
        "mask_areas": areas,
        "predicted_iou": scores["predicted_iou"],
        "object_scores": scores["object_scores"],
        "visible": (areas > 0) & (scores["object_scores"] > 0),
    }


def tight_boxes(masks: Array) -> Array:
    """[N, H, W] bool to [N, 4] int32 xyxy in pixels, right and bottom exclusive; zeros for an empty mask."""
    boxes = np.array([cv2.boundingRect(mask.view(np.uint8)) for mask in masks], np.int32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # x, y, width, height -> xyxy
    return boxes


def stretch_mask(mask: Array, side: int) -> Array:
    """A mask that the caller drew over the square grounding frame: antialiased bilinear, then half or more (sam2_video_predictor.py
    add_new_mask): [H, W] bool -> [side, side] bool.
    """
    drawn: Array = antialiased(mask.astype(np.float32), side) >= 0.5
    return drawn


def drawn_logits(mask: Array, side: int) -> Array:
    """The logits of such a mask: [S, S] bool -> [side, side] float32 (sam2_base.py _use_mask_as_output)."""
    return antialiased(np.where(mask, np.float32(settings.DRAWN_MASK_LOGIT), np.float32(-settings.DRAWN_MASK_LOGIT)), side)


def antialiased(map: Array, side: int) -> Array:
    """[H, W] float32 -> [side, side], bilinear over all source pixels (torch `interpolate` with antialias)."""
    return np.asarray(Image.fromarray(map).resize((side, side), Image.Resampling.BILINEAR))
