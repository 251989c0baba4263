"""SAM2's features of a frame (spec 6.1; sam2_base.py forward_image)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ensemble.config import ModelConfig

from .hiera import FeaturePyramid, Hiera
from .layers import Graph


class FrameEncoder(Graph):
    """Hiera with its pyramid at `sam2.image_size`, and the mask decoder's projections of the two finer levels."""

    keys: ClassVar[dict[str, str]] = {
        "trunk.": "sparrow:model.visual_model.image_encoder.trunk.",
        "neck.": "sparrow:model.visual_model.image_encoder.neck.",
        "conv_s0.": "sparrow:model.visual_model.sam_mask_decoder.conv_s0.",
        "conv_s1.": "sparrow:model.visual_model.sam_mask_decoder.conv_s1.",
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        sam2 = config.sam2
        self.trunk = Hiera(sam2.hiera, sam2.image_size)
        self.neck = FeaturePyramid(sam2.hiera, sam2.width)
        self.conv_s0 = nn.Conv2d(sam2.width, sam2.width // 8, 1)
        self.conv_s1 = nn.Conv2d(sam2.width, sam2.width // 4, 1)

    def forward(self, grounding_frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Contract `frame_encoder`: (frame_embeddings, high_res_1, high_res_0)."""
        stride_4, stride_8, stride_16 = self.neck(self.trunk(grounding_frames))
        return stride_16, self.conv_s1(stride_8), self.conv_s0(stride_4)
