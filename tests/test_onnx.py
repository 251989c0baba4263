"""Torch modules against the ONNX graphs that the exporter wrote, at the ends and in the middle of every dynamic size."""

import numpy as np
import onnx
import pytest

from ensemble.components import components
from ensemble.config import TINY
from ensemble.graph import parts
from ensemble.tensors import Dim
from export.gate import pass_gate
from export.models import MODULES
from export.runners import OnnxGraph, TorchGraph, as_stored
from export.to_onnx import check_graph, onnx_from_torch

CONTRACTS = components(TINY)
SIZES = {
    "least": {"tokens": 1, "slots": 5, "prompts": 1, "proposals": 1, "memories": 1, "pointers": 1},
    "some": {"images": 3, "frames": 2, "tokens": 7, "sequences": 2, "slots": 40, "states": 2, "embeddings": 3, "objects": 3, "prompts": 3,
             "proposals": 7, "memories": 4, "pointers": 9},
    "many": {"images": 5, "frames": 5, "tokens": 50, "sequences": 3, "slots": 90, "states": 5, "embeddings": 6, "objects": 7, "prompts": 9,
             "proposals": 300, "memories": 7, "pointers": 16},
}  # fmt: skip


def inputs(component, sizes):
    contract = CONTRACTS[component]
    dims = {size.name for spec in contract.inputs for size in spec.shape if isinstance(size, Dim)}
    arrays = contract.sample(seed=1, **{name: size for name, size in sizes.items() if name in dims})
    if "positions" in arrays:  # in a cache every token has a slot of its own
        rows, tokens = arrays["positions"].shape
        arrays["positions"] = np.arange(3, 3 + tokens) + np.arange(rows)[:, None]
    return arrays


@pytest.fixture(scope="module", params=list(MODULES))
def component(request):
    return request.param


@pytest.fixture(scope="module")
def graphs(component, tiny, repository, tmp_path_factory):
    module = tiny.build(component)
    path = next(repository.glob(f"*/1/{component}.onnx"), None)
    if path is None:  # served in torch, but exported all the same
        path = tmp_path_factory.mktemp("onnx") / f"{component}.onnx"
        onnx_from_torch(module, component, path)
    return TorchGraph(module, component), OnnxGraph(path)


@pytest.mark.parametrize("sizes", SIZES)
def test_onnx_graph_equals_torch_module(component, graphs, sizes):
    torch_graph, onnx_graph = graphs
    contract, arrays = CONTRACTS[component], inputs(component, SIZES[sizes])
    contract.check_inputs(arrays)
    expected, got = torch_graph.run(arrays), onnx_graph.run(arrays)
    assert list(got) == [spec.name for spec in contract.outputs]
    for name, array in expected.items():
        assert contract.tolerance.error(got[name], array) <= contract.tolerance.max_error, name


def test_half_precision_is_in_the_graph_with_norms_and_softmax_in_float32(component, tiny, tmp_path):
    module, path = tiny.build(component), tmp_path / f"{component}.onnx"
    onnx_from_torch(as_stored(module, component, "float16"), component, path, "float16")
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    assert {tensor.data_type for tensor in weights.values() if tensor.data_type != onnx.TensorProto.INT64} >= {onnx.TensorProto.FLOAT16}
    for node in graph.node:
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT, node.name
        if node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT16, node.name
    assert all(types[value.name] == onnx.TensorProto.FLOAT for value in graph.output)
    pass_gate(OnnxGraph(path), module, component, "float16")


def test_every_component_with_a_contract_has_a_module():
    assert list(MODULES) == [name for name, contract in CONTRACTS.items() if contract.is_graph]
    assert [part.name for part in parts(CONTRACTS, "language_model")] == ["token_embedder", "language_decoder", "prompt_projector"]


def test_check_graph_refuses_a_graph_of_another_contract(repository):
    graph = onnx.load(repository / "tracker" / "1" / "memory_encoder.onnx")
    check_graph(graph, CONTRACTS["memory_encoder"])
    graph.graph.input[2].name = "masks"
    with pytest.raises(ValueError, match=r"memory_encoder: the exported input is masks .*, expected mask_logits"):
        check_graph(graph, CONTRACTS["memory_encoder"])
