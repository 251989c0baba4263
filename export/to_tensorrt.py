"""ONNX graph to a TensorRT plan, for this machine's GPU: python -m export.to_tensorrt GRAPH.onnx -o PLAN --preset nano

Needs TensorRT 8.6 or later and, for what is here, neither torch nor onnx. From release 10 on a network is strongly typed: every operator
is computed in the type that the graph gives it. Before, the precision allows TensorRT to take half precision wherever it likes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble.components import components
from ensemble.config import PRESETS
from ensemble.tensors import Component, Dim

from .machine import gpus

if TYPE_CHECKING:
    from .models.layers import Graph as Module

CACHE = Path.home() / ".cache" / "sparrow"
"""Where timings are kept."""
STRONGLY_TYPED_SINCE = 10
GIB = 1 << 30

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]
"""Input to its least, usual and largest shape."""


class TensorRtError(Exception):
    """TensorRT does not take a graph, or cannot run a plan; the message says what it said and what to do."""


@dataclass(frozen=True)
class Building:
    """How a plan is built.

    Args:
        level: how many kernels are tried, 0 (fewest) to 5.
        workspace_gib: GPU memory that a kernel may take for itself.
        auxiliary_streams: on which kernels run beside each other; None: as TensorRT likes.
        tf32: whether products of float32 may be computed with 10 bits of mantissa.
        libraries: whether kernels of cuBLAS and cuDNN are tried.
        at_most: name of a varying size to the largest that the plan shall take, where that is less than the contract's: a plan holds
            the memory of its largest shapes from the start.
    """

    level: int = 3
    workspace_gib: float = 8
    auxiliary_streams: int | None = None
    tf32: bool = True
    libraries: bool = True
    at_most: Mapping[str, int] | None = None


def plan_from_onnx(graph: Path, path: Path, contract: Component, precision: str, building: Building | None = None) -> None:
    """Builds a plan.

    Args:
        graph: .onnx file of the component, as `export.to_onnx` writes it.
        path: .plan file to write.
        contract: of the component.
        precision: of its products.
        building: how.
    Raises:
        TensorRtError: TensorRT does not take the graph; the message holds all that it said.
    """
    import tensorrt as trt

    building = building or Building()
    builder = trt.Builder(logger())
    network = builder.create_network(network_flags())
    parser = trt.OnnxParser(network, logger())
    if not parser.parse_from_file(str(graph)):
        errors = "\n".join(f"  node {error.node()}: {error.desc()}" for error in map(parser.get_error, range(parser.num_errors)))
        raise TensorRtError(
            f"{contract.name}: TensorRT {trt.__version__} cannot read {graph}:\n{errors}\n{said()}\nChoose another engine kind."
        )
    config = builder.create_builder_config()
    configure(config, precision, building)
    shapes = builder.create_optimization_profile()
    for name, (least, usual, largest) in profile(contract, building.at_most or {}).items():
        shapes.set_shape(name, least, usual, largest)
    config.add_optimization_profile(shapes)

    timings = timing_file()
    config.set_timing_cache(config.create_timing_cache(timings.read_bytes() if timings.exists() else b""), ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise TensorRtError(
            f"{contract.name}: TensorRT {trt.__version__} built no plan of {graph} in {precision}:\n{said()}\n"
            "Choose another precision or engine kind."
        )
    write(path, plan)
    timings.parent.mkdir(parents=True, exist_ok=True)
    write(timings, config.get_timing_cache().serialize())


def require() -> None:
    """Raises TensorRtError where this machine cannot build or run plans."""
    missing = [] if gpus() else ["an NVIDIA GPU"]
    missing += [] if find_spec("tensorrt") else ["the package tensorrt"]
    if missing:
        raise TensorRtError(f"engine tensorrt: this machine lacks {' and '.join(missing)}. Export in its container, or take another kind.")


def network_flags() -> int:
    """Strongly typed where there is that; batches are explicit, which later releases take for granted."""
    import tensorrt as trt

    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED if strongly_typed() else flags.EXPLICIT_BATCH)


def strongly_typed() -> bool:
    import tensorrt as trt

    return int(trt.__version__.split(".")[0]) >= STRONGLY_TYPED_SINCE


def configure(config: Any, precision: str, building: Building) -> None:
    """Options and, on releases before strong typing, the precision."""
    import tensorrt as trt

    config.builder_optimization_level = building.level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(building.workspace_gib * GIB))
    if building.auxiliary_streams is not None:
        config.max_aux_streams = building.auxiliary_streams
    if not building.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if not building.libraries:
        own = trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS
        config.set_tactic_sources(sum(1 << int(source) for source in own))
    if precision != "float32" and not strongly_typed():
        if precision != "float16":
            raise TensorRtError(f"TensorRT {trt.__version__}: got precision {precision}, expected float32 or float16. Or take release 10.")
        config.set_flag(trt.BuilderFlag.FP16)


def profile(contract: Component, at_most: Mapping[str, int]) -> Profile:
    """The shapes of every input whose size varies."""

    def shape(sizes: tuple[int | Dim, ...], of: str) -> Shape:
        return tuple(min(getattr(size, of), at_most.get(size.name, size.max)) if isinstance(size, Dim) else size for size in sizes)

    varying = [spec for spec in contract.inputs if -1 in spec.dims()]
    return {spec.name: (shape(spec.shape, "min"), shape(spec.shape, "opt"), shape(spec.shape, "max")) for spec in varying}


def timing_file() -> Path:
    """What kernels took on such a GPU with this release: a second build of much the same tries them no more."""
    import tensorrt as trt

    (_, _, _, capability), *_ = (*gpus(), ["", "", "", "none"])
    return CACHE / f"tensorrt-{trt.__version__}-sm_{capability.replace('.', '')}.timings"


def write(path: Path, content: Any) -> None:
    """Writes a file that other processes never see in part."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)


