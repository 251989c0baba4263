"""Prompts to masks: the token layouts of the specification's appendix B, the call of the mask decoder, and what follows without prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from . import settings
from .components import ABSENT, BOTTOM_RIGHT, PAD, TEXT, TOP_LEFT
from .config import Sam2Config
from .runner import Device, DeviceArray, Host, Run
from .tensors import Array

BOX = (TOP_LEFT, BOTTOM_RIGHT, PAD)
BOX_AND_TEXT = (TOP_LEFT, BOTTOM_RIGHT, TEXT)
TEXT_ONLY = (TEXT,)
TRACKED_TEXT = (PAD, PAD, TEXT)
TRACKED = (PAD, PAD)

HIGH_RES = ("high_res_1", "high_res_0")
"""Features that the mask decoder alone reads."""


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
    run: Run,
    frames: Mapping[str, DeviceArray],
    prompts: Sequence[Prompt],
    object_frame: DeviceArray,
    device: Device | None = None,
) -> dict[str, DeviceArray]:
    """One mask per object, from its frame's own embedding.

    Args:
        run: calls a component.
        frames: outputs of frame_encoder for F frames.
        prompts: of O objects.
        object_frame: [O] int64, frame of each object.
        device: where `run` expects its inputs; the host where not given.
    Returns:
        The outputs of mask_decoder.
    """
    width, low_res = frames["frame_embeddings"].shape[1], frames["high_res_0"].shape[2]
    return run(
        "mask_decoder",
        {
            "image_embeddings": frames["frame_embeddings"],
            **{name: frames[name] for name in HIGH_RES},
            "object_embedding": object_frame,
            "object_frame": object_frame,
            **prompt_inputs(prompts, width, low_res, device or Host()),
        },
    )


def prompt_inputs(prompts: Sequence[Prompt], width: int, low_res: int, device: Device) -> dict[str, DeviceArray]:
    """What mask_decoder takes of prompts; `width` is C and `low_res` L."""
    count, longest = len(prompts), max(len(prompt.labels) for prompt in prompts)
    slots = next(size for size in settings.PROMPT_SLOTS if size >= longest)
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
    return {
        "has_memory": np.array([prompt.remembers for prompt in prompts]),
        "multimask": np.array([prompt.multimask for prompt in prompts]),
        "prompt_points": points,
        "prompt_labels": labels,
        "text_embeddings": texts,
        "mask_prompts": masks,
        "has_mask_prompt": np.array([prompt.mask is not None for prompt in prompts]),
    }


class Propagation:
    """The composition of contract `propagation`: memory_attention, mask_decoder without a prompt, memory_encoder (spec 7.3-7.5).

    What is the same on every frame is made once per number of objects.

    Args:
        sam2: sizes.
        device: where the graphs take and leave their arrays.
    """

    def __init__(self, sam2: Sam2Config, device: Device) -> None:
        self._sam2, self._device = sam2, device
        self._unprompted = cache(self._make_unprompted)

    def __call__(self, run: Run, inputs: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        frames = {name: inputs[name] for name in ("frame_embeddings", "object_frame")}
        unprompted, prompted = self._unprompted(len(inputs["object_frame"]))
        conditioned = run("memory_attention", {name: array for name, array in inputs.items() if name not in HIGH_RES})
        decoded = run(
            "mask_decoder",
            {
                "image_embeddings": conditioned["conditioned_embeddings"],
                **{name: inputs[name] for name in HIGH_RES},
                "object_frame": inputs["object_frame"],
                **unprompted,
            },
        )
        seen = {name: decoded[name] for name in ("mask_logits", "object_scores")}
        return {**gated(decoded, self._device), **run("memory_encoder", {**frames, **seen, "prompted": prompted})}

    def _make_unprompted(self, count: int) -> tuple[dict[str, DeviceArray], DeviceArray]:
        """What is the same on every frame of `count` objects, on the device: inputs of mask_decoder, and `prompted` of memory_encoder."""
        prompts = [Prompt(TRACKED, multimask=True, remembers=True)] * count
        inputs = {"object_embedding": np.arange(count), **prompt_inputs(prompts, self._sam2.width, self._sam2.low_res, self._device)}
        return {name: self._device.put(array) for name, array in inputs.items()}, self._device.put(np.zeros(count, bool))


def gated(decoded: Mapping[str, DeviceArray], device: Device) -> dict[str, DeviceArray]:
    """Outputs of mask_decoder with the masks of absent objects emptied, as tracking does (spec 7.3)."""
    present = (decoded["object_scores"] > 0)[:, None, None]
    return {**decoded, "mask_logits": device.where(present, decoded["mask_logits"], settings.NO_OBJECT_LOGIT)}
