"""CUDA graphs: a call whose shapes come again is replayed as one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_SHAPES = 96
"""Graphs that one call keeps; shapes beyond run as they come."""


class Captured:
    """A function of tensors on the GPU, captured the second time that its inputs have the same shapes: the first call has readied kernels.

    The graphs of a process share one pool of memory, so that results are copied out before anything else is replayed: calls of all
    threads take turns in what they launch, not in waiting for it.

    Args:
        call: takes tensors and returns one or several; asks the device for nothing while it runs.
    """

    _turn: ClassVar[Lock] = Lock()
    _pool: ClassVar[Any] = None
    pool_bytes: ClassVar[int] = 0
    """What the graphs of this process hold while nothing runs."""

    def __init__(self, call: Callable[..., Tensor | Sequence[Tensor]]) -> None:
        self._call = call
        self._seen: set[tuple[tuple[int, ...], ...]] = set()
        self._graphs: dict[tuple[tuple[int, ...], ...], tuple[torch.cuda.CUDAGraph, Sequence[Tensor], Sequence[Tensor]]] = {}

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        import torch

        from .models.layers import several

        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        with self._turn, torch.inference_mode():
            if shapes not in self._seen:
                if len(self._seen) < MAX_SHAPES:
                    self._seen.add(shapes)
                return several(self._call(*inputs))
            if shapes not in self._graphs:
                self._graphs[shapes] = self._capture([tensor.clone() for tensor in inputs])
            graph, places, results = self._graphs[shapes]
            for place, tensor in zip(places, inputs, strict=True):
                place.copy_(tensor)
            graph.replay()
            return [result.clone() for result in results]

    def _capture(self, places: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor], Sequence[Tensor]]:
        import torch

        from .models.layers import several

        if Captured._pool is None:
            Captured._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=Captured._pool, capture_error_mode="thread_local"):
            results = several(self._call(*places))
        Captured.pool_bytes += torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - idle
        return graph, places, results
