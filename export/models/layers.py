"""Layers that several components share, named as in the checkpoints they load from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

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


class OfWeights(nn.Module):
    """A module for compilation: its weights are the last of its inputs, so that engines can share them.

    Args:
        module: whose parameters' names and order the weights have.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names = [name for name, _ in module.named_parameters()]
        self.module = [module]  # not a submodule: its weights are no part of this

    def through(self, weights: Sequence[Tensor], *inputs: Any) -> Any:
        """The module with other weights."""
        return torch.func.functional_call(self.module[0], dict(zip(self.names, weights, strict=True)), inputs)


class GraphOfWeights(OfWeights):
    """A whole graph."""

    def forward(self, *tensors: Tensor) -> Any:
        """Inputs of the graph, then weights."""
        count = len(tensors) - len(self.names)
        return self.through(tensors[count:], *tensors[:count])


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
    """Linear layers with an activation between them (sam2_utils.py MLP).

    Args:
        width, hidden, out: channels.
        depth: linear layers.
        gelu: between them, instead of ReLU.
    """

    def __init__(self, width: int, hidden: int, out: int, depth: int, gelu: bool = False) -> None:
        super().__init__()
        sizes = [width, *[hidden] * (depth - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = activated(layer, x, self.gelu)  # type: ignore[arg-type]
        return last(x)  # type: ignore[no-any-return]


def activated(layer: nn.Linear, x: Tensor, gelu: bool = False) -> Tensor:
    """A linear layer and ReLU, or exact GELU; on a GPU in half precision as `activated_product`."""
    if by_kernels(layer.weight):
        return activated_product(x.to(layer.weight.dtype), layer.weight, layer.bias, gelu)  # type: ignore[no-any-return]
    return F.gelu(layer(x)) if gelu else F.relu(layer(x))


@torch.library.custom_op("sparrow::activated_product", mutates_args=())
def activated_product(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """A linear layer with the ReLU or the GELU that cuBLAS has in the same kernel.

    That GELU, by tanh, differs from the exact one by up to 5e-4, and takes sums that are not rounded yet: the result is closer to the exact
    one than in two steps (docs/performance.md).

    Args:
        x: [..., C]
        weight: [D, C]
        bias: [D]; all of them float16, or all bfloat16.
        gelu: instead of ReLU.
    Returns:
        [..., D]
    """
    out: Tensor = torch.ops.aten._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=gelu)
    return out.reshape(*x.shape[:-1], -1)


@activated_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


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
    """[N, heads, S, C] queries over [N, heads, K, C] keys and [N, heads, K, D] values, D up to C, to [N, heads, S, D].

    One wide head of one or two objects has fewer tiles of queries than an H100 has processors. There, keys go to several heads (K is a
    multiple of 4), and what those mix is put together by the weight that each has in the whole softmax (docs/performance.md).
    """
    if mask is not None or q.shape[1] > 1 or q.shape[3] <= 128 or not on_hopper(v):
        missing = q.shape[3] - v.shape[3] if v.is_cuda else 0  # fast kernels there take values as wide as keys
        return F.scaled_dot_product_attention(q, k, F.pad(v, (0, missing)) if missing else v, mask)[..., : v.shape[3]]
    shared = {1: 4, 2: 2}.get(q.shape[0], 1) if isinstance(q.shape[0], int) else 1  # a size that varies, in a traced graph, is not known
    q = q.to(v.dtype).expand(-1, shared, -1, -1).contiguous()
    k, v = (x.to(v.dtype).reshape(x.shape[0], shared, -1, x.shape[3]) for x in (k, v))
    mixed, log_sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, shared > 1)
    if shared == 1:
        return mixed  # type: ignore[no-any-return]
    weights = log_sums.reshape(*mixed.shape[:3], 1).softmax(1)  # [N, heads, S, 1]
    together: Tensor = (mixed * weights).sum(1, keepdim=True).to(v.dtype)
    return together


def on_hopper(x: Tensor) -> bool:
    """Whether cuDNN has a kernel for half precision and heads of 256: it needs an H100 or H200."""
    return on_tensor_cores(x) and torch.cuda.get_device_capability(x.device) == (9, 0)


def by_kernels(weight: Tensor) -> bool:
    """Whether kernels of our own take a layer: of weights in half precision on a GPU, in what is being compiled for it. Eager torch would
    need a C compiler where it serves.
    """
    return on_tensor_cores(weight) and torch.compiler.is_exporting()


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
