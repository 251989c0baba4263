"""Torch module to an AOTInductor package: compiled for this machine, called without torch's Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ensemble.components import components
from ensemble.tensors import Component

from .to_onnx import export_sizes

if TYPE_CHECKING:
    from .models.layers import Graph


def aoti_from_torch(module: Graph, component: str, path: Path, precision: str, device: str) -> None:
    """Compiles a component.

    Args:
        module: in eval mode on the device, with its weights as they shall be kept.
        component: its name.
        path: .pt2 file to write.
        precision: of products, as eager torch has it under autocast.
        device: cpu or cuda.
    """
    import torch
    from torch._inductor import aoti_compile_and_package

    contract = components(module.config)[component]
    sample = contract.sample(seed=0, **export_sizes(contract))
    inputs = tuple(torch.from_numpy(array).to(device) for array in sample.values())
    dtype = getattr(torch, precision)
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes(contract))
        aoti_compile_and_package(program, package_path=str(path))


def dynamic_shapes(contract: Component) -> tuple[dict[int, object], ...]:
    """Of every input in order, axis to size, as `torch.export` takes them."""
    from torch.export import Dim as Size

    sizes = {name: Size(name, min=size.min, max=size.max) for name, size in contract.dims.items()}
    return tuple({axis: sizes[name] for axis, name in axes.items()} for axes in contract.dynamic_axes().values())
