"""InternVideo2 tower: patch features of 4-frame chunks at 224 px (spec 1.4; weights named as in its internvideo2.py)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble.config import VideoTowerConfig

from .layers import activated, small_random

RMS_NORM_EPS = 1e-6


class VideoTower(nn.Module):
    """InternVideo2 up to the raw output of its last block but one, without the class token."""

    unused: ClassVar[tuple[str, ...]] = (
        r"vision_encoder\.(img_pos_embed|clip_.*|final_clip_decoder\..*)",
        r"vision_encoder\.blocks\.\d+\.(norm[12]|attn\.(qkv|q_norm|k_norm|proj)|mlp\.fc[12])\.weight",
        r"vision_encoder\.blocks\.\d+\.((attn\.proj|mlp\.fc[12])\.bias|ls[12]\.gamma)",
    )
    """As `Graph.unused`; the blocks are there for the last one, which does not run."""

    def __init__(self, config: VideoTowerConfig) -> None:
        super().__init__()
        self.chunk_tokens = config.chunk_frames * config.grid**2
        self.patch_embed = PatchEmbed(config)
        self.cls_token = small_random(1, 1, config.width)
        self.pos_embed = small_random(1, 1 + self.chunk_tokens, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_width) for _ in range(config.blocks - 1))

    def forward(self, video_frames: Tensor) -> Tensor:
        """Frames to patch features; every chunk of frames on its own.

        Args:
            video_frames: [T, 3, image_size, image_size] float, ImageNet-normalised; T a multiple of chunk_frames.
        Returns:
            [T / chunk_frames, chunk_frames * grid * grid, width] float; frame by frame, row-major patches.
        """
        patches = self.patch_embed(video_frames)  # [T, 3, S, S] -> [T, grid * grid, C]
        patches = patches.reshape(-1, self.chunk_tokens, patches.shape[-1])  # [T, grid * grid, C] -> [chunks, chunk_tokens, C]
        x = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


class PatchEmbed(nn.Module):
    """Frames to patches. The stored kernel is 3-D but one frame deep, so it runs as a 2-D convolution on every frame."""

    def __init__(self, config: VideoTowerConfig) -> None:
        super().__init__()
        size = (1, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.width, size, size)

    def forward(self, frames: Tensor) -> Tensor:
        patches = F.conv2d(frames, self.proj.weight.squeeze(2), self.proj.bias, self.proj.stride[1:])
        return patches.flatten(2).transpose(1, 2)  # [T, C, grid, grid] -> [T, grid * grid, C]


class Block(nn.Module):
    """Pre-norm transformer block with scaled branches."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, RMS_NORM_EPS)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.RMSNorm(width, RMS_NORM_EPS)
        self.mlp = Mlp(width, mlp_width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention over a chunk; queries and keys are normalised over all channels, before the split into heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = nn.RMSNorm(width, RMS_NORM_EPS)
        self.k_norm = nn.RMSNorm(width, RMS_NORM_EPS)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        parts = (self.q_norm(q.float()), self.k_norm(k.float()), v)  # one kernel; in half precision, with weights in float32, it is six
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)  # [N, S, C] -> 3 x [N, heads, S, C / heads]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [N, heads, S, C / heads] -> [N, S, C]
        return self.proj(mixed)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers with exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activated(self.fc1, x, gelu=True))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """A learned factor per channel, applied in float32: it may be below the smallest normal half (spec 8.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * self.gamma.float()).to(x.dtype)
