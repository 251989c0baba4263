"""What of TensorRT there is without a GPU: profiles, the graph that release 8.6 reads, configurations, what is said without it."""

import shutil

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from sparrow_client import Prompt, SparrowClient
from tritonclient.grpc import model_config_pb2

from ensemble.components import components
from ensemble.config import TINY
from export import proof, to_tensorrt
from export.models import graph_class
from export.runners import Engine, OnnxGraph
from export.seeded import draw_frame
from export.serve import Ports, Server, ServerError
from export.to_onnx import lower, onnx_from_torch
from export.to_repository import SOURCE, repository_from_checkpoint, write_configs
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


STAND_IN = """
from ensemble.backend import Model, read_inputs, to_response
from export.runners import open_graphs


class TritonPythonModel(Model):
    def initialize(self, args):
        super().initialize(args)
        (self.graph,) = open_graphs(self.settings, self.folder, ["frame_encoder"], self.config).values()

    def execute(self, requests):
        return [to_response({name: array[:, None] for name, array in self.graph.run(read_inputs(own)).items()}) for own in requests]
"""
"""What answers for a plan where there is no backend for it: the ONNX graph, with the shapes that Triton gives a plan's outputs."""


@pytest.mark.serving
def test_ensemble_around_a_plan_gives_the_masks_of_one_process(server, repository, tmp_path):
    native = tmp_path / "native"
    shutil.copytree(repository, native)
    write_configs(TINY, tmp_path / "configs", Engine("tensorrt"))
    for name in ("sparrow_track", "frame_features", "frame_preprocessor", "frame_encoder"):
        (native / name / "1").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tmp_path / "configs" / name / "config.pbtxt", native / name / "config.pbtxt")
    for file in (native / "frame_features" / "1").iterdir():
        shutil.move(file, native / "frame_encoder" / "1")
    (native / "frame_encoder" / "1" / "model.py").write_text(STAND_IN)
    shutil.copyfile(SOURCE / "frame_preprocessor" / "1" / "model.py", native / "frame_preprocessor" / "1" / "model.py")
    shutil.copyfile(native / "tracker" / "1" / "config.json", native / "frame_preprocessor" / "1" / "config.json")
    path = native / "frame_encoder" / "config.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    config.platform, config.backend, config.default_model_filename = "", "python", ""
    config.instance_group[0].kind = model_config_pb2.ModelInstanceGroup.Kind.KIND_CPU
    config.parameters["engine_kind"].string_value = "onnx"
    path.write_text(text_format.MessageToString(config))
    with Server(native, Ports(0, 0, 0)) as other:
        for one, two in zip(*(masks_through(own.url) for own in (server, other)), strict=True):
            np.testing.assert_array_equal(one, two)


def masks_through(url):
    """Of a question about a clip, and of a session."""
    frames = [draw_frame(index / 5, 60, 80) for index in range(5)]
    with SparrowClient(url, timeout_s=60) as client:
        yield from (frame.masks for frame in client.segment(np.stack(frames), "Please segment the moving shape in this video.").frames)
        with client.track([Prompt(0, boxes=[0.2, 0.3, 0.6, 0.8])], in_flight=0) as session:
            yield from (session.push(frame)[0].masks for frame in frames)


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
