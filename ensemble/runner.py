"""How the algorithm reaches its components: the same code runs in one process and on Triton."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

import numpy as np

from .errors import SparrowError
from .tensors import Array, Arrays, Component

Parameters = Mapping[str, Any]

CLOSING: dict[str, Arrays] = {
    "language_model": {"num_tokens": np.zeros(1, np.int32)},
    "tracker": {"frame_size": np.zeros(2, np.int32)},
}
"""Inputs of a last request that only frees the sequence."""


@dataclass(frozen=True)
class SequenceRequest:
    """One request of a sequence to a component with state."""

    session_id: int
    inputs: Arrays
    start: bool = False
    end: bool = False
    cancelled: bool = False
    parameters: Parameters = field(default_factory=dict)


class Session:
    """An open sequence of a component with state.

    Args:
        component: a key of `CLOSING`.
        session_id: correlation id.
        parameters: sent with every request.
        send: delivers a request and returns its outputs, or raises SparrowError.
    """

    def __init__(self, component: str, session_id: int, parameters: Parameters, send: Callable[[SequenceRequest], Arrays]) -> None:
        self._component, self._id, self._parameters, self._send = component, session_id, parameters, send
        self.started = self._ended = False

    def step(self, inputs: Arrays, end: bool = False) -> Arrays:
        """The next request of the sequence; `end` frees its state afterwards."""
        request = SequenceRequest(self._id, inputs, not self.started, end, parameters=self._parameters)
        self.started, self._ended = True, end
        return self._send(request)

    def close(self) -> None:
        """Frees the state of a sequence that has not ended."""
        if self.started and not self._ended:
            self.step(CLOSING[self._component], end=True)


class Runner(Protocol):
    """Calls components by name."""

    @property
    def on_gpu(self) -> bool:
        """Whether components have a GPU, which works while the caller does something else."""

    def run(self, component: str, inputs: Arrays, on_device: bool = False) -> dict[str, Any]:
        """One call of a component without state; raises SparrowError.

        Args:
            component: its name.
            inputs: arrays, or what an earlier call has left on a device.
            on_device: leaves the outputs on the GPU that has computed them, for other components; else they are NumPy's.
        """

    def join(self, arrays: Sequence[Any]) -> Any:
        """[n1 + n2 + ..., ...] of outputs [n, ...] of several calls, where `run` has left them."""

    def session(self, component: str, parameters: Parameters) -> Session:
        """A new sequence of a component with state."""


@contextmanager
def open_session(runner: Runner, component: str, parameters: Parameters | None = None) -> Iterator[Session]:
    """A sequence that is closed whatever happens inside."""
    session = runner.session(component, parameters or {})
    try:
        yield session
    finally:
        session.close()


class Stateful(Protocol):
    """A component with state: one step serves the waiting requests of several sequences."""

    def step(self, requests: list[SequenceRequest]) -> list[Arrays | SparrowError]:
        """One result per request, in order; a bad request fails alone."""

    def expire(self) -> None:
        """Frees the sequences that were idle for too long; to be called now and then, since a vanished client sends nothing."""


class Graph(Protocol):
    """A loaded graph of any engine kind."""

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name."""


DeviceArray = Any
"""An array where a device keeps it: NumPy's or a torch tensor. Code for both only indexes it and hands it to graphs."""

Run = Callable[[str, dict[str, DeviceArray]], dict[str, DeviceArray]]
"""Calls a component by its name: inputs to outputs."""

Composition = Callable[[Run, Mapping[str, DeviceArray]], dict[str, DeviceArray]]
"""What several graphs do in turn: inputs to outputs. A GPU captures its second call of a shape, in which nothing can come from the host:
what it needs besides its inputs stays on the device from the first."""


