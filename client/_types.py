"""What the server answers, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

BRANCHES = ("framewise", "tracked")
"""How masks follow an object, in the order in which `both` gives them."""


@dataclass(frozen=True)
class TextPiece:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True)
class TrackedObject:
    """An object that the answer mentions.

    Args:
        phrase: the words of the answer that name it.
        embedding: [C] float32, its [SEG] embedding; `SparrowClient.track` takes it to follow the object in other frames.
        selected_boxes: [K, 4] float32 xyxy, normalised, may leave 0..1; proposals that were chosen for it.
        boxes: those that the prior filter kept.
    """

    phrase: str
    embedding: NDArray[np.float32]
    selected_boxes: NDArray[np.float32]
    boxes: NDArray[np.float32]


@dataclass(frozen=True)
class Objects:
    """The objects of an answer, in the order of their [SEG]."""

    objects: list[TrackedObject]


@dataclass(frozen=True)
class FrameMasks:
    """The masks of one frame, one per object.

    Args:
        frame_idx: index into the frames that were sent.
        masks: [N, H, W] bool.
        predicted_iou: [N] float32, the decoder's own estimate, 0..1.
        object_scores: [N] float32; > 0: the object is in the frame.
        visible: [N] bool; the mask is not empty and the score is positive.
        branch: tracked or framewise.
    """

    frame_idx: int
    masks: NDArray[np.bool_]
    predicted_iou: NDArray[np.float32]
    object_scores: NDArray[np.float32]
    visible: NDArray[np.bool_]
    branch: str


@dataclass(frozen=True)
class Proposals:
    """What boxes were chosen from; asked for with proposal_debug.

    Args:
        frame: [S, S, 3] uint8 RGB, the first frame, stretched to a square.
        boxes: [P, 4] float32 xyxy, normalised, may leave 0..1.
        scores: [P] float32, 0..1, descending.
    """

    frame: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class Summary:
    """How the answer came about.

    Args:
        answer: the whole text.
        branch: tracked, framewise or both.
        video_init: text_then_boxes or text_only; None when framewise.
        timings_ms: milliseconds per stage; stages overlap.
        fields: everything the server said.
    """

    answer: str
    branch: str
    video_init: str | None
    timings_ms: dict[str, float]
    fields: dict[str, Any]


Event = TextPiece | Proposals | Objects | FrameMasks | Summary


@dataclass
class Answer:
    """Everything a request brought.

    Args:
        summary: how it came about.
        objects: in the order of their [SEG].
        frames: masks frame by frame; with branch="both" each frame comes once per branch.
        proposals: with proposal_debug.
    """

    summary: Summary
    objects: list[TrackedObject] = field(default_factory=list)
    frames: list[FrameMasks] = field(default_factory=list)
    proposals: Proposals | None = None

    @property
    def text(self) -> str:
        return self.summary.answer

    @property
    def branches(self) -> dict[str, list[FrameMasks]]:
        """Branch to its masks, frame by frame."""
        names = BRANCHES if self.summary.branch == "both" else (self.summary.branch,)
        return {name: [frame for frame in self.frames if frame.branch == name] for name in names}


Tensors = Mapping[str, NDArray[Any]]


def frame_masks(tensors: Tensors, branch: str, frame_idx: int, height: int, width: int) -> FrameMasks:
    """The masks of a response in the format `bits`."""
    bits = tensors["mask_bits"]
    masks = np.unpackbits(bits, axis=1, count=height * width).reshape(len(bits), height, width).astype(bool)
    return FrameMasks(frame_idx, masks, tensors["predicted_iou"], tensors["object_scores"], tensors["visible"], branch)


def objects_from_tensors(tensors: Tensors) -> list[TrackedObject]:
    """One object per row, with the boxes that name it."""
    return [
        TrackedObject(
            phrase.decode(),
            tensors["text_embeddings"][index],
            tensors["selected_boxes"][tensors["selected_box_objects"] == index],
            tensors["boxes"][tensors["box_objects"] == index],
        )
        for index, phrase in enumerate(tensors["phrases"])
    ]


def summary_from_json(fields: dict[str, Any]) -> Summary:
    return Summary(fields["answer"], fields["branch"], fields["video_init"], fields["timings_ms"], fields)
