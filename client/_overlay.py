"""Masks drawn over frames. Needs PyAV and Pillow: `pip install 'sparrow-serving[cli]'`."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import TracebackType

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
OUTLINE = 240
"""Short side of a frame per pixel of outline."""


def blend(frame: NDArray[np.uint8], masks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A frame with every mask in its colour and a white outline, since an object may have that colour itself.

    Args:
        frame: [H, W, 3] uint8 RGB.
        masks: [N, H, W] bool.
    Returns:
        [H, W, 3] uint8 RGB.
    """
    picture = frame.astype(np.float32)
    for mask, colour in zip(masks, COLOURS[np.arange(len(masks)) % len(COLOURS)], strict=True):
        picture[mask] = (1 - OPACITY) * picture[mask] + OPACITY * colour
        picture[mask & ~inside(mask, max(1, round(min(mask.shape) / OUTLINE)))] = 255
    return picture.astype(np.uint8)


def inside(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """The pixels of a mask that lie deeper than `width` pixels; the frame's edge is no outline."""
    for _ in range(width):
        around = np.pad(mask, 1, mode="edge")
        mask = mask & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return mask


def write_picture(path: Path, frame: NDArray[np.uint8]) -> None:
    Image.fromarray(frame).save(path)


class VideoWriter:
    """H.264 in MP4, frame by frame; odd sizes are padded by a repeated row or column, which the format needs.

    The file is written in fragments: an endless one takes no memory, and can be played however it ends.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self._container = av.open(str(path), "w", options={"movflags": "frag_keyframe+empty_moov"})
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "18"})
        self._stream.pix_fmt = "yuv420p"

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()

    def add(self, frame: NDArray[np.uint8]) -> None:
        """The next frame, [H, W, 3] uint8 RGB, all of one size."""
        height, width = frame.shape[:2]
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if not self._stream.codec_context.is_open:
            self._stream.height, self._stream.width = even.shape[:2]
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], fps: float) -> None:
    with VideoWriter(path, fps) as video:
        for frame in frames:
            video.add(frame)
