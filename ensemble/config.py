"""Sizes of the model: one frozen dataclass per part, and the presets `full`, `tiny` and `nano`.

Widths that are not listed follow from these (the letters of the specification are in each docstring). A checkpoint of the
original layout is turned into a `ModelConfig` by `export.checkpoints`; the served repository carries it as `config.json`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from . import settings

POOL = 2
"""Visual tokens of a video frame are averaged POOL by POOL (spec 1.5)."""


@dataclass(frozen=True)
class ContextTowerConfig:
    """CLIP ViT-L/14-336; features are the patch outputs of the last layer but one (spec 1.3)."""

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class VideoTowerConfig:
    """InternVideo2-1B stage 2; features are the patch outputs of the last block but one (spec 1.4)."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    blocks: int = 40
    heads: int = 16
    mlp_width: int = 6144
    chunk_frames: int = 4

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class LanguageConfig:
    """Phi-3-mini with the tokens [SEG] and [BOX] (spec 2, 3)."""

    vocab_size: int = 32013
    width: int = 3072
    layers: int = 32
    heads: int = 32
    mlp_width: int = 8192
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int | None = 2047
    """A query sees key j when 0 <= i - j <= sliding_window; None: every earlier key."""
    seg_token_id: int = 32011
    box_token_id: int = 32012
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (32000, 32001, 32007)


@dataclass(frozen=True)
class HieraConfig:
    """SAM2 image encoder trunk and its feature pyramid (spec 7.1)."""

    embed_dim: int = 144
    heads: int = 2
    stages: tuple[int, ...] = (2, 6, 36, 4)
    global_blocks: tuple[int, ...] = (23, 33, 43)
    window_sizes: tuple[int, ...] = (8, 4, 16, 8)
    position_grid: int = 7
    """Side of the background position embedding."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.stages)))


@dataclass(frozen=True)
class Sam2Config:
    """SAM 2.0 with memory (spec 6, 7); SAM 2.1 adds `pointer_positions` and `absent_embedding` and nothing else."""

    image_size: int = 1024
    hiera: HieraConfig = field(default_factory=HieraConfig)
    width: int = 256
    decoder_layers: int = 2
    decoder_heads: int = 8
    decoder_mlp_width: int = 2048
    memory_width: int = 64
    memory_layers: int = 4
    memory_mlp_width: int = 2048
    num_maps: int = 7
    """Memory maps that a frame attends to: the conditioning frame's and the most recent ones (num_maskmem)."""
    pointer_positions: bool = False
    """Object pointers tell how many frames ago they were made (add_tpos_enc_to_obj_ptrs, proj_tpos_enc_in_obj_ptrs)."""
    absent_embedding: bool = False
    """The memory of a frame without the object says so (no_obj_embed_spatial)."""

    @property
    def grid(self) -> int:
        """Side of the frame embedding."""
        return self.image_size // 16

    @property
    def low_res(self) -> int:
        """Side of the mask logits."""
        return self.image_size // 4

    @property
    def num_pointers(self) -> int:
        """Object pointers that a frame attends to: the conditioning frame's and the most recent ones."""
        return 1 + settings.MAX_RECENT_POINTERS


@dataclass(frozen=True)
class ProposerConfig:
    """DDETR-SAM2: Deformable-DETR on its own SAM2 encoder (spec 4)."""

    image_size: int = 448
    hiera: HieraConfig = field(default_factory=HieraConfig)
    width: int = 256
    layers: int = 6
    heads: int = 8
    mlp_width: int = 1024
    points: int = 4
    queries: int = 300

    @property
    def grid(self) -> int:
        """Side of the one feature level."""
        return self.image_size // 16


