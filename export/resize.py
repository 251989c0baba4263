"""Callers' frames to the inputs of the encoders on this process's GPU, in the integers of Pillow and OpenCV (ADR 0019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ensemble import frames, settings
from ensemble.config import ModelConfig
from ensemble.frames import HostPreprocessor, Preprocessor, centre, context_size, picture_size, session_frame
from ensemble.runner import DeviceArray
from ensemble.tensors import Array, Arrays

from .capture import Captured
from .runners import TorchDevice, torch_device

if TYPE_CHECKING:
    from torch import Tensor

PILLOW_BITS = 22
"""Of a weight's fraction (Resample.c)."""
OPENCV_BITS = 11
"""Of a weight's fraction (resize.cpp INTER_RESIZE_COEF_BITS)."""
ALL = slice(None)


@dataclass(frozen=True)
class Filter:
    """A filter of Pillow's (Resample.c).

    Args:
        weight: distance from the centre, in pixels of the smaller picture, to a weight.
        support: distance from which on it is 0.
    """

    weight: Callable[[Array], Array]
    support: float


def triangle(x: Array) -> Array:
    """Weights of the bilinear filter at distances x."""
    return np.maximum(1 - abs(x), 0)


def cubic(x: Array, a: float = -0.5) -> Array:
    """Weights of the bicubic filter at distances x."""
    x = abs(x)
    return np.select([x < 1, x < 2], [((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a])


BILINEAR, BICUBIC = Filter(triangle, 1), Filter(cubic, 2)


def open_preprocessor(parameters: Mapping[str, str], config: ModelConfig) -> Preprocessor:
    """What brings frames to their size, as resize_on in a config.pbtxt says: gpu (where there is one), or cpu, by Pillow and OpenCV."""
    on_gpu = parameters["resize_on"] == "gpu" and torch_device() == "cuda"
    return TorchPreprocessor(config) if on_gpu else HostPreprocessor(config)


def open_session_frame(parameters: Mapping[str, str], config: ModelConfig) -> Callable[[Arrays], dict[str, DeviceArray]]:
    """The component `frame_preprocessor`."""
    preprocessor, device = open_preprocessor(parameters, config), TorchDevice()

    def prepared(inputs: Arrays) -> dict[str, DeviceArray]:
        outputs = session_frame(inputs, preprocessor)
        device.wait()  # another process reads them
        return outputs

    return prepared


class TorchPreprocessor:
    """A `Preprocessor` whose results stay on the device, for graphs of this process.

    Every row is resized, then every column: as Pillow, which rounds in between, but for frames of which it takes the columns first, which
    differ by one grey level here and there; and as OpenCV.

    Args:
        config: sizes.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config, self._device = config, TorchDevice()
        self._square: Callable[..., Sequence[Tensor]] = Captured(self._make_square) if self._device.on_gpu else self._make_square

    def tower_frames(self, frames: Sequence[Array], *names: str) -> dict[str, DeviceArray]:
        import torch

        resize = {"context_frames": self._context_frames, "video_frames": self._video_frames}
        pixels = [self._device.put(frame) for frame in frames]
        together = [torch.stack(pixels)] if len({frame.shape for frame in frames}) == 1 else [own[None] for own in pixels]
        return {name: torch.cat([resize[name](own) for own in together]) for name in names}

    def proposal_frame(self, frame: Array) -> DeviceArray:
        """As `HostPreprocessor` makes it: floats in the same order of operations."""
        import torch

        size = self._config.sam2.image_size
        picture = resized(self._device.put(frame)[None], *picture_size(frame, self._config), BILINEAR)
        grounding = stretch(stretch(looked_up(picture, frames.grounding_values()), 2, size), 3, size)
        deviation, mean = (torch.tensor(values, device=grounding.device) for values in (settings.SAM_STD, settings.SAM_MEAN))
        seen = (grounding.permute(0, 2, 3, 1) * deviation + mean).round().clamp(0, 255).byte()
        side = self._config.proposer.image_size
        return looked_up(resized(seen, side, side, BICUBIC), frames.proposal_values())

    def encoder_frame(self, frame: Array) -> dict[str, DeviceArray]:
        (height, width), pixels = picture_size(frame, self._config), self._device.put(frame)
        taken = *taps(frame.shape[1], width, BILINEAR, pixels.device.type), *taps(frame.shape[0], height, BILINEAR, pixels.device.type)
        square = self._square(pixels, *taken)[0]
        return {"pictures": square, "picture_sizes": np.array([height, width])}

    def _make_square(self, pixels: Tensor, *taken: Tensor) -> list[Tensor]:
        """[H, W, 3] uint8 and the `taps` of its rows and of its columns -> [S, S, 3] uint8. They come as inputs: what is captured has to
        find them again.
        """
        import torch

        columns, column_weights, rows, row_weights = taken
        picture = weighted(weighted(pixels, 1, columns, column_weights), 0, rows, row_weights)
        square = torch.zeros(self._config.sam2.image_size, self._config.sam2.image_size, 3, dtype=torch.uint8, device=pixels.device)
        square[: picture.shape[0], : picture.shape[1]] = picture
        return [square]

    def _context_frames(self, pixels: Tensor) -> Tensor:
        """As `frames.context_frame`: [N, H, W, 3] uint8 -> [N, 3, S, S] float32."""
        size = self._config.context.image_size
        height, width = context_size(pixels.shape[1], pixels.shape[2], size)
        return looked_up(resized(pixels, height, width, BICUBIC, centre(height, size), centre(width, size)), frames.context_values())

    def _video_frames(self, pixels: Tensor) -> Tensor:
        """As `frames.video_frame`: [N, H, W, 3] uint8 -> [N, 3, S, S] float32."""
        return looked_up(stretched(pixels, self._config.video.image_size), frames.video_values())


def looked_up(pixels: Tensor, channels: Array) -> Tensor:
    """As `frames.looked_up`: [N, H, W, 3] uint8 and [3, 256] -> [N, 3, H, W]."""
    import torch

    tables = torch.from_numpy(channels).to(pixels.device, non_blocking=True)
    return torch.stack([table[pixels[..., channel].int()] for channel, table in enumerate(tables)], 1)


def resized(pixels: Tensor, height: int, width: int, filter: Filter, rows: slice = ALL, columns: slice = ALL) -> Tensor:
    """As Pillow: [N, H, W, 3] uint8 -> [N, height, width, 3] uint8, of which only some rows and columns are made."""
    return along(along(pixels, 2, width, filter, columns), 1, height, filter, rows)


def along(x: Tensor, axis: int, size: int, filter: Filter, kept: slice) -> Tensor:
    """One axis of `resized`: [..., n, ...] uint8 -> [..., size, ...] uint8."""
    sources, weights = taps(x.shape[axis], size, filter, x.device.type)
    return weighted(x, axis, sources[:, kept], weights[:, kept])


def weighted(x: Tensor, axis: int, sources: Tensor, weights: Tensor) -> Tensor:
    """Sums along one axis, rounded, as `taps` says: [..., n, ...] uint8 -> [..., size, ...] uint8."""
    import torch

    total = torch.full((), 1 << PILLOW_BITS - 1, dtype=torch.int32, device=x.device)
    for source, weight in zip(sources, weights, strict=True):
        total = total + x.index_select(axis, source).int() * across(weight, axis, x)
    return (total >> PILLOW_BITS).clamp(0, 255).byte()


def across(line: Tensor, axis: int, x: Tensor) -> Tensor:
    """[n] in the shape in which it goes along one axis of x."""
    return line.reshape([-1 if axis == other else 1 for other in range(x.ndim)])


@lru_cache(64)  # of both axes of frames of 32 sizes: callers may send any number of sizes
def taps(size: int, new_size: int, filter: Filter, device: str) -> tuple[Tensor, Tensor]:
    """What each new pixel is the sum of (Resample.c precompute_coeffs, normalize_coeffs_8bpc).

    Returns:
        source pixels [K, new_size] int64 and their weights [K, new_size] int32, in units of 2**-PILLOW_BITS.
    """
    import torch

    scale = size / new_size
    stretch = max(scale, 1.0)
    reach = filter.support * stretch
    middle = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((middle - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((middle + reach + 0.5).astype(np.int64), size)
    sources = first + np.arange(2 * math.ceil(reach) + 1)[:, None]
    weights = np.where(sources < last, filter.weight((sources - middle + 0.5) / stretch), 0)
    weights = weights / weights.sum(0) * (1 << PILLOW_BITS)
    rounded = np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)
    return torch.from_numpy(np.minimum(sources, size - 1)).to(device), torch.from_numpy(rounded).to(device)


def stretch(x: Tensor, axis: int, size: int) -> Tensor:
    """As `frames.stretch`."""
    import torch

    if x.shape[axis] == size:
        return x
    low, high, weight = (torch.from_numpy(line).to(x.device, non_blocking=True) for line in frames.between(x.shape[axis], size))
    weight = across(weight, axis, x)
    return (1 - weight) * x.index_select(axis, low) + weight * x.index_select(axis, high)


def stretched(pixels: Tensor, size: int) -> Tensor:
    """As OpenCV's INTER_LINEAR: [N, H, W, 3] uint8 -> [N, size, size, 3] uint8 (resize.cpp HResizeLinear, VResizeLinear)."""
    _, height, width, _ = pixels.shape
    (left, right), across_x = neighbours(width, size, True, pixels.device.type)
    (above, below), across_y = neighbours(height, size, False, pixels.device.type)
    x = pixels.int()
    lines = [x.index_select(2, source) * across(weight, 2, x) for source, weight in zip((left, right), across_x, strict=True)]
    x = lines[0] + lines[1] >> 4
    lines = [x.index_select(1, source) * across(weight, 1, x) >> 16 for source, weight in zip((above, below), across_y, strict=True)]
    return (lines[0] + lines[1] + 2 >> 2).byte()


@lru_cache(64)
def neighbours(size: int, new_size: int, at_edges: bool, device: str) -> tuple[Tensor, Tensor]:
    """The two pixels that each new one lies between, and how much of each it takes.

    Args:
        at_edges: beyond the outermost pixels it takes nothing of the second; else both are the same.
    Returns:
        [2, new_size] int64 and [2, new_size] int32, in units of 2**-OPENCV_BITS.
    """
    import torch

    place = ((np.arange(new_size) + 0.5) * (size / new_size) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    share = place - first.astype(np.float32)
    if at_edges:
        share[(first < 0) | (first >= size - 1)] = 0
    weights = np.rint(np.stack([1 - share, share]) * (1 << OPENCV_BITS)).astype(np.int32)
    return torch.from_numpy(np.stack([first, first + 1]).clip(0, size - 1)).to(device), torch.from_numpy(weights).to(device)
