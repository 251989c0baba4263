"""Oracles of the SAM2 components: the official `sam2` package at the sizes of a `ModelConfig`, and steps of the golden packs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.prompt_encoder import PromptEncoder
from sam2.modeling.sam.transformer import RoPEAttention, TwoWayTransformer
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from ensemble import frames, settings
from ensemble.components import BOTTOM_RIGHT, PAD, TEXT, TOP_LEFT, components
from ensemble.config import TINY, HieraConfig, ModelConfig, Sam2Config
from ensemble.tensors import Arrays
from export.checkpoints import Checkpoint
from export.models.layers import Graph
from export.runners import OnnxGraph, TorchGraph
from export.to_onnx import onnx_from_torch

if TYPE_CHECKING:
    from tests import goldens


def config_at(image_size: int, sam21: bool = False) -> ModelConfig:
    """The tiny model at another input size, with more than one memory layer; SAM 2.0 or 2.1."""
    version = {"pointer_positions": sam21, "absent_embedding": sam21}
    return dataclasses.replace(TINY, sam2=dataclasses.replace(TINY.sam2, image_size=image_size, memory_layers=2, **version))


class Oracle(Checkpoint):
    """A checkpoint that holds the weights of a `SAM2Base`: `build` makes our components from what the oracle computes with.

    Args:
        config: sizes.
        seed: of the weights.
        kind: what to build; only a plain SAM2Base takes texts.
        spread: of what is added to the initial weights; smaller where layers are wider.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, kind: type[SAM2Base] = SAM2Base, spread: float = 0.1) -> None:
        self.root = Path("sam2")
        self.config = config
        self.sam2 = sam2_base(config.sam2, kind).requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.sam2.parameters():
            # Far from the zeros and ones of the initialisation, which would hide a missing table, norm or layer scale.
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
        state = {name.replace(".gamma", ".weight"): tensor for name, tensor in self.sam2.state_dict().items()}  # spec 7.0
        self._tensors = {"sparrow": {"model.visual_model." + name: tensor for name, tensor in state.items()}}


def sam2_base(sam2: Sam2Config, kind: type[SAM2Base]) -> SAM2Base:
    """sam2_hiera_l.yaml or sam2.1_hiera_l.yaml and the overrides of build_sam.py at other sizes, without hole filling."""
    torch.manual_seed(0)
    base = kind(
        image_encoder=image_encoder(sam2.hiera, sam2.width),
        memory_attention=memory_attention(sam2),
        memory_encoder=MemoryEncoder(
            out_dim=sam2.memory_width,
            in_dim=sam2.width,
            position_encoding=PositionEmbeddingSine(sam2.memory_width),
            mask_downsampler=MaskDownSampler(sam2.width, kernel_size=3, stride=2, padding=1),
            fuser=Fuser(CXBlock(sam2.width), num_layers=2),
        ),
        num_maskmem=sam2.num_maps,
        image_size=sam2.image_size,
        sigmoid_scale_for_mem_enc=20.0,
        sigmoid_bias_for_mem_enc=-10.0,
        binarize_mask_from_pts_for_mem_enc=True,
        use_mask_input_as_output_without_sam=True,
        directly_add_no_mem_embed=True,
        use_high_res_features_in_sam=True,
        multimask_output_in_sam=True,
        multimask_min_pt_num=0,
        multimask_max_pt_num=1,
        multimask_output_for_tracking=True,
        use_multimask_token_for_obj_ptr=True,
        iou_prediction_use_sigmoid=True,
        use_obj_ptrs_in_encoder=True,
        add_tpos_enc_to_obj_ptrs=sam2.pointer_positions,
        proj_tpos_enc_in_obj_ptrs=sam2.pointer_positions,
        use_signed_tpos_enc_to_obj_ptrs=sam2.pointer_positions,
        no_obj_embed_spatial=sam2.absent_embedding,
        only_obj_ptrs_in_the_past_for_eval=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=True,
        use_mlp_for_obj_ptr_proj=True,
    )
    prompt_encoder = PromptEncoderWithText if kind is SAM2Base else PromptEncoder
    base.sam_prompt_encoder = prompt_encoder(sam2.width, (sam2.grid,) * 2, (sam2.image_size,) * 2, 16)
    # SAM2Base fixes the sizes of its decoder.
    base.sam_mask_decoder = MaskDecoder(
        transformer_dim=sam2.width,
        transformer=TwoWayTransformer(sam2.decoder_layers, sam2.width, sam2.decoder_heads, sam2.decoder_mlp_width),
        iou_head_hidden_dim=sam2.width,
        use_high_res_features=True,
        iou_prediction_use_sigmoid=True,
        dynamic_multimask_via_stability=True,
        dynamic_multimask_stability_delta=settings.STABILITY_DELTA,
        dynamic_multimask_stability_thresh=settings.STABILITY_THRESHOLD,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        use_multimask_token_for_obj_ptr=True,
    )
    return base


