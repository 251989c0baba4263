"""DDETR-SAM2: class-agnostic boxes from a Deformable-DETR on an image encoder of its own (spec 4).

Named as transformers 4.41 `DeformableDetrModel`, two-stage, with one feature level. Unlike there, the content of a query is
learned and goes by its rank, and every decoder layer samples around the box that the encoder proposed.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble.config import ModelConfig, ProposerConfig

from .hiera import FeaturePyramid, Hiera
from .layers import MLP, Attention, Graph, LayerNorm2d, small_random

PROPOSAL_SIDE = 0.05
"""Width and height of the box that each cell starts from, in parts of the image (gen_encoder_output_proposals)."""
LOGIT_EPS = 1e-5
"""Bound of x and of 1 - x in the inverse of a sigmoid (inverse_sigmoid)."""


class ProposalDetector(Graph):
    """Image encoder, a deformable encoder that ranks and proposes boxes, and a decoder that refines the best of them."""

    keys: ClassVar[dict[str, str]] = {
        "trunk.": "ddetr:vis_encoder.trunk.",
        "neck.": "ddetr:vis_encoder.neck.",
        "input_proj.": "ddetr:input_proj.0.",
        "": "ddetr:ddetr_transformer.",
        "encoder.": "ddetr:ddetr_transformer.encoder.layers.",
        "decoder.": "ddetr:ddetr_transformer.decoder.layers.",
        "bbox_embed.": "ddetr:ddetr_transformer.bbox_embed.|ddetr:ddetr_transformer.decoder.bbox_embed.",
        "class_embed_": "ddetr:ddetr_transformer.class_embed_|ddetr:ddetr_transformer.decoder.class_embed_",
    }
    unused: ClassVar[tuple[str, ...]] = (
        r"ddetr_transformer\.(decoder\.)?bbox_embed\.\d+\.layers\.[012]\.(weight|bias)",
        r"ddetr_transformer\.(decoder\.)?class_embed_(coco|sa1b)\.\d+\.(weight|bias)",
    )
    """The heads of earlier layers, which only training reads."""

    cell_positions: Tensor
    cell_boxes: Tensor
    cell_proposals: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        proposer = config.proposer
        width, grid, last = proposer.width, proposer.grid, proposer.layers - 1
        self.trunk = Hiera(proposer.hiera, proposer.image_size)
        self.neck = FeaturePyramid(proposer.hiera, width)
        self.input_proj = nn.Sequential(nn.Conv2d(width, width, 1), LayerNorm2d(width))
        self.level_embed = small_random(1, width)
        self.encoder = nn.ModuleList(EncoderLayer(proposer) for _ in range(proposer.layers))
        self.enc_output = nn.Linear(width, width)
        self.enc_output_norm = nn.LayerNorm(width)
        self.pos_trans = nn.Linear(2 * width, 2 * width)
        self.pos_trans_norm = nn.LayerNorm(2 * width)
        self.query_position_embeddings = nn.Embedding(proposer.queries, width)
        self.decoder = nn.ModuleList(DecoderLayer(proposer) for _ in range(proposer.layers))
        self.class_embed_enc = nn.Linear(width, 1)
        self.class_embed_coco = nn.ModuleDict({str(last): nn.Linear(width, 1)})
        self.class_embed_sa1b = nn.ModuleDict({str(last): nn.Linear(width, 1)})
        # One per decoder layer, of which the last two matter, then the encoder's.
        self.bbox_embed = nn.ModuleDict({str(index): MLP(width, width, 4, 3) for index in (last - 1, last, last + 1)})

        line = torch.arange(grid) + 0.5
        cells = torch.cartesian_prod(line, line)  # [g * g, 2], row and column
        centres = cells.flip(1) / grid
        proposals = torch.cat([centres, torch.full_like(centres, PROPOSAL_SIDE)], 1)
        # In a box of this side offsets count cells, as the encoder's do.
        boxes = torch.cat([centres, torch.full_like(centres, 2 * proposer.points / grid)], 1)
        self.register_buffer("cell_positions", sines(cells / (grid + 1e-6), width // 2)[None], persistent=False)  # [1, g * g, C]
        self.register_buffer("cell_boxes", boxes[None], persistent=False)  # [1, g * g, 4]
        self.register_buffer("cell_proposals", inverse_sigmoid(proposals)[None], persistent=False)  # [1, g * g, 4]

    def forward(self, proposal_image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Contract `proposal_detector`: (query_boxes, query_features, coco_scores, sa1b_scores)."""
        boxes, features, coco_logits, sa1b_logits = (x[0] for x in self.detect(proposal_image))
        centres, sides = boxes.chunk(2, 1)  # [Q, 4] -> 2 x [Q, 2]
        return torch.cat([centres - sides / 2, centres + sides / 2], 1), features, coco_logits.sigmoid(), sa1b_logits.sigmoid()

    def detect(self, proposal_image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every query's box, in the order of the encoder's ranking.

        Args:
            proposal_image: [N, 3, S, S] float, ImageNet-normalised, S = config.proposer.image_size.
        Returns:
            boxes: [N, Q, 4] cxcywh, normalised.
            features: [N, Q, C]
            coco_logits, sa1b_logits: [N, Q]
        """
        memory = self.encode(proposal_image)
        return self.refine(memory, self.rank(*self.propose(memory)))

    def encode(self, proposal_image: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, g * g, C]: the cells, encoded."""
        memory = self.source(proposal_image).flatten(2).transpose(1, 2)  # [N, C, g, g] -> [N, g * g, C]
        for encoder_layer in self.encoder:
            memory = encoder_layer(memory, self.cell_positions + self.level_embed, self.cell_boxes)
        return memory

    def source(self, proposal_image: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, C, g, g]: the one feature level."""
        *_, stride_16 = self.neck(self.trunk(proposal_image))
        return self.input_proj(stride_16)  # type: ignore[no-any-return]

    def propose(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """What every cell proposes.

        Args:
            memory: [N, g * g, C] encoded cells.
        Returns:
            logits: [N, g * g]
            boxes: [N, g * g, 4] cxcywh, normalised.
        """
        memory = self.enc_output_norm(self.enc_output(memory))
        *_, encoder_box = self.bbox_embed.values()
        return self.class_embed_enc(memory).squeeze(2), (encoder_box(memory) + self.cell_proposals).sigmoid()

    def rank(self, logits: Tensor, boxes: Tensor) -> Tensor:
        """[N, g * g] logits, [N, g * g, 4] boxes -> [N, Q, 4]: the best boxes, best first."""
        best = logits.topk(self.config.proposer.queries).indices  # [N, Q]
        return boxes.gather(1, best[..., None].expand(-1, -1, 4))

    def refine(self, memory: Tensor, references: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The decoder: what `detect` returns.

        Args:
            memory: [N, g * g, C] encoded cells.
            references: [N, Q, 4] cxcywh, normalised, best first.
        """
        embedded = sines(references, self.config.proposer.width // 2)  # [N, Q, 4] -> [N, Q, 2 C]
        # The other half would be the content of the queries in the original Deformable-DETR.
        positions = self.pos_trans_norm(self.pos_trans(embedded)).chunk(2, 2)[0]  # -> [N, Q, C]
        features = earlier = self.query_position_embeddings.weight.expand(len(memory), -1, -1)  # [N, Q, C]
        for decoder_layer in self.decoder:
            earlier, features = features, decoder_layer(features, positions, memory, references)

        earlier_box, last_box, _ = self.bbox_embed.values()
        boxes = (earlier_box(earlier) + inverse_sigmoid(references)).sigmoid()
        boxes = (last_box(features) + inverse_sigmoid(boxes)).sigmoid()
        (coco,), (sa1b,) = self.class_embed_coco.values(), self.class_embed_sa1b.values()
        return boxes, features, coco(features).squeeze(2), sa1b(features).squeeze(2)


class EncoderLayer(nn.Module):
    """Deformable self-attention and MLP; post-norm."""

    def __init__(self, proposer: ProposerConfig) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(proposer)
        self.self_attn_layer_norm = nn.LayerNorm(proposer.width)
        self.fc1 = nn.Linear(proposer.width, proposer.mlp_width)
        self.fc2 = nn.Linear(proposer.mlp_width, proposer.width)
        self.final_layer_norm = nn.LayerNorm(proposer.width)

    def forward(self, x: Tensor, positions: Tensor, boxes: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(x + self.self_attn(x + positions, x, boxes))
        out: Tensor = self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))
        return out


class DecoderLayer(nn.Module):
    """Self-attention of queries, deformable attention to the encoded cells, MLP; post-norm."""

    def __init__(self, proposer: ProposerConfig) -> None:
        super().__init__()
        width = proposer.width
        self.self_attn = Attention(width, proposer.heads, width)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = DeformableAttention(proposer)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, proposer.mlp_width)
        self.fc2 = nn.Linear(proposer.mlp_width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor, memory: Tensor, boxes: Tensor) -> Tensor:
        placed = x + positions
        x = self.self_attn_layer_norm(x + self.self_attn(placed, placed, x))
        x = self.encoder_attn_layer_norm(x + self.encoder_attn(x + positions, memory, boxes))
        out: Tensor = self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))
        return out


