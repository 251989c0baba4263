"""A caller's frame to the encoder's picture on this process's GPU, in the integers of Pillow (`ensemble.frames.picture`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np

from ensemble import frames
from ensemble.config import ModelConfig
from ensemble.frames import EncoderFrame, picture_size, session_frame
from ensemble.runner import DeviceArray
from ensemble.tensors import Array, Arrays

from .runners import TorchDevice, torch_device

if TYPE_CHECKING:
    from torch import Tensor

FRACTION_BITS = 22
"""Of Pillow's weights (Resample.c)."""


def open_session_frame(settings: Mapping[str, str]) -> Callable[[Arrays, ModelConfig], dict[str, DeviceArray]]:
    """The component `frame_preprocessor`, as its config.pbtxt says."""
    return partial(session_frame, encoder_frame=open_encoder_frame(settings))


def open_encoder_frame(settings: Mapping[str, str]) -> EncoderFrame:
    """What brings frames to their size, as resize_on in a config.pbtxt says: gpu (where there is one), or cpu, by Pillow itself."""
    on_gpu = settings["resize_on"] == "gpu" and torch_device() == "cuda"
    return encoder_frame if on_gpu else frames.encoder_frame


def encoder_frame(frame: Array, config: ModelConfig) -> dict[str, DeviceArray]:
    """As `ensemble.frames.encoder_frame`, but `pictures` stays on the device, where it has been computed when this returns.

    Every row is resized, rounded, then every column: as Pillow, but for frames of which it takes the columns first, which differ by one
    grey level here and there.
    """
    import torch

    device, size, (height, width) = TorchDevice(), config.sam2.image_size, picture_size(frame, config)
    pixels = device.put(frame)
    square = torch.zeros(size, size, 3, dtype=torch.uint8, device=pixels.device)
    square[:height, :width] = resized(resized(pixels, 1, width), 0, height)
    device.wait()
    return {"pictures": square, "picture_sizes": np.array([height, width])}


def resized(x: Tensor, axis: int, size: int) -> Tensor:
    """Antialiased bilinear resize of one axis, rounded: [..., n, ...] uint8 -> [..., size, ...] uint8."""
    import torch

    if x.shape[axis] == size:
        return x
    total = torch.full((), 1 << FRACTION_BITS - 1, dtype=torch.int32, device=x.device)
    for sources, weights in zip(*taps(x.shape[axis], size, x.device.type), strict=True):
        total = total + x.index_select(axis, sources).int() * weights.reshape([-1 if axis == other else 1 for other in range(x.ndim)])
    return (total >> FRACTION_BITS).clamp(0, 255).byte()


@lru_cache(64)  # of both axes of frames of 32 sizes: callers may send any number of sizes
def taps(size: int, new_size: int, device: str) -> tuple[Tensor, Tensor]:
    """What each new pixel is the sum of (Resample.c precompute_coeffs, normalize_coeffs_8bpc).

    Returns:
        source pixels [K, new_size] int64 and their weights [K, new_size] int32, in units of 2**-FRACTION_BITS.
    """
    import torch

    scale = size / new_size
    reach = max(scale, 1.0)
    centre = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + reach + 0.5).astype(np.int64), size)
    sources = first + np.arange(2 * math.ceil(reach) + 1)[:, None]
    weights = np.where(sources < last, np.maximum(1 - np.abs((sources - centre + 0.5) / reach), 0), 0)
    weights = (weights / weights.sum(0) * (1 << FRACTION_BITS) + 0.5).astype(np.int32)
    return torch.from_numpy(np.minimum(sources, size - 1)).to(device), torch.from_numpy(weights).to(device)
