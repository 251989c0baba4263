"""Reads and writes checkpoints in the original on-disk formats (spec 8).

part         our layout, which we write                            the original's working directory (its README and chat.py)
sparrow      ROOT/sparrow-finetune/                                ROOT/checkpoints/sparrow-finetune/
clip         ROOT/openai/clip-vit-large-patch14-336/               the same
internvideo  ROOT/InternVideo2/InternVideo2-stage2_1b-224p-f4.pt   ROOT/OpenGVLab/InternVideo2-Stage2_1B-224p-f4/
ddetr        ROOT/ddetr_sam2/                                      ROOT/checkpoints_hf/ddetr_sam2/

sparrow holds language model, projectors, SAM2 and selector; clip and internvideo are the vision towers, ddetr is the proposer. A
checkpoint without selector (stage 1) needs no proposer. Instead of ROOT, a file of SAM2 alone serves for tracking.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ensemble.components import components
from ensemble.config import (
    FULL,
    ContextTowerConfig,
    HieraConfig,
    LanguageConfig,
    ModelConfig,
    ProposerConfig,
    Sam2Config,
    VideoTowerConfig,
)
from ensemble.tokenizer import Tokenizer

from .models import MODULES, empty_module, graph_class
from .models.layers import Graph

SOURCES = {
    "sparrow": "sparrow-finetune",
    "clip": "openai/clip-vit-large-patch14-336",
    "internvideo": "InternVideo2/InternVideo2-stage2_1b-224p-f4.pt",
    "ddetr": "ddetr_sam2",
}
"""Where we write each part of the weights under the checkpoint's root."""

ORIGINAL_PLACES = {
    "sparrow": ("checkpoints/sparrow-finetune", "hf_model"),
    "internvideo": ("OpenGVLab/InternVideo2-Stage2_1B-224p-f4/InternVideo2-stage2_1b-224p-f4.pt",),
    "ddetr": ("checkpoints_hf/ddetr_sam2",),
}
"""Where the original has them under its working directory (README "Checkpoints", defaults of chat.py)."""

TOWER_FIELDS = {"clip": "image_mm_vision_tower", "internvideo": "mm_vision_tower"}
"""Field of SPARROW's config.json that says where the tower is, relative to the root; looked at first."""

README = "The original's README puts https://huggingface.co"
ADVICE = {
    "sparrow": f"{README}/RISys-Lab/sparrow-finetune at checkpoints/sparrow-finetune/",
    "clip": "The original's README leaves it to transformers' download: put https://huggingface.co/openai/clip-vit-large-patch14-336 at "
    "openai/clip-vit-large-patch14-336/",
    "internvideo": f"{README}/OpenGVLab/InternVideo2-Stage2_1B-224p-f4 at OpenGVLab/InternVideo2-Stage2_1B-224p-f4/",
    "ddetr": f"{README}/RISys-Lab/sparrow-det-pretrain (any checkpoint of it) at checkpoints_hf/ddetr_sam2/",
}
"""How to get each part."""

CONFIG_FIELD = "sparrow_serving_config"
"""Field of sparrow-finetune/config.json in which checkpoints that we write carry their `ModelConfig`."""

SAM2 = "model.visual_model."
"""Prefix of SAM2's names in a SPARROW checkpoint."""

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

MODEL_TYPES = {"sparrow": ("VideoGPT+",), "clip": ("clip", "clip_vision_model"), "ddetr": ("ddetr_sam2",)}
"""What model_type says in each config.json."""

NEEDED: dict[str, dict[str, type | UnionType]] = {
    "sparrow": {
        "vocab_size": int,
        "hidden_size": int,
        "num_hidden_layers": int,
        "num_attention_heads": int,
        "intermediate_size": int,
        "rms_norm_eps": float,
        "rope_theta": int | float,
        "sliding_window": int | None,
        "seg_token_idx": int,
        "box_token_idx": int,
        "bos_token_id": int,
    },
    "clip": dict.fromkeys(
        ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), int
    ),
    "ddetr": dict.fromkeys(
        ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "encoder_n_points", "two_stage_num_proposals"), int
    ),
}
"""Fields of each config.json that sizes are read from, and their types."""

