"""CUDA graphs: a call whose shapes come again is replayed as one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .models.layers import Call

MAX_SHAPES = 128
"""Graphs that one call keeps, of the shapes that it was last given."""

IDLE_CACHE_BYTES = 64 << 20
"""GPU memory that a process keeps for its next request beyond what it holds: every model is a process, and they share the GPU."""

EARLY = "_early"
"""In the name of a kernel that may begin before the one before it has ended: it waits by itself (models/decode_kernels.py)."""

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Capture:
    """One launch, where it reads its inputs and where it leaves its results."""

    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    results: Sequence[Tensor]


class Captured:
    """A function of tensors on the GPU, captured the second time that its inputs have the same shapes: the first call has readied kernels.

    The graphs of a process share one pool of memory, and those of a call share the places of their inputs and results. So results are
    copied out before anything else is replayed: calls of all threads take turns in what they launch, not in waiting for it.

    Args:
        call: takes tensors and returns one or several; asks the device for nothing while it runs.
    """

    pool_bytes: ClassVar[int] = 0
    """What the graphs of this process hold while nothing runs."""
    _turn: ClassVar[Lock] = Lock()
    _pool: ClassVar[Any] = None

    def __init__(self, call: Call) -> None:
        self._call = call
        self._known: dict[Shapes, Capture | Sequence[Tensor]] = {}
        """What was captured, or before that the shapes of its results. The shape that was called longest ago comes first."""
        self._places: dict[str, Tensor] = {}

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        import torch

        from .models.layers import several

        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        with self._turn, torch.inference_mode():
            capture = self._known.pop(shapes, None)
            if capture is None:
                results = several(self._call(*inputs))
                self._known[shapes] = [tensor.to("meta") for tensor in results]
                if len(self._known) > MAX_SHAPES:
                    del self._known[next(iter(self._known))]
                self.trim()
                return results
            if not isinstance(capture, Capture):
                capture = self._capture(inputs, capture)
            self._known[shapes] = capture
            for place, tensor in zip(capture.inputs, inputs, strict=True):
                place.copy_(tensor)
            capture.graph.replay()
            return [result.clone() for result in capture.results]

    @classmethod
    def trim(cls) -> None:
        """Gives back what calls that were not captured have left, where that is much."""
        import torch

        if torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - cls.pool_bytes > IDLE_CACHE_BYTES:
            torch.cuda.empty_cache()

    def _capture(self, inputs: Sequence[Tensor], shapes: Sequence[Tensor]) -> Capture:
        import torch

        from .models.layers import several

        if Captured._pool is None:
            Captured._pool = torch.cuda.CUDAGraph()
            with torch.cuda.graph(Captured._pool):  # lives as long as the process: a pool ends with its last graph
                torch.zeros(1, device="cuda")
        places = [self._place(f"input {index}", tensor) for index, tensor in enumerate(inputs)]  # filled by whoever replays
        results = [self._place(f"result {index}", tensor) for index, tensor in enumerate(shapes)]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # as capturing does: what is idle behind it is the pool's
        idle, graph = torch.cuda.memory_reserved() - torch.cuda.memory_allocated(), torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, pool=Captured._pool.pool(), capture_error_mode="thread_local"):
            for result, tensor in zip(results, several(self._call(*places)), strict=True):
                result.copy_(tensor)
        begin_early(graph.raw_cuda_graph())
        graph.instantiate()
        Captured.pool_bytes += torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - idle
        return Capture(graph, places, results)

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        """Where an input like a tensor is read from, or a result left: one piece of memory for all shapes, of twice the size when it gets
        too small.
        """
        import torch

        size, had = tensor.numel() * tensor.itemsize, self._places[name].numel() if name in self._places else 0
        if had < size:
            self._places[name] = torch.empty(max(size, 2 * had), dtype=torch.uint8, device="cuda")
        return self._places[name][:size].view(tensor.dtype).view(tensor.shape)


def begin_early(graph: int) -> None:
    """Lets the kernels with EARLY in their names begin once every program of the kernel before them has begun, as a programmatic dependent
    launch does: AOTInductor of torch 2.11 has no such launches, but what it has captured can be given their dependencies.

    Args:
        graph: address of a cudaGraph_t that is not instantiated yet.
    """
    from cuda.bindings import driver

    own, plain = driver.CUgraph(graph), driver.CUgraphEdgeData()
    programmatic = driver.CUgraphEdgeData()
    programmatic.type = driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC.value
    programmatic.from_port = driver.CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
    *_, count = done(driver.cuGraphGetEdges(own))
    sources, targets, *_ = done(driver.cuGraphGetEdges(own, count))
    for source, target in zip(sources, targets, strict=True):
        if EARLY in kernel_name(target) and kernel_name(source):
            done(driver.cuGraphRemoveDependencies(own, [source], [target], [plain], 1))
            done(driver.cuGraphAddDependencies(own, [source], [target], [programmatic], 1))


def kernel_name(node: Any) -> str:
    """Of a node of a CUDA graph; empty for what is no kernel."""
    from cuda.bindings import driver

    (kind,) = done(driver.cuGraphNodeGetType(node))
    if kind != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
        return ""
    (parameters,) = done(driver.cuGraphKernelNodeGetParams(node))
    (name,) = done(driver.cuFuncGetName(parameters.func) if int(parameters.func) else driver.cuKernelGetName(parameters.kern))
    return str(name.decode())


def done(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of the driver returned behind its status; raises RuntimeError where that is none of success."""
    status, *values = result
    if status.value:
        raise RuntimeError(
            f"CUDA graph: got {status.name} from the driver, expected CUDA_SUCCESS. Check that driver and torch fit together."
        )
    return tuple(values)