class PromptEncoderWithText(PromptEncoder):
    """Reads its prompts from its attributes: a text embedding is appended as SPARROW does, and SAM2Base never passes a box."""

    points: tuple[Tensor, Tensor] | None = None
    boxes: Tensor | None = None
    text: Tensor | None = None

    def forward(self, points, boxes, masks):
        sparse, dense = super().forward(self.points, self.boxes, masks)
        if self.text is not None:
            sparse = torch.cat([sparse.expand(len(self.text), -1, -1), self.text[:, None]], 1)
        return sparse, dense


def image_encoder(hiera: HieraConfig, width: int) -> ImageEncoder:
    trunk = Hiera(
        embed_dim=hiera.embed_dim,
        num_heads=hiera.heads,
        stages=hiera.stages,
        global_att_blocks=hiera.global_blocks,
        window_pos_embed_bkg_spatial_size=(hiera.position_grid, hiera.position_grid),
        window_spec=hiera.window_sizes,
    )
    neck = FpnNeck(
        PositionEmbeddingSine(width), width, list(reversed(hiera.widths)), fpn_interp_model="nearest", fpn_top_down_levels=[2, 3]
    )
    return ImageEncoder(trunk, neck, scalp=1)


def memory_attention(sam2: Sam2Config) -> MemoryAttention:
    rope = {"embedding_dim": sam2.width, "num_heads": 1, "feat_sizes": (sam2.grid, sam2.grid)}
    layer = MemoryAttentionLayer(
        activation="relu",
        d_model=sam2.width,
        dim_feedforward=sam2.memory_mlp_width,
        dropout=0.0,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        self_attention=RoPEAttention(**rope),
        cross_attention=RoPEAttention(**rope, rope_k_repeat=True, kv_in_dim=sam2.memory_width),
    )
    return MemoryAttention(d_model=sam2.width, pos_enc_at_input=True, layer=layer, num_layers=sam2.memory_layers)


def assert_onnx_equals_torch(module: Graph, component: str, path: Path, samples: Sequence[Arrays]) -> None:
    """Exports a component and compares the graph with the module on inputs of its contract."""
    onnx_from_torch(module, component, path)
    contract, torch_graph, onnx_graph = components(module.config)[component], TorchGraph(module, component), OnnxGraph(path)
    for inputs in samples:
        contract.check_inputs(inputs)
        expected, got = torch_graph.run(inputs), onnx_graph.run(inputs)
        for spec in contract.outputs:
            assert contract.tolerance.error(got[spec.name], expected[spec.name]) <= contract.tolerance.max_error, spec.name


