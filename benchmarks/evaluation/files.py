"""What the readers of data sets share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sparrow_client._media import MediaError, open_picture

from .samples import DatasetError


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A file of a data set; `what` says of which, for the DatasetError where there is none."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DatasetError(f"{path}: {reason}; expected {what} here. Check --data and --split, or get the data set again.") from error
    return fields


def read_palette(path: Path) -> NDArray[np.uint8]:
    """[H, W]: the object that each pixel shows; raises DatasetError where the picture cannot be read, or shows colours."""
    try:
        with open_picture(path) as picture:
            if picture.mode not in ("P", "L"):
                raise DatasetError(f"{path}: got a picture of mode {picture.mode}, expected a palette. Get the data set again.")
            return np.asarray(picture)
    except MediaError as error:
        raise DatasetError(str(error)) from error


def read_palettes(paths: Sequence[Path]) -> NDArray[np.uint8]:
    """[T, H, W]: the object that each pixel shows; raises DatasetError where one cannot be read, or sizes differ."""
    frames = [read_palette(path) for path in paths]
    for path, frame in zip(paths, frames, strict=True):
        if frame.shape != frames[0].shape:
            got, expected = (f"{own.shape[1]}x{own.shape[0]}" for own in (frame, frames[0]))
            raise DatasetError(f"{path}: got {got} px, expected {expected} as the first frame. Get the data set again.")
    return np.stack(frames)


def missing(paths: list[Path]) -> list[str]:
    """A line for each file that is not there."""
    return [f"{path}: no such file. Get the data set again." for path in paths if not path.exists()]
