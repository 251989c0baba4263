"""SAM2's image encoder at any input size: Hiera trunk and feature pyramid (spec 7.1; hieradet.py, image_encoder.py)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ensemble.config import HieraConfig

from .layers import MLP, by_kernels, small_random, split_heads

PATCH_STRIDE = 4
"""Pixels from one cell of the first stage to the next."""
POOL = 2
"""Each stage but the first halves the sides of the map."""


class Hiera(nn.Module):
    """Trunk of four stages of windowed attention.

    Args:
        hiera: its sizes.
        image_size: side of the input in pixels, a multiple of 32.
    """

    def __init__(self, hiera: HieraConfig, image_size: int) -> None:
        super().__init__()
        self.grid = image_size // PATCH_STRIDE
        self.depths, self.windows = hiera.stages, hiera.window_sizes
        patch_embed = nn.Conv2d(3, hiera.embed_dim, kernel_size=7, stride=PATCH_STRIDE, padding=3)
        self.patch_embed = nn.Sequential(OrderedDict(proj=patch_embed))
        self.pos_embed = small_random(1, hiera.embed_dim, hiera.position_grid, hiera.position_grid)
        self.pos_embed_window = small_random(1, hiera.embed_dim, hiera.window_sizes[0], hiera.window_sizes[0])
        self.blocks = nn.ModuleList()
        for stage, depth in enumerate(hiera.stages):
            for depth_idx in range(depth):
                # A stage's first block still reads the map, the windows and the width of the stage before it.
                source = stage - 1 if depth_idx == 0 and stage > 0 else stage
                grid = self.grid // POOL**source
                window = grid if len(self.blocks) in hiera.global_blocks else hiera.window_sizes[source]
                self.blocks.append(Block(hiera.widths[source], hiera.widths[stage], hiera.heads * 2**stage, grid, window))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of every stage.

        Args:
            images: [N, 3, image_size, image_size] float32, normalised.
        Returns:
            Per stage [N, H, W, C], H = W = image_size / 4, 8, 16, 32.
        """
        x = self.patch_embed(images).permute(0, 2, 3, 1) + self.positions()  # [N, 3, S, S] -> [N, H, W, C]
        maps, blocks = [], cast(Iterator[Block], iter(self.blocks))
        for stage, depth in enumerate(self.depths):
            if stage:
                x = next(blocks)(x)  # pools
            x = self.windowed(x, list(islice(blocks, depth - (stage > 0))), self.windows[stage])
            maps.append(x)
        return maps

    def windowed(self, x: Tensor, blocks: Sequence[Block], window: int) -> Tensor:
        """A map [N, H, W, C] through blocks of one width, which get its cells window by window where they can: only attention to windows
        depends on their order.
        """
        grid = x.shape[1]
        if not blocks or grid % window or blocks[0].attn.has_kernel:
            for block in blocks:
                x = block(x)
            return x
        x = split_windows(x, window)
        for block in blocks:
            x = block(x, by_window=True)
        return join_windows(x.flatten(1, 2), window, grid)

    def positions(self) -> Tensor:
        """[1, H, W, C] learned positions: resized background plus one window, repeated."""
        background = F.interpolate(self.pos_embed, (self.grid, self.grid), mode="bicubic")
        repeats = self.grid // self.pos_embed_window.shape[2]
        return (background + self.pos_embed_window.tile(1, 1, repeats, repeats)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Attention within windows, then an MLP; where the width grows, queries and shortcut are max-pooled."""

    def __init__(self, width: int, out_width: int, heads: int, grid: int, window: int) -> None:
        super().__init__()
        self.pools = out_width != width
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = WindowAttention(width, out_width, heads, grid, window, self.pools)
        self.norm2 = nn.LayerNorm(out_width, eps=1e-6)
        self.mlp = MLP(out_width, 4 * out_width, out_width, 2, gelu=True)
        if self.pools:
            self.proj = nn.Linear(width, out_width)

    def forward(self, x: Tensor, by_window: bool = False) -> Tensor:
        """[N, H, W, C], or its windows [N * windows, w, w, C], to the same; to [N, H / 2, W / 2, 2 C] where it pools."""
        normal = self.norm1(x)
        shortcut = max_pool(self.proj(normal)) if self.pools else x
        x = shortcut + self.attn(normal, by_window)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class WindowAttention(nn.Module):
    """Self-attention of the cells of each window of a map; where it pools, of fewer queries."""

    def __init__(self, width: int, out_width: int, heads: int, grid: int, window: int, pools: bool) -> None:
        super().__init__()
        self.heads, self.grid, self.window, self.pools = heads, grid, window, pools
        self.qkv = nn.Linear(width, 3 * out_width)
        self.proj = nn.Linear(out_width, out_width)

    @property
    def has_kernel(self) -> bool:
        """Whether a kernel of our own attends to windows where they lie in the map."""
        if self.pools or not by_kernels(self.qkv.weight):
            return False
        from . import map_kernels

        return map_kernels.takes_windows(self.grid, self.window)

    def forward(self, x: Tensor, by_window: bool) -> Tensor:
        """As `Block.forward`."""
        if by_window:  # of the block's own windows, or all of them together where it sees the whole map
            q, k, v = (split_heads(own, self.heads) for own in self.qkv(x).reshape(-1, self.window**2, 3 * x.shape[3]).chunk(3, -1))
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]
        if self.has_kernel:
            from . import map_kernels

            return self.proj(map_kernels.window_attention(self.qkv(x), self.heads, self.window))  # type: ignore[no-any-return]
        q, k, v = self.qkv(split_windows(x, self.window)).chunk(3, -1)  # [N, H, W, C] -> 3 x [windows, w, w, C]
        q = max_pool(q) if self.pools else q
        q, k, v = (split_heads(x.flatten(1, 2), self.heads) for x in (q, k, v))  # -> [windows, heads, w * w, C / heads]
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # -> [windows, w * w, C]
        shrunk = POOL if self.pools else 1
        return join_windows(self.proj(x), self.window // shrunk, self.grid // shrunk)


def max_pool(x: Tensor) -> Tensor:
    """[N, H, W, C] -> [N, H / 2, W / 2, C]"""
    half = x.shape[1] // POOL
    return x.reshape(-1, half, POOL, half, POOL, x.shape[3]).amax((2, 4))


def split_windows(x: Tensor, window: int) -> Tensor:
    """[N, H, W, C] -> [N * windows, w, w, C]; zeros fill the last windows, and are attended (spec 4.2)."""
    missing = -x.shape[1] % window
    if missing:
        x = F.pad(x, (0, 0, 0, missing, 0, missing))
    count = x.shape[1] // window
    x = x.reshape(-1, count, window, count, window, x.shape[3]).transpose(2, 3)  # [N, H, W, C] -> [N, n, n, w, w, C]
    return x.flatten(0, 2)


def join_windows(x: Tensor, window: int, grid: int) -> Tensor:
    """[N * windows, w * w, C] -> [N, H, W, C], without the fill; H = W = grid."""
    count = -(-grid // window)
    x = x.reshape(-1, count, count, window, window, x.shape[2]).transpose(2, 3)  # -> [N, n, w, n, w, C]
    return x.flatten(3, 4).flatten(1, 2)[:, :grid, :grid]


class FeaturePyramid(nn.Module):
    """Neck: every stage projected to one width, the coarsest added to the one above it and then dropped."""

    def __init__(self, hiera: HieraConfig, width: int) -> None:
        super().__init__()
        # Coarsest first, as the checkpoint has them.
        laterals = [nn.Conv2d(channels, width, 1) for channels in reversed(hiera.widths)]
        self.convs = nn.ModuleList(nn.Sequential(OrderedDict(conv=conv)) for conv in laterals)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Three levels.

        Args:
            maps: what `Hiera` returns.
        Returns:
            [N, width, H, H] of stride 4, 8, 16.
        """
        channels_first = [x.permute(0, 3, 1, 2) for x in reversed(maps)]  # [N, H, W, C] -> [N, C, H, W]
        laterals = [conv(x) for conv, x in zip(self.convs, channels_first, strict=True)]  # -> [N, width, H, W]
        stride_32, stride_16, stride_8, stride_4 = laterals
        return stride_4, stride_8, stride_16 + F.interpolate(stride_32, scale_factor=2.0, mode="nearest")