ASSUMED: dict[str, dict[str, Any]] = {
    "sparrow": {
        "mm_projector_type": "mlp2x_gelu",
        "image_mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "hidden_act": "silu",
        "rope_scaling": None,
    },
    "clip": {"hidden_act": "quick_gelu"},
    "ddetr": {"activation_function": "relu", "num_feature_levels": 1, "two_stage": True, "with_box_refine": True},
}
"""Fields that weights do not show, with the one value that our components implement (spec 1.3, 1.5, 3.1, 4.2)."""

EQUAL: dict[str, dict[str, str]] = {
    "sparrow": {"num_key_value_heads": "num_attention_heads"},
    "clip": {},
    "ddetr": {"decoder_attention_heads": "encoder_attention_heads"},
}
"""Such fields whose one value is that of another."""

AnyGraph = TypeVar("AnyGraph", bound=Graph)


class CheckpointError(Exception):
    """A checkpoint is incomplete or of another model; the message lists everything that is wrong."""


class Checkpoint:
    """A checkpoint, opened lazily: weights are memory-mapped and read once.

    Args:
        root: folder with one of the layouts above, or a file of SAM2.
        complete: False opens what is there, to examine it.
    Raises:
        CheckpointError: a part is missing.
    """

    def __init__(self, root: Path | str, complete: bool = True) -> None:
        self.root = Path(root)
        self.sources = find_sources(self.root)
        self._tensors: dict[str, Mapping[str, Tensor]] = {}
        if complete and (missing := self.missing()):
            raise CheckpointError("\n".join(missing))

    def path(self, source: str) -> Path:
        """The folder or file of a part."""
        if source not in self.sources:
            raise CheckpointError(f"{self.root}: no {source}. {looked_for(source)}")
        return self.sources[source]

    def tensors(self, source: str) -> Mapping[str, Tensor]:
        """All tensors of one part by their original names; those of a SAM2 file are "sparrow", named as there."""
        if source not in self._tensors:
            alone = source == "sparrow" and "sam2" in self.sources
            self._tensors[source] = renamed_sam2(read_tensors(self.root)) if alone else read_tensors(self.path(source))
        return self._tensors[source]

    def missing(self) -> list[str]:
        """A line for every part that is needed and not there."""
        if "sam2" in self.sources:
            return []
        if not self.root.is_dir():
            return [f"{self.root}: no such file or folder."]
        absent = [source for source in SOURCES if source not in self.sources]
        if "ddetr" in absent and "sparrow" in self.sources and self.scope == "unguided":
            absent.remove("ddetr")
        found = [f"{self.root}: no {source}. {looked_for(source)}" for source in absent]
        if "sparrow" in absent and (self.root / "config.json").exists():
            kind = read_json(self.root / "config.json").get("model_type")
            found.insert(0, f"{self.root / 'config.json'}: model_type is {kind!r}, but ROOT should be the folder that holds all parts.")
        return found

    @cached_property
    def scope(self) -> str:
        """What the checkpoint can do, as in `ModelConfig.scope`."""
        if "sam2" in self.sources:
            return "tracking"
        guided = any(name.startswith(("model.proposal_selector.", "model.roi_helper.")) for name in self.tensors("sparrow"))
        return "full" if guided else "unguided"

    @cached_property
    def components(self) -> tuple[str, ...]:
        """The graphs that can be built."""
        return graphs(self.scope)

    @cached_property
    def config(self) -> ModelConfig:
        """The sizes; raises CheckpointError that lists every problem of the configuration files."""
        if problems := config_problems(self):
            raise CheckpointError("\n".join(problems))
        return read_sizes(self)

    def build(self, component: str) -> Graph:
        """The component's module in float32 with its weights, ready for inference."""
        if component in MODULES and component not in graphs(self.config.scope):
            raise CheckpointError(f"{self.root}: holds no weights for {component}, only for {', '.join(graphs(self.config.scope))}.")
        return self.load(empty_module(component, self.config)).requires_grad_(False).eval()

    def load(self, module: AnyGraph) -> AnyGraph:
        """Fills `module`; raises CheckpointError that lists every missing, unexpected or wrongly shaped key."""
        found, problems = self.fit(module)
        if problems:
            raise CheckpointError(f"{self.root}: {type(module).__name__} does not fit:\n  " + "\n  ".join(problems))
        module.load_state_dict({own: tensor.float() for own, tensor in found.items()}, assign=True)
        return module

    def fit(self, module: Graph) -> tuple[dict[str, Tensor], list[str]]:
        """The stored tensors by the names of `module`, and a line for every key that is missing, unexpected or wrongly shaped."""
        expected = module.state_dict()
        found: dict[str, Tensor] = {}
        problems: list[str] = []
        missing = dict(expected)
        for own, original, tensor in self._matching(module):
            missing.pop(own, None)
            if own not in expected:
                if not any(re.fullmatch(pattern, original.split(":")[1]) for pattern in module.unused):
                    problems.append(f"unexpected {original}")
            elif expected[own].shape != tensor.shape:
                problems.append(f"{original}: got {list(tensor.shape)}, expected {list(expected[own].shape)}")
            else:
                found[own] = tensor
        problems += [f"missing {original_name(module, own)}" for own in missing]
        if self.root.is_file():
            problems = [problem.replace(f"sparrow:{SAM2}", "sam2:") for problem in problems]
        return found, problems

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


