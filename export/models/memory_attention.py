"""Conditions a frame on an object's past (spec 7.5; memory_attention.py, sam2_base.py _prepare_memory_conditioned_features)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ensemble import settings
from ensemble.config import ModelConfig, Sam2Config

from .layers import TEMPERATURE, Attention, Graph, activated, attention, by_kernels, sine_positions, small_random

FRAME_POSITION_SCALE = 0.1
"""Weight of the positions that are added to the frame (memory_attention.py)."""


class MemoryAttention(Graph):
    """Layers of self-attention over the frame and cross-attention to memory maps and object pointers."""

    keys: ClassVar[dict[str, str]] = {
        "layers.": "sparrow:model.visual_model.memory_attention.layers.",
        "norm.": "sparrow:model.visual_model.memory_attention.norm.",
        "maskmem_tpos_enc": "sparrow:model.visual_model.maskmem_tpos_enc",
        "obj_ptr_tpos_proj.": "sparrow:model.visual_model.obj_ptr_tpos_proj.",
    }
    alone = "objects"

    frame_positions: Tensor
    map_positions: Tensor
    rope_cos: Tensor
    rope_sin: Tensor
    distance_scales: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        sam2 = config.sam2
        self.layers = nn.ModuleList(MemoryLayer(sam2) for _ in range(sam2.memory_layers))
        self.norm = nn.LayerNorm(sam2.width)
        self.maskmem_tpos_enc = small_random(sam2.num_maps, 1, 1, sam2.memory_width)
        if sam2.pointer_positions:
            self.obj_ptr_tpos_proj = nn.Linear(sam2.width, sam2.memory_width)
            self.register_buffer("distance_scales", distance_scales(sam2.width), persistent=False)
        self.register_buffer("frame_positions", sine_positions(sam2.grid, sam2.width).flatten(0, 1), persistent=False)
        self.register_buffer("map_positions", sine_positions(sam2.grid, sam2.memory_width).flatten(0, 1), persistent=False)
        angles = rope_angles(sam2.grid, sam2.width)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)

    def forward(
        self,
        frame_embeddings: Tensor,
        object_frame: Tensor,
        memory_maps: Tensor,
        memory_rows: Tensor,
        object_pointers: Tensor,
        pointer_distances: Tensor,
    ) -> Tensor:
        """Contract `memory_attention`: conditioned_embeddings."""
        sam2 = self.config.sam2
        frames = frame_embeddings.flatten(2).transpose(1, 2)  # [T, C, g, g] -> [T, g * g, C]
        x = (frames + FRAME_POSITION_SCALE * self.frame_positions)[object_frame]  # [T, g * g, C] -> [O, g * g, C]

        maps = memory_maps.flatten(3).transpose(2, 3)  # [O, M, C, g, g] -> [O, M, g * g, C]
        temporal = self.maskmem_tpos_enc.flatten(1)[memory_rows]  # [O, M] -> [O, M, C]
        map_keys = maps + self.map_positions + temporal[:, :, None]
        objects, tokens = object_pointers.shape[0], sam2.width // sam2.memory_width
        pointers = object_pointers.reshape(objects, -1, sam2.memory_width)  # [O, P, width] -> [O, P * tokens, C]
        values = torch.cat([maps.flatten(1, 2), pointers], 1)[:, None]  # [O, 1, K, C], K = M * g * g + P * tokens
        pointer_keys = pointers
        if sam2.pointer_positions:
            angles = pointer_distances[:, :, None] * self.distance_scales  # [O, P] -> [O, P, width / 2]
            positions = self.obj_ptr_tpos_proj(torch.cat([angles.sin(), angles.cos()], -1))  # -> [O, P, C]
            pointer_keys = pointers + positions.repeat_interleave(tokens, 1)  # [O, P, C] -> [O, P * tokens, C]

        for layer in self.layers:
            x = layer(x, map_keys, pointer_keys, values, self.rope_cos, self.rope_sin)
        conditioned: Tensor = self.norm(x).transpose(1, 2)  # [O, g * g, C] -> [O, C, g * g]
        return conditioned.reshape(-1, sam2.width, sam2.grid, sam2.grid)


class MemoryLayer(nn.Module):
    """Pre-norm layer: self-attention, cross-attention, MLP; one head, rotary positions on everything but pointers."""

    def __init__(self, sam2: Sam2Config) -> None:
        super().__init__()
        width = sam2.width
        self.self_attn = Attention(width, 1, width)
        self.cross_attn_image = Attention(width, 1, width, sam2.memory_width)
        self.linear1 = nn.Linear(width, sam2.memory_mlp_width)
        self.linear2 = nn.Linear(sam2.memory_mlp_width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, map_keys: Tensor, pointer_keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attn, normal = self.self_attn, self.norm1(x)
        q, k = rotate(attn.q_proj(normal), cos, sin), rotate(attn.k_proj(normal), cos, sin)
        x = x + attn.attend(q, k, attn.v_proj(normal))

        attn, normal = self.cross_attn_image, self.norm2(x)
        k = rotated_keys(attn.k_proj, map_keys, pointer_keys, cos, sin)
        q = rotate(attn.q_proj(normal), cos, sin)
        # Weights of a softmax sum to one: values may be mixed first, while they are narrow, and projected then.
        mixed = attention(q[:, None], k[:, None], values.to(attn.v_proj.weight.dtype), None)  # -> [O, 1, g * g, memory_width]
        x = x + attn.out_proj(attn.v_proj(mixed[:, 0]))

        out: Tensor = x + self.linear2(activated(self.linear1, self.norm3(x)))
        return out


def distance_scales(width: int) -> Tensor:
    """Angle per frame of distance in each channel pair: [width / 2] (sam2_utils.py get_1d_sine_pe).

    The original divides distances by one less than the pointers that a frame attends to, min(num_frames, 16) of them. A served stream
    has no known length, so it counts as 16 frames or more: clips of fewer frames get other angles than from the original.
    """
    half = width // 2
    return TEMPERATURE ** -(torch.arange(half) // 2 * 2 / half) / settings.MAX_RECENT_POINTERS


def rope_angles(grid: int, width: int) -> Tensor:
    """Rotation of each channel pair in each cell: [grid * grid, width / 2], columns first, then rows (compute_axial_cis)."""
    angle = torch.arange(grid)[:, None] * TEMPERATURE ** -(torch.arange(0, width, 4) / width)  # [grid, width / 4]
    return torch.cat([angle.expand(grid, -1, -1), angle[:, None].expand(-1, grid, -1)], -1).flatten(0, 1)


def rotated_keys(k_proj: nn.Linear, map_keys: Tensor, pointer_keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Projected keys of all memories, [O, K, C]: [O, M, g * g, memory_width], which are rotated, and [O, P, memory_width] behind them."""
    if by_kernels(k_proj.weight):
        from . import map_kernels

        maps, pointers = (keys.to(k_proj.weight.dtype) for keys in (map_keys, pointer_keys))
        return map_kernels.rotated_keys(maps, pointers, k_proj.weight, k_proj.bias, cos, sin)  # type: ignore[no-any-return]
    maps = rotate(k_proj(map_keys), cos, sin).flatten(1, 2)  # [O, M, g * g, C] -> [O, M * g * g, C]
    return torch.cat([maps, torch.cat(pairs(k_proj(pointer_keys)), -1)], 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring channels of x [..., g * g, C] by the angles of cos, sin [g * g, C / 2].

    Returns:
        all first channels of the pairs before all second ones, which products of queries and keys do not depend on: no memory is read or
        written in strides.
    """
    even, odd = pairs(x)
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1)


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., C] -> the first and the second of neighbouring channels, [..., C / 2] each."""
    return x[..., 0::2], x[..., 1::2]