class DeformableAttention(nn.Module):
    """Each head of a query samples the map at a few learned offsets around the query's box (MultiScaleDeformableAttention)."""

    def __init__(self, proposer: ProposerConfig) -> None:
        super().__init__()
        self.grid, self.heads, self.points = proposer.grid, proposer.heads, proposer.points
        self.sampling_offsets = nn.Linear(proposer.width, self.heads * self.points * 2)
        self.attention_weights = nn.Linear(proposer.width, self.heads * self.points)
        self.value_proj = nn.Linear(proposer.width, proposer.width)
        self.output_proj = nn.Linear(proposer.width, proposer.width)
        self.sample = sample_grid

    def forward(self, queries: Tensor, memory: Tensor, boxes: Tensor) -> Tensor:
        """Attention over the cells of the map.

        Args:
            queries: [N, S, C]
            memory: [N, g * g, C] row-major cells.
            boxes: [N, S, 4] cxcywh, normalised; an offset as large as `points` reaches from the centre to the edge.
        Returns:
            [N, S, C]
        """
        offsets = self.sampling_offsets(queries)
        offsets = offsets.unflatten(2, (self.heads, self.points, 2))  # [N, S, 2 * heads * points] -> [N, S, heads, points, 2]
        centres, sides = boxes[:, :, None, None].chunk(2, -1)  # [N, S, 4] -> 2 x [N, S, 1, 1, 2]
        at = centres + offsets / self.points * sides * 0.5  # -> [N, S, heads, points, 2]
        weights = self.attention_weights(queries).unflatten(2, (self.heads, self.points)).softmax(3)  # -> [N, S, heads, points]
        values = self.value_proj(memory).unflatten(2, (self.heads, -1))  # [N, g * g, C] -> [N, g * g, heads, C / heads]
        out: Tensor = self.output_proj(self.sample(values, at, weights, self.grid))
        return out