def flat(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [H * W, N, C], as SAM2Base passes its features around."""
    return x.flatten(2).permute(2, 0, 1)


def golden_checkpoint(pack: str) -> Checkpoint:
    from tests import goldens  # needs the client's packages, which a GPU host that only tracks has not

    return goldens.checkpoint(pack)


@cache
def component(pack: str, name: str) -> Graph:
    """A component with the weights of a golden pack."""
    return golden_checkpoint(pack).build(name)


def encoded_frame(case: goldens.Case, frame_idx: int) -> tuple[Tensor, Tensor, Tensor]:
    """frame_embeddings, high_res_1, high_res_0 of a frame of a golden case; encoded once per input, which cases share."""
    key = (case.pack, case.meta["frames"], frame_idx)
    if key not in _encoded:
        grounding = frames.grounding_frame(case.frames[frame_idx], golden_checkpoint(case.pack).config)
        _encoded[key] = component(case.pack, "frame_encoder").encode(torch.from_numpy(grounding)[None])
    return _encoded[key]


_encoded: dict[tuple[str, str, int], tuple[Tensor, Tensor, Tensor]] = {}


def decode_golden(
    case: goldens.Case,
    frame_idx: int,
    labels: Sequence[int],
    points: Tensor | None = None,
    text: Tensor | None = None,
    mask_prompts: Tensor | None = None,
    multimask: bool = False,
    conditioned: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Our decoder's outputs for a frame of a golden case, all objects with the same labels.

    Args:
        points: [O, S, 2] in pixels of the grounding frame.
        text: [O, C]
        mask_prompts: [O, 256, 256]
        conditioned: [O, C, 64, 64] from memory attention; the frame's own embedding where not given.
    """
    sam2 = golden_checkpoint(case.pack).config.sam2
    embeddings, high_res_1, high_res_0 = encoded_frame(case, frame_idx)
    given = [x for x in (points, text, mask_prompts, conditioned) if x is not None]
    objects = len(given[0])
    first = torch.zeros(objects, dtype=torch.int64)
    return component(case.pack, "mask_decoder")(
        embeddings if conditioned is None else conditioned,
        high_res_1,
        high_res_0,
        first if conditioned is None else torch.arange(objects),
        first,
        torch.full((objects,), conditioned is not None),
        torch.full((objects,), multimask),
        torch.zeros(objects, len(labels), 2) if points is None else points,
        torch.tensor(labels).expand(objects, -1),
        torch.zeros(objects, sam2.width) if text is None else text,
        torch.zeros(objects, sam2.low_res, sam2.low_res) if mask_prompts is None else mask_prompts,
        torch.full((objects,), mask_prompts is not None),
    )


def gated(mask_logits: Tensor, object_scores: Tensor) -> Tensor:
    """[O, H, W], [O] -> [O, H, W]: no mask where there is no object, as SAM2Base does after its decoder."""
    return torch.where(object_scores[:, None, None] > 0, mask_logits, settings.NO_OBJECT_LOGIT)


def conditioning_steps(case: goldens.Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Frame 0 of a tracked golden case: (mask logits, pointer) of each object after its text and after each of its boxes."""
    height, width = case.expected["orig_hw"]
    to_grounding = golden_checkpoint(case.pack).config.sam2.image_size / torch.tensor([width, height], dtype=torch.float32)
    steps = {}
    for n, text in enumerate(torch.from_numpy(case.expected["seg.emb"])):
        mask, _, score, pointer = decode_golden(case, 0, [PAD, PAD, TEXT], text=text[None], multimask=True)
        steps[f"track.init.obj{n}.text"] = gated(mask, score), pointer
        k = 0
        while (step := f"track.init.obj{n}.box{k}") + ".px_xyxy" in case.expected:
            corners = torch.from_numpy(case.expected[step + ".px_xyxy"]).reshape(1, 2, 2) * to_grounding
            points = torch.cat([corners, torch.zeros(1, 1, 2)], 1)
            earlier = gated(mask, score).clamp(-settings.MASK_PROMPT_CLAMP, settings.MASK_PROMPT_CLAMP)
            mask, _, score, pointer = decode_golden(case, 0, [TOP_LEFT, BOTTOM_RIGHT, PAD], points, mask_prompts=earlier)
            steps[step] = gated(mask, score), pointer
            k += 1
    return steps


@cache
def conditioned_objects(case: goldens.Case) -> tuple[Tensor, Tensor, Tensor]:
    """What frame 0 of a tracked golden case leaves behind: mask logits [O, 256, 256], pointers [O, C], maps [O, 64, 64, 64]."""
    last = {name.split(".")[2]: step for name, step in conditioning_steps(case).items()}
    masks, pointers = (torch.cat(tensors) for tensors in zip(*last.values(), strict=True))
    objects = len(masks)
    same_frame, prompted = torch.zeros(objects, dtype=torch.int64), torch.ones(objects, dtype=torch.bool)
    scores = torch.ones(objects)  # SAM 2.0 does not read them
    maps = component(case.pack, "memory_encoder")(encoded_frame(case, 0)[0], same_frame, masks, prompted, scores)
    return masks, pointers, maps


def frame_1(case: goldens.Case) -> Tensor:
    """[O, C, 64, 64] frame 1 of a tracked golden case, conditioned on frame 0."""
    _, pointers, maps = conditioned_objects(case)
    objects = len(maps)
    rows = torch.full((objects, 1), golden_checkpoint(case.pack).config.sam2.num_maps - 1)
    memory = maps[:, None], rows, pointers[:, None], torch.ones(objects, 1, dtype=torch.int64)
    return component(case.pack, "memory_attention")(encoded_frame(case, 1)[0], torch.zeros(objects, dtype=torch.int64), *memory)
