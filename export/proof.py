"""Proof of TensorRT plans where there is no torch: one machine prepares graphs and what torch computes, another builds, runs and measures.

    python -m export.proof prepare FOLDER     here: the graphs of the nano checkpoint, and some at full size
    python -m export.proof build CASE         there: a plan in the folder of a case
    python -m export.proof run CASE...        there: a JSON line with the figures of each

A graph at full size travels without its weights, which are drawn again from their names.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble.components import components
from ensemble.config import FULL, PRESETS
from ensemble.tensors import Array, Arrays, Component

from .gate import GateError, as_if, judge, note, round_weights, run_module
from .manifest import Gate
from .tensorrt_graph import Plan
from .to_tensorrt import Building, TensorRtError, plan_from_onnx

if TYPE_CHECKING:
    from torch import Tensor

    from .models.layers import Graph as Module

NANO = Path(__file__).parent.parent / "training" / "nano"
PRECISIONS = ("float32", "float16")
IN_TORCH = "language_decoder"
"""What no engine kind takes from torch."""
FULL_SIZE = ("memory_encoder", "mask_decoder", "proposal_selector", "memory_attention", "image_encoder", "proposal_detector")
"""What is built at full size, smallest first."""
AT_MOST = {"frames": 2, "images": 2, "objects": 4, "embeddings": 4, "tokens": 64, "states": 8, "sequences": 2, "slots": 256}
"""Bounds of varying sizes: a plan holds the memory of its largest shapes."""
LARGE = 1 << 16
"""Bytes from which a weight at full size is drawn again instead of carried."""
WARM_UP, REPEATS = 10, 50
Weight = tuple[str, bool, Sequence[int], str, int]
"""Name, whether it is transposed, shape before that, dtype and checksum."""
GRAPH, PLAN, WEIGHTS = "graph.onnx", "graph.plan", "weights.bin"


@dataclass(frozen=True)
class Case:
    """One engine to be proven; kept as case.json in a folder with its graph.

    Args:
        preset: size of the model.
        component: its name.
        precision: of products.
        variant: "", or "plugin" for deformable attention as TensorRT's plugin.
        weights: what is not in the graph, in the order of their file.
        stable: of a ranked component in half precision, figures of torch with rounded weights and inputs.
    """

    preset: str
    component: str
    precision: str
    variant: str
    weights: Sequence[Weight]
    stable: Gate

    @property
    def name(self) -> str:
        return "_".join(filter(None, (self.preset, self.precision, self.component, self.variant)))

    @property
    def contract(self) -> Component:
        return components(PRESETS[self.preset])[self.component]

    @property
    def expected(self) -> str:
        """The file, beside the folder, with what torch computes in float32."""
        return f"{self.preset}_{self.component}.npz"

    @property
    def building(self) -> Building:
        # In float32 nothing but the order of sums may differ. The libraries are stubs where release 8.6 is proven.
        return Building(tf32=self.precision != "float32", libraries=False, at_most=AT_MOST)

    @classmethod
    def read(cls, folder: Path) -> Case:
        return cls(**json.loads((folder / "case.json").read_text()))


def samples(contract: Component) -> list[Arrays]:
    """Seeded inputs: of the usual sizes, within AT_MOST, and of the least ones."""
    usual = {name: min(size.opt, AT_MOST.get(name, size.max)) for name, size in contract.dims.items()}
    least = {name: size.min for name, size in contract.dims.items()}
    return [contract.sample(seed, **sizes) for seed, sizes in enumerate((usual, least))]


def prepare(folder: Path) -> None:
    """Writes a folder for each case, the expected outputs, and cases.json with all names in order; what is there stays."""
    from .checkpoints import Checkpoint

    checkpoint = Checkpoint(NANO)
    work: list[tuple[str, str, Callable[[], Module]]] = [
        ("nano", component, partial(checkpoint.build, component)) for component in checkpoint.components if component != IN_TORCH
    ]
    work += [("full", component, partial(drawn, component)) for component in FULL_SIZE]
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    for preset, component, build in work:
        variants = ("", "plugin") if component == "proposal_detector" else ("",)
        cases = [Case(preset, component, precision, variant, (), {}) for variant in variants for precision in PRECISIONS]
        names += [case.name for case in cases]
        if all((folder / case.name / "case.json").exists() for case in cases):
            continue
        module = build()
        contract = cases[0].contract
        expected = [run_module(module, contract, inputs) for inputs in samples(contract)]
        arrays = {f"{index}.{name}": array for index, outputs in enumerate(expected) for name, array in outputs.items()}
        np.savez_compressed(folder / cases[0].expected, **arrays)
        for case in cases:
            rank = contract.ranked and case.precision != "float32"
            write_case(folder / case.name, replace(case, stable=stable_figures(module, case, expected) if rank else {}), module)
    (folder / "cases.json").write_text(json.dumps(names))


def drawn(component: str) -> Module:
    """A module at full size with weights that are drawn from their names."""
    import torch

    from .models import empty_module

    module = empty_module(component, FULL)
    state = {name: torch.from_numpy(draw(name, tuple(tensor.shape))) for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


def draw(name: str, shape: tuple[int, ...]) -> Array:
    """A weight that keeps the size of what goes through it."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if len(shape) > 1:
        return values / np.float32(math.sqrt(math.prod(shape[1:])))
    return values * np.float32(0.1) + np.float32(name.endswith(("weight", "gamma")))


