"""Loads what the exporter wrote, one class per engine kind: `torch` (eager), `onnx` (ONNX Runtime)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble import settings
from ensemble.components import components
from ensemble.config import ModelConfig
from ensemble.generation import Decoder
from ensemble.runner import Graph
from ensemble.tensors import Array, Arrays

if TYPE_CHECKING:
    from .models.language_model import LanguageDecoder
    from .models.layers import Graph as Module

ENGINE_SUFFIX = {"torch": ".safetensors", "onnx": ".onnx"}
"""Engine kind to the file that it is kept in, beside its component's model.py."""


class OnnxGraph:
    """A graph in ONNX Runtime.

    Args:
        path: .onnx file.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        onnxruntime.disable_telemetry_events()  # a server tells nobody what it runs
        options = onnxruntime.SessionOptions()
        # Every component has a session of its own: threads that spin while they wait would take the cores from the others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(path, options, providers=onnxruntime.get_available_providers())
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))


class TorchGraph:
    """A torch module in eager mode.

    Args:
        module: takes and returns the tensors of its contract in order.
        component: its name.
    """

    def __init__(self, module: Module, component: str) -> None:
        self._module = module
        contract = components(module.config)[component]
        self._inputs = [spec.name for spec in contract.inputs]
        self._outputs = [spec.name for spec in contract.outputs]

    def run(self, inputs: Arrays) -> Arrays:
        import torch

        with torch.inference_mode():
            outputs = self._module(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self._inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {name: tensor.numpy() for name, tensor in zip(self._outputs, outputs, strict=True)}


class DecoderEnds:
    """What every decoder does before and behind the language model proper.

    Args:
        embedder, projector: graphs of token_embedder and prompt_projector.
    """

    def __init__(self, embedder: Graph, projector: Graph) -> None:
        self._embedder, self._projector = embedder, projector

    def embed(self, token_ids: list[int]) -> Array:
        return self._embedder.run({"token_ids": np.array(token_ids)})["token_embeddings"]

    def project(self, states: Array) -> Array:
        return self._projector.run({"final_states": states})["prompt_embeddings"]


class GraphDecoder(DecoderEnds):
    """The language model as a graph that returns its caches; each slot keeps the part in use.

    Args:
        decoder, embedder, projector: graphs of language_decoder, token_embedder and prompt_projector.
        config: sizes of the model.
    """

    def __init__(self, decoder: Graph, embedder: Graph, projector: Graph, config: ModelConfig) -> None:
        super().__init__(embedder, projector)
        language = config.language
        self._decoder = decoder
        self._empty = np.zeros((language.layers, 1, language.heads, 0, language.width // language.heads), np.float32)
        self._caches: dict[int, tuple[Array, Array]] = {}

    def prefill(self, slot: int, embeddings: Array) -> tuple[Array, Array]:
        self._caches[slot] = self._empty, self._empty
        return self._append(slot, embeddings)

    def decode(self, slots: list[int], token_ids: list[int]) -> tuple[Array, Array]:
        results = [self._append(slot, row[None]) for slot, row in zip(slots, self.embed(token_ids), strict=True)]
        logits, states = zip(*results, strict=True)
        return np.stack(logits), np.stack(states)

    def _append(self, slot: int, embeddings: Array) -> tuple[Array, Array]:
        """New tokens [S, H] behind those of one slot."""
        keys, values = self._caches[slot]
        room = [(0, 0), (0, 0), (0, 0), (0, len(embeddings)), (0, 0)]
        used = keys.shape[3]
        outputs = self._decoder.run(
            {
                "token_embeddings": embeddings[None],
                "positions": np.arange(used, used + len(embeddings))[None],
                "key_cache": np.pad(keys, room),
                "value_cache": np.pad(values, room),
            }
        )
        self._caches[slot] = outputs["new_key_cache"], outputs["new_value_cache"]
        return outputs["logits"][0], outputs["final_states"][0]


class TorchDecoder(DecoderEnds):
    """The language model in torch over a cache that is written in place.

    Args:
        decoder: its weights and sizes.
        embedder, projector: graphs of token_embedder and prompt_projector.
    """

    def __init__(self, decoder: LanguageDecoder, embedder: Graph, projector: Graph) -> None:
        import torch

        super().__init__(embedder, projector)
        language = decoder.config.language
        shape = (language.layers, settings.MAX_GENERATIONS, language.heads, decoder.config.max_sequence, language.width // language.heads)
        self._decoder = decoder
        self._keys, self._values = torch.zeros(shape), torch.zeros(shape)
        self._lengths = np.zeros(settings.MAX_GENERATIONS, np.int64)

    def prefill(self, slot: int, embeddings: Array) -> tuple[Array, Array]:
        logits, states = self._append(slot, embeddings[None], np.arange(len(embeddings))[None])
        self._lengths[slot] = len(embeddings)
        return logits[0], states[0]

    def decode(self, slots: list[int], token_ids: list[int]) -> tuple[Array, Array]:
        # All slots in the range run, so that the cache needs no gathering. What an idle one writes behind its last token is
        # overwritten by its own next token before anybody reads it.
        low, high = min(slots), max(slots) + 1
        rows = [slot - low for slot in slots]
        embeddings = np.zeros((high - low, 1, self._decoder.config.language.width), np.float32)
        embeddings[rows, 0] = self.embed(token_ids)
        positions = np.minimum(self._lengths[low:high], self._keys.shape[3] - 1)[:, None]
        logits, states = self._append(low, embeddings, positions)
        self._lengths[slots] += 1
        return logits[rows], states[rows]

    def _append(self, first: int, embeddings: Array, positions: Array) -> tuple[Array, Array]:
        """New tokens [n, S, H] at their positions [n, S] in the slots from `first` on."""
        import torch

        rows, used = slice(first, first + len(embeddings)), int(positions.max()) + 1
        with torch.inference_mode():
            logits, states = self._decoder.decode_(
                torch.from_numpy(embeddings), torch.from_numpy(positions), self._keys[:, rows, :, :used], self._values[:, rows, :, :used]
            )
        return logits.numpy(), states.numpy()


def open_graph(kind: str, folder: Path, component: str, config: ModelConfig) -> Graph:
    """A component's graph of one engine kind.

    Args:
        kind: key of ENGINE_SUFFIX.
        folder: holds `<component><suffix>`.
    Raises:
        FileNotFoundError: it was not exported; says how to.
    """
    path = folder / f"{component}{ENGINE_SUFFIX[kind]}"
    if not path.exists():
        raise FileNotFoundError(f"{component}: no {path.name} in {folder}. Build it: sparrow export CHECKPOINT -o REPOSITORY")
    return OnnxGraph(path) if kind == "onnx" else TorchGraph(load_module(path, component, config), component)


def open_decoder(kind: str, folder: Path, config: ModelConfig) -> Decoder:
    """The language model of one engine kind, from a folder that holds its three graphs."""
    embedder, projector = (open_graph(kind, folder, name, config) for name in ("token_embedder", "prompt_projector"))
    if kind == "torch":
        module: Any = load_module(folder / f"language_decoder{ENGINE_SUFFIX[kind]}", "language_decoder", config)
        return TorchDecoder(module, embedder, projector)
    return GraphDecoder(open_graph(kind, folder, "language_decoder", config), embedder, projector, config)


def load_module(path: Path, component: str, config: ModelConfig) -> Module:
    """A component's module with the weights that `save_module` wrote."""
    from safetensors.torch import load_file

    from .models import empty_module

    module = empty_module(component, config)
    module.load_state_dict(load_file(path), assign=True)
    return module.requires_grad_(False).eval()


def save_module(module: Module, path: Path) -> None:
    """Writes a component's weights under its own names."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)
