"""A mask that the caller drew to a mask prompt (sam2_base.py mask_downsample)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ensemble.config import ModelConfig

from .layers import Graph

STRIDE = 4
"""Pixels of the grounding frame to one of a mask prompt."""


class MaskDownsampler(Graph):
    """One learned convolution."""

    keys: ClassVar[dict[str, str]] = {"conv.": "sparrow:model.visual_model.mask_downsample."}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.conv = nn.Conv2d(1, 1, STRIDE, STRIDE)

    def forward(self, masks: Tensor) -> Tensor:
        """Contract `mask_downsampler`: mask_prompts."""
        return self.conv(masks[:, None])[:, 0]  # type: ignore[no-any-return]  # [O, S, S] -> [O, 4 g, 4 g]
