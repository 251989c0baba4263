"""Prompts to masks: the token layouts of the specification's appendix B and the call of the mask decoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import settings
from .components import BOTTOM_RIGHT, PAD, TEXT, TOP_LEFT
from .runner import Runner
from .tensors import Array, Arrays

BOX_AND_TEXT = (TOP_LEFT, BOTTOM_RIGHT, TEXT)
TEXT_ONLY = (TEXT,)
BOX = (TOP_LEFT, BOTTOM_RIGHT, PAD)
TRACKED_TEXT = (PAD, PAD, TEXT)
TRACKED = (PAD, PAD)


@dataclass(frozen=True)
class Prompts:
    """What the mask decoder is told about O objects.

    Args:
        layout: prompt labels, the same for all objects.
        object_frame: [O] int64, frame of each object.
        multimask: choose among three masks by predicted IoU.
        corners: [O, 2, 2] float32, x, y in pixels of the grounding frame; where the layout has corners.
        text: [O, C] float32; where the layout has text.
        masks: [O, L, L] float32 logits of an earlier decode.
    """

    layout: tuple[int, ...]
    object_frame: Array
    multimask: bool
    corners: Array | None = None
    text: Array | None = None
    masks: Array | None = None


def decode_masks(runner: Runner, frames: Arrays, prompts: Prompts, conditioned: Array | None = None) -> Arrays:
    """One mask per object.

    Args:
        frames: outputs of frame_encoder for F frames.
        prompts: O objects.
        conditioned: [O, C, g, g] float32 from memory_attention; None: the frames' own embeddings.
    Returns:
        The outputs of mask_decoder.
    """
    num_objects, slots = len(prompts.object_frame), len(prompts.layout)
    width, low_res = frames["frame_embeddings"].shape[1], frames["high_res_0"].shape[2]
    points = np.zeros((num_objects, slots, 2), np.float32)
    if prompts.corners is not None:
        points[:, :2] = prompts.corners
    return runner.run(
        "mask_decoder",
        {
            "image_embeddings": frames["frame_embeddings"] if conditioned is None else conditioned,
            "high_res_1": frames["high_res_1"],
            "high_res_0": frames["high_res_0"],
            "object_embedding": prompts.object_frame if conditioned is None else np.arange(num_objects),
            "object_frame": prompts.object_frame,
            "has_memory": np.full(num_objects, conditioned is not None),
            "multimask": np.full(num_objects, prompts.multimask),
            "prompt_points": points,
            "prompt_labels": np.tile(np.array(prompts.layout, np.int64), (num_objects, 1)),
            "text_embeddings": np.zeros((num_objects, width), np.float32) if prompts.text is None else prompts.text,
            "mask_prompts": np.zeros((num_objects, low_res, low_res), np.float32) if prompts.masks is None else prompts.masks,
            "has_mask_prompt": np.full(num_objects, prompts.masks is not None),
        },
    )


def gate(decoded: Arrays) -> Arrays:
    """`decoded` with the masks of absent objects emptied, as tracking does (spec 7.3)."""
    present = (decoded["object_scores"] > 0)[:, None, None]
    return {**decoded, "mask_logits": np.where(present, decoded["mask_logits"], np.float32(settings.NO_OBJECT_LOGIT))}
