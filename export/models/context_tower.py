"""CLIP vision tower: patch features of frames at 336 px (spec 1.3; weights named as in transformers `CLIPVisionModel`)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ensemble.config import ContextTowerConfig

from .layers import Attention, small_random


class ContextTower(nn.Module):
    """CLIP ViT up to the output of its last layer but one, without the class token."""

    unused: ClassVar[tuple[str, ...]] = (
        r"vision_model\.embeddings\.position_ids",
        r"vision_model\.encoder\.layers\.\d+\.(layer_norm[12]|self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.(weight|bias)",
        r"vision_model\.post_layernorm\.(weight|bias)",
    )
    """As `Graph.unused`; the layers are there for the last one, which does not run."""

    def __init__(self, config: ContextTowerConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)  # spelt so in the checkpoints
        self.encoder = Encoder(config)

    def forward(self, context_frames: Tensor) -> Tensor:
        """Frames to patch features; every frame on its own.

        Args:
            context_frames: [T, 3, image_size, image_size] float, CLIP-normalised.
        Returns:
            [T, grid * grid, width] float, row-major patches.
        """
        states: Tensor = self.encoder(self.pre_layrnorm(self.embeddings(context_frames)))
        return states[:, 1:]


class Embeddings(nn.Module):
    """Class token and patches, with learned positions."""

    def __init__(self, config: ContextTowerConfig) -> None:
        super().__init__()
        self.class_embedding = small_random(config.width)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.grid**2 + 1, config.width)

    def forward(self, frames: Tensor) -> Tensor:
        patches = self.patch_embedding(frames).flatten(2).transpose(1, 2)  # [T, 3, S, S] -> [T, grid * grid, C]
        class_token = self.class_embedding.expand(frames.shape[0], 1, -1)
        return torch.cat((class_token, patches), dim=1) + self.position_embedding.weight


class Encoder(nn.Module):
    """The layers that run: all but the last."""

    def __init__(self, config: ContextTowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config.width, config.heads, config.mlp_width) for _ in range(config.layers - 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = Attention(width, heads, width)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_norm1(x)
        x = x + self.self_attn(y, y, y)
        return x + self.mlp(self.layer_norm2(x))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers with CLIP's quick GELU, x * sigmoid(1.702 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # type: ignore[no-any-return]
