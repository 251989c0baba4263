"""Reads and writes checkpoints in the original on-disk formats (spec 8).

ROOT/sparrow-finetune/                            language model, projectors, SAM2, selector: config.json, tokenizer, weights
ROOT/openai/clip-vit-large-patch14-336/           CLIP vision tower
ROOT/InternVideo2/InternVideo2-stage2_1b-224p-f4.pt   InternVideo2 tower
ROOT/ddetr_sam2/                                  proposer
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ensemble.config import (
    FULL,
    ContextTowerConfig,
    HieraConfig,
    LanguageConfig,
    ModelConfig,
    ProposerConfig,
    Sam2Config,
    SelectorConfig,
    VideoTowerConfig,
)

from .models import MODULES, empty_module, graph_class
from .models.layers import Graph

SOURCES = {
    "sparrow": "sparrow-finetune",
    "clip": "openai/clip-vit-large-patch14-336",
    "internvideo": "InternVideo2/InternVideo2-stage2_1b-224p-f4.pt",
    "ddetr": "ddetr_sam2",
}
"""Where each part of the weights lies under the checkpoint's root."""

CONFIG_FIELD = "sparrow_serving_config"
"""Field of sparrow-finetune/config.json in which checkpoints that we write carry their `ModelConfig`."""

HIERA = {
    (144, 48): HieraConfig(),
    (112, 24): HieraConfig(112, 2, (2, 3, 16, 3), (12, 16, 20), (8, 4, 14, 7), 14),
    (96, 16): HieraConfig(96, 1, (1, 2, 11, 2), (7, 10, 13), (8, 4, 14, 7)),
    (96, 12): HieraConfig(96, 1, (1, 2, 7, 2), (5, 7, 9), (8, 4, 14, 7)),
    (16, 9): HieraConfig(16, 1, (1, 2, 4, 2), (4, 6)),
}
"""(embed_dim, blocks) to trunk: SAM2 large, base+, small, tiny, and the reduced trunk of the parity packs."""

VIDEO_HEADS = {1408: 16, 64: 4}
"""InternVideo2 width to heads: the released tower, and the reduced one of the parity packs."""

AnyGraph = TypeVar("AnyGraph", bound=Graph)


class CheckpointError(Exception):
    """A checkpoint is incomplete or of another model; the message lists everything that is wrong."""


class Checkpoint:
    """A checkpoint folder, opened lazily: weights are memory-mapped and read once.

    Args:
        root: folder with the layout above.
    Raises:
        CheckpointError: a file is missing or the sizes are of no known model.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        missing = [name for name in SOURCES.values() if not (self.root / name).exists()]
        if missing:
            raise CheckpointError(f"{self.root}: no {', '.join(missing)}, expected {', '.join(SOURCES.values())} there.")
        self._tensors: dict[str, Mapping[str, Tensor]] = {}

    def path(self, source: str) -> Path:
        return self.root / SOURCES[source]

    def tensors(self, source: str) -> Mapping[str, Tensor]:
        """All tensors of one source by their original names."""
        if source not in self._tensors:
            self._tensors[source] = read_tensors(self.path(source))
        return self._tensors[source]

    @cached_property
    def config(self) -> ModelConfig:
        return read_config(self)

    def build(self, component: str) -> Graph:
        """The component's module in float32 with its weights, ready for inference."""
        return self.load(empty_module(component, self.config)).requires_grad_(False).eval()

    def load(self, module: AnyGraph) -> AnyGraph:
        """Fills `module`; raises CheckpointError that lists every missing, unexpected or wrongly shaped key."""
        expected = module.state_dict()
        found: dict[str, Tensor] = {}
        problems: list[str] = []
        for own, original, tensor in self._matching(module):
            if own not in expected:
                if not any(re.fullmatch(pattern, original.split(":")[1]) for pattern in module.unused):
                    problems.append(f"unexpected {original}")
            elif expected[own].shape != tensor.shape:
                problems.append(f"{original}: got {list(tensor.shape)}, expected {list(expected[own].shape)}")
            else:
                found[own] = tensor.float()
        problems += [f"missing {original_name(module, own)}" for own in expected if own not in found]
        if problems:
            raise CheckpointError(f"{self.root}: {type(module).__name__} does not fit:\n  " + "\n  ".join(problems))
        module.load_state_dict(found, assign=True)
        return module

    def _matching(self, module: Graph) -> Iterable[tuple[str, str, Tensor]]:
        """(own name, "source:original name", tensor) for every original key under a prefix; the longest prefix decides."""
        places = {place: own for own, alternatives in module.keys.items() for place in alternatives.split("|")}
        for source in dict.fromkeys(place.split(":")[0] for place in places):
            for name, tensor in self.tensors(source).items():
                original = f"{source}:{name}"
                if matching := [place for place in places if original.startswith(place)]:
                    place = max(matching, key=len)
                    yield places[place] + original.removeprefix(place), original, tensor