@lru_cache(maxsize=1)
def logger() -> Any:
    """The one logger of this process, which keeps the last errors: TensorRT goes on using the first that it was given."""
    import tensorrt as trt

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=40)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)

    trt.init_libnvinfer_plugins(made := Logger(), "")
    return made


def said() -> str:
    """The errors that TensorRT has reported since this was asked last."""
    lines = "\n".join(f"  {line}" for line in logger().errors)
    logger().errors.clear()
    return lines or "  (it said nothing)"


def plan_from_torch(module: Module, component: str, path: Path, precision: str) -> None:
    """Builds a plan of a torch module, by way of ONNX.

    Args:
        module: in eval mode, with its weights as they shall be kept.
        component: its name.
        path: .plan file to write.
        precision: of its products.
    """
    from .to_onnx import lower, onnx_from_torch

    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / f"{component}.onnx"
        onnx_from_torch(module, component, graph, precision)
        if not strongly_typed():
            lower(graph)
        plan_from_onnx(graph, path, components(module.config)[component], precision)


def main() -> None:
    """Builds one plan."""
    parser = argparse.ArgumentParser(description="Build a TensorRT plan of COMPONENT from its ONNX graph.")
    parser.add_argument("component")
    parser.add_argument("graph", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="full", help="sizes of the model")
    parser.add_argument("--precision", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--level", type=int, default=Building.level, help="how many kernels are tried, 0..5")
    parser.add_argument("--workspace-gib", type=float, default=Building.workspace_gib)
    parser.add_argument("--auxiliary-streams", type=int)
    parser.add_argument("--no-tf32", dest="tf32", action="store_false")
    parser.add_argument("--no-libraries", dest="libraries", action="store_false", help="without the kernels of cuBLAS and cuDNN")
    parser.add_argument("--at-most", nargs="*", default=[], metavar="NAME=SIZE", help="narrower bounds of varying sizes")
    given = vars(parser.parse_args())
    at_most = {name: int(size) for name, size in (entry.split("=") for entry in given.pop("at_most"))}
    contract = components(PRESETS[given.pop("preset")])[given.pop("component")]
    graph, path, precision = given.pop("graph"), given.pop("out"), given.pop("precision")
    plan_from_onnx(graph, path, contract, precision, Building(**given, at_most=at_most))


if __name__ == "__main__":
    main()
