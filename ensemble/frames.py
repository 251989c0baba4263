"""Caller's frames to the inputs of the encoders, exactly as the original does it (spec 1.1, 1.2, 4.1)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Protocol

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from . import settings
from .config import ModelConfig
from .errors import InvalidInput
from .runner import DeviceArray
from .tensors import Array, Arrays

VALUES = np.arange(256, dtype=np.uint8)
"""Of a channel of a pixel."""


class Preprocessor(Protocol):
    """Brings frames, [H, W, 3] uint8 RGB, to the sizes and values of the encoders, as the functions of this module do."""

    def tower_frames(self, frames: Sequence[Array], *names: str) -> dict[str, DeviceArray]:
        """Inputs of the vision towers: `context_frames` and `video_frames`, as `names` say, [N, 3, S, S] float32 of N frames."""

    def proposal_frame(self, frame: Array) -> DeviceArray:
        """Input of proposal_detector for one frame: `proposal_frame` of `proposal_image` of `grounding_frame`, [1, 3, P, P] float32."""

    def encoder_frame(self, frame: Array) -> dict[str, DeviceArray]:
        """Inputs of frame_encoder for one frame, as `encoder_frame`."""


class HostPreprocessor:
    """By Pillow and OpenCV, as the original.

    Args:
        config: sizes.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def tower_frames(self, frames: Sequence[Array], *names: str) -> Arrays:
        """All pictures of both towers at once: resizing leaves the interpreter to others."""
        resize = {"context_frames": context_frame, "video_frames": video_frame}
        with ThreadPoolExecutor() as pool:
            resized = {name: pool.map(resize[name], frames, repeat(self._config)) for name in names}
            return {name: np.stack(list(own)) for name, own in resized.items()}

    def proposal_frame(self, frame: Array) -> Array:
        return proposal_frame(proposal_image(grounding_frame(frame, self._config), self._config))

    def encoder_frame(self, frame: Array) -> Arrays:
        return encoder_frame(frame, self._config)


def encoder_indices(num_frames: int, wanted: int) -> list[int]:
    """Which of `num_frames` frames the vision towers see: evenly spaced, or all with the last one repeated (spec 1.1)."""
    if num_frames > wanted:
        return [int(index) for index in np.linspace(0, num_frames - 1, wanted, dtype=int)]
    return [*range(num_frames), *[num_frames - 1] * (wanted - num_frames)]


def check_frame_size(height: int, width: int, where: str) -> None:
    """Raises InvalidInput when a side is out of range; `where` names the input."""
    low, high = settings.MIN_FRAME_SIDE, settings.MAX_FRAME_SIDE
    if not (low <= height <= high and low <= width <= high):
        raise InvalidInput(f"{where}: got a frame of {height}x{width} px, expected {low}..{high} px a side. Resize it.")


def decode_frames(files: Sequence[bytes], where: str) -> Array:
    """JPEG or PNG files to frames, all at once: decoding leaves the interpreter to others.

    Returns:
        [T, H, W, 3] uint8 RGB.
    Raises:
        InvalidInput: a file is not a picture, is too large, or differs in size from the first.
    """
    with ThreadPoolExecutor() as pool:
        frames = list(pool.map(decode_frame, files, [f"{where}[{index}]" for index in range(len(files))]))
    for index, frame in enumerate(frames):
        if frame.shape != frames[0].shape:
            got, expected = "x".join(map(str, frame.shape[:2])), "x".join(map(str, frames[0].shape[:2]))
            raise InvalidInput(f"{where}[{index}]: got {got} px, expected {expected} px as the first frame. Send frames of one size.")
    return np.stack(frames)


def decode_frame(file: bytes, where: str) -> Array:
    """One of `decode_frames`: [H, W, 3]."""
    try:
        with Image.open(io.BytesIO(file), formats=("JPEG", "PNG")) as picture:
            check_frame_size(picture.height, picture.width, where)
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InvalidInput(f"{where}: got {len(file)} bytes that are no readable JPEG or PNG ({error}). Encode it again.") from error


def context_frame(frame: Array, config: ModelConfig) -> Array:
    """CLIP input: bicubic resize of the short side, centre crop, normalise.

    Args:
        frame: [H, W, 3] uint8 RGB.
    Returns:
        [3, S, S] float32, S = config.context.image_size.
    """
    size = config.context.image_size
    height, width = context_size(frame.shape[0], frame.shape[1], size)
    resized = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    return looked_up(resized[centre(height, size), centre(width, size)], context_values())


def context_size(height: int, width: int, short: int) -> tuple[int, int]:
    """Height and width of a frame whose shorter side is brought to `short`."""
    shorter = min(height, width)
    return int(short * height / shorter), int(short * width / shorter)


def centre(side: int, size: int) -> slice:
    """The `size` pixels in the middle of a side."""
    return slice((side - size) // 2, (side - size) // 2 + size)


def video_frame(frame: Array, config: ModelConfig) -> Array:
    """InternVideo2 input: bilinear stretch on uint8, normalise in float64.

    Args:
        frame: [H, W, 3] uint8 RGB.
    Returns:
        [3, S, S] float32, S = config.video.image_size.
    """
    size = config.video.image_size
    resized = cv2.resize(frame, (size, size), interpolation=cv2.INTER_LINEAR)
    return looked_up(resized, video_values())


def picture(frame: Array, config: ModelConfig) -> Array:
    """Antialiased bilinear resize on uint8: [H, W, 3] -> [h, w, 3], of `picture_size`."""
    height, width = picture_size(frame, config)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))


