"""Files to frames: a clip, exactly as the original samples it (spec 1.1), or every frame, one at a time.

Needs PyAV and Pillow: `pip install 'sparrow-serving[cli]'`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ._stubs import MAX_FRAMES, MAX_SAMPLED_FRAMES, VIDEO_SAMPLE_FPS

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
"""Files that are images; everything else is a video."""


ASSUMED_FPS = 25
"""Frames per second of a folder, or of a stream that names no rate."""


class MediaError(Exception):
    """A file cannot be used as input; the message says why and what to do."""


@dataclass(frozen=True)
class Media:
    """Frames of an input.

    Args:
        frames: [T, H, W, 3] uint8 RGB.
        modality: video or image.
        names: stem of each frame's output files.
        fps: frames per second of the sampled frames.
    """

    frames: NDArray[np.uint8]
    modality: str
    names: list[str]
    fps: float


@dataclass(frozen=True)
class FrameSource:
    """Frames that are decoded when they are asked for.

    Args:
        frames: [H, W, 3] uint8 RGB each; raises MediaError where decoding fails.
        total: how many there are, if that is known.
        fps: frames per second.
    """

    frames: Iterator[NDArray[np.uint8]]
    total: int | None
    fps: float


@contextmanager
def open_frames(source: str, timeout_s: float) -> Iterator[FrameSource]:
    """Every frame of a picture, a folder of frames, a video, or whatever else PyAV opens: a camera's URL, a device.

    Args:
        source: path or URL; the suffix decides what a file is.
        timeout_s: longest wait for a camera.
    Raises:
        MediaError: the input is missing or unreadable.
    """
    path = Path(source)
    if path.is_dir() or (path.exists() and path.suffix.lower() in IMAGE_SUFFIXES):
        files = folder_files(path) if path.is_dir() else [path]
        yield FrameSource(map(read_image, files), len(files), ASSUMED_FPS)
        return
    if "://" not in source and not path.exists():
        raise no_such_file(source)
    with readable(source):
        container = av.open(source, timeout=timeout_s)
    with container:
        stream = first_video(container, source)
        rate = stream.average_rate or stream.guessed_rate or ASSUMED_FPS
        yield FrameSource(decode(container, source), stream.frames or None, float(rate))


def decode(container: av.container.InputContainer, source: object) -> Iterator[NDArray[np.uint8]]:
    with readable(source):
        yield from map(upright, container.decode(video=0))


@contextmanager
def readable(source: object) -> Iterator[None]:
    """Raises MediaError where the video cannot be read."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{source}: not a readable video ({error}). Convert it, e.g. to MP4.") from error


def first_video(container: av.container.InputContainer, source: object) -> av.VideoStream:
    if not container.streams.video:
        raise MediaError(f"{source}: no video in the file. Name a video or a picture.")
    return container.streams.video[0]


def no_such_file(source: object) -> MediaError:
    return MediaError(f"{source}: no such file. Check the path.")


def read_media(path: Path, sample_fps: float = VIDEO_SAMPLE_FPS) -> Media:
    """Frames of an image, a video file or a folder of frames.

    Args:
        path: the suffix decides what it is.
        sample_fps: frames per second to take from a video file.
    Raises:
        MediaError: the input is missing, unreadable or empty, or its frames differ in size.
    """
    if path.is_dir():
        return read_folder(path)
    if not path.exists():
        raise no_such_file(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return Media(read_image(path)[None], "image", ["00000"], 1)
    return read_video(path, sample_fps)


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """A picture, turned upright; raises MediaError where it cannot be read."""
    try:
        with Image.open(path) as picture:
            yield ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: not a readable picture ({error}). Save it again as JPEG or PNG.") from error


def read_image(path: Path) -> NDArray[np.uint8]:
    """[H, W, 3] uint8 RGB, turned upright, without alpha."""
    with open_picture(path) as picture:
        if picture.mode.startswith("I;16"):  # Pillow would cut 16-bit grey off at 255 instead of scaling it
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        return np.asarray(picture.convert("RGB"))


def read_mask(path: Path) -> NDArray[np.bool_]:
    """[H, W] bool: the pixels that are not zero; of a palette, its indices, and alpha does not count."""
    with open_picture(path) as picture:
        channels = np.atleast_3d(np.asarray(picture))  # [H, W, C]
        mask: NDArray[np.bool_] = channels[..., : len(picture.getbands()) - picture.mode.endswith("A")].any(2)
        return mask


def folder_files(path: Path) -> list[Path]:
    """All pictures of a folder in the order of their names; raises MediaError where there are none."""
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise MediaError(f"{path}: no {', '.join(IMAGE_SUFFIXES)} files in the folder. Name a folder of frames.")
    return files


def read_folder(path: Path) -> Media:
    """All pictures of a folder; no frame is left out."""
    files = folder_files(path)
    if len(files) > MAX_FRAMES:
        raise MediaError(f"{path}: {len(files)} frames, expected at most {MAX_FRAMES}. Take a part of them.")
    frames = [read_image(file) for file in files]
    for file, frame in zip(files, frames, strict=True):
        if frame.shape != frames[0].shape:
            raise MediaError(f"{file}: {frame.shape[1]}x{frame.shape[0]} px, but {files[0].name} differs. Resize the frames to one size.")
    return Media(np.stack(frames), "video", [file.stem for file in files], VIDEO_SAMPLE_FPS)


def read_video(path: Path, sample_fps: float) -> Media:
    """Frames 0, stride, 2 stride, ... of a video, thinned out evenly to MAX_SAMPLED_FRAMES; only these are kept in memory."""
    with readable(path):
        with av.open(str(path)) as container:
            stream = first_video(container, path)
            fps = stream.average_rate or stream.guessed_rate
            count = sum(1 for packet in container.demux(stream) if packet.size)
        if count < 2:
            raise MediaError(f"{path}: a video of {count} frames, expected 2 or more. Save a single frame as PNG and segment that.")
        stride = sample_stride(path, fps, sample_fps)
        wanted = np.arange(0, count, stride)
        if len(wanted) > MAX_SAMPLED_FRAMES:
            wanted = wanted[np.linspace(0, len(wanted) - 1, MAX_SAMPLED_FRAMES, dtype=int)]
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            chosen = set(wanted.tolist())
            decoded = itertools.islice(container.decode(video=0), int(wanted[-1]) + 1)
            frames = [upright(frame) for index, frame in enumerate(decoded) if index in chosen]
    if not frames:
        raise MediaError(f"{path}: no frame could be decoded. Convert it, e.g. to MP4.")
    return Media(np.stack(frames), "video", [f"{index:05d}" for index in range(len(frames))], float(fps / stride) if fps else sample_fps)


def upright(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """[H, W, 3] uint8 RGB, turned as the file asks players to (phones store portrait video lying on its side)."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))


def sample_stride(path: Path, fps: Fraction | None, sample_fps: float) -> int:
    """Every how many frames one is taken: the rounded ratio of the rates; half is rounded to even, as in the original."""
    if not fps:
        raise MediaError(f"{path}: the file names no frame rate. Convert it, e.g. to MP4.")
    stride = round(float(fps) / sample_fps)
    if stride < 1:
        raise MediaError(
            f"{path}: {float(fps):g} frames per second, expected more than {sample_fps / 2:g}. Take all with --sample-fps {float(fps):g}."
        )
    return stride
