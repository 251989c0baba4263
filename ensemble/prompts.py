"""The edits that a tracking request brings: which objects start on its frame, from which prompts, and which are removed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from . import settings
from .components import BOTTOM_RIGHT, PAD, TOP_LEFT
from .config import Sam2Config
from .decoding import TRACKED_TEXT, Prompt
from .errors import InvalidInput
from .masks import stretch_mask
from .tensors import Array, Arrays

PROMPTS = {"text_embeddings": "text_objects", "boxes": "box_objects", "points": "point_objects", "masks": "mask_objects"}
"""Input that holds prompts to the one that names their objects."""


@dataclass
class ObjectPrompt:
    """Everything that a request says of one object.

    Args:
        text: [C] float32.
        boxes: [4] float32 each, xyxy, normalised.
        points: [2] float32 each, x, y, normalised.
        point_labels: 1 on the object, 0 beside it.
        mask: [S, S] bool, stretched over the grounding frame.
    """

    text: Array | None = None
    boxes: list[Array] = field(default_factory=list)
    points: list[Array] = field(default_factory=list)
    point_labels: list[int] = field(default_factory=list)
    mask: Array | None = None

    def turns(self, sam2: Sam2Config) -> list[Prompt]:
        """The decodes that condition the object: text, then each box (spec 7.3); points go with the last box, as in the official
        predictor's add_new_points_or_box. Each but the first also takes the mask so far; the caller adds it.
        """
        turns = [] if self.text is None else [Prompt(TRACKED_TEXT, multimask=True, text=self.text)]
        groups: list[tuple[list[int], list[Array]]] = [([TOP_LEFT, BOTTOM_RIGHT], [*box.reshape(2, 2)]) for box in self.boxes]
        if self.points:
            labels, points = groups.pop() if groups else ([], [])
            groups.append(([*labels, *self.point_labels], [*points, *self.points]))
        for labels, points in groups:
            pixels = np.stack(points).clip(0, 1) * np.float32(sam2.image_size)
            turns.append(Prompt((*labels, PAD), multimask=len(labels) == 1, points=pixels))
        return turns


@dataclass(frozen=True)
class Edits:
    """What changes on a frame.

    Args:
        started: object id to its prompts.
        removed: object ids.
        reset: all objects so far are removed.
    """

    started: dict[int, ObjectPrompt]
    removed: frozenset[int]
    reset: bool


NO_EDITS = Edits({}, frozenset(), reset=False)


def read_edits(inputs: Arrays, reset: bool, size: tuple[int, int], image_size: int) -> Edits:
    """The edits of a request.

    Args:
        inputs: of the component `tracker`, which satisfy its contract.
        reset: the parameter of that name.
        size: height and width of the frame.
        image_size: side of the grounding frame.
    Raises:
        InvalidInput: prompts without owner, not finite, outside the frame, contradicting each other, or more than fit.
    """
    owned = {name: owners_of(inputs, name) for name in PROMPTS}
    for name in ("text_embeddings", "boxes", "points"):
        if not np.isfinite(inputs.get(name, np.zeros(0))).all():
            raise InvalidInput(f"tracker.{name}: got values that are not finite. Check what they were computed from.")
    started = {int(id): ObjectPrompt() for name in PROMPTS for id in owned[name]}
    for id, text in zip(owned["text_embeddings"], inputs.get("text_embeddings", ()), strict=True):
        started[id].text = text
    for id, box in zip(owned["boxes"], check_boxes(inputs.get("boxes", np.zeros((0, 4)))), strict=True):
        started[id].boxes.append(box)
    labels = inputs.get("point_labels", np.zeros(0, np.int32))
    if len(labels) != len(owned["points"]):
        raise InvalidInput(f"tracker.point_labels: got {len(labels)}, expected one per point. Say whether each is on its object.")
    for id, point, label in zip(owned["points"], check_points(inputs.get("points", np.zeros((0, 2)))), labels, strict=True):
        started[id].points.append(point)
        started[id].point_labels.append(int(label))
    for id, mask in zip(owned["masks"], drawn_masks(inputs.get("masks", np.zeros((0, *size), bool)), size, image_size), strict=True):
        started[id].mask = mask
    check_objects(started, owned)
    return Edits(started, frozenset(inputs.get("removed_objects", np.zeros(0, np.int32)).tolist()), reset)


def owners_of(inputs: Arrays, name: str) -> list[int]:
    """The object of each prompt; texts without owners are those of objects 0, 1, ..."""
    count = len(inputs.get(name, ()))
    owners: list[int] = (
        inputs[PROMPTS[name]].tolist() if PROMPTS[name] in inputs else list(range(count if name == "text_embeddings" else 0))
    )
    if len(owners) != count:
        raise InvalidInput(f"tracker.{PROMPTS[name]}: got {len(owners)}, expected one per row of {name}, {count}. Say whose each is.")
    return owners


def check_boxes(boxes: Array) -> Array:
    """`boxes`; raises InvalidInput for one that is turned round or does not touch the frame. What sticks out is cut off later."""
    for box in boxes:
        x1, y1, x2, y2 = box
        if x2 < x1 or y2 < y1:
            raise InvalidInput(f"tracker.boxes: got {box.tolist()}, expected x1 <= x2 and y1 <= y2. Send x1, y1, x2, y2.")
        if min(x2, y2) < 0 or max(x1, y1) > 1:
            raise InvalidInput(
                f"tracker.boxes: got {box.tolist()}, which lies outside the frame, 0..1. Divide pixels by its width and height."
            )
    return boxes


def check_points(points: Array) -> Array:
    """`points`; raises InvalidInput for one outside the frame."""
    for point in points:
        if point.min() < 0 or point.max() > 1:
            raise InvalidInput(
                f"tracker.points: got {point.tolist()}, which lies outside the frame, 0..1. Divide pixels by its width and height."
            )
    return points


def drawn_masks(masks: Array, size: tuple[int, int], image_size: int) -> list[Array]:
    """Masks over the grounding frame; raises InvalidInput where they are not of the frame's size, or nothing is left of one."""
    if masks.shape[1:] != size:
        got, expected = ("x".join(map(str, shape)) for shape in (masks.shape[1:], size))
        raise InvalidInput(f"tracker.masks: got masks of {got} px, expected {expected} px as the frame. Resize them.")
    drawn = [stretch_mask(mask, image_size) for mask in masks]
    if not all(mask.any() for mask in drawn):
        raise InvalidInput(f"tracker.masks: got a mask that is empty at {image_size}x{image_size} px, expected an object. Leave it out.")
    return drawn


def check_objects(started: dict[int, ObjectPrompt], owned: dict[str, list[int]]) -> None:
    """Raises InvalidInput where an object has more than it may have of something, or both a mask and something else."""
    for name in ("text_embeddings", "masks"):
        twice = [id for id, count in Counter(owned[name]).items() if count > 1]
        if twice:
            raise InvalidInput(
                f"tracker.{PROMPTS[name]}: got object {twice[0]} more than once, expected one of {name} for each. Number them."
            )
    for id, prompt in started.items():
        if len(prompt.points) > settings.MAX_POINTS:
            raise InvalidInput(
                f"tracker.points: got {len(prompt.points)} for object {id}, expected at most {settings.MAX_POINTS}. Send fewer."
            )
        if prompt.mask is not None and (prompt.text is not None or prompt.boxes or prompt.points):
            raise InvalidInput(f"tracker.masks: got a mask and other prompts for object {id}, expected one or the other. Leave one out.")
