"""Masks drawn over frames. Needs PyAV and Pillow: `pip install 'sparrow-serving[cli]'`."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

COLOURS = np.array(
    [(230, 25, 75), (60, 180, 75), (0, 130, 200), (255, 225, 25), (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230)],
    np.float32,
)
"""One per object, in turn."""

OPACITY = 0.5


def blend(frame: NDArray[np.uint8], masks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A frame with every mask in its colour.

    Args:
        frame: [H, W, 3] uint8 RGB.
        masks: [N, H, W] bool.
    Returns:
        [H, W, 3] uint8 RGB.
    """
    picture = frame.astype(np.float32)
    for mask, colour in zip(masks, COLOURS[np.arange(len(masks)) % len(COLOURS)], strict=True):
        picture[mask] = (1 - OPACITY) * picture[mask] + OPACITY * colour
    return picture.astype(np.uint8)


def write_picture(path: Path, frame: NDArray[np.uint8]) -> None:
    Image.fromarray(frame).save(path)


def write_video(path: Path, frames: Sequence[NDArray[np.uint8]], fps: float) -> None:
    """H.264 in MP4; odd sizes are padded by a repeated row or column, which the format needs."""
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        for frame in frames:
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())
