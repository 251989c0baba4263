"""The model while it is trained: every graph of a configuration, and the file that a stage leaves behind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ensemble.config import ModelConfig
from export.checkpoints import original_name
from export.models import MODULES, graph_class
from export.models.frame_encoder import FrameEncoder
from export.models.language_model import LanguageDecoder, PromptProjector, TokenEmbedder
from export.models.layers import Graph, LayerNorm2d
from export.models.mask_decoder import MaskDecoder
from export.models.mask_downsampler import MaskDownsampler
from export.models.memory_attention import MemoryAttention
from export.models.memory_encoder import MemoryEncoder
from export.models.proposal_detector import ProposalDetector
from export.models.proposal_selector import ProposalSelector
from export.models.vision_encoder import ImageEncoder, VisionEncoder

FEW = 64
"""Channels below which PyTorch's layer normalisation is slow on a GPU: a block of threads for each row."""


def standardise(x: Tensor, axis: int, eps: float) -> Tensor:
    """Zero mean and unit variance along an axis, in float32."""
    x = x.float()
    variance, mean = torch.var_mean(x, axis, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


class MapNorm(LayerNorm2d):
    """The same, of operators that are fast with few channels."""

    def forward(self, x: Tensor) -> Tensor:
        return standardise(x, 1, 1e-6) * self.weight[:, None, None] + self.bias[:, None, None]


class RowNorm(nn.LayerNorm):
    """The same, of operators that are fast with few channels."""

    def forward(self, x: Tensor) -> Tensor:
        return standardise(x, -1, self.eps) * self.weight + self.bias


class Model(nn.Module):
    """The graphs by name; a weight that several of them read is one parameter, as it is one tensor in the checkpoint.

    Args:
        config: sizes.
    """

    vision_encoder: VisionEncoder
    image_encoder: ImageEncoder
    token_embedder: TokenEmbedder
    language_decoder: LanguageDecoder
    prompt_projector: PromptProjector
    proposal_detector: ProposalDetector
    proposal_selector: ProposalSelector
    frame_encoder: FrameEncoder
    mask_downsampler: MaskDownsampler
    memory_attention: MemoryAttention
    mask_decoder: MaskDecoder
    memory_encoder: MemoryEncoder

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        shared: dict[str, nn.Parameter] = {}
        for component in MODULES:
            graph = graph_class(component)(config)
            self.add_module(component, graph)
            for own, parameter in list(graph.named_parameters()):
                place, _, name = own.rpartition(".")
                setattr(graph.get_submodule(place), name, shared.setdefault(original_name(graph, own), parameter))

        for module in self.modules():
            if isinstance(module, LayerNorm2d) and len(module.weight) < FEW:
                module.__class__ = MapNorm
            elif isinstance(module, nn.LayerNorm) and module.normalized_shape[0] < FEW:
                module.__class__ = RowNorm

    def graph(self, component: str) -> Graph:
        """By the component's name."""
        graph: Graph = getattr(self, component)
        return graph

    def tensors(self, graphs: Iterable[str] = MODULES) -> dict[str, Tensor]:
        """The state of some graphs: "source:original name" to tensor."""
        return {original_name(self.graph(name), own): tensor for name in graphs for own, tensor in self.graph(name).state_dict().items()}

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Source to original name to tensor, as `export.checkpoints.write_checkpoint` takes them."""
        states: dict[str, dict[str, Tensor]] = {}
        for original, tensor in self.tensors().items():
            source, name = original.split(":")
            states.setdefault(source, {})[name] = tensor
        return states

    def parameters_of(self, graphs: Iterable[str]) -> list[nn.Parameter]:
        """Every parameter that no other graphs read, once."""
        others = {id(parameter) for name in set(MODULES) - set(graphs) for parameter in self.graph(name).parameters()}
        own = {id(parameter): parameter for name in graphs for parameter in self.graph(name).parameters()}
        return [parameter for key, parameter in own.items() if key not in others]


def save(path: Path, model: Model, graphs: Iterable[str], progress: float) -> None:
    """Writes what a stage has trained, 0..1 of it done, as float16 like the checkpoint; a file that is half written is never seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.tensors(graphs).items()}
    save_file(tensors, partial, metadata={"progress": f"{progress:.6f}"})
    partial.replace(path)


def load(path: Path, model: Model) -> float:
    """Reads what `save` wrote into a model; its progress."""
    own = model.tensors()
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            own[name].copy_(file.get_tensor(name))
        return float(file.metadata()["progress"])