def sample_grid(values: Tensor, at: Tensor, weights: Tensor, grid: int) -> Tensor:
    """Bilinear samples of a map, weighted and added up, in operators that every engine has.

    Args:
        values: [N, g * g, heads, C / heads] row-major cells.
        at: [N, S, heads, points, 2] x and y, normalised; outside of the map there are zeros.
        weights: [N, S, heads, points]
        grid: g
    Returns:
        [N, S, C]
    """
    maps = values.flatten(2).transpose(1, 2).reshape(len(values) * values.shape[2], -1, grid, grid)  # -> [N * heads, C / heads, g, g]
    places = (2 * at - 1).transpose(1, 2).flatten(0, 1)  # [N, S, heads, points, 2] -> [N * heads, S, points, 2]
    samples = F.grid_sample(maps, places, padding_mode="zeros", align_corners=False)  # -> [N * heads, C / heads, S, points]
    x = (samples * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(3)  # -> [N * heads, C / heads, S]
    return x.reshape(len(values), -1, at.shape[1]).transpose(1, 2)  # -> [N, S, C]


def sample_plugin(values: Tensor, at: Tensor, weights: Tensor, grid: int) -> Tensor:
    """As `sample_grid`, but as TensorRT's plugin for it: for graphs that TensorRT alone will read. In torch it gives zeros."""
    shapes, starts = torch.tensor([[grid, grid]], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    given = [values.float(), shapes, starts, at.float()[:, :, :, None], weights.float()[:, :, :, None]]  # of one feature level
    shape = (values.shape[0], at.shape[1], *values.shape[2:])
    plugin = "tensorrt.plugins::MultiscaleDeformableAttnPlugin_TRT"
    out: Tensor = torch.onnx.ops.symbolic(plugin, given, dtype=torch.float32, shape=shape, version=1)  # [N, S, heads, C / heads]
    return out.flatten(2)


def use_plugin(detector: nn.Module) -> None:
    """Makes a detector's graph sample by TensorRT's plugin."""
    for layer in detector.modules():
        if isinstance(layer, DeformableAttention):
            layer.sample = sample_plugin


def sines(x: Tensor, width: int) -> Tensor:
    """Coordinates as sines and cosines, in turn (DeformableDetrSinePositionEmbedding, get_proposal_pos_embed).

    Args:
        x: [..., K] float, 0..1.
        width: channels per coordinate.
    Returns:
        [..., K * width] float.
    """
    frequencies = 10000 ** -(torch.arange(0, width, 2, device=x.device) / width)
    angles = x[..., None] * 2 * math.pi * frequencies  # [..., K] -> [..., K, width / 2]
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)  # -> [..., K * width]


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Logits of probabilities, bounded."""
    return (x.clamp(min=LOGIT_EPS) / (1 - x).clamp(min=LOGIT_EPS)).log()
