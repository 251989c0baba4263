"""Torch module to ONNX graph, with names and axes from the contract."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ensemble.components import components
from ensemble.tensors import Component

if TYPE_CHECKING:
    from torch import Tensor

    from .models.layers import Graph

OPSETS = {"float32": 18, "float16": 18, "bfloat16": 22}
"""Precision to version of ONNX; the first in which a convolution may be bfloat16 is 22."""
SINCE_18 = {
    "ReduceMax": ("noop_with_empty_axes",),
    "ReduceMean": ("noop_with_empty_axes",),
    "Resize": ("antialias", "keep_aspect_ratio_policy"),
    "Split": ("num_outputs",),
}
"""Operator to attributes that opset 17 does not have; here they only say what it does anyway."""
EXTERNAL_DATA_BYTES = 1 << 30
"""Weights beyond this go to a file beside the graph: a protobuf ends at 2 GiB."""


def onnx_from_torch(module: Graph, component: str, path: Path, precision: str = "float32") -> None:
    """Exports a component and checks that the graph's inputs and outputs are the contract's.

    Args:
        module: in eval mode, with its weights as they shall be kept.
        component: its name.
        path: .onnx file to write.
        precision: of products, as eager torch has it under autocast; inputs and outputs stay float32.
    Raises:
        ValueError: the graph differs from the contract.
    """
    import onnx
    import torch

    from .models.roi_align import onnx_translations
    from .onnx_operators import translations

    dtype = getattr(torch, precision)
    half = dtype != torch.float32
    contract = components(module.config)[component]
    sample = {name: torch.from_numpy(array) for name, array in contract.sample(seed=0, **export_sizes(contract)).items()}
    hook = module.register_forward_hook(lambda module, inputs, outputs: as_float32(outputs))
    with warnings.catch_warnings(), torch.no_grad(), torch.autocast("cpu", dtype, enabled=half):
        warnings.simplefilter("ignore")
        for package in ("torch.onnx", "onnxscript"):
            logging.getLogger(package).setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            tuple(sample.values()),
            dynamo=True,
            dynamic_shapes=dict(contract.dynamic_axes()),
            input_names=list(sample),
            output_names=[spec.name for spec in contract.outputs],
            opset_version=OPSETS[precision],
            custom_translation_table=onnx_translations() | translations(half),
            verbose=False,
        )
    hook.remove()
    assert program is not None
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    program.save(path, external_data=size > EXTERNAL_DATA_BYTES)
    check_graph(onnx.load(path, load_external_data=False), contract)
    onnx.checker.check_model(path)


def lower(path: Path) -> None:
    """Rewrites a graph in place as TensorRT 8.6 reads it: opset 17, without bfloat16, and with pictures in float32.

    Values that were to be rounded to bfloat16 stay as they are. Of a Shape that release returns all dimensions, whatever the attributes ask
    for, so that a Slice takes those out; inputs in uint8 make its builder crash.
    """
    import onnx

    half, single, pixel = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    model = onnx.load(path, load_external_data=False)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        model.graph.node.append(node)
        bounds = {attribute.name: attribute.i for attribute in node.attribute} if node.op_type == "Shape" else {}
        if bounds:
            whole = model.graph.node[-1]
            (name,) = whole.output
            del whole.attribute[:]
            whole.output[0] = f"{name}_whole"
            edges = [np.array([bounds.get(edge, default)]) for edge, default in (("start", 0), ("end", np.iinfo(np.int64).max))]
            names = [f"{name}_start", f"{name}_end"]
            model.graph.initializer.extend(onnx.numpy_helper.from_array(edge, own) for edge, own in zip(edges, names, strict=True))
            model.graph.node.append(onnx.helper.make_node("Slice", [whole.output[0], *names], [name], f"{name}_slice"))
    for node in model.graph.node:
        if node.op_type in ("ReduceMax", "ReduceMean") and len(node.input) > 1:
            axes = onnx.numpy_helper.to_array(constants[node.input.pop()]).tolist()
            node.attribute.append(onnx.helper.make_attribute("axes", axes))
        for attribute in list(node.attribute):
            if attribute.name in SINCE_18.get(node.op_type, ()):
                node.attribute.remove(attribute)
            elif (node.op_type, attribute.name, attribute.i) == ("Cast", "to", half):
                attribute.i = single
    for value in (*model.graph.input, *model.graph.value_info):
        if value.type.tensor_type.elem_type in (half, pixel):
            value.type.tensor_type.elem_type = single
    (standard,) = (opset for opset in model.opset_import if not opset.domain)
    standard.version = 17
    model.ir_version = 8  # of the time of that opset
    onnx.save(model, path)
    onnx.checker.check_model(path)


def as_float32(outputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """What a module returns, as its contract has it."""
    return outputs.float() if not isinstance(outputs, tuple) else tuple(output.float() for output in outputs)


def export_sizes(contract: Component) -> dict[str, int]:
    """Sizes to trace at: torch.export specialises 0 and 1, so every Dim gets at least 2, and cached positions stay valid."""
    dims = contract.dims
    sizes = {name: min(max(2, dim.min), dim.max) for name, dim in dims.items()}
    # Distinct sizes keep the tracer from taking two Dims for one.
    return {name: min(size + index, dims[name].max) for index, (name, size) in enumerate(sizes.items())}


def check_graph(graph: object, contract: Component) -> None:
    """Raises ValueError when names, order or fixed sizes of the graph's inputs and outputs differ from the contract's."""
    for kind, specs in (("input", contract.inputs), ("output", contract.outputs)):
        values = getattr(graph.graph, kind)  # type: ignore[attr-defined]
        got = [(value.name, [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]) for value in values]
        expected = [(spec.name, list(spec.dims())) for spec in specs]
        for (name, dims), (expected_name, expected_dims) in zip(got, expected, strict=True):
            fits = name == expected_name and all(size in (-1, dim) for dim, size in zip(dims, expected_dims, strict=True))
            dynamic = all(isinstance(dim, str) for dim, size in zip(dims, expected_dims, strict=True) if size == -1)
            if not (fits and (dynamic or kind == "output")):
                raise ValueError(f"{contract.name}: the exported {kind} is {name} {dims}, expected {expected_name} {expected_dims}.")
