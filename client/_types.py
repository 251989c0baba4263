"""What the server answers, and what a tracking session starts from, as NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._wire import Tensors

BRANCHES = ("framewise", "tracked")
"""How masks follow an object, in the order in which `both` gives them."""


@dataclass(frozen=True)
class TextPiece:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True)
class Prompt:
    """Where an object is on the frame that it starts, or starts anew, on: an embedding, boxes and points together, or a mask alone.

    Args:
        object_id: int32, chosen by the caller.
        embedding: [C] float32, the [SEG] embedding of an answer.
        boxes: [4], or [K, 4] for several, float32 xyxy, normalised to 0..1.
        points: [P, 2] float32 x, y, normalised to 0..1.
        point_labels: [P] int32; 1: on the object, 0: not on it; all 1 where left out.
        mask: [H, W] bool, of the frame's size.
    """

    object_id: int
    embedding: ArrayLike | None = None
    boxes: ArrayLike | None = None
    points: ArrayLike | None = None
    point_labels: ArrayLike | None = None
    mask: ArrayLike | None = None


@dataclass(frozen=True)
class TrackedObject:
    """An object that the answer mentions.

    Args:
        phrase: the words of the answer that name it.
        embedding: [C] float32, its [SEG] embedding.
        selected_boxes: [K, 4] float32 xyxy, normalised, may leave 0..1; proposals that were chosen for it.
        boxes: those that the prior filter kept.
    """

    phrase: str
    embedding: NDArray[np.float32]
    selected_boxes: NDArray[np.float32]
    boxes: NDArray[np.float32]

    def prompt(self, object_id: int) -> Prompt:
        """What a tracking session takes to follow it, from the first frame of the clip on."""
        return Prompt(object_id, embedding=self.embedding, boxes=self.boxes)


@dataclass(frozen=True)
class Objects:
    """The objects of an answer, in the order of their [SEG]."""

    objects: list[TrackedObject]


@dataclass(frozen=True)
class FrameMasks:
    """The masks of one frame, one per object.

    Args:
        frame_idx: index into the frames that were sent.
        object_ids: [N] int32; of an answer, the rows of its objects.
        boxes_px: [N, 4] int32 xyxy in pixels of the frame, right and bottom exclusive; zeros: empty mask.
        areas_px: [N] int32, pixels of the frame.
        predicted_iou: [N] float32, the decoder's own estimate, 0..1.
        object_scores: [N] float32; > 0: the object is in the frame.
        visible: [N] bool; the mask is not empty and the score is positive.
        branch: tracked or framewise.
        frame_size_hw: height and width of the frame.
        mask_format: rle, bits or logits; decides which of `rle`, `masks` and `mask_logits` there is.
        encoded: the masks as they came, [N, ...].
    """

    frame_idx: int
    object_ids: NDArray[np.int32]
    boxes_px: NDArray[np.int32]
    areas_px: NDArray[np.int32]
    predicted_iou: NDArray[np.float32]
    object_scores: NDArray[np.float32]
    visible: NDArray[np.bool_]
    branch: str
    frame_size_hw: tuple[int, int]
    mask_format: str
    encoded: NDArray[Any] = field(repr=False)

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """[N, H, W] bool; raises ValueError unless mask_format is bits."""
        height, width = self.frame_size_hw
        flat = np.unpackbits(self._encoded_as("bits"), axis=1, count=height * width)  # [N, bytes] -> [N, H * W]
        return flat.reshape(len(flat), height, width).view(bool)

    @property
    def rle(self) -> list[dict[str, Any]]:
        """COCO's compressed RLE, {"size": [H, W], "counts": bytes}, per object; raises ValueError unless mask_format is rle."""
        return [{"size": list(self.frame_size_hw), "counts": counts} for counts in self._encoded_as("rle")]

    @property
    def mask_logits(self) -> NDArray[np.float32]:
        """[N, L, L] float32 of the frame stretched to a square, > 0 is mask; raises ValueError unless mask_format is logits."""
        return self._encoded_as("logits")

    def _encoded_as(self, mask_format: str) -> NDArray[Any]:
        if self.mask_format != mask_format:
            raise ValueError(
                f"FrameMasks: got masks as {self.mask_format}, expected {mask_format}. Track with mask_format={mask_format!r}."
            )
        return self.encoded


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


def frame_masks(tensors: Tensors, branch: str, frame_size_hw: tuple[int, int], mask_format: str) -> FrameMasks:
    """The masks of a response."""
    areas = tensors["mask_areas"]
    return FrameMasks(
        frame_idx=int(tensors["frame_idx"][0]),
        object_ids=tensors.get("object_ids", np.arange(len(areas), dtype=np.int32)),
        boxes_px=tensors["mask_boxes"],
        areas_px=areas,
        predicted_iou=tensors["predicted_iou"],
        object_scores=tensors["object_scores"],
        visible=tensors["visible"],
        branch=branch,
        frame_size_hw=frame_size_hw,
        mask_format=mask_format,
        encoded=tensors[f"mask_{mask_format}"],
    )


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