def stable_figures(module: Module, case: Case, expected: list[Arrays]) -> Gate:
    """What the gate holds a ranked component in half precision against."""
    rounded, stable = round_weights(module, case.precision), Gate()
    for inputs, outputs in zip(samples(case.contract), expected, strict=True):
        given = {name: as_if(array, case.precision) for name, array in inputs.items()}
        note(stable, case.contract, run_module(rounded, case.contract, given), outputs)
    return stable


def write_case(folder: Path, case: Case, module: Module) -> None:
    """Exports a module as TensorRT 8.6 reads it; at full size without its large weights."""
    from .models.proposal_detector import use_plugin
    from .runners import as_stored
    from .to_onnx import lower, onnx_from_torch

    folder.mkdir(parents=True, exist_ok=True)
    module.cpu()
    kept = as_stored(module, case.component, case.precision)
    if case.variant == "plugin":
        use_plugin(kept)
    onnx_from_torch(kept, case.component, folder / GRAPH, case.precision)
    weights = take_out(folder / GRAPH, kept.state_dict()) if case.preset == "full" else []
    lower(folder / GRAPH)
    (folder / "case.json").write_text(json.dumps(asdict(replace(case, weights=weights))))
    (folder / WEIGHTS).unlink(missing_ok=True)
    tell(f"{folder.name:<44} {(folder / GRAPH).stat().st_size / 1e6:8.2f} MB")


def take_out(path: Path, state: dict[str, Tensor]) -> list[Weight]:
    """Moves large weights out of a graph into the file that `fill` writes again; the exporter has transposed some."""
    import onnx

    known: dict[bytes, tuple[str, bool]] = {}
    for name, tensor in state.items():
        known[tensor.numpy().tobytes()] = name, False
        if tensor.ndim == 2:
            known.setdefault(tensor.numpy().T.tobytes(), (name, True))
    model = onnx.load(path)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    weights: list[Weight] = []
    with (path.parent / WEIGHTS).open("wb") as file:
        for tensor in model.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor)
            content = array.tobytes()
            if len(content) < LARGE or content not in known:
                continue
            tensor.raw_data = content
            onnx.external_data_helper.set_external_data(tensor, WEIGHTS, file.tell(), len(content))
            tensor.ClearField("raw_data")
            file.write(content)
            name, transposed = known[content]
            weights.append((name, transposed, list(state[name].shape), array.dtype.name, zlib.crc32(content)))
    onnx.save(model, path)
    return weights


def fill(folder: Path, case: Case) -> None:
    """Writes the weights that a graph travelled without."""
    with (folder / WEIGHTS).open("wb") as file:
        for name, transposed, shape, dtype, checksum in case.weights:
            array = draw(name, tuple(shape)).astype(dtype)
            content = (array.T if transposed else array).tobytes()
            if zlib.crc32(content) != checksum:
                raise TensorRtError(
                    f"{name}: NumPy {np.__version__} draws other values than where the graph was prepared. Take its version."
                )
            file.write(content)


def build(folder: Path, level: int) -> None:
    """Builds the plan of a case."""
    case = Case.read(folder)
    fill(folder, case)
    start = time.monotonic()
    building = Building(**{**asdict(case.building), "level": level})
    plan_from_onnx(folder / GRAPH, folder / PLAN, case.contract, case.precision, building)
    tell(json.dumps({"case": case.name, "build_s": round(time.monotonic() - start, 1)}))


