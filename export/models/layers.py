"""Layers that several components share, named as in the checkpoints they load from."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble.config import ModelConfig


class Graph(nn.Module):
    """A component that is exported to one graph."""

    keys: ClassVar[dict[str, str]]
    """Prefix of this module's state dict to "source:prefix" in the original checkpoint (`export.checkpoints.SOURCES`)."""

    unused: ClassVar[tuple[str, ...]] = ()
    """Patterns of original keys under those prefixes that inference never reads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config


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
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.activation = activation or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)  # type: ignore[no-any-return]
