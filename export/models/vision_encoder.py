"""Frames to the tokens that the language model reads: towers, projectors, pooling (spec 1.3-1.5)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ensemble.config import POOL, ModelConfig

from .context_tower import ContextTower
from .layers import Graph
from .video_tower import VideoTower


class VisionEncoder(Graph):
    """CLIP and InternVideo2 features of a clip, projected, pooled and merged."""

    keys: ClassVar[dict[str, str]] = {
        "context_tower.": "clip:vision_model.",
        "video_tower.": "internvideo:vision_encoder.",
        "image_mm_projector.": "sparrow:model.image_mm_projector.",
        "mm_projector.": "sparrow:model.mm_projector.",
    }
    unused = ContextTower.unused + VideoTower.unused

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.context_tower = ContextTower(config.context)
        self.video_tower = VideoTower(config.video)
        self.image_mm_projector = Projector(config.context.width, config.language.width)
        self.mm_projector = Projector(config.video.width, config.language.width)

    def forward(self, video_frames: Tensor, context_frames: Tensor) -> Tensor:
        """A clip's frames, at the sizes of both towers, to its visual tokens.

        Args:
            video_frames: [T, 3, S, S] float, ImageNet-normalised, S = config.video.image_size, T = config.num_frames.
            context_frames: [T, 3, S, S] float, CLIP-normalised, S = config.context.image_size.
        Returns:
            [config.video_tokens, C] float: context tokens of all frames, then video tokens of all frames.
        """
        context = self.image_mm_projector.pooled(self.context_tower(context_frames), self.config.context.grid)
        video = self.mm_projector.pooled(self.video_tower(video_frames), self.config.video.grid)
        return torch.cat((context, video))


class ImageEncoder(Graph):
    """CLIP features of images, projected; not pooled."""

    keys: ClassVar[dict[str, str]] = {
        "context_tower.": "clip:vision_model.",
        "image_mm_projector.": "sparrow:model.image_mm_projector.",
    }
    unused = ContextTower.unused

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.context_tower = ContextTower(config.context)
        self.image_mm_projector = Projector(config.context.width, config.language.width)

    def forward(self, context_frames: Tensor) -> Tensor:
        """Images to their visual tokens.

        Args:
            context_frames: [images, 3, S, S] float, CLIP-normalised, S = config.context.image_size.
        Returns:
            [images, config.context_tokens, C] float, row-major patches.
        """
        return self.image_mm_projector(self.context_tower(context_frames))  # type: ignore[no-any-return]


class Projector(nn.Sequential):
    """Tower width to language width: linear, exact GELU, linear (`mlp2x_gelu`)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))

    def pooled(self, features: Tensor, grid: int) -> Tensor:
        """The projection, averaged over POOL by POOL patches; before the second linear, which is exact and cheaper (spec 11).

        Args:
            features: [N, frames * grid * grid, width] float; frame by frame, row-major patches.
        Returns:
            [N * frames * (grid / POOL)^2, out] float, in the same order.
        """
        first, gelu, second = self
        hidden = gelu(first(features))
        side = grid // POOL
        cells = hidden.reshape(-1, side, POOL, side, POOL, hidden.shape[-1])  # [N, S, C] -> [T, side, 2, side, 2, C]
        return second(cells.mean((2, 4)).flatten(0, 2))  # type: ignore[no-any-return]  # -> [T * side * side, C]