def graphs(scope: str) -> tuple[str, ...]:
    """The graphs of a `ModelConfig.scope`."""
    contracts = components(replace(FULL, scope=scope))
    return tuple(name for name in MODULES if name in contracts)


def find_sources(root: Path) -> dict[str, Path]:
    """The parts that are there."""
    if root.is_file():
        return {"sam2": root}
    sources: dict[str, Path] = {}
    fields: dict[str, Any] = {}
    for source in SOURCES:
        named = fields.get(TOWER_FIELDS.get(source, ""))
        candidates = [root / place for place in ([named] if isinstance(named, str) else []) + places(source)]
        there = [path for path in candidates if (path.is_file() if source == "internvideo" else path.is_dir() and path != root)]
        if there:
            sources[source] = there[0]
        if source == "sparrow" and there:
            with suppress(CheckpointError):  # config_problems says so
                fields = read_json(there[0] / "config.json")
    return sources


def places(source: str) -> list[str]:
    """Where a part is looked for under the root."""
    return [SOURCES[source], *ORIGINAL_PLACES.get(source, ())]


def looked_for(source: str) -> str:
    if source not in SOURCES:
        return f"Expected one of {', '.join(SOURCES)}."
    named = f" and where {TOWER_FIELDS[source]} in config.json of sparrow says" if source in TOWER_FIELDS else ""
    return f"Looked for {', '.join(places(source))}{named}. {ADVICE[source]}."


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt file or of a Hugging Face folder (.bin or .safetensors, sharded or not), memory-mapped.

    Raises:
        CheckpointError: there are no weights, or they cannot be read.
    """
    if path.is_dir():
        return {name: tensor for file in weight_files(path) for name, tensor in read_tensors(file).items()}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {code[1]}, which is code and no tensor, so it was not opened" if code else first_line(error)
        raise CheckpointError(f"{path}: cannot be read as weights ({reason}). Use the original file.") from error
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read as weights ({first_line(error)}). Copy it again.") from error
    for wrapper in ("model", "module"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path}: cannot be read as weights (no tensors by name). Use the original file.")
    return tensors


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def weight_files(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder that hold its weights, in the order of preference of transformers.

    Raises:
        CheckpointError: there are none, or shards are missing.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if (folder / f"{stem}{suffix}").exists():
            return [folder / f"{stem}{suffix}"]
        index = folder / f"{stem}{suffix}.index.json"
        weight_map = read_json(index).get("weight_map") if index.exists() else {}
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map is no object of tensor names and files. Copy it again.")
        names = set(weight_map.values())
        if absent := sorted(name for name in names if not (folder / name).exists()):
            raise CheckpointError(f"{index}: weight_map names {', '.join(absent)}, not there. Copy it there.")
        shards = sorted(folder / name for name in names) or sorted(folder.glob(f"{stem}-[0-9]*-of-[0-9]*{suffix}"))
        if shards and not names and len(shards) != (total := int(shards[0].stem.rpartition("-")[2])):
            raise CheckpointError(f"{folder}: got {len(shards)} of {total} shards of {stem}{suffix}. Copy the others there.")
        if shards:
            return shards
    raise CheckpointError(f"{folder}: no model*.safetensors and no pytorch_model*.bin. Copy the weights there.")


def renamed_sam2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SAM2's own names to those in a SPARROW checkpoint (spec 8.2)."""
    return {SAM2 + re.sub(r"(memory_encoder\.fuser\..*)\.gamma$", r"\1.weight", name): tensor for name, tensor in tensors.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a configuration file.

    Raises:
        CheckpointError: it is not there, or not a JSON object.
    """
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not there. Copy it from the release.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not JSON ({first_line(error)}). Copy it again.") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: got {type(fields).__name__}, expected a JSON object. Copy it again.")
    return fields


def read_fields(checkpoint: Checkpoint, source: str) -> dict[str, Any]:
    """The fields of a part's config.json that describe the model."""
    path = checkpoint.path(source) / "config.json"
    fields = read_json(path)
    if fields.get("model_type") not in MODEL_TYPES[source]:
        expected = " or ".join(map(repr, MODEL_TYPES[source]))
        raise CheckpointError(
            f"{path}: model_type is {fields.get('model_type')!r}, expected {expected}: another model's folder. {ADVICE[source]}."
        )
    nested = fields.get({"clip": "vision_config", "ddetr": "ddetr_cfg"}.get(source, ""), fields)
    return nested if isinstance(nested, dict) else fields


def config_problems(checkpoint: Checkpoint) -> list[str]:
    """A line for everything that is wrong with the configuration files; each names the file and the field."""
    found: list[str] = []
    ours = False
    for source in (source for source in MODEL_TYPES if source in checkpoint.sources):
        try:
            fields = read_fields(checkpoint, source)
            ours = ours or CONFIG_FIELD in fields  # that of sparrow comes first and holds all sizes
            found += [] if ours else field_problems(checkpoint.path(source) / "config.json", source, fields)
            if source == "sparrow":
                found += weight_problems(checkpoint, fields) + token_problems(checkpoint, fields)
        except CheckpointError as error:
            found.append(str(error))
    return found


def field_problems(path: Path, source: str, fields: dict[str, Any]) -> list[str]:
    """Fields of a config.json that are missing, of another type, or ask for what the components do not do."""
    found = []
    for name, kind in NEEDED[source].items():
        expected = getattr(kind, "__name__", kind)
        if name not in fields:
            found.append(f"{path}: no field {name}, expected {expected}. Copy the file from the release.")
        elif not isinstance(fields[name], kind):
            found.append(f"{path}: {name} is {fields[name]!r}, expected {expected}.")
    for name, value in ASSUMED[source].items():
        if name in fields and fields[name] != value:
            found.append(f"{path}: {name} is {fields[name]!r}, expected {value!r}: no other is implemented.")
    for name, other in EQUAL[source].items():
        if name in fields and other in fields and fields[name] != fields[other]:
            found.append(f"{path}: {name} is {fields[name]!r}, expected {fields[other]!r} as {other}: no other is implemented.")
    return found


def weight_problems(checkpoint: Checkpoint, fields: dict[str, Any]) -> list[str]:
    """Sizes in config.json that are not those of the weights."""
    sparrow = checkpoint.tensors("sparrow")
    sizes = {"num_hidden_layers": count(sparrow, "model.layers.")}
    for tensor, names in (
        ("model.embed_tokens.weight", ("vocab_size", "hidden_size")),
        ("model.layers.0.mlp.down_proj.weight", (None, "intermediate_size")),
    ):
        if tensor in sparrow:
            sizes |= {name: size for name, size in zip(names, sparrow[tensor].shape, strict=False) if name}
    path = checkpoint.path("sparrow") / "config.json"
    return [
        f"{path}: {name} is {fields[name]!r}, the weights have {size}."
        for name, size in sizes.items()
        if name in fields and fields[name] != size
    ]


def token_problems(checkpoint: Checkpoint, fields: dict[str, Any]) -> list[str]:
    """Tokens that the tokenizer lacks, or whose ids the configuration files do not agree with (spec 2, 3.3)."""
    folder = checkpoint.path("sparrow")
    try:
        tokenizer = Tokenizer(folder)
    except FileNotFoundError as error:
        return [str(error)]
    except Exception as error:
        return [f"{folder / 'tokenizer_config.json'}: cannot be read as a tokenizer ({type(error).__name__}: {first_line(error)})."]
    ids = {token.content: token.id for token in tokenizer.added.values()}
    found = []
    for token, name in (("[SEG]", "seg_token_idx"), ("[BOX]", "box_token_idx")):
        if token not in ids:
            found.append(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has no {token}, and its embedding would be random.")
        elif name in fields and fields[name] != ids[token]:
            found.append(f"{folder / 'config.json'}: {name} is {fields[name]!r}, the tokenizer's {token} is {ids[token]}.")
    path = folder / "generation_config.json"
    if path.exists():
        stops = stop_ids(read_json(path))
        if ids.get(END) not in stops:
            found.append(f"{path}: eos_token_id is {stops}, expected {END} = {ids.get(END)} among them: answers would run on.")
    return found


END = "<|end|>"
"""The token that the model was trained to end its answers with."""


def stop_ids(fields: dict[str, Any]) -> list[int]:
    """The ids of eos_token_id, which may be one, a list, or not there."""
    eos = fields.get("eos_token_id")
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def read_sizes(checkpoint: Checkpoint) -> ModelConfig:
    """The sizes of a checkpoint, from its configuration files and the shapes of its weights.

    Raises:
        CheckpointError: a trunk or tower of unknown size.
    """
    sparrow = checkpoint.tensors("sparrow")
    if checkpoint.scope == "tracking":
        return ModelConfig(preset=checkpoint.root.stem, scope="tracking", sam2=sam2_config(checkpoint.root, sparrow))
    path = checkpoint.path("sparrow")
    fields = read_fields(checkpoint, "sparrow")
    if CONFIG_FIELD in fields:
        try:
            config = ModelConfig.from_json(json.dumps(fields[CONFIG_FIELD]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path / 'config.json'}: {CONFIG_FIELD} cannot be read ({error}). Write the checkpoint again."
            ) from error
    else:
        eos = stop_ids(read_json(path / "generation_config.json") if (path / "generation_config.json").exists() else fields)
        config = ModelConfig(
            context=context_config(read_fields(checkpoint, "clip")),
            video=video_config(checkpoint.path("internvideo"), checkpoint.tensors("internvideo")),
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
                eos_token_ids=tuple(eos),
            ),
            sam2=sam2_config(path, sparrow),
            proposer=proposer_config(checkpoint) if checkpoint.scope == "full" else ProposerConfig(),
        )
        config = config if config == FULL else replace(config, preset=checkpoint.root.resolve().name)
    gamma = sparrow.get("model.roi_fusion_gamma")
    selector = replace(config.selector, trained_gamma=None if gamma is None else float(gamma))
    return replace(config, scope=checkpoint.scope, selector=selector)


def context_config(clip: dict[str, Any]) -> ContextTowerConfig:
    return ContextTowerConfig(
        image_size=clip["image_size"],
        patch_size=clip["patch_size"],
        width=clip["hidden_size"],
        layers=clip["num_hidden_layers"],
        heads=clip["num_attention_heads"],
        mlp_width=clip["intermediate_size"],
    )


def video_config(path: Path, tensors: Mapping[str, Tensor]) -> VideoTowerConfig:
    positions, mlp = shapes(path, tensors, "vision_encoder.pos_embed", "vision_encoder.blocks.0.mlp.fc1.weight")
    width = positions[2]
    if width not in VIDEO_HEADS:
        raise CheckpointError(f"{path}: got width {width}, expected one of {list(VIDEO_HEADS)}.")
    return VideoTowerConfig(width=width, blocks=count(tensors, "vision_encoder.blocks."), heads=VIDEO_HEADS[width], mlp_width=mlp[0])


def sam2_config(path: Path, tensors: Mapping[str, Tensor]) -> Sam2Config:
    """SAM2 in a SPARROW checkpoint or alone; what its weights do not show is the same in every release."""
    neck, decoder, memory, layer, maps = shapes(
        path,
        tensors,
        SAM2 + "image_encoder.neck.convs.0.conv.weight",
        SAM2 + "sam_mask_decoder.transformer.layers.0.mlp.layers.0.weight",
        SAM2 + "memory_encoder.out_proj.weight",
        SAM2 + "memory_attention.layers.0.linear1.weight",
        SAM2 + "maskmem_tpos_enc",
    )
    return Sam2Config(
        hiera=hiera_config(path, tensors, SAM2 + "image_encoder.trunk."),
        width=neck[0],
        decoder_mlp_width=decoder[0],
        memory_width=memory[0],
        memory_layers=count(tensors, SAM2 + "memory_attention.layers."),
        memory_mlp_width=layer[0],
        num_maps=maps[0],
        pointer_positions=SAM2 + "obj_ptr_tpos_proj.weight" in tensors,
        absent_embedding=SAM2 + "no_obj_embed_spatial" in tensors,
    )


def proposer_config(checkpoint: Checkpoint) -> ProposerConfig:
    ddetr = read_fields(checkpoint, "ddetr")
    return ProposerConfig(
        hiera=hiera_config(checkpoint.path("ddetr"), checkpoint.tensors("ddetr"), "vis_encoder.trunk."),
        width=ddetr["d_model"],
        layers=ddetr["encoder_layers"],
        heads=ddetr["encoder_attention_heads"],
        mlp_width=ddetr["encoder_ffn_dim"],
        points=ddetr["encoder_n_points"],
        queries=ddetr["two_stage_num_proposals"],
    )


def hiera_config(path: Path, tensors: Mapping[str, Tensor], prefix: str) -> HieraConfig:
    """The trunk whose weights lie under `prefix`, by its width and depth."""
    (positions,) = shapes(path, tensors, prefix + "pos_embed")
    size = (positions[1], count(tensors, prefix + "blocks."))
    if size not in HIERA:
        raise CheckpointError(f"{path}: {prefix} is a trunk of (width, blocks) {size}, expected one of {list(HIERA)}.")
    return HIERA[size]


def shapes(path: Path, tensors: Mapping[str, Tensor], *names: str) -> list[torch.Size]:
    """The shapes of tensors; raises CheckpointError that lists those which are not there."""
    if absent := [name.removeprefix(SAM2) if path.is_file() else name for name in names if name not in tensors]:
        raise CheckpointError(f"{path}: holds no {', '.join(absent)}. Use the original weights.")
    return [tensors[name].shape for name in names]


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
        halves = {name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pt":
            torch.save({"model": halves}, path)
            continue
        path.mkdir(exist_ok=True)
        save_file(halves, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(configs[source], indent=2))
    eos = {"do_sample": False, "bos_token_id": language.bos_token_id, "eos_token_id": list(language.eos_token_ids)}
    (root / SOURCES["sparrow"] / "generation_config.json").write_text(json.dumps(eos, indent=2))


def random_states(config: ModelConfig, seed: int, device: str = "cpu") -> dict[str, dict[str, Tensor]]:
    """Seeded random weights of every component under their original names; modules that share a weight get the same one."""
    torch.manual_seed(seed)
    states: dict[str, dict[str, Tensor]] = {source: {} for source in SOURCES}
    for component in MODULES:
        with torch.device(device):
            module = graph_class(component)(config)
        for own, tensor in module.state_dict().items():
            source, name = original_name(module, own).split(":")
            states[source].setdefault(name, tensor)
    return states
