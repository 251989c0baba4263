"""Loads what the exporter wrote, one class per engine kind: `torch` (eager), `onnx` (ONNX Runtime), `aoti` (AOTInductor package),
`tensorrt` (plan).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble import settings
from ensemble.components import components
from ensemble.config import ModelConfig
from ensemble.generation import Decoder, Outlook
from ensemble.runner import Composition, Device, Graph, Host
from ensemble.tensors import Array, Arrays, Component

from .capture import Captured
from .manifest import check
from .models import MODULES
from .quantize import quantize

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .models.language_model import LanguageDecoder
    from .models.layers import Call
    from .models.layers import Graph as Module

ENGINE_SUFFIX = {"torch": ".safetensors", "onnx": ".onnx", "aoti": ".pt2", "tensorrt": ".plan"}
"""Engine kind to the file that it is kept in, beside its component's model.py."""

HELD_BY_TORCH = ("torch", "aoti")
"""Engine kinds whose weights are a file of their own, which graphs of one process share."""

POSITIONS_STEP = 512
"""Positions by which the cache of the language model grows."""

CAPTURED_BATCHES = (4, 3, 2, 1)
"""Frames or objects of the calls that are captured at the start; others are when they come."""

COMPOSED = ("memory_attention",)
"""Graphs that run as part of a composition alone, which is warmed up whole."""

PRECISIONS = ("float32", "bfloat16", "float16")
INDUCTOR = {"triton.coalesce_tiling_analysis": False}
"""Options of torch's compiler: on a GPU the analysis of memory accesses fails on the strided cells of the CLIP grid (torch 2.11)."""
ALONE, PROMPT = "alone", "prompt"
"""Packages of their own: for one object, frame or answer, and for the prompt of an answer."""
QUANTIZATION_BITS = {"none": None, "8bit": 8, "4bit": 4}


@dataclass(frozen=True)
class Engine:
    """How graphs run; travels as the parameters of a model's config.pbtxt.

    Args:
        engine_kind: key of ENGINE_SUFFIX.
        precision: of weights and products, one of PRECISIONS; norms and softmax stay in float32.
        quantization: key of QUANTIZATION_BITS; of the language model's layers.
        components: graph to its own engine kind, where that is another.
    """

    engine_kind: str = "onnx"
    precision: str = "float32"
    quantization: str = "none"
    components: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> Engine:
        """The fields among the parameters of a config.pbtxt, as `parameters` gives them."""
        own = {name: parameters[name] for name in ("engine_kind", "precision", "quantization") if name in parameters}
        prefix = "engine_kind."
        return cls(**own, components={name.removeprefix(prefix): kind for name, kind in parameters.items() if name.startswith(prefix)})

    def parameters(self) -> dict[str, str]:
        """Of a config.pbtxt."""
        kinds = {f"engine_kind.{component}": kind for component, kind in self.components.items()}
        return {"engine_kind": self.engine_kind, **kinds, "precision": self.precision, "quantization": self.quantization}

    @property
    def kinds(self) -> set[str]:
        return {self.engine_kind, *self.components.values()}

    def of(self, component: str) -> Engine:
        """How one graph runs."""
        return replace(self, engine_kind=self.components.get(component, self.engine_kind), components={})

    def __post_init__(self) -> None:
        known = (
            *(("engine_kind", kind, ENGINE_SUFFIX) for kind in self.kinds),
            ("precision", self.precision, PRECISIONS),
            ("quantization", self.quantization, QUANTIZATION_BITS),
            *(("component", component, MODULES) for component in self.components),
        )
        for name, got, values in known:
            if got not in values:
                raise ValueError(f"engine: got {name} {got!r}, expected one of {', '.join(values)}.")
        if "onnx" in self.kinds and self.precision == "bfloat16":
            raise ValueError("engine: got onnx in bfloat16, expected float32 or float16: ONNX Runtime has no products in bfloat16.")


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
        # Shapes differ from call to call: a plan of the memory for each of them takes more than it saves.
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(path, options, providers=onnxruntime.get_available_providers())
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))