@dataclass(frozen=True)
class SelectorConfig:
    """ProposalSelector and ROIProposalHelper (spec 5)."""

    width: int = 256
    roi_size: int = 7
    trained_gamma: float | None = None
    """The checkpoint's roi_fusion_gamma, which the original never loads (spec 5.4)."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the whole system."""

    preset: str = "full"
    scope: str = "full"
    """What the checkpoint can do: full; unguided (no selector: proposals do not take part); tracking (SAM2 alone)."""
    num_frames: int = 16
    """Frames that the vision towers see (NUM_FRAMES)."""
    context: ContextTowerConfig = field(default_factory=ContextTowerConfig)
    video: VideoTowerConfig = field(default_factory=VideoTowerConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    sam2: Sam2Config = field(default_factory=Sam2Config)
    proposer: ProposerConfig = field(default_factory=ProposerConfig)
    selector: SelectorConfig = field(default_factory=SelectorConfig)

    @property
    def context_tokens(self) -> int:
        """Tokens of one image."""
        return self.context.grid**2

    @property
    def video_tokens(self) -> int:
        """Tokens of a clip: pooled context tokens of every frame, then pooled video tokens of every frame."""
        return self.num_frames * ((self.context.grid // POOL) ** 2 + (self.video.grid // POOL) ** 2)

    @property
    def max_sequence(self) -> int:
        """Slots of the key/value cache of one answer."""
        visual = max(self.video_tokens, self.context_tokens)
        return visual + settings.MAX_PROMPT_TOKENS + settings.MAX_TARGET_TOKENS + settings.MAX_NEW_TOKENS

    @property
    def guided(self) -> bool:
        """Whether proposals can take part."""
        return self.scope == "full"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Reads what `to_json` wrote; raises TypeError on an unknown field."""
        return cast(ModelConfig, _build(cls, json.loads(text)))

    @classmethod
    def load(cls, path: Path | str) -> ModelConfig:
        return cls.from_json(Path(path).read_text())


PARTS: dict[str, type[Any]] = {
    "context": ContextTowerConfig,
    "video": VideoTowerConfig,
    "language": LanguageConfig,
    "sam2": Sam2Config,
    "proposer": ProposerConfig,
    "selector": SelectorConfig,
    "hiera": HieraConfig,
}


def _build(cls: type[Any], fields: dict[str, Any]) -> Any:
    """The dataclass of nested JSON objects; lists become tuples."""
    values = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            value = _build(PARTS[name], value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


FULL = ModelConfig()
"""The numbers of the specification."""

_TINY_HIERA = HieraConfig(embed_dim=16, heads=1, stages=(1, 1, 2, 1), global_blocks=(3,))

TINY = ModelConfig(
    preset="tiny",
    context=ContextTowerConfig(image_size=112, width=32, layers=3, heads=2, mlp_width=64),
    video=VideoTowerConfig(image_size=112, width=32, blocks=3, heads=2, mlp_width=64),
    language=LanguageConfig(
        vocab_size=525,
        width=64,
        layers=2,
        heads=4,
        mlp_width=128,
        seg_token_id=523,
        box_token_id=524,
        eos_token_ids=(512, 513, 519),
    ),
    sam2=Sam2Config(
        image_size=256,
        hiera=_TINY_HIERA,
        width=64,
        decoder_mlp_width=128,
        memory_width=16,
        memory_layers=1,
        memory_mlp_width=128,
    ),
    proposer=ProposerConfig(image_size=224, hiera=_TINY_HIERA, width=64, layers=2, mlp_width=128, queries=60),
    selector=SelectorConfig(width=64),
)
"""Every part of the architecture, small enough for seconds on two cores. Its weights are random: its masks mean nothing."""

_NANO_HIERA = HieraConfig(embed_dim=24, heads=1, stages=(1, 2, 2, 1), global_blocks=(4,))

NANO = ModelConfig(
    preset="nano",
    num_frames=4,
    context=ContextTowerConfig(image_size=128, patch_size=8, width=128, layers=4, heads=4, mlp_width=256),
    video=VideoTowerConfig(image_size=128, patch_size=16, width=128, blocks=4, heads=4, mlp_width=256),
    language=LanguageConfig(
        vocab_size=525,
        width=192,
        layers=3,
        heads=6,
        mlp_width=384,
        seg_token_id=523,
        box_token_id=524,
        eos_token_ids=(512, 513, 519),
    ),
    sam2=Sam2Config(
        image_size=256,
        hiera=_NANO_HIERA,
        width=128,
        decoder_mlp_width=256,
        memory_width=32,
        memory_layers=2,
        memory_mlp_width=256,
    ),
    proposer=ProposerConfig(image_size=224, hiera=_NANO_HIERA, width=96, layers=2, mlp_width=192, queries=100),
    selector=SelectorConfig(width=128),
)
"""Every part of the architecture, trained on shapes-rvos (training/): small, but its masks mean something."""

PRESETS = {"full": FULL, "tiny": TINY, "nano": NANO}