def original_name(module: Graph, own: str) -> str:
    """The "source:name" under which a tensor of `module` is stored; the longest matching prefix decides."""
    prefix = max((prefix for prefix in module.keys if own.startswith(prefix)), key=len)
    return module.keys[prefix].split("|")[0] + own.removeprefix(prefix)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt file or of a Hugging Face folder (.bin or .safetensors, sharded or not), memory-mapped.

    Raises:
        CheckpointError: there are no weights, or they cannot be read.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise CheckpointError(f"{path}: no *.safetensors and no pytorch_model*.bin. Copy the weights there.")
        return {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read as weights ({error}). Copy it again.") from error
    for wrapper in ("model", "module"):
        if wrapper in state:
            state = state[wrapper]
    return dict(state)


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """The sizes of a checkpoint, from its config files and the shapes of its weights.

    Raises:
        CheckpointError: a trunk or tower of unknown size.
    """
    fields = json.loads((checkpoint.path("sparrow") / "config.json").read_text())
    if CONFIG_FIELD in fields:
        return ModelConfig.from_json(json.dumps(fields[CONFIG_FIELD]))
    sparrow, internvideo = checkpoint.tensors("sparrow"), checkpoint.tensors("internvideo")
    clip = json.loads((checkpoint.path("clip") / "config.json").read_text())
    clip = clip.get("vision_config", clip)
    ddetr = json.loads((checkpoint.path("ddetr") / "config.json").read_text())["ddetr_cfg"]
    generation_path = checkpoint.path("sparrow") / "generation_config.json"
    generation = json.loads(generation_path.read_text()) if generation_path.exists() else fields
    eos = generation["eos_token_id"]

    video_width = internvideo["vision_encoder.pos_embed"].shape[2]
    if video_width not in VIDEO_HEADS:
        raise CheckpointError(f"{checkpoint.path('internvideo')}: got width {video_width}, expected one of {list(VIDEO_HEADS)}.")
    sam2 = "model.visual_model."
    config = ModelConfig(
        context=ContextTowerConfig(
            image_size=clip["image_size"],
            patch_size=clip["patch_size"],
            width=clip["hidden_size"],
            layers=clip["num_hidden_layers"],
            heads=clip["num_attention_heads"],
            mlp_width=clip["intermediate_size"],
        ),
        video=VideoTowerConfig(
            width=video_width,
            blocks=count(internvideo, "vision_encoder.blocks."),
            heads=VIDEO_HEADS[video_width],
            mlp_width=internvideo["vision_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        ),
        language=LanguageConfig(
            vocab_size=fields["vocab_size"],
            width=fields["hidden_size"],
            layers=fields["num_hidden_layers"],
            heads=fields["num_attention_heads"],
            mlp_width=fields["intermediate_size"],
            rms_norm_eps=fields["rms_norm_eps"],
            rope_theta=fields["rope_theta"],
            sliding_window=fields["sliding_window"],
            seg_token_id=fields["seg_token_idx"],
            box_token_id=fields["box_token_idx"],
            bos_token_id=fields["bos_token_id"],
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        ),
        sam2=Sam2Config(
            hiera=hiera_config(sparrow, sam2 + "image_encoder.trunk."),
            memory_layers=count(sparrow, sam2 + "memory_attention.layers."),
            memory_mlp_width=sparrow[sam2 + "memory_attention.layers.0.linear1.weight"].shape[0],
        ),
        proposer=ProposerConfig(
            hiera=hiera_config(checkpoint.tensors("ddetr"), "vis_encoder.trunk."),
            width=ddetr["d_model"],
            layers=ddetr["encoder_layers"],
            heads=ddetr["encoder_attention_heads"],
            mlp_width=ddetr["encoder_ffn_dim"],
            points=ddetr["encoder_n_points"],
            queries=ddetr["two_stage_num_proposals"],
            topk=min(100, ddetr["two_stage_num_proposals"]),
        ),
        selector=SelectorConfig(),
    )
    return config if config == FULL else replace(config, preset=checkpoint.root.name)


def hiera_config(tensors: Mapping[str, Tensor], prefix: str) -> HieraConfig:
    """The trunk whose weights lie under `prefix`, by its width and depth."""
    size = (tensors[prefix + "pos_embed"].shape[1], count(tensors, prefix + "blocks."))
    if size not in HIERA:
        raise CheckpointError(f"{prefix}: got a trunk of (width, blocks) {size}, expected one of {list(HIERA)}.")
    return HIERA[size]


def count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules lie under `prefix`."""
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def write_checkpoint(root: Path, config: ModelConfig, states: dict[str, dict[str, Tensor]]) -> None:
    """Writes the weights of `states` (source to original name to tensor) and the config files in the original layout.

    Float16 storage, as the original; the tokenizer is the caller's to add to `sparrow-finetune/`.
    """
    language = config.language
    configs = {
        "sparrow": {
            "architectures": ["SPARROWForCausalLM"],
            "model_type": "VideoGPT+",
            "mm_vision_tower": SOURCES["internvideo"],
            "image_mm_vision_tower": SOURCES["clip"],
            "vocab_size": language.vocab_size,
            "seg_token_idx": language.seg_token_id,
            "box_token_idx": language.box_token_id,
            CONFIG_FIELD: json.loads(config.to_json()),
        },
        "clip": {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"},
        "ddetr": {"architectures": ["CustomDDETRSAM2Model"], "model_type": "ddetr_sam2"},
    }
    for source, tensors in states.items():
        path = root / SOURCES[source]
        halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pt":
            torch.save({"model": halves}, path)
            continue
        path.mkdir(exist_ok=True)
        save_file(halves, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(configs[source], indent=2))
    eos = {"do_sample": False, "bos_token_id": language.bos_token_id, "eos_token_id": list(language.eos_token_ids)}
    (root / SOURCES["sparrow"] / "generation_config.json").write_text(json.dumps(eos, indent=2))


def random_states(config: ModelConfig, seed: int) -> dict[str, dict[str, Tensor]]:
    """Seeded random weights of every component under their original names; modules that share a weight get the same one."""
    torch.manual_seed(seed)
    states: dict[str, dict[str, Tensor]] = {source: {} for source in SOURCES}
    for component in MODULES:
        module = graph_class(component)(config)
        for own, tensor in module.state_dict().items():
            source, name = original_name(module, own).split(":")
            states[source].setdefault(name, tensor)
    return states
