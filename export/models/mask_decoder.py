"""Prompts to masks (spec 6.2, 6.3, 7.3, appendix B; prompt_encoder.py, mask_decoder.py, sam2_base.py _forward_sam_heads)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ensemble import settings
from ensemble.components import ABSENT, BOTTOM_RIGHT, PAD, TEXT
from ensemble.config import ModelConfig, Sam2Config

from .layers import MLP, Attention, Graph, LayerNorm2d, small_random

NUM_MASKS = 4
"""Mask tokens: 0 for a single mask, 1 to 3 for an ambiguous prompt."""
NUM_OUTPUT_TOKENS = 2 + NUM_MASKS
"""Object score, predicted IoU, masks."""
MASK_PROMPT_CHANNELS = 16
"""Channels of a mask prompt at stride 16 (sam2_base.py mask_in_chans)."""


class MaskDecoder(Graph):
    """SAM2's prompt encoder, two-way transformer and heads, with the choice among the mask tokens."""

    keys: ClassVar[dict[str, str]] = {
        "prompt_encoder.": "sparrow:model.visual_model.sam_prompt_encoder.",
        "": "sparrow:model.visual_model.sam_mask_decoder.",
        "obj_ptr_proj.": "sparrow:model.visual_model.obj_ptr_proj.",
        "no_mem_embed": "sparrow:model.visual_model.no_mem_embed",
        "no_obj_ptr": "sparrow:model.visual_model.no_obj_ptr",
    }
    unused: ClassVar[tuple[str, ...]] = (r".*\.sam_mask_decoder\.conv_s[01]\..*",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        sam2 = config.sam2
        width = sam2.width
        self.prompt_encoder = PromptEncoder(sam2)
        self.obj_score_token = nn.Embedding(1, width)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(NUM_MASKS, width)
        self.transformer = TwoWayTransformer(sam2)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, 2),
            LayerNorm2d(width // 4),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(width, width, width // 8, 3) for _ in range(NUM_MASKS))
        self.iou_prediction_head = MLP(width, width, NUM_MASKS, 3)
        self.pred_obj_score_head = MLP(width, width, 1, 3)
        self.obj_ptr_proj = MLP(width, width, width, 3)
        self.no_mem_embed = small_random(1, 1, width)
        self.no_obj_ptr = small_random(1, width)

    def forward(
        self,
        image_embeddings: Tensor,
        high_res_1: Tensor,
        high_res_0: Tensor,
        object_embedding: Tensor,
        object_frame: Tensor,
        has_memory: Tensor,
        multimask: Tensor,
        prompt_points: Tensor,
        prompt_labels: Tensor,
        text_embeddings: Tensor,
        mask_prompts: Tensor,
        has_mask_prompt: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Contract `mask_decoder`: (mask_logits, predicted_iou, object_scores, object_pointers)."""
        masks, iou, object_scores, mask_tokens = self.decode(
            image_embeddings,
            high_res_1,
            high_res_0,
            object_embedding,
            object_frame,
            has_memory,
            prompt_points,
            prompt_labels,
            text_embeddings,
            mask_prompts,
            has_mask_prompt,
        )
        best = iou[:, 1:].argmax(1) + 1  # [O]
        single = torch.zeros_like(best)
        chosen = torch.where(multimask | ~is_stable(masks[:, 0]), best, single)
        # An unstable single mask is replaced, its token is not (mask_decoder.py forward).
        pointers = self.point(pick(mask_tokens, torch.where(multimask, best, single)), object_scores)
        return pick(masks, chosen), pick(iou, chosen), object_scores, pointers

    def decode(
        self,
        image_embeddings: Tensor,
        high_res_1: Tensor,
        high_res_0: Tensor,
        object_embedding: Tensor,
        object_frame: Tensor,
        has_memory: Tensor,
        prompt_points: Tensor,
        prompt_labels: Tensor,
        text_embeddings: Tensor,
        mask_prompts: Tensor,
        has_mask_prompt: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What every mask token says.

        Args:
            those of `forward`.
        Returns:
            masks: [O, 4, 4 g, 4 g]
            iou: [O, 4]
            object_scores: [O]
            mask_tokens: [O, 4, C]
        """
        image = image_embeddings[object_embedding]  # [E, C, g, g] -> [O, C, g, g]
        image = torch.where(has_memory[:, None, None, None], image, image + self.no_mem_embed.reshape(1, -1, 1, 1))
        image = image + self.prompt_encoder.dense(mask_prompts, has_mask_prompt)

        prompts = self.prompt_encoder.sparse(prompt_points, prompt_labels, text_embeddings)  # [O, S, C]
        objects = prompts.shape[0]
        outputs = torch.cat([self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight])  # [6, C]
        tokens = torch.cat([outputs.expand(objects, -1, -1), prompts], 1)  # [O, 6 + S, C]
        present = torch.cat([prompt_labels.new_ones(objects, NUM_OUTPUT_TOKENS), prompt_labels], 1) != ABSENT  # [O, 6 + S]

        tokens, image = self.transformer(tokens, image, self.prompt_encoder.image_positions(), present[:, None, None])
        mask_tokens = tokens[:, 2:NUM_OUTPUT_TOKENS]  # [O, 4, C]
        masks = self.masks(mask_tokens, image, high_res_1[object_frame], high_res_0[object_frame])  # [O, 4, 4 g, 4 g]
        iou = self.iou_prediction_head(tokens[:, 1]).sigmoid()  # [O, 4]
        object_scores = self.pred_obj_score_head(tokens[:, 0]).squeeze(1)  # [O, C] -> [O]
        return masks, iou, object_scores, mask_tokens

    def point(self, mask_tokens: Tensor, object_scores: Tensor) -> Tensor:
        """Object pointers: [O, C] tokens of the chosen masks, [O] -> [O, C]."""
        return torch.where(object_scores[:, None] > 0, self.obj_ptr_proj(mask_tokens), self.no_obj_ptr)

    def masks(self, mask_tokens: Tensor, image: Tensor, high_res_1: Tensor, high_res_0: Tensor) -> Tensor:
        """Logits of every mask token.

        Args:
            mask_tokens: [O, 4, C]
            image: [O, C, g, g]
            high_res_1, high_res_0: [O, C / 4, 2 g, 2 g], [O, C / 8, 4 g, 4 g]
        Returns:
            [O, 4, 4 g, 4 g]
        """
        up_1, norm, gelu_1, up_0, gelu_0 = self.output_upscaling
        x = gelu_1(norm(up_1(image) + high_res_1))  # [O, C, g, g] -> [O, C / 4, 2 g, 2 g]
        x = gelu_0(up_0(x) + high_res_0)  # -> [O, C / 8, 4 g, 4 g]
        mlps = enumerate(self.output_hypernetworks_mlps)
        filters = torch.stack([mlp(mask_tokens[:, index]) for index, mlp in mlps], 1)  # [O, 4, C] -> [O, 4, C / 8]
        masks: Tensor = filters @ x.flatten(2)  # [O, 4, C / 8] -> [O, 4, 16 g * g]
        return masks.reshape(-1, NUM_MASKS, *x.shape[2:])


def is_stable(mask_logits: Tensor) -> Tensor:
    """[O, H, W] logits -> [O] bool: the mask hardly changes when its threshold moves (_dynamic_multimask_via_stability)."""
    inner = (mask_logits > settings.STABILITY_DELTA).sum((1, 2), dtype=torch.float32)
    outer = (mask_logits > -settings.STABILITY_DELTA).sum((1, 2), dtype=torch.float32)
    return (outer == 0) | (inner / outer.clamp(min=1) >= settings.STABILITY_THRESHOLD)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """[O, 4, ...], [O] -> [O, ...]: each object's entry."""
    return x[torch.arange(x.shape[0], device=x.device), index]


class PromptEncoder(nn.Module):
    """Points, boxes, texts and masks as the decoder takes them."""

    centres: Tensor

    def __init__(self, sam2: Sam2Config) -> None:
        super().__init__()
        self.image_size = sam2.image_size
        self.pe_layer = FourierPositions(sam2.width)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, sam2.width) for _ in range(BOTTOM_RIGHT + 1))
        self.not_a_point_embed = nn.Embedding(1, sam2.width)
        self.no_mask_embed = nn.Embedding(1, sam2.width)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, MASK_PROMPT_CHANNELS // 4, 2, 2),
            LayerNorm2d(MASK_PROMPT_CHANNELS // 4),
            nn.GELU(),
            nn.Conv2d(MASK_PROMPT_CHANNELS // 4, MASK_PROMPT_CHANNELS, 2, 2),
            LayerNorm2d(MASK_PROMPT_CHANNELS),
            nn.GELU(),
            nn.Conv2d(MASK_PROMPT_CHANNELS, sam2.width, 1),
        )
        line = (torch.arange(sam2.grid) + 0.5) / sam2.grid
        self.register_buffer("centres", torch.cartesian_prod(line, line).flip(1), persistent=False)  # [g * g, 2], x and y

    def sparse(self, points: Tensor, labels: Tensor, text_embeddings: Tensor) -> Tensor:
        """One token per slot.

        Args:
            points: [O, S, 2] float32, x, y in pixels.
            labels: [O, S] int64 as in the contract.
            text_embeddings: [O, C]
        Returns:
            [O, S, C]
        """
        points = self.pe_layer((points + 0.5) / self.image_size)  # [O, S, 2] -> [O, S, C]
        kinds = torch.cat([*self.point_embeddings.parameters()])  # [4, C]
        tokens = points + kinds[labels.clamp(0, BOTTOM_RIGHT)]
        tokens = torch.where((labels == PAD)[:, :, None], self.not_a_point_embed.weight, tokens)
        return torch.where((labels == TEXT)[:, :, None], text_embeddings[:, None], tokens)

    def dense(self, mask_prompts: Tensor, has_mask_prompt: Tensor) -> Tensor:
        """[O, 4 g, 4 g] logits, [O] bool -> [O, C, g, g]"""
        embedded = self.mask_downscaling(mask_prompts[:, None])  # [O, 4 g, 4 g] -> [O, C, g, g]
        return torch.where(has_mask_prompt[:, None, None, None], embedded, self.no_mask_embed.weight[:, :, None, None])

    def image_positions(self) -> Tensor:
        """[g * g, C] positions of the cells of the image embedding."""
        return self.pe_layer(self.centres)  # type: ignore[no-any-return]


class FourierPositions(nn.Module):
    """Positions as sines and cosines of random frequencies (position_encoding.py PositionEmbeddingRandom)."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, width // 2))

    def forward(self, points: Tensor) -> Tensor:
        """[..., 2] x and y in 0..1 -> [..., C]"""
        angle = 2 * math.pi * ((2 * points - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angle.sin(), angle.cos()], -1)


class TwoWayTransformer(nn.Module):
    """Tokens attend to the image and the image to the tokens, in turn."""

    def __init__(self, sam2: Sam2Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayLayer(sam2, index == 0) for index in range(sam2.decoder_layers))
        self.final_attn_token_to_image = Attention(sam2.width, sam2.decoder_heads, sam2.width // 2)
        self.norm_final_attn = nn.LayerNorm(sam2.width)

    def forward(self, tokens: Tensor, image: Tensor, image_positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both, updated.

        Args:
            tokens: [O, S, C]
            image: [O, C, g, g]
            image_positions: [g * g, C]
            mask: [O, 1, 1, S] bool; False hides a token from all others.
        Returns:
            tokens [O, S, C] and image [O, C, g, g].
        """
        prompts, x = tokens, image.flatten(2).transpose(1, 2)  # [O, C, g, g] -> [O, g * g, C]
        for layer in self.layers:
            tokens, x = layer(tokens, x, prompts, image_positions, mask)
        tokens = tokens + self.final_attn_token_to_image(tokens + prompts, x + image_positions, x)
        return self.norm_final_attn(tokens), x.transpose(1, 2).reshape(image.shape)  # [O, g * g, C] -> [O, C, g, g]


class TwoWayLayer(nn.Module):
    """Self-attention of tokens, tokens to image, MLP of tokens, image to tokens; post-norm."""

    def __init__(self, sam2: Sam2Config, is_first: bool) -> None:
        super().__init__()
        width, heads = sam2.width, sam2.decoder_heads
        self.is_first = is_first
        self.self_attn = Attention(width, heads, width)
        self.cross_attn_token_to_image = Attention(width, heads, width // 2)
        self.mlp = MLP(width, sam2.decoder_mlp_width, width, 2)
        self.cross_attn_image_to_token = Attention(width, heads, width // 2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(width) for _ in range(4))

    def forward(self, tokens: Tensor, image: Tensor, prompts: Tensor, image_positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[O, S, C] tokens and [O, g * g, C] image, updated; `prompts` are the tokens' positions."""
        if self.is_first:  # the tokens still are their own positions
            tokens = self.norm1(self.self_attn(tokens, tokens, tokens, mask))
        else:
            placed = tokens + prompts
            tokens = self.norm1(tokens + self.self_attn(placed, placed, tokens, mask))
        placed_image = image + image_positions
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + prompts, placed_image, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(placed_image, tokens + prompts, tokens, mask))
        return tokens, image