def run(folder: Path, memory: Memory) -> dict[str, Any]:
    """The figures of a case: the gate's, its verdict, and milliseconds at the usual sizes."""
    case = Case.read(folder)
    contract, plan = case.contract, Plan(folder / PLAN)
    expected = np.load(folder.parent / case.expected)
    figures: Gate = {}
    inputs = samples(contract)
    for index, arrays in reversed(list(enumerate(inputs))):  # the usual sizes last: they are timed
        got = memory.run(plan, arrays)
        note(figures, contract, got, {spec.name: expected[f"{index}.{spec.name}"] for spec in contract.outputs})
    verdict = ""
    try:
        judge(contract, figures, case.stable, case.precision)
    except GateError as error:
        verdict = str(error)
    latency_ms = memory.time(plan, inputs[0])
    return {"case": case.name, "figures": figures, "verdict": verdict, "latency_ms": latency_ms}


class Memory:
    """GPU memory, a stream and a clock by CUDA's driver alone; arrays are freed when the next ones are taken."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._held: list[int] = []
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._do("cuInit", 0)
        self._do("cuDeviceGet", ctypes.byref(device), 0)
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)  # the one that TensorRT works in
        self._do("cuCtxSetCurrent", context)
        self._stream = self._make("cuStreamCreate", ctypes.c_uint(0))

    def _do(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._cuda, name)(*arguments):
            raise TensorRtError(f"{name}: CUDA's driver answered {status}.")

    def _make(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._do(name, ctypes.byref(made), *arguments)
        return made

    def _room(self, size: int) -> int:
        address = ctypes.c_uint64()
        self._do("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(1, size)))
        self._held.append(address.value)
        return address.value

    def place(self, plan: Plan, inputs: Arrays) -> tuple[dict[str, int], Arrays]:
        """Addresses of inputs and outputs on the GPU, and arrays that the outputs fit in."""
        while self._held:
            self._do("cuMemFree_v2", ctypes.c_uint64(self._held.pop()))
        addresses = {}
        for name, array in inputs.items():
            sent = np.ascontiguousarray(array, plan.dtypes[name])
            addresses[name] = self._room(sent.nbytes)
            self._do("cuMemcpyHtoD_v2", ctypes.c_uint64(addresses[name]), ctypes.c_void_p(sent.ctypes.data), ctypes.c_size_t(sent.nbytes))
        shapes = plan.shapes({name: array.shape for name, array in inputs.items()})
        outputs = {name: np.empty(shape, plan.dtypes[name]) for name, shape in shapes.items()}
        return addresses | {name: self._room(array.nbytes) for name, array in outputs.items()}, outputs

    def run(self, plan: Plan, inputs: Arrays) -> Arrays:
        """The outputs of one run."""
        addresses, outputs = self.place(plan, inputs)
        plan.enqueue(addresses, self._stream.value or 0)
        self._do("cuStreamSynchronize", self._stream)
        for name, array in outputs.items():
            address, size = ctypes.c_uint64(addresses[name]), ctypes.c_size_t(array.nbytes)
            self._do("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), address, size)
        return outputs

    def time(self, plan: Plan, inputs: Arrays) -> list[float]:
        """Milliseconds that the GPU takes for each of REPEATS runs."""
        addresses, _ = self.place(plan, inputs)
        start, stop = (self._make("cuEventCreate", ctypes.c_uint(0)) for _ in range(2))
        took = []
        for index in range(WARM_UP + REPEATS):
            self._do("cuEventRecord", start, self._stream)
            plan.enqueue(addresses, self._stream.value or 0)
            self._do("cuEventRecord", stop, self._stream)
            self._do("cuStreamSynchronize", self._stream)
            elapsed = ctypes.c_float()
            self._do("cuEventElapsedTime", ctypes.byref(elapsed), start, stop)
            if index >= WARM_UP:
                took.append(elapsed.value)
        return took


def tell(line: str) -> None:
    """To whoever started this, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """One verb on the folders that are given."""
    parser = argparse.ArgumentParser(description="Prove TensorRT plans where there is no torch.")
    parser.add_argument("verb", choices=("prepare", "build", "run"))
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--level", type=int, default=1, help="how many kernels are tried, 0..5")
    given = parser.parse_args()
    if given.verb == "prepare":
        prepare(given.folders[0])
    elif given.verb == "build":
        build(given.folders[0], given.level)
    else:
        memory = Memory()
        for folder in given.folders:
            tell(json.dumps(run(folder, memory)))


if __name__ == "__main__":
    main()
