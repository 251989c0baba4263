"""What of TensorRT there is without a GPU: profiles, the graph that release 8.6 reads, configurations, what is said without it."""

import shutil

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from ensemble.components import components
from ensemble.config import TINY
from export import proof, to_tensorrt
from export.models import graph_class
from export.runners import Engine, OnnxGraph
from export.serve import Ports, Server, ServerError
from export.to_onnx import lower, onnx_from_torch
from export.to_repository import repository_from_checkpoint, write_configs
from export.to_tensorrt import TensorRtError, profile

CONTRACTS = components(TINY)
PART = "prompt_projector"


def test_profile_has_every_input_that_varies_within_the_bounds():
    contract = CONTRACTS["memory_attention"]
    shapes = profile(contract, {"objects": 4})
    assert list(shapes) == [spec.name for spec in contract.inputs]
    assert shapes["memory_rows"] == ((1, 1), (1, 7), (4, 7))
    assert shapes["object_pointers"] == ((1, 1, TINY.sam2.width), (1, 16, TINY.sam2.width), (4, 16, TINY.sam2.width))
    assert profile(contract, {})["memory_rows"][2] == (16, 7)
    assert profile(contract, {"memories": 3})["memory_rows"] == ((1, 1), (1, 3), (16, 3))
    assert profile(CONTRACTS["proposal_detector"], {}) == {}


@pytest.mark.parametrize(
    ("model", "component"),
    [("frame_features", "frame_encoder"), ("tracker", "memory_encoder"), ("tracker", "mask_decoder"), ("sparrow", "proposal_selector")],
)
def test_lowered_graph_computes_the_same_in_opset_17_without_bfloat16(repository, tmp_path, model, component):
    written, lowered = repository / model / "1" / f"{component}.onnx", tmp_path / "lowered.onnx"
    shutil.copyfile(written, lowered)
    lower(lowered)
    graph = onnx.load(lowered)
    assert graph.opset_import[0].version == 17
    casts = [attribute.i for node in graph.graph.node if node.op_type == "Cast" for attribute in node.attribute]
    assert onnx.TensorProto.BFLOAT16 not in casts
    onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True)
    assert not any(node.attribute for node in graph.graph.node if node.op_type == "Shape")
    inputs, contract = CONTRACTS[component].sample(1), CONTRACTS[component]
    expected = OnnxGraph(written).run(inputs)
    inputs = {name: array.astype(np.float32) if array.dtype == np.uint8 else array for name, array in inputs.items()}
    got = OnnxGraph(lowered).run(inputs)
    for name, array in expected.items():
        assert contract.tolerance.error(got[name], array) <= contract.tolerance.max_error, name


def test_frame_encoder_is_served_by_the_backend_for_plans_and_the_rest_in_python(tmp_path):
    write_configs(TINY, tmp_path, Engine("tensorrt", "float16"))
    configs = {
        path.parent.name: text_format.Parse(path.read_text(), model_config_pb2.ModelConfig()) for path in tmp_path.glob("*/config.pbtxt")
    }
    encoder = configs["frame_encoder"]
    assert (encoder.platform, encoder.backend, encoder.default_model_filename) == ("tensorrt_plan", "", "frame_encoder.plan")
    pictures, sizes = CONTRACTS["frame_encoder"].inputs
    assert encoder.max_batch_size <= pictures.shape[0].max
    assert [(tensor.name, list(tensor.dims)) for tensor in encoder.input] == [
        (spec.name, list(spec.shape[1:])) for spec in (pictures, sizes)
    ]
    assert model_config_pb2.ModelInstanceGroup.Kind.Name(encoder.instance_group[0].kind) == "KIND_GPU"
    assert configs["tracker"].backend == "python"
    assert configs["tracker"].parameters["engine_kind"].string_value == "tensorrt"
    assert configs["language_model"].parameters["engine_kind"].string_value == "torch"


def test_server_without_the_backend_for_plans_says_where_they_run(tmp_path):
    write_configs(TINY, tmp_path, Engine("tensorrt"))
    with pytest.raises(ServerError, match=r"frame_encoder: it is a TensorRT plan, .* Run it in the container: .* docker compose up"):
        Server(tmp_path, Ports(0, 0, 0)).__enter__()


def test_export_without_tensorrt_says_what_is_missing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(to_tensorrt, "gpus", list)
    monkeypatch.setattr(to_tensorrt, "find_spec", lambda name: None)
    with pytest.raises(TensorRtError, match="this machine lacks an NVIDIA GPU and the package tensorrt"):
        repository_from_checkpoint(tiny, tmp_path / "repository", lambda made, anew: None, Engine("tensorrt"))
    assert not (tmp_path / "repository").exists()


def test_weights_that_a_graph_travels_without_are_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "LARGE", 1 << 12)
    module = graph_class(PART)(TINY).eval()
    module.load_state_dict({name: torch.from_numpy(proof.draw(name, tuple(tensor.shape))) for name, tensor in module.state_dict().items()})
    path = tmp_path / proof.GRAPH
    onnx_from_torch(module, PART, path)
    inputs, size = CONTRACTS[PART].sample(0), path.stat().st_size
    expected = OnnxGraph(path).run(inputs)
    weights = proof.take_out(path, module.state_dict())
    assert len(weights) == 2
    assert path.stat().st_size < size / 2
    (tmp_path / proof.WEIGHTS).unlink()
    case = proof.Case("tiny", PART, "float32", "", weights, {})
    proof.fill(tmp_path, case)
    got = OnnxGraph(path).run(inputs)
    assert all(np.array_equal(got[name], array) for name, array in expected.items())

    monkeypatch.setattr(proof, "draw", lambda name, shape: np.zeros(shape, np.float32))
    with pytest.raises(TensorRtError, match="draws other values than where the graph was prepared"):
        proof.fill(tmp_path, case)


def test_file_is_never_seen_in_part(tmp_path):
    to_tensorrt.write(tmp_path / "a.plan", np.arange(4, dtype=np.uint8).data)
    assert (tmp_path / "a.plan").read_bytes() == bytes(range(4))
    assert [path.name for path in tmp_path.iterdir()] == ["a.plan"]
