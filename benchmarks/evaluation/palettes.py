"""Annotations as DAVIS has them: a picture per frame, whose palette index says which object a pixel shows, 0: none, 255: void."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sparrow_client._media import MediaError, open_picture

from .samples import DatasetError

VOID = 255
"""Index of pixels that do not count."""

PALETTE = bytes(sum((index >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for index in range(256) for channel in range(3))
"""The colours of DAVIS: bits 0, 1 and 2 of an index are the highest bits of red, green and blue, 3, 4 and 5 the next ones, ..."""


def read_palettes(paths: Sequence[Path]) -> NDArray[np.uint8]:
    """[T, H, W]; raises DatasetError where a picture cannot be read, shows colours, or differs in size from the first."""
    frames = [read_palette(path) for path in paths]
    for path, frame in zip(paths, frames, strict=True):
        if frame.shape != frames[0].shape:
            got, expected = (f"{own.shape[1]}x{own.shape[0]}" for own in (frame, frames[0]))
            raise DatasetError(f"{path}: got {got} px, expected {expected} as the first frame. Get the data set again.")
    return np.stack(frames)


def read_palette(path: Path) -> NDArray[np.uint8]:
    """[H, W]"""
    try:
        with open_picture(path) as picture:
            if picture.mode not in ("P", "L"):
                raise DatasetError(f"{path}: got a picture of mode {picture.mode}, expected a palette. Get the data set again.")
            return np.asarray(picture)
    except MediaError as error:
        raise DatasetError(str(error)) from error


def write_palette(path: Path, frame: NDArray[np.uint8]) -> None:
    """[H, W]"""
    picture = Image.fromarray(frame, "P")
    picture.putpalette(PALETTE)
    picture.save(path)


def check_size(name: str, got: Sequence[int], expected: Sequence[int]) -> None:
    """Raises DatasetError unless frames, or masks of them, are as many and as large as the annotations: T, H, W."""
    if tuple(got) != tuple(expected):
        raise DatasetError(f"{name}: got frames {list(got)}, expected {list(expected)} as annotated. Get the data set again.")
