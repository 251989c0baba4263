"""An engine that computes something else is not kept, and the message says which tensor."""

import numpy as np
import pytest
import torch

from ensemble.components import components
from ensemble.config import TINY
from export import real_inputs as real
from export.checkpoints import Checkpoint
from export.gate import GateError, mask_iou, matched, pass_gate
from export.models import MODULES
from export.real_inputs import PICTURES, real_inputs
from export.runners import TorchGraph
from tests.test_checkpoints import sam2_file, write_original


class Bent:
    """A graph whose output `name` is changed."""

    def __init__(self, graph, name, change):
        self.graph, self.name, self.change = graph, name, change

    def run(self, inputs):
        outputs = self.graph.run(inputs)
        return outputs | {self.name: self.change(outputs[self.name])}


@pytest.fixture(scope="module")
def module(tiny):
    return tiny.build("memory_attention")


def bent(module, change):
    return Bent(TorchGraph(module, "memory_attention"), "conditioned_embeddings", change)


def test_same_graph_passes_with_no_error(module):
    figures = pass_gate(TorchGraph(module, "memory_attention"), module, "memory_attention", "float32")
    assert figures == {"conditioned_embeddings": {"error": 0, "cosine": pytest.approx(1), "p99_error": 0}}


@pytest.mark.parametrize(
    ("change", "figure"),
    [
        (lambda array: array + 0.1 * np.abs(array).max(), "error 0.1"),
        (lambda array: np.where(np.arange(array.size).reshape(array.shape) == 7, np.nan, array), "error inf"),
        (lambda array: array[:, :-1], "error inf"),
    ],
    ids=["shifted", "not a number", "misshapen"],
)
def test_other_values_are_refused_in_float32(module, change, figure):
    with pytest.raises(GateError, match=rf"memory_attention\.conditioned_embeddings in float32: got {figure}"):
        pass_gate(bent(module, change), module, "memory_attention", "float32")


def test_half_precision_may_round_but_not_turn(module):
    rounded = bent(module, lambda array: torch.from_numpy(array).bfloat16().float().numpy())
    assert pass_gate(rounded, module, "memory_attention", "bfloat16")["conditioned_embeddings"]["error"] > 1e-4
    with pytest.raises(GateError, match="float32"):
        pass_gate(rounded, module, "memory_attention", "float32")
    noise = np.random.default_rng(0).standard_normal
    with pytest.raises(GateError, match=r"in bfloat16: got cosine 0\.9"):
        pass_gate(bent(module, lambda array: array + 0.3 * noise(array.shape)), module, "memory_attention", "bfloat16")


def test_proposals_may_change_places_in_half_precision_but_not_get_lost(tiny):
    module = tiny.build("proposal_detector")
    assert components(TINY)["proposal_detector"].ranked
    graph = TorchGraph(module, "proposal_detector")
    order = np.random.default_rng(0).permutation(TINY.proposer.queries)
    assert pass_gate(Bent(graph, "query_boxes", lambda boxes: boxes[order]), module, "proposal_detector", "float16")
    with pytest.raises(GateError, match="query_boxes in float16: got matched"):
        pass_gate(Bent(graph, "query_boxes", lambda boxes: boxes + 5), module, "proposal_detector", "float16")
    with pytest.raises(GateError, match="query_boxes in float32"):
        pass_gate(Bent(graph, "query_boxes", lambda boxes: boxes[order]), module, "proposal_detector", "float32")


def test_boxes_are_matched_wherever_they_stand():
    boxes = np.float32([[0, 0, 1, 1], [0.5, 0.5, 0.7, 0.7], [0.2, 0.2, 0.3, 0.3]])
    assert matched(boxes[::-1], boxes) == 1
    assert matched(boxes[:2], boxes) == pytest.approx(2 / 3)


@pytest.mark.parametrize("component", MODULES)
def test_every_graph_that_sees_a_frame_is_run_on_real_ones(tiny, component):
    given = real_inputs(tiny, component)
    assert bool(given) == (component not in ("token_embedder", "language_decoder", "prompt_projector"))
    for inputs in given:
        components(TINY)[component].check_inputs(inputs)


def test_tracked_frames_remember_those_before_them(tiny):
    assert [len(inputs["memory_rows"][0]) for inputs in real_inputs(tiny, "memory_attention")] == [1, 2]
    assert [inputs["has_memory"].all() for inputs in real_inputs(tiny, "mask_decoder")] == [False, True, True]


def test_sam2_alone_is_run_on_real_frames_too(tmp_path):
    write_original(tmp_path / "original")
    sam2_file(tmp_path / "original", tmp_path / "sam2_hiera_large.pt")
    checkpoint = Checkpoint(tmp_path / "sam2_hiera_large.pt")
    assert checkpoint.scope == "tracking"
    assert all(real_inputs(checkpoint, component) for component in checkpoint.components)


def test_pictures_are_light():
    assert len(PICTURES) == 3
    assert sum(path.stat().st_size for path in PICTURES) < 60_000


def test_cpu_computes_no_features_with_a_large_frame_encoder(tiny, monkeypatch):
    monkeypatch.setattr(real, "SMALL", 0)
    monkeypatch.setattr(real, "torch_device", lambda: "cpu")
    assert not real_inputs(tiny, "mask_decoder")
    assert real_inputs(tiny, "frame_encoder")


def test_other_masks_are_refused_on_real_frames(tiny):
    module = tiny.build("mask_decoder")
    graph, given = TorchGraph(module, "mask_decoder"), real_inputs(tiny, "mask_decoder")
    assert pass_gate(graph, module, "mask_decoder", "float32", given)["mask_logits"]["mask_iou"] == 1
    flat = Bent(graph, "mask_logits", lambda logits: np.where(abs(logits) < 0.01 * abs(logits).max(), -logits, logits))
    assert "mask_iou" not in pass_gate(flat, module, "mask_decoder", "float16")["mask_logits"]
    with pytest.raises(GateError, match=r"mask_decoder\.mask_logits in float16: got mask_iou 0\.\d+ .* at least 0\.99"):
        pass_gate(flat, module, "mask_decoder", "float16", given)


def test_mask_iou_is_that_of_the_worst_object():
    logits = np.float32([[[1, 1], [-1, -1]], [[-1, -1], [-1, -1]]])
    assert mask_iou(logits, logits) == 1
    assert mask_iou(logits, -logits) == 0
    assert mask_iou(np.float32([[[1, -1], [-1, -1]], [[-1, -1], [-1, -1]]]), logits) == 0.5
    assert mask_iou(logits[:1], logits) == 0