class Device(Protocol):
    """Where graphs run and memories stay."""

    @property
    def on_gpu(self) -> bool:
        """Whether its arrays lie in the memory of a GPU."""

    def zeros(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """A new array; dtype is float32 or bfloat16."""

    def itemsize(self, dtype: str) -> int:
        """Bytes of a value as `zeros` stores it."""

    def put(self, array: DeviceArray) -> DeviceArray:
        """A NumPy array on the device; what is there already stays."""

    def stack(self, arrays: Sequence[DeviceArray]) -> DeviceArray:
        """[n, ...] float32 of n arrays, of NumPy's or on the device."""

    def join(self, arrays: Sequence[DeviceArray]) -> DeviceArray:
        """[n1 + n2 + ..., ...] of arrays [n, ...], of NumPy's or on the device."""

    def adopt(self, tensors: Mapping[str, Any]) -> dict[str, DeviceArray]:
        """Tensors of Triton's, as NumPy has them or copied from GPU to GPU; the copies have been made when this returns."""

    def wait(self) -> None:
        """Returns when all that was computed is there, for another process to read."""

    def trim(self) -> None:
        """Gives back memory that nothing holds, where that is much."""

    def where(self, condition: DeviceArray, array: DeviceArray, value: float) -> DeviceArray:
        """An array where a condition, which is broadcast, holds; a value elsewhere."""

    def run(self, graph: Graph, inputs: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        """`Graph.run` without leaving the device."""

    def compose(self, contract: Component, composition: Composition, graphs: Mapping[str, Graph]) -> Graph:
        """Several graphs as one, which a GPU launches at once."""

    def host(self, array: DeviceArray) -> Array:
        """NumPy; waits until it is computed."""

    def hosts(self, arrays: Mapping[str, DeviceArray]) -> Arrays:
        """Several as `host`, with one wait."""

    def fetch(self, arrays: Mapping[str, DeviceArray]) -> Callable[[], Arrays]:
        """Sends arrays to the host; what it returns waits until they are there, and for nothing that is launched later."""

    @contextmanager
    def timed(self) -> Iterator[Callable[[], float]]:
        """Yields what tells, once results are on the host, the seconds that the device was busy inside."""


class Host:
    """The device of graphs that take and return NumPy arrays."""

    on_gpu = False

    def zeros(self, shape: Sequence[int], dtype: str) -> Array:
        return np.zeros(shape, np.float32)  # NumPy has no bfloat16

    def itemsize(self, dtype: str) -> int:
        return np.dtype(np.float32).itemsize

    def put(self, array: Array) -> Array:
        return array

    def stack(self, arrays: Sequence[Array]) -> Array:
        return np.stack(arrays)

    def join(self, arrays: Sequence[Array]) -> Array:
        return np.concatenate(arrays)

    def adopt(self, tensors: Mapping[str, Any]) -> Arrays:
        return {name: tensor.as_numpy() for name, tensor in tensors.items()}

    def wait(self) -> None:
        pass

    def trim(self) -> None:
        pass

    def where(self, condition: Array, array: Array, value: float) -> Array:
        return np.where(condition, array, array.dtype.type(value))

    def run(self, graph: Graph, inputs: Mapping[str, Array]) -> Arrays:
        return graph.run(dict(inputs))

    def compose(self, contract: Component, composition: Composition, graphs: Mapping[str, Graph]) -> Graph:
        return Composed(composition, graphs)

    def host(self, array: Array) -> Array:
        return array

    def hosts(self, arrays: Mapping[str, Array]) -> Arrays:
        return dict(arrays)

    def fetch(self, arrays: Mapping[str, Array]) -> Callable[[], Arrays]:
        return lambda: dict(arrays)

    @contextmanager
    def timed(self) -> Iterator[Callable[[], float]]:
        start = stop = time.perf_counter()
        yield lambda: stop - start
        stop = time.perf_counter()


@dataclass(frozen=True)
class Composed:
    """Several graphs as one, called in turn; arguments as of `Device.compose`."""

    composition: Composition
    graphs: Mapping[str, Graph]

    def run(self, inputs: Arrays) -> Arrays:
        return self.composition(lambda component, own: self.graphs[component].run(own), inputs)


class LocalRunner:
    """Every component in this process.

    Args:
        graphs: component to loaded graph.
    """

    on_gpu = False

    def __init__(self, graphs: Mapping[str, Graph]) -> None:
        self.graphs = graphs
        self.stateful: dict[str, Stateful] = {}
        """Component to its server; filled by the caller, since these need a runner themselves."""
        self._ids = count(1)

    def run(self, component: str, inputs: Arrays, on_device: bool = False) -> Arrays:
        return self.graphs[component].run(inputs)

    def join(self, arrays: Sequence[Array]) -> Array:
        return np.concatenate(arrays)

    def session(self, component: str, parameters: Parameters) -> Session:
        def send(request: SequenceRequest) -> Arrays:
            (result,) = self.stateful[component].step([request])
            if isinstance(result, SparrowError):
                raise result
            return result

        return Session(component, next(self._ids), parameters, send)
