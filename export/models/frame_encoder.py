"""SAM2's features of a frame (spec 6.1; sam2_base.py forward_image)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ensemble import settings
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

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        sam2 = config.sam2
        self.trunk = Hiera(sam2.hiera, sam2.image_size)
        self.neck = FeaturePyramid(sam2.hiera, sam2.width)
        self.conv_s0 = nn.Conv2d(sam2.width, sam2.width // 8, 1)
        self.conv_s1 = nn.Conv2d(sam2.width, sam2.width // 4, 1)
        self.register_buffer("mean", torch.tensor(settings.SAM_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(settings.SAM_STD), persistent=False)

    def forward(self, pictures: Tensor, picture_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Contract `frame_encoder`: (frame_embeddings, high_res_1, high_res_0)."""
        # Channels first from here on: ONNX Runtime is slow where three values lie beside each other.
        pixels = (pictures.permute(0, 3, 1, 2).float() - self.mean[:, None, None]) / self.std[:, None, None]  # [N, 3, S, S]
        columns = stretch(pixels, picture_sizes[:, 0]).transpose(2, 3)
        return self.encode(stretch(columns, picture_sizes[:, 1]).transpose(2, 3))

    def encode(self, grounding_frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of what `ensemble.frames.grounding_frame` returns: [N, 3, S, S] float."""
        stride_4, stride_8, stride_16 = self.neck(self.trunk(grounding_frames))
        return stride_16, self.conv_s1(stride_8), self.conv_s0(stride_4)


def stretch(x: Tensor, used: Tensor) -> Tensor:
    """Linear interpolation of the first lines of a square over all of its lines, as `ensemble.frames.stretch` (spec 1.2).

    Args:
        x: [N, C, S, S] float.
        used: [N] int, how many lines of each hold a picture.
    """
    count, channels, size = x.shape[:3]
    source = ((torch.arange(size, device=x.device) + 0.5) * (used[:, None] / size) - 0.5).clamp(min=0)  # [N, S]
    low = source.long()
    high = torch.minimum(low + 1, used[:, None] - 1)
    weight = (source - low)[:, None, :, None]  # [N, S] -> [N, 1, S, 1]
    lines, first = x.flatten(0, 2), size * torch.arange(count * channels, device=x.device).reshape(count, channels, 1)
    return (1 - weight) * lines[first + low[:, None]] + weight * lines[first + high[:, None]]