def torch_device() -> str:
    """The GPU, or the CPU where there is none."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class TorchDevice:
    """This process's GPU, or the CPU: a `Device` whose arrays are tensors."""

    def __init__(self) -> None:
        # Kernels that want a workspace want it zeroed before every call, and every process would hold one.
        os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")
        self.name = torch_device()

    @property
    def on_gpu(self) -> bool:
        return self.name == "cuda"

    def zeros(self, shape: Sequence[int], dtype: str) -> Tensor:
        import torch

        return torch.zeros(*shape, dtype=getattr(torch, dtype), device=self.name)

    def itemsize(self, dtype: str) -> int:
        import torch

        return int(getattr(torch, dtype).itemsize)

    def put(self, array: Array | Tensor) -> Tensor:
        import torch

        # The array has been read when this returns, if not yet copied: to wait for the device would be in vain.
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.name, non_blocking=True) if isinstance(array, np.ndarray) else array

    def stack(self, arrays: Sequence[Tensor]) -> Tensor:
        import torch

        first, *others = map(self.put, arrays)
        return (torch.stack([first, *others]) if others else first[None]).float()

    def join(self, arrays: Sequence[Array | Tensor]) -> Tensor:
        import torch

        return torch.cat([self.put(array) for array in arrays])

    def adopt(self, tensors: Mapping[str, Any]) -> dict[str, Array | Tensor]:
        import torch

        def own(tensor: Any) -> Array | Tensor:
            return tensor.as_numpy() if tensor.is_cpu() else torch.utils.dlpack.from_dlpack(tensor.to_dlpack()).clone()

        adopted = {name: own(tensor) for name, tensor in tensors.items()}
        if any(isinstance(array, torch.Tensor) for array in adopted.values()):
            self.wait()
        return adopted

    def wait(self) -> None:
        self.mark()()

    def trim(self) -> None:
        if self.on_gpu:
            Captured.trim()

    def mark(self) -> Callable[[], None]:
        """What waits for all that has been launched so far, and for nothing that is launched later."""
        import torch

        if not self.on_gpu:
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    def where(self, condition: Tensor, array: Tensor, value: float) -> Tensor:
        import torch

        return torch.where(condition, array, value)

    def run(self, graph: Graph, inputs: Mapping[str, Array | Tensor]) -> dict[str, Tensor]:
        assert isinstance(graph, TensorGraph)
        return graph.run_tensors({name: self.put(array) for name, array in inputs.items()})

    def compose(self, contract: Component, composition: Composition, graphs: Mapping[str, Graph]) -> TensorGraph:
        def run(component: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            graph = graphs[component]
            assert isinstance(graph, TensorGraph)
            return graph.run_tensors(inputs, captured=False)

        def call(*tensors: Tensor) -> list[Tensor]:
            outputs = composition(run, {spec.name: tensor for spec, tensor in zip(contract.inputs, tensors, strict=True)})
            return [outputs[spec.name] for spec in contract.outputs]

        return TensorGraph(contract, call)

    def host(self, array: Array | Tensor) -> Array:
        return self.hosts({"array": array})["array"]

    def hosts(self, arrays: Mapping[str, Array | Tensor]) -> Arrays:
        """Floats as float32, whatever they were computed in."""
        return self.fetch(arrays)()

    def fetch(self, arrays: Mapping[str, Array | Tensor]) -> Callable[[], Arrays]:
        """Sends arrays to the host; what it returns waits until they are there."""

        def sent(array: Array | Tensor) -> Array | Tensor:
            if isinstance(array, np.ndarray):
                return array
            return (array.float() if array.is_floating_point() else array).to("cpu", non_blocking=True)

        there, wait = {name: sent(array) for name, array in arrays.items()}, self.mark()

        def arrived() -> Arrays:
            wait()
            return {name: np.asarray(array) for name, array in there.items()}

        return arrived

    @contextmanager
    def timed(self) -> Iterator[Callable[[], float]]:
        import torch

        if not self.on_gpu:
            with Host().timed() as elapsed:
                yield elapsed
            return
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield lambda: start.elapsed_time(stop) / 1000
        stop.record()


class TorchPlace:
    """A module on this process's device, with the products of a precision.

    Args:
        module: moved there; its weights keep the dtype that they are stored in.
        precision: one of PRECISIONS.
    """

    def __init__(self, module: nn.Module, precision: str) -> None:
        import torch

        self.device = TorchDevice()
        self.dtype: torch.dtype = getattr(torch, precision)
        self.module = module.to(self.device.name)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """What forward passes run in; as the original, half weights under autocast (spec 12.3)."""
        import torch

        with torch.inference_mode(), torch.autocast(self.device.name, self.dtype, enabled=self.dtype != torch.float32):
            yield


class TensorGraph:
    """A graph that takes and returns tensors on this process's device; on a GPU it is captured.

    Args:
        contract: of the graph, or of what several compute together.
        call: takes the tensors of the contract's inputs in order, and returns those of its outputs.
    """

    def __init__(self, contract: Component, call: Call) -> None:
        from .models import graph_class
        from .models.layers import several

        def cast(*tensors: Tensor) -> list[Tensor]:
            # Other processes take what is in C order alone.
            return [(tensor.float() if tensor.is_floating_point() else tensor).contiguous() for tensor in several(call(*tensors))]

        self._inputs = [spec.name for spec in contract.inputs]
        self._outputs = [spec.name for spec in contract.outputs]
        self._device, self._call = TorchDevice(), cast
        capturable = all(graph_class(name).capturable for name in contract.parts or [contract.name])
        self._captured = Captured(cast) if self._device.on_gpu and capturable else cast

    def run(self, inputs: Arrays) -> Arrays:
        return self._device.hosts(self._device.run(self, inputs))

    def run_tensors(self, inputs: Mapping[str, Tensor], captured: bool = True) -> dict[str, Tensor]:
        """Inputs and outputs on the device; floats as float32. What is captured itself asks for no captured launch."""
        call = self._captured if captured else self._call
        return dict(zip(self._outputs, call(*(inputs[name] for name in self._inputs)), strict=True))


class TorchGraph(TensorGraph):
    """A torch module in eager mode.

    Args:
        module: takes and returns the tensors of its contract in order.
        component: its name.
        precision: one of PRECISIONS.
    """

    def __init__(self, module: Module, component: str, precision: str = "float32") -> None:
        place = TorchPlace(module, precision)

        def call(*tensors: Tensor) -> Tensor | Sequence[Tensor]:
            with place.inference():
                outputs: Tensor | Sequence[Tensor] = place.module(*tensors)
                return outputs

        super().__init__(components(module.config)[component], call)


class AotiGraph(TensorGraph):
    """A component that AOTInductor has compiled for this machine.

    Args:
        path: .pt2 file.
        component: its name.
        module: its weights and sizes.
    """

    def __init__(self, path: Path, component: str, module: Module) -> None:
        contract, weights = components(module.config)[component], list(module.to(torch_device()).parameters())
        package = load_package(path)
        if module.alone:
            axes = contract.dynamic_axes().values()
            place, axis = next((place, axis) for place, names in enumerate(axes) for axis, name in names.items() if name == module.alone)
            package = choose(load_package(beside(path, ALONE)), package, place, axis)
        super().__init__(contract, lambda *tensors: package(*tensors, *weights))


def choose(alone: Call, others: Call, place: int = 0, axis: int = 0) -> Call:
    """One call of two: where the axis of an input has size 1, and where it has any other."""
    return lambda *tensors: (alone if tensors[place].shape[axis] == 1 else others)(*tensors)


def beside(path: Path, name: str) -> Path:
    """Another package of a component, beside that at `path`, which is for any number of objects, frames or answers: ALONE or PROMPT."""
    return path.with_stem(f"{path.stem}_{name}")


def load_package(path: Path) -> Call:
    """The function that AOTInductor has compiled."""
    from torch._inductor import aoti_load_package

    from .models import layers, roi_align  # noqa: F401 (packages call the operators that they register)

    # What takes locks of its own cannot be captured.
    package: Call = aoti_load_package(str(path), run_single_threaded=torch_device() == "cuda")
    return package


@dataclass(frozen=True)
class CompiledLayers:
    """What stands for every layer of the language decoder, in a step and in a prompt; the module's own where not given.

    Args:
        decode, prompt: `export.models.language_model.DecodeLayer` and `PromptLayer`, compiled.
    """

    decode: Call | None = None
    prompt: Call | None = None


def load_compiled(path: Path, config: ModelConfig) -> tuple[Any, CompiledLayers]:
    """The language decoder's module, and the layers that were compiled from it, which lie beside its weights."""
    module = load_module(path, "language_decoder", config)
    decode = choose(load_package(beside(path, ALONE)), load_package(path))
    return module, CompiledLayers(decode, load_package(beside(path, PROMPT)))


class CompiledSteps(TensorGraph):
    """The language decoder as one graph for the gate: a single token, and a prompt that fills the caches, go through compiled layers.

    Args:
        module: its weights and sizes.
        layers: compiled.
        precision: one of PRECISIONS.
    """

    def __init__(self, module: LanguageDecoder, layers: CompiledLayers, precision: str) -> None:
        place = TorchPlace(module, precision)

        def call(embeddings: Tensor, positions: Tensor, *caches: Tensor) -> Sequence[Tensor]:
            keys, values = (cache.to(place.dtype, copy=True) for cache in caches)
            length, slots = embeddings.shape[1], keys.shape[3]
            with place.inference():
                if 1 < length == slots:
                    outputs = module.prefill_(embeddings, keys, values, layers.prompt)
                else:
                    outputs = module.decode_(embeddings, positions, keys, values, layers.decode if length == 1 else None)
            return *outputs, keys, values

        super().__init__(components(module.config)["language_decoder"], call)


class DecoderEnds:
    """What every decoder has before and behind the language model proper.

    Args:
        embedder, projector: graphs of token_embedder and prompt_projector.
    """

    def __init__(self, embedder: Graph, projector: Graph) -> None:
        self._embedder, self._projector = embedder, projector

    def embed(self, token_ids: list[int]) -> Array:
        return self._embedder.run({"token_ids": np.array(token_ids)})["token_embeddings"]


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

    def prefill(self, slot: int, embeddings: Sequence[Array]) -> Outlook:
        self._caches[slot] = self._empty, self._empty
        return self._outlook([self._append(slot, np.concatenate(embeddings))])

    def decode(self, slots: list[int], token_ids: list[int]) -> Outlook:
        return self._outlook([self._append(slot, row[None]) for slot, row in zip(slots, self.embed(token_ids), strict=True)])

    def _outlook(self, results: Sequence[tuple[Array, Array]]) -> Outlook:
        logits, states = map(np.stack, zip(*results, strict=True))
        prompt_embeddings = self._projector.run({"final_states": states})["prompt_embeddings"]
        return Outlook(logits.argmax(1), states, prompt_embeddings, logits.__getitem__)

    def _append(self, slot: int, embeddings: Array) -> tuple[Array, Array]:
        """New tokens [S, H] behind those of one slot: logits [V] and final-norm state [H]."""
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
    """The language model in torch over a cache that is written in place; on a GPU a step of all answers is one captured launch.

    There, while answers take their likeliest tokens, the next step is launched before anybody asks for it, and while the host deals with
    this one. A step that is not what is asked for then does no harm: its tokens' places are written again before they are read.

    Args:
        decoder: its weights and sizes.
        embedder, projector: graphs of token_embedder and prompt_projector.
        precision: one of PRECISIONS; of the cache too.
        layers: compiled ones.
        capturable: whether its layers ask the device for nothing while they run; those of bitsandbytes do.
    """

    def __init__(
        self,
        decoder: LanguageDecoder,
        embedder: Graph,
        projector: Graph,
        precision: str = "float32",
        layers: CompiledLayers = CompiledLayers(),
        capturable: bool = True,
    ) -> None:
        from .models.language_model import ring_slots

        super().__init__(embedder, projector)
        self._decoder, self._place, self._layers = decoder, TorchPlace(decoder, precision), layers
        self._captures = self._runs_ahead = capturable and self._place.device.on_gpu
        self._expected: tuple[list[int], list[int]] | None = None
        """Slots of the last outlook and their likeliest tokens."""
        self._ahead: Sequence[Tensor] | None = None
        """What the step makes of them, if it was launched."""
        self._lengths = np.zeros(settings.MAX_GENERATIONS, np.int64)
        self._ring = ring_slots(decoder.config)
        self._keys, self._values = self._empty(0, 0), self._empty(0, 0)
        self._forget()

    def prefill(self, slot: int, embeddings: Sequence[Array | Tensor]) -> Outlook:
        import torch

        length, rows = sum(map(len, embeddings)), slice(slot, slot + 1)
        self._reserve(slot + 1, length)
        with self._place.inference():
            whole = torch.cat([self._place.device.put(piece) for piece in embeddings])[None]
            tensors = self._behind(*self._decoder.prefill_(whole, self._keys[:, rows], self._values[:, rows], self._layers.prompt))
        self._lengths[slot] = length
        outlook = self._outlook(tensors[3], self._fetch(tensors)(), [0])
        self._expected, self._ahead = ([slot], outlook.likeliest.tolist()), None
        return outlook

    def decode(self, slots: list[int], token_ids: list[int]) -> Outlook:
        # All slots up to the highest run, in few sizes, so that the cache needs no gathering and a step can be captured. What an idle
        # one writes behind its last token is overwritten by its own next token before anybody reads it.
        count = 1 << max(slots).bit_length()
        self._reserve(count, int(self._lengths[slots].max()) + 1)
        goes_on = (slots, token_ids) == self._expected
        if goes_on and self._ahead is not None:
            tensors = self._ahead
        else:
            ids = np.zeros(count, np.int64)
            ids[slots] = token_ids
            tensors = self._launch(self._place.device.put(ids))
        self._lengths[slots] += 1
        arrived = self._fetch(tensors)
        self._ahead = self._launch(tensors[0]) if goes_on and self._runs_ahead else None
        outlook = self._outlook(tensors[3], arrived(), slots)
        self._expected = slots, outlook.likeliest.tolist()
        return outlook

    def _launch(self, token_ids: Tensor) -> Sequence[Tensor]:
        """A step of the first n answers, of which an idle one may get any token: [n] to what `_behind` returns."""
        with self._place.inference():
            return self._step(token_ids, self._place.device.put(self._lengths[: len(token_ids)]))

    def _forget(self) -> None:
        """Captured steps write to the cache that they were captured with."""
        self._step: Callable[[Tensor, Tensor], Sequence[Tensor]] = (
            Captured(self._run) if self._captures else lambda *tensors: self._run(*tensors)
        )

    def _run(self, token_ids: Tensor, lengths: Tensor) -> Sequence[Tensor]:
        """One more token [n] behind each of the first n answers, of their lengths [n]; as `_behind`."""
        assert isinstance(self._embedder, TensorGraph)
        embeddings = self._embedder.run_tensors({"token_ids": token_ids}, captured=False)["token_embeddings"]
        caches = self._keys[:, : len(lengths)], self._values[:, : len(lengths)]
        with self._place.inference():
            return self._behind(*self._decoder.decode_(embeddings[:, None], lengths[:, None], *caches, self._layers.decode))

    def _behind(self, logits: Tensor, states: Tensor) -> Sequence[Tensor]:
        """The tensors of an `Outlook`: what the host asks for is computed on the device, and little enough to copy for every token."""
        assert isinstance(self._projector, TensorGraph)
        states = states.float()
        projected = self._projector.run_tensors({"final_states": states}, captured=False)
        return logits.argmax(1), states, projected["prompt_embeddings"], logits

    def _fetch(self, tensors: Sequence[Tensor]) -> Callable[[], Arrays]:
        """What every token needs of `_behind`, to the host."""
        return self._place.device.fetch(dict(zip(("likeliest", "states", "prompt_embeddings"), tensors, strict=False)))

    def _outlook(self, logits: Tensor, arrived: Arrays, rows: list[int]) -> Outlook:
        """Of some rows."""
        chosen = {name: array[rows] for name, array in arrived.items()}
        return Outlook(**chosen, logits=lambda row: self._place.device.host(logits[rows[row]]))

    def _reserve(self, slots: int, positions: int) -> None:
        """Lets the cache grow to as many answers and positions as there ever were at once; on a GPU an answer has all of its positions."""
        _, had_slots, _, had_positions, _ = self._keys.shape
        positions = self._ring if self._place.device.on_gpu else min(positions, self._ring)
        if slots <= had_slots and positions <= had_positions:
            return
        steps = -(-max(positions, had_positions) // POSITIONS_STEP)
        size = max(slots, had_slots), min(steps * POSITIONS_STEP, self._ring)
        self._forget()
        for name in ("_keys", "_values"):  # one after the other: the old one is freed before the next is made
            larger = self._empty(*size)
            larger[:, :had_slots, :, :had_positions] = getattr(self, name)
            setattr(self, name, larger)

    def _empty(self, slots: int, positions: int) -> Tensor:
        """[layers, slots, heads, positions, C / heads] of the cache."""
        import torch

        language = self._decoder.config.language
        shape = (language.layers, slots, language.heads, positions, language.width // language.heads)
        return torch.zeros(shape, dtype=self._place.dtype, device=self._place.device.name)


def open_graph(parameters: Mapping[str, str], folder: Path, component: str, config: ModelConfig) -> Graph:
    """A component's graph.

    Args:
        parameters: of its config.pbtxt.
        folder: holds `<component><suffix>`.
    Raises:
        ManifestError: it was not exported, or is not what was exported; says how to mend it.
    """
    engine = Engine.from_parameters(parameters).of(component)
    return load_graph(engine, engine_path(engine, folder, component), component, config)


def load_graph(engine: Engine, path: Path, component: str, config: ModelConfig) -> Graph:
    """A component's graph from its file."""
    if engine.engine_kind == "onnx":
        return OnnxGraph(path)
    if engine.engine_kind == "aoti" and component == "language_decoder":
        return CompiledSteps(*load_compiled(path, config), engine.precision)
    if engine.engine_kind == "tensorrt":
        from .tensorrt_graph import TensorRtGraph

        return TensorRtGraph(path, component, config)
    return with_weights(engine, path, component, load_module(path, component, config))


def with_weights(engine: Engine, path: Path, component: str, module: Module) -> Graph:
    """The graph of a component whose weights torch holds."""
    return AotiGraph(path, component, module) if engine.engine_kind == "aoti" else TorchGraph(module, component, engine.precision)


def open_graphs(parameters: Mapping[str, str], folder: Path, names: Sequence[str], config: ModelConfig) -> dict[str, Graph]:
    """Several components' graphs, as `open_graph`, with the weights that they share held once; each that is called on its own is warmed up,
    so that the first request need not wait for it.
    """
    engines = {name: Engine.from_parameters(parameters).of(name) for name in names}
    paths = {name: engine_path(engine, folder, name) for name, engine in engines.items()}
    modules = {name: load_module(paths[name], name, config) for name, engine in engines.items() if engine.engine_kind in HELD_BY_TORCH}
    share_weights(list(modules.values()))
    graphs: dict[str, Graph] = {
        name: with_weights(engine, paths[name], name, modules[name]) if name in modules else load_graph(engine, paths[name], name, config)
        for name, engine in engines.items()
    }
    for name, graph in graphs.items():
        if name not in COMPOSED:
            warm_up(graph, components(config)[name])
    return graphs


def warm_up(graph: Graph, contract: Component) -> None:
    """Runs it at the usual size; on a GPU twice at several, so that they are captured."""
    on_gpu = torch_device() == "cuda" and isinstance(graph, TensorGraph)
    for sizes in capture_sizes(contract) if on_gpu else [{}]:
        sample = contract.sample(seed=0, **sizes)
        for _ in range(1 + on_gpu):
            graph.run(sample)


def capture_sizes(contract: Component) -> list[dict[str, int]]:
    """What is captured before the first request: a few frames or objects at once, objects of every age. The largest come first: what is
    captured later finds room in their memory.
    """
    dims = contract.dims
    batch: list[str] = [name for name in ("frames", "objects", "embeddings") if name in dims]
    sizes: list[dict[str, int]] = [dict.fromkeys(batch, count) for count in CAPTURED_BATCHES] if batch else [{}]
    if "pointers" in dims:
        ages = range(dims["pointers"].max, 0, -1)
        return [{**own, "memories": min(age, dims["memories"].max), "pointers": age} for own in sizes for age in ages]
    return sizes


def share_weights(modules: Sequence[nn.Module]) -> None:
    """Lets modules hold weights of one name and value once, as the CLIP tower that clips and images go through."""
    import torch

    held: dict[str, nn.Parameter] = {}
    for module in modules:
        for name, parameter in list(module.named_parameters()):
            known = held.setdefault(name, parameter)
            if known is not parameter and known.dtype == parameter.dtype and torch.equal(known, parameter):
                owner, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(owner), attribute, known)


def open_device(parameters: Mapping[str, str]) -> Device:
    """Where the graphs of an `Engine` take and leave their arrays: one place, since ONNX graphs are mixed with no others."""
    return Host() if Engine.from_parameters(parameters).engine_kind == "onnx" else TorchDevice()


def open_decoder(parameters: Mapping[str, str], folder: Path, config: ModelConfig) -> Decoder:
    """The language model, from a folder that holds its three graphs; as `open_graph`."""
    engine = Engine.from_parameters(parameters).of("language_decoder")
    module: Any
    embedder, projector = (open_graph(parameters, folder, name, config) for name in ("token_embedder", "prompt_projector"))
    if engine.engine_kind == "onnx":
        return GraphDecoder(open_graph(parameters, folder, "language_decoder", config), embedder, projector, config)
    path, layers = engine_path(engine, folder, "language_decoder"), CompiledLayers()
    if engine.engine_kind == "aoti":
        module, layers = load_compiled(path, config)
    else:
        module = load_module(path, "language_decoder", config)
    if bits := QUANTIZATION_BITS[engine.quantization]:
        quantize(module, bits, torch_device())
    decoder = TorchDecoder(module, embedder, projector, engine.precision, layers, capturable=not bits)
    decoder.prefill(0, [np.zeros((1, config.language.width), np.float32)])
    for _ in range(2):  # the second is captured
        decoder.decode([0], [0])
    return decoder


def engine_path(engine: Engine, folder: Path, component: str) -> Path:
    """The file of a component's graph, as its manifest says; raises ManifestError."""
    settings = {"engine_kind": engine.engine_kind, "precision": engine.precision, "machine": machine_of(engine)}
    path = folder / engine_file(engine, component)
    weights = [weights_beside(path).name] if engine.engine_kind in HELD_BY_TORCH else []
    check(folder, component, settings, [path.name, *weights])
    return path


def machine_of(engine: Engine) -> str:
    """What an engine is bound to: "any" machine, or the library and the processor that it was compiled for."""
    if engine.engine_kind not in ("aoti", "tensorrt"):
        return "any"
    import torch

    if engine.engine_kind == "tensorrt":
        return "TensorRT {}, sm_{}{}".format(version("tensorrt"), *torch.cuda.get_device_capability())
    if torch_device() == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"torch {torch.__version__}, sm_{major}{minor}"
    return f"torch {torch.__version__}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def engine_file(engine: Engine, component: str) -> str:
    """The name of a component's file."""
    return f"{component}{ENGINE_SUFFIX[engine.engine_kind]}"


def weights_beside(path: Path) -> Path:
    """Where the weights of an engine lie that torch holds."""
    return path.with_suffix(ENGINE_SUFFIX["torch"])


def load_module(path: Path, component: str, config: ModelConfig) -> Module:
    """A component's module with the weights that `save_module` wrote, at `path` or beside the engine there."""
    from safetensors.torch import load_file

    from .models import empty_module

    module = empty_module(component, config)
    module.load_state_dict(load_file(weights_beside(path)), assign=True)
    return module.requires_grad_(False).eval()


def save_module(module: Module, path: Path, precision: str) -> None:
    """Writes a component's weights under its own names, as `stored` keeps them, to `path` or beside the engine there."""
    from safetensors.torch import save_file

    save_file(stored(module, precision), weights_beside(path))


def as_stored(module: Module, component: str, precision: str) -> Module:
    """A component's module with its weights as `stored` keeps them."""
    from .models import empty_module

    kept = empty_module(component, module.config)
    kept.load_state_dict(stored(module, precision), assign=True)
    return kept.requires_grad_(False).eval()


def stored(module: Module, precision: str) -> dict[str, Tensor]:
    """A component's weights by its own names: matrices and the biases of their products in a precision, other vectors (norms) in float32.

    Autocast would round those biases in every call.
    """
    import torch

    dtype, weights = getattr(torch, precision), module.state_dict()

    def is_product(name: str) -> bool:
        matrix = f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name
        return matrix in weights and weights[matrix].ndim > 1

    return {name: (tensor.to(dtype) if is_product(name) else tensor).contiguous() for name, tensor in weights.items()}
