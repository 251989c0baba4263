"""What a frame changes, objects that start and objects that are removed, as inputs of `sparrow_track`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._errors import InvalidInput
from ._types import Prompt
from ._wire import SPARROW_TRACK

OWNERS = {"text_embeddings": "text_objects", "boxes": "box_objects", "points": "point_objects", "masks": "mask_objects"}
"""Input that holds prompts to the one that names their objects."""


def edit_tensors(prompts: Sequence[Prompt], removed: Sequence[int]) -> dict[str, NDArray[Any]]:
    """The inputs of these edits; those without rows are left out.

    Raises:
        InvalidInput: a prompt that says nothing, labels that do not fit their points, arrays that do not fit each other, an id that is no
            int32.
    """
    rows: dict[str, list[NDArray[Any]]] = {name: [] for name in (*OWNERS, "point_labels")}
    ids: dict[str, list[int]] = {name: [] for name in (*OWNERS.values(), "removed_objects")}
    ids["removed_objects"].extend(removed)
    for prompt in prompts:
        own = prompt_rows(prompt)
        for name, array in own.items():
            rows[name].extend(array)
            if name in OWNERS:
                ids[OWNERS[name]].extend([prompt.object_id] * len(array))
    stacked = {name: stack(name, entries) for name, entries in rows.items() if entries}
    return stacked | {name: to_int32(name, values) for name, values in ids.items() if values}


def prompt_rows(prompt: Prompt) -> dict[str, NDArray[Any]]:
    """Input to the rows that a prompt adds to it: [K, C], [K, 4], [P, 2], [K, H, W], [P]."""
    rows = {
        "text_embeddings": to_rows(prompt.embedding, 1, np.float32),
        "boxes": to_rows(prompt.boxes, 1, np.float32),
        "points": to_rows(prompt.points, 1, np.float32),
        "masks": to_rows(prompt.mask, 2),
    }
    if not any(map(len, rows.values())):
        raise refused(f"got a prompt for object {prompt.object_id} that says nothing, expected an embedding, boxes, points or a mask")
    num_points = len(rows["points"])
    labels = np.ones(num_points, np.int32) if prompt.point_labels is None else to_rows(prompt.point_labels, 0, np.int32)
    if len(labels) != num_points:
        raise refused(f"got {len(labels)} point_labels for the {num_points} points of object {prompt.object_id}, expected one each")
    return {**rows, "point_labels": labels}


def to_rows(values: ArrayLike | None, rank: int, dtype: type[np.generic] | None = None) -> NDArray[Any]:
    """One row of `rank` dimensions, or several, or None: [...] or [K, ...] -> [K, ...]."""
    array = np.asarray([] if values is None else values, dtype)
    return array[None] if array.ndim == rank and array.size else array


def stack(name: str, rows: Sequence[NDArray[Any]]) -> NDArray[Any]:
    shapes = list(dict.fromkeys(row.shape for row in rows))
    if len(shapes) > 1:
        raise refused(f"got {name} of shapes {shapes[:3]}, expected one shape")
    return np.stack(rows)


def to_int32(name: str, values: Sequence[int]) -> NDArray[np.int32]:
    limits = np.iinfo(np.int32)
    for value in values:
        if not limits.min <= index(value) <= limits.max:
            raise refused(f"got {value} in {name}, expected ids of 32 bits")
    return np.array(values, np.int32)


def refused(reason: str) -> InvalidInput:
    return InvalidInput(f"{SPARROW_TRACK}: {reason}. Mend the prompts.", SPARROW_TRACK, "")
