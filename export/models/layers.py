"""Layers that several components share, named as in the checkpoints they load from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble.config import ModelConfig

Call = Callable[..., Tensor | Sequence[Tensor]]
"""A graph, or a layer of one, as it is called: eager or compiled."""

TEMPERATURE = 10000.0
"""Longest period of SAM2's sine and rotary positions, in units of the shortest (sam2_hiera_l.yaml)."""


class Graph(nn.Module):
    """A component that is exported to one graph."""

    keys: ClassVar[dict[str, str]]
    """Prefix of this module's state dict to "source:prefix" in the original checkpoint (`export.checkpoints.SOURCES`); prefixes with "|"
    between them are alternatives, of which a checkpoint has one."""

    unused: ClassVar[tuple[str, ...]] = ()
    """Patterns of original keys under those prefixes that inference never reads."""

    alone: ClassVar[str | None] = None
    """The size of which 1 gets a compiled engine of its own: with it known, other kernels are taken."""

    capturable: ClassVar[bool] = True
    """Whether it asks the device for nothing while it runs, as a CUDA graph demands."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config


def several(results: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """What a call has returned, as a sequence."""
    return results if isinstance(results, (tuple, list)) else (results,)


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of a map (sam2_utils.py LayerNorm2d, eps 1e-6)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6)  # [N, C, H, W] -> [N, H, W, C]
        return x.permute(0, 3, 1, 2)


class MLP(nn.Module):
    """Linear layers with an activation between them (sam2_utils.py MLP)."""

    def __init__(self, width: int, hidden: int, out: int, depth: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        sizes = [width, *[hidden] * (depth - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.activation = activation or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head attention with a projection per operand (sam/transformer.py Attention).

    Args:
        width: channels of the queries and of the result.
        heads: how many heads share `inner` channels.
        inner: channels of the projected operands.
        key_width: channels of keys and values; `width` where not given.
    """

    def __init__(self, width: int, heads: int, inner: int, key_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(key_width or width, inner)
        self.v_proj = nn.Linear(key_width or width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Projects, then `attend`."""
        return self.attend(self.q_proj(q), self.k_proj(k), self.v_proj(v), mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of projected operands.

        Args:
            q: [N, S, inner]
            k, v: [N, K, inner]
            mask: [N, 1, 1, K] bool; True where a key may be attended.
        Returns:
            [N, S, width]
        """
        q, k, v = (split_heads(x, self.heads) for x in (q, k, v))
        x = attention(q, k, v, mask)
        out: Tensor = self.out_proj(x.transpose(1, 2).flatten(2))  # [N, heads, S, C / heads] -> [N, S, C]
        return out


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[N, heads, S, C] queries over [N, heads, K, C] keys and values.

    One wide head of one or two objects has fewer tiles of queries than an H100 has processors. There, keys go to several heads (K is a
    multiple of 4), and what those mix is put together by the weight that each has in the whole softmax (docs/performance.md).
    """
    few = {1: 4, 2: 2}.get(q.shape[0]) if isinstance(q.shape[0], int) else None  # a size that varies, in a traced graph, is not known
    if few is None or mask is not None or q.shape[1] > 1 or q.shape[3] <= 128 or not on_hopper(v):
        return F.scaled_dot_product_attention(q, k, v, mask)
    q, k, v = q.expand(-1, few, -1, -1), k.reshape(k.shape[0], few, -1, k.shape[3]), v.reshape(v.shape[0], few, -1, v.shape[3])
    mixed, log_sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q.to(v.dtype), k.to(v.dtype), v, None, True)
    weights = log_sums.reshape(*mixed.shape[:3], 1).softmax(1)  # [N, heads, S, 1]
    together: Tensor = (mixed * weights).sum(1, keepdim=True).to(v.dtype)
    return together


def on_hopper(x: Tensor) -> bool:
    """Whether cuDNN has a kernel for half precision and heads of 256: it needs an H100 or H200."""
    return on_tensor_cores(x) and torch.cuda.get_device_capability(x.device) == (9, 0)


def on_tensor_cores(x: Tensor) -> bool:
    """Whether a GPU's kernels for half precision take it."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[N, S, C] -> [N, heads, S, C / heads]"""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def sine_positions(grid: int, width: int) -> Tensor:
    """Where each cell of a square map lies, as sines and cosines (position_encoding.py PositionEmbeddingSine).

    Returns:
        [grid, grid, width] float32; the first half of the channels follows the row, the second the column.
    """
    half = width // 2
    channel = torch.arange(half)
    cell = torch.arange(1, grid + 1)[:, None] / (grid + 1e-6)
    angle = cell * 2 * math.pi / TEMPERATURE ** (channel // 2 * 2 / half)  # [grid, half]
    line = torch.where(channel % 2 == 0, angle.sin(), angle.cos())
    return torch.cat([line[:, None].expand(-1, grid, -1), line.expand(grid, -1, -1)], -1)


def small_random(*shape: int) -> nn.Parameter:
    """A learned table before it is trained or loaded."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))
