"""Runs a TensorRT plan on memory that somebody else holds; `TensorRtGraph` holds it in torch."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble.components import components
from ensemble.config import ModelConfig

from .runners import TensorGraph
from .to_tensorrt import TensorRtError, logger, said

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


class Plan:
    """A plan with what it takes to run it once at a time.

    Args:
        path: .plan file, of this machine's GPU and TensorRT.
    Raises:
        TensorRtError: it is of another one, or there is too little memory for its largest shapes.
    """

    def __init__(self, path: Path) -> None:
        import tensorrt as trt

        self._runtime = trt.Runtime(logger())
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        self._context = engine and engine.create_execution_context()
        if self._context is None:
            raise TensorRtError(f"{path}: TensorRT {trt.__version__} cannot run it:\n{said()}\nBuild it anew on this machine.")
        self._engine = engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.dtypes: dict[str, str] = {name: trt.nptype(engine.get_tensor_dtype(name)).__name__.rstrip("_") for name in names}
        """Of inputs and outputs, as NumPy and torch name them; TensorRT 8.6 has int32 where the contract has int64."""
        self.outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]

    def shapes(self, inputs: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
        """Takes the shapes of the inputs; returns those of the outputs.

        Raises:
            TensorRtError: the plan was not built for such a shape.
        """
        for name, shape in inputs.items():
            if not self._context.set_input_shape(name, tuple(shape)):
                least, _, largest = (tuple(bound) for bound in self._engine.get_tensor_profile_shape(name, 0))
                raise TensorRtError(f"{name}: got {tuple(shape)}, expected {least} to {largest}. Build the plan with wider bounds.")
        return {name: tuple(self._context.get_tensor_shape(name)) for name in self.outputs}

    def enqueue(self, addresses: Mapping[str, int], stream: int) -> None:
        """Runs at the shapes that were taken last, on a CUDA stream; addresses are those of every input and output."""
        for name, address in addresses.items():
            self._context.set_tensor_address(name, address)
        if not self._context.execute_async_v3(stream):
            raise TensorRtError(f"TensorRT failed to run:\n{said()}")


class TensorRtGraph(TensorGraph):
    """A component that TensorRT has compiled for this machine's GPU.

    Args:
        path: .plan file.
        component: its name.
        config: sizes.
    """

    def __init__(self, path: Path, component: str, config: ModelConfig) -> None:
        import torch

        plan, turn = Plan(path), threading.Lock()
        contract = components(config)[component]

        def call(*tensors: Tensor) -> list[Tensor]:
            given = {
                spec.name: tensor.to(getattr(torch, plan.dtypes[spec.name])).contiguous()
                for spec, tensor in zip(contract.inputs, tensors, strict=True)
            }
            with turn:
                shapes = plan.shapes({name: tensor.shape for name, tensor in given.items()})
                made = {name: torch.empty(shape, dtype=getattr(torch, plan.dtypes[name]), device="cuda") for name, shape in shapes.items()}
                addresses = {name: tensor.data_ptr() for name, tensor in (given | made).items()}
                plan.enqueue(addresses, torch.cuda.current_stream().cuda_stream)
            return [made[spec.name] for spec in contract.outputs]

        super().__init__(contract, call)
