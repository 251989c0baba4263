"""Masks as a server would send them, for tests of the client that need none."""

from __future__ import annotations

import numpy as np
from sparrow_client import FrameMasks
from sparrow_client._types import frame_masks

from ensemble import masks


def mask_tensors(chosen, scores, frame_idx, mask_format="bits"):
    """The tensors of a frame with these masks, [N, H, W] bool, and scores, [N] predicted_iou and object_scores each."""
    ious, objects = (np.asarray(column, np.float32) for column in scores)
    logits = np.where(chosen, np.float32(1), np.float32(-1))
    response = masks.respond(logits, {"predicted_iou": ious, "object_scores": objects}, chosen.shape[1:], mask_format)
    return {"frame_idx": np.int32([frame_idx]), **response}


def masks_of(frame_idx, chosen, scores, branch="tracked", mask_format="bits") -> FrameMasks:
    """What the client makes of them."""
    return frame_masks(mask_tensors(chosen, scores, frame_idx, mask_format), branch, chosen.shape[1:], mask_format)
