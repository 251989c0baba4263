"""Prompts to masks: the token layouts of the specification's appendix B and the call of the mask decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import settings
from .components import ABSENT, BOTTOM_RIGHT, PAD, TEXT, TOP_LEFT
from .runner import Device, DeviceArray, Host
from .tensors import Array, Arrays

BOX = (TOP_LEFT, BOTTOM_RIGHT, PAD)
BOX_AND_TEXT = (TOP_LEFT, BOTTOM_RIGHT, TEXT)
TEXT_ONLY = (TEXT,)
TRACKED_TEXT = (PAD, PAD, TEXT)
TRACKED = (PAD, PAD)


@dataclass(frozen=True)
class Prompt:
    """What the mask decoder is told about one object.

    Args:
        labels: kinds of the prompt's slots, as the contract numbers them.
        multimask: choose among three masks by predicted IoU; else one mask, unless it is unstable.
        points: [n, 2] float32, x, y in pixels of the grounding frame, of the first n slots.
        text: [C] float32, read where a label is TEXT.
        mask: [L, L] float32, logits of an earlier decode or an output of mask_downsampler.
        remembers: the embedding is used as it is; else no_mem_embed is added.
    """

    labels: tuple[int, ...]
    multimask: bool
    points: Array | None = None
    text: Array | None = None
    mask: Array | None = None
    remembers: bool = False


def decode_masks(
    run: Callable[[str, dict[str, DeviceArray]], dict[str, DeviceArray]],
    frames: Mapping[str, DeviceArray],
    prompts: Sequence[Prompt],
    object_frame: Array,
    conditioned: DeviceArray | None = None,
    device: Device | None = None,
) -> dict[str, DeviceArray]:
    """One mask per object.

    Args:
        run: calls a component.
        frames: outputs of frame_encoder for F frames.
        prompts: of O objects.
        object_frame: [O] int64, frame of each object.
        conditioned: [O, C, g, g] float32 from memory_attention; None: the frames' own embeddings.
        device: where `run` expects its inputs; the host where not given.
    Returns:
        The outputs of mask_decoder.
    """
    device = device or Host()
    count, longest = len(prompts), max(len(prompt.labels) for prompt in prompts)
    slots = next(size for size in settings.PROMPT_SLOTS if size >= longest)
    width, low_res = frames["frame_embeddings"].shape[1], frames["high_res_0"].shape[2]
    labels = np.full((count, slots), ABSENT, np.int64)
    points, texts = np.zeros((count, slots, 2), np.float32), np.zeros((count, width), np.float32)
    masks = device.zeros((count, low_res, low_res), "float32")
    for index, prompt in enumerate(prompts):
        labels[index, : len(prompt.labels)] = prompt.labels
        if prompt.points is not None:
            points[index, : len(prompt.points)] = prompt.points
        if prompt.text is not None:
            texts[index] = prompt.text
        if prompt.mask is not None:
            masks[index] = device.put(prompt.mask)
    return run(
        "mask_decoder",
        {
            "image_embeddings": frames["frame_embeddings"] if conditioned is None else conditioned,
            "high_res_1": frames["high_res_1"],
            "high_res_0": frames["high_res_0"],
            "object_embedding": object_frame if conditioned is None else np.arange(count),
            "object_frame": object_frame,
            "has_memory": np.array([prompt.remembers for prompt in prompts]),
            "multimask": np.array([prompt.multimask for prompt in prompts]),
            "prompt_points": points,
            "prompt_labels": labels,
            "text_embeddings": texts,
            "mask_prompts": masks,
            "has_mask_prompt": np.array([prompt.mask is not None for prompt in prompts]),
        },
    )


def gate(mask_logits: Array, object_scores: Array) -> Array:
    """[O, L, L] logits with those of absent objects emptied, as tracking does (spec 7.3)."""
    return np.where((object_scores > 0)[:, None, None], mask_logits, np.float32(settings.NO_OBJECT_LOGIT))


def gated(decoded: Arrays) -> Arrays:
    """`decoded` with its masks gated."""
    return {**decoded, "mask_logits": gate(decoded["mask_logits"], decoded["object_scores"])}
