"""A frame and an object's mask to the memory that later frames attend to (spec 7.4; memory_encoder.py, sam2_base.py _encode_new_memory)."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble import settings
from ensemble.config import ModelConfig

from .layers import Graph, LayerNorm2d, activated, by_kernels, small_random

MASK_CHANNELS = (1, 4, 16, 64, 256)
"""Channels of the mask at stride 1, 2, 4, 8, 16: each step keeps the number of values."""
NARROW = 4
"""Channels up to which cuDNN is slow at a convolution."""
FUSER_BLOCKS = 2


class MemoryEncoder(Graph):
    """Sum of the projected frame and the downsampled mask, through ConvNeXt blocks."""

    keys: ClassVar[dict[str, str]] = {
        "mask_downsampler.": "sparrow:model.visual_model.memory_encoder.mask_downsampler.encoder.",
        "pix_feat_proj.": "sparrow:model.visual_model.memory_encoder.pix_feat_proj.",
        "fuser.": "sparrow:model.visual_model.memory_encoder.fuser.layers.",
        "out_proj.": "sparrow:model.visual_model.memory_encoder.out_proj.",
        "no_obj_embed_spatial": "sparrow:model.visual_model.no_obj_embed_spatial",
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        sam2 = config.sam2
        self.mask_downsampler = nn.Sequential()
        for channels, out_channels in pairwise(MASK_CHANNELS):
            self.mask_downsampler.extend([Halving(channels, out_channels), LayerNorm2d(out_channels), nn.GELU()])
        self.mask_downsampler.append(nn.Conv2d(MASK_CHANNELS[-1], sam2.width, 1))
        self.pix_feat_proj = nn.Conv2d(sam2.width, sam2.width, 1)
        self.fuser = nn.Sequential(*(ConvNextBlock(sam2.width) for _ in range(FUSER_BLOCKS)))
        self.out_proj = nn.Conv2d(sam2.width, sam2.memory_width, 1)
        if sam2.absent_embedding:
            self.no_obj_embed_spatial = small_random(1, sam2.memory_width)

    def forward(
        self, frame_embeddings: Tensor, object_frame: Tensor, mask_logits: Tensor, prompted: Tensor, object_scores: Tensor
    ) -> Tensor:
        """Contract `memory_encoder`: memory_maps."""
        sam2 = self.config.sam2
        size = (sam2.image_size, sam2.image_size)
        present = object_scores[:, None, None, None] > 0
        gated = torch.where(present, mask_logits[:, None], settings.NO_OBJECT_LOGIT)
        logits = F.interpolate(gated, size, mode="bilinear")  # [O, 4 g, 4 g] -> [O, 1, S, S]
        mask = torch.where(prompted[:, None, None, None], (logits > 0).float(), logits.sigmoid())
        mask = mask * settings.MEMORY_MASK_SCALE + settings.MEMORY_MASK_BIAS
        frames = self.pix_feat_proj(frame_embeddings)[object_frame]  # [T, C, g, g] -> [O, C, g, g]
        maps: Tensor = self.out_proj(self.fuser(frames + self.mask_downsampler(mask)))  # -> [O, memory_width, g, g]
        if sam2.absent_embedding:
            absent = maps + self.no_obj_embed_spatial[:, :, None, None]
            maps = torch.where(present, maps, absent)
        return maps.to(torch.bfloat16).float()


class Halving(nn.Conv2d):
    """A 3 by 3 convolution of stride 2 over a map of even sides."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[O, C, H, W] -> [O, D, H / 2, W / 2]"""
        if self.in_channels > NARROW or not by_kernels(self.weight):
            return super().forward(x)
        from . import map_kernels

        out: Tensor = map_kernels.halve(x.to(self.weight.dtype).permute(0, 2, 3, 1), self.weight, self.bias)
        return out.permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """7 by 7 depthwise convolution and an MLP per cell, scaled (CXBlock; its `gamma` is `weight` in SPARROW's checkpoints)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[O, C, g, g] -> [O, C, g, g]"""
        y = self.norm(depthwise(self.dwconv, x.permute(0, 2, 3, 1)))  # [O, C, g, g] -> [O, g, g, C]
        y = self.weight * self.pwconv2(activated(self.pwconv1, y, gelu=True))
        out: Tensor = x + y.permute(0, 3, 1, 2)  # [O, g, g, C] -> [O, C, g, g]
        return out


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A depthwise convolution that keeps the size of a map, channels last: [O, g, g, C] -> [O, g, g, C]."""
    if by_kernels(conv.weight):
        from . import map_kernels

        return map_kernels.depthwise(x.to(conv.weight.dtype), conv.weight, conv.bias)  # type: ignore[no-any-return]
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]
