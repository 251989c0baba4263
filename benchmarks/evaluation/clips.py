"""Clips on disk to what a request carries: files of pictures as they are, everything else as frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from sparrow_client._media import IMAGE_SUFFIXES, MediaError, open_frames, read_image
from sparrow_client._stubs import MAX_FRAMES

from .samples import Clip, Frames

READ_TIMEOUT_S = 30
"""Longest wait for a video file."""


@dataclass(frozen=True)
class Shown:
    """A clip as a request carries it.

    Args:
        size: T, H, W.
        frames: [T, H, W, 3] uint8 RGB; None with encoded_frames.
        encoded_frames: T JPEG or PNG files.
    """

    size: tuple[int, int, int]
    frames: Frames | None = None
    encoded_frames: list[bytes] | None = None


def read_clip(clip: Clip) -> Shown:
    """What to send of a clip. Pictures are not decoded here: their files are a tenth of their frames, and the server decodes them anyway.

    Raises:
        MediaError: a file is missing or unreadable, frames differ in size, or there are none, or more than the server takes.
    """
    if clip.pictures and not clip.size and all(path.suffix.lower() in IMAGE_SUFFIXES for path in clip.pictures):
        check_count(clip, len(clip.pictures))
        return Shown((len(clip.pictures), *picture_size(clip.pictures[0])), encoded_frames=[read_bytes(path) for path in clip.pictures])
    frames = read_frames(clip)
    return Shown((len(frames), frames.shape[1], frames.shape[2]), frames=frames)


def read_frames(clip: Clip) -> Frames:
    """[T, H, W, 3] uint8 RGB; raises MediaError as `read_clip` does."""
    frames = list(islice(each_frame(clip), MAX_FRAMES + 1))
    check_count(clip, len(frames))
    return np.stack(frames)


def each_frame(clip: Clip) -> Iterator[Frames]:
    """[H, W, 3] uint8 RGB, one after the other; raises MediaError where one is missing, unreadable, or of another size."""
    expected = None
    for index, frame in enumerate(map(read_image, clip.pictures) if clip.pictures else video_frames(clip)):
        expected = expected or frame.shape
        if frame.shape != expected:
            file = clip.pictures[index] if clip.pictures else clip.video
            sizes = [f"{width}x{height}" for height, width, _ in (frame.shape, expected)]
            raise MediaError(f"{file}: got frame {index} of {sizes[0]} px, expected {sizes[1]} as the first. Get the data set again.")
        yield cv2.resize(frame, clip.size[::-1], interpolation=cv2.INTER_LINEAR) if clip.size else frame


def video_frames(clip: Clip) -> Iterator[Frames]:
    """The frames of a video that belong to the clip; raises MediaError where it ends before them."""
    with open_frames(str(clip.video), READ_TIMEOUT_S) as source:
        if clip.indices is None:
            yield from source.frames
            return
        wanted, count = list(clip.indices), 0
        for count, frame in enumerate(source.frames, 1):
            while wanted and wanted[0] == count - 1:
                yield frame
                del wanted[0]
            if not wanted:
                return
    raise MediaError(f"{clip.video}: got {count} frames, expected {wanted[-1] + 1} or more. Get the data set again.")


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror}. Get the data set again.") from error


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width, of the header alone; raises MediaError."""
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: not a readable picture ({error}). Get the data set again.") from error


def check_count(clip: Clip, count: int) -> None:
    if not 1 <= count <= MAX_FRAMES:
        name = clip.pictures[0].parent if clip.pictures else clip.video
        got = f"more than {MAX_FRAMES} frames" if count else "no frame"
        raise MediaError(f"{name}: got {got}, expected as many as the server takes at once, 1..{MAX_FRAMES}. Take a part of them.")