def picture_size(frame: Array, config: ModelConfig) -> tuple[int, int]:
    """Height and width of a frame whose longer side is brought to config.sam2.image_size."""
    height, width = frame.shape[:2]
    scale = config.sam2.image_size / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def encoder_frame(frame: Array, config: ModelConfig) -> Arrays:
    """Input of frame_encoder, which does the rest of `grounding_frame` itself.

    Args:
        frame: [H, W, 3] uint8 RGB.
    Returns:
        pictures: [S, S, 3] uint8, S = config.sam2.image_size, `picture` at the top left.
        picture_sizes: [2] int64, its height and width.
    """
    resized = picture(frame, config)
    height, width = resized.shape[:2]
    square = np.zeros((config.sam2.image_size, config.sam2.image_size, 3), np.uint8)
    square[:height, :width] = resized
    return {"pictures": square, "picture_sizes": np.array([height, width])}


def grounding_frame(frame: Array, config: ModelConfig) -> Array:
    """What SAM2 sees: `picture`, normalised, then stretched bilinearly to a square.

    Args:
        frame: [H, W, 3] uint8 RGB.
    Returns:
        [3, S, S] float32, S = config.sam2.image_size.
    """
    size = config.sam2.image_size
    return stretch(stretch(looked_up(picture(frame, config), grounding_values()), 1, size), 2, size)


def session_frame(inputs: Arrays, preprocessor: Preprocessor) -> dict[str, DeviceArray]:
    """The inputs of frame_encoder, and the frame's size; an empty frame (the session only closes) becomes a black one of size 0, 0.

    Raises:
        InvalidInput: the frame is too small or too large.
    """
    frame = inputs["frame"]
    height, width = frame.shape[:2]
    if height or width:
        check_frame_size(height, width, "sparrow_track.frame")
    else:
        frame = np.zeros((1, 1, 3), np.uint8)
    return {**preprocessor.encoder_frame(frame), "frame_size": np.array([height, width], np.int32)}


def stretch(x: Array, axis: int, size: int) -> Array:
    """Linear interpolation along one axis, half-pixel centres, edges clamped, no antialiasing (torch `interpolate`)."""
    old = x.shape[axis]
    if old == size:
        return x
    low, high, weights = between(old, size)
    weight = weights.reshape([-1 if axis == other else 1 for other in range(x.ndim)])
    stretched: Array = (1 - weight) * x.take(low, axis) + weight * x.take(high, axis)
    return stretched


def between(old: int, size: int) -> tuple[Array, Array, Array]:
    """The two lines that each new one lies between, [size] int64 each, and the weight of the second, [size] float32, as in `stretch`."""
    source = np.maximum((np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(old / size) - np.float32(0.5), 0)
    low = source.astype(np.int64)
    return low, np.minimum(low + 1, old - 1), source - low.astype(np.float32)


def denormalise(grounding: Array) -> Array:
    """The picture that a grounding frame was made of, stretched to a square: [3, S, S] float32 -> [S, S, 3] uint8 RGB."""
    pixels = grounding.transpose(1, 2, 0) * np.array(settings.SAM_STD, np.float32) + np.array(settings.SAM_MEAN, np.float32)
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def proposal_image(grounding: Array, config: ModelConfig) -> Array:
    """The proposer's picture, rebuilt from the grounding frame as the original does: denormalise, round, bicubic resize.

    Args:
        grounding: [3, S, S] float32 from `grounding_frame`.
    Returns:
        [P, P, 3] uint8 RGB, P = config.proposer.image_size.
    """
    picture = Image.fromarray(denormalise(grounding))
    return np.asarray(picture.resize((config.proposer.image_size,) * 2, Image.Resampling.BICUBIC))


def proposal_frame(picture: Array) -> Array:
    """Proposer input.

    Args:
        picture: [P, P, 3] uint8 RGB from `proposal_image`.
    Returns:
        [1, 3, P, P] float32.
    """
    return looked_up(picture, proposal_values())[None]


def grounding_values() -> Array:
    """What SAM2 sees of every value of a pixel: [3, 256] float32."""
    return normalised(VALUES.astype(np.float32), settings.SAM_MEAN, settings.SAM_STD)


def proposal_values() -> Array:
    """What the proposer sees of every value of a pixel: [3, 256] float32."""
    return scaled_values(settings.IMAGENET_MEAN, settings.IMAGENET_STD)


def context_values() -> Array:
    """What CLIP sees of every value of a pixel: [3, 256] float32."""
    return scaled_values(settings.CLIP_MEAN, settings.CLIP_STD)


def video_values() -> Array:
    """What InternVideo2 sees of every value of a pixel: [3, 256] float32."""
    return normalised(VALUES / 255.0, settings.IMAGENET_MEAN, settings.IMAGENET_STD).astype(np.float32)


def scaled_values(mean: Sequence[float], std: Sequence[float]) -> Array:
    """What CLIP's image processor makes of every value of a pixel, as `normalised`: rescaled in float64, normalised in float32."""
    return normalised((VALUES * (1 / 255)).astype(np.float32), mean, std)


def normalised(values: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """(values - mean) / std of each channel, in the dtype of `values`: [256] -> [3, 256]."""
    channels: Array = (values - np.array(mean, values.dtype)[:, None]) / np.array(std, values.dtype)[:, None]
    return channels


def looked_up(pixels: Array, channels: Array) -> Array:
    """Every pixel's value in the table of its channel: [H, W, 3] uint8 and [3, 256] -> [3, H, W]; much faster than to compute it again."""
    return np.stack([table.take(pixels[:, :, channel]) for channel, table in enumerate(channels)])
