"""Scores every proposal against every prompt embedding (spec 5.1, 5.2: ProposalSelector, ROIProposalHelper)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble.config import ModelConfig

from .layers import Graph, small_random
from .roi_align import roi_align

MIN_SCORE = 1e-6
"""Bound under the logarithm of a proposal's score (spec 5.1)."""


class ProposalSelector(Graph):
    """Attention of prompts over proposals, and logits from what SAM2 sees inside of each box."""

    keys: ClassVar[dict[str, str]] = {
        "": "sparrow:model.proposal_selector.",
        "roi_helper.": "sparrow:model.roi_helper.",
        "no_mem_embed": "sparrow:model.visual_model.no_mem_embed",
    }
    capturable = False  # roi_align asks the boxes how many samples they take
    unused: ClassVar[tuple[str, ...]] = (r"model\.proposal_selector\.box_head\..*",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width = config.selector.width
        self.seg_proj = nn.Linear(config.sam2.width, width)
        self.prop_proj = nn.Linear(config.proposer.width, width)
        self.fuse_proj = nn.Linear(config.proposer.width, config.sam2.width)
        self.roi_helper = RoiHelper(config)
        self.no_mem_embed = small_random(1, 1, config.sam2.width)

    def forward(
        self,
        prompt_embeddings: Tensor,
        proposal_boxes: Tensor,
        proposal_features: Tensor,
        proposal_scores: Tensor,
        frame_embeddings: Tensor,
        high_res_1: Tensor,
        high_res_0: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Contract `proposal_selector`: (selector_logits, roi_logits, refined_embeddings)."""
        queries, keys = self.seg_proj(prompt_embeddings), self.prop_proj(proposal_features)  # [S, C], [P, C]
        logits = queries @ keys.T / math.sqrt(keys.shape[1]) + proposal_scores.clamp(min=MIN_SCORE).log()  # [S, P]
        refined = prompt_embeddings + self.fuse_proj(logits.softmax(1) @ proposal_features)

        pyramid = [high_res_0, high_res_1, frame_embeddings + self.no_mem_embed.reshape(1, -1, 1, 1)]
        return logits, self.roi_helper(prompt_embeddings, proposal_boxes, pyramid), refined


class RoiHelper(nn.Module):
    """Logits of (prompt, proposal) pairs from the features inside of each box."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, sam2_width = config.selector.width, config.sam2.width
        self.image_size, self.roi_size = config.sam2.image_size, config.selector.roi_size
        levels = [sam2_width // 8, sam2_width // 4, sam2_width]
        self.query_proj = nn.Linear(sam2_width, width)
        self.seg_proj = nn.Linear(sam2_width, width)
        self.level_token_proj = nn.ModuleList(nn.Linear(channels, width) for channels in levels)
        self.level_pool_proj = nn.ModuleList(nn.Linear(channels, width) for channels in levels)
        self.score_head = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, prompt_embeddings: Tensor, boxes: Tensor, pyramid: list[Tensor]) -> Tensor:
        """Logits.

        Args:
            prompt_embeddings: [S, sam2.width]
            boxes: [P, 4] xyxy, normalised, unclamped.
            pyramid: [1, C, h, w] of stride 4, 8, 16.
        Returns:
            [S, P]
        """
        tokens, pooled = self.read(boxes * self.image_size, pyramid)
        queries = self.query_proj(prompt_embeddings).expand(1, tokens.shape[0], -1, -1)  # [S, C] -> [1, P, S, C]
        # Every proposal is a head: the ONNX exporter takes no attention without an axis of heads.
        found = F.scaled_dot_product_attention(queries, tokens[None], tokens[None])[0]  # [1, P, S, C] -> [P, S, C]

        # The first layer of score_head reads (found, pooled, prompt); apart, only `found` is worked on once per pair.
        of_found, of_pooled, of_prompt = self.score_head.get_parameter("0.weight").chunk(3, 1)
        hidden = F.linear(found, of_found, self.score_head.get_parameter("0.bias"))
        hidden = hidden + F.linear(pooled, of_pooled)[:, None] + F.linear(self.seg_proj(prompt_embeddings), of_prompt)
        logits: Tensor = self.score_head[1:](hidden).squeeze(2).T  # [P, S, C] -> [P, S, 1] -> [S, P]
        return logits

    def read(self, boxes: Tensor, pyramid: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What each box shows.

        Args:
            boxes: [P, 4] xyxy, in pixels of the grounding frame.
            pyramid: as in `forward`.
        Returns:
            [P, 3 * cells, C], the cells of every level; [P, C], their mean.
        """
        tokens, pooled = [], []
        for level, token_proj, pool_proj in zip(pyramid, self.level_token_proj, self.level_pool_proj, strict=True):
            cells = roi_align(level, boxes, self.roi_size, level.shape[-1] / self.image_size).flatten(2)  # [P, C, cells]
            tokens.append(token_proj(cells.transpose(1, 2)))  # -> [P, cells, C]
            pooled.append(pool_proj(cells.mean(2)))  # -> [P, C]
        return torch.cat(tokens, 1), torch.stack(pooled).mean(0)
