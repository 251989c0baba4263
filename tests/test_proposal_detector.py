import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr import modeling_deformable_detr as oracle

from ensemble import frames
from ensemble.components import components
from ensemble.config import TINY, ProposerConfig
from ensemble.selection import rank
from export.checkpoints import Checkpoint, CheckpointError, original_name
from export.models.proposal_detector import (
    DecoderLayer,
    DeformableAttention,
    EncoderLayer,
    ProposalDetector,
    inverse_sigmoid,
    sines,
    use_plugin,
)
from tests import goldens

TOLERANCE = 1e-4
"""Float32 summation order on values of order 1 to 10. Measured: 3e-6."""
GOLDEN_TOLERANCE = 1e-3
"""Relative to the largest value: two ranks turn rounding into other queries (goldens' README). Measured: 5e-6."""

PROPOSER = ProposerConfig(image_size=96, width=32, layers=3, heads=4, mlp_width=48, points=3, queries=20)
ORACLE = DeformableDetrConfig(
    d_model=PROPOSER.width,
    encoder_attention_heads=PROPOSER.heads,
    decoder_attention_heads=PROPOSER.heads,
    encoder_ffn_dim=PROPOSER.mlp_width,
    decoder_ffn_dim=PROPOSER.mlp_width,
    encoder_n_points=PROPOSER.points,
    decoder_n_points=PROPOSER.points,
    num_feature_levels=1,
    two_stage=True,
    with_box_refine=True,
    attn_implementation="eager",
)
CELLS = PROPOSER.grid**2
LEVEL = {
    "spatial_shapes": torch.tensor([[PROPOSER.grid, PROPOSER.grid]]),
    "spatial_shapes_list": [(PROPOSER.grid, PROPOSER.grid)],
    "level_start_index": torch.tensor([0]),
}
HEAD = re.compile(r"ddetr_transformer\.(?=bbox_embed|class_embed_)")


pytestmark = pytest.mark.usefixtures("inference")


def randomise(module):
    """Weights large enough for attention to be far from uniform and for samples to leave the map."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


@cache
def tiny_detector():
    """A detector of random weights at the sizes of PROPOSER, on the tiny trunk."""
    return randomise(ProposalDetector(replace(TINY, proposer=replace(PROPOSER, hiera=TINY.proposer.hiera))))


def with_weights(module, expected):
    """`module` with the weights of an oracle of today's transformers, whose names have changed since 4.41."""
    state = expected.state_dict()
    module.load_state_dict({name.replace("mlp.fc", "fc").replace("o_proj", "out_proj"): x for name, x in state.items()})
    return module.eval()


def some_boxes(queries):
    """[1, queries, 4] cxcywh; some reach beyond the image."""
    return torch.cat([torch.rand(1, queries, 2), torch.rand(1, queries, 2)], 2)


def cell_points():
    """[1, g * g, 1, 2]: the oracle's reference points of an encoder over one level."""
    return oracle.DeformableDetrEncoder.get_reference_points(LEVEL["spatial_shapes_list"], torch.ones(1, 1, 2), "cpu")


def test_deformable_attention_equals_transformers_around_boxes():
    expected = randomise(oracle.DeformableDetrMultiscaleDeformableAttention(ORACLE, PROPOSER.heads, PROPOSER.points))
    attention = with_weights(DeformableAttention(PROPOSER), expected)
    queries, memory, boxes = torch.randn(1, 20, PROPOSER.width), torch.randn(1, CELLS, PROPOSER.width), some_boxes(20)
    want, _ = expected(queries, encoder_hidden_states=memory, reference_points=boxes[:, :, None], **LEVEL)
    torch.testing.assert_close(attention(queries, memory, boxes), want, atol=TOLERANCE, rtol=0)


def test_deformable_attention_equals_transformers_around_cells():
    expected = randomise(oracle.DeformableDetrMultiscaleDeformableAttention(ORACLE, PROPOSER.heads, PROPOSER.points))
    attention = with_weights(DeformableAttention(PROPOSER), expected)
    queries, memory = torch.randn(1, CELLS, PROPOSER.width), torch.randn(1, CELLS, PROPOSER.width)
    want, _ = expected(queries, encoder_hidden_states=memory, reference_points=cell_points(), **LEVEL)
    torch.testing.assert_close(attention(queries, memory, tiny_detector().cell_boxes), want, atol=TOLERANCE, rtol=0)


def test_encoder_layer_equals_transformers():
    expected = randomise(oracle.DeformableDetrEncoderLayer(ORACLE))
    layer = with_weights(EncoderLayer(PROPOSER), expected)
    x, positions = torch.randn(1, CELLS, PROPOSER.width), torch.randn(1, CELLS, PROPOSER.width)
    want = expected(x, None, positions, cell_points(), **LEVEL)
    torch.testing.assert_close(layer(x, positions, tiny_detector().cell_boxes), want, atol=TOLERANCE, rtol=0)


def test_decoder_layer_equals_transformers():
    expected = randomise(oracle.DeformableDetrDecoderLayer(ORACLE))
    layer = with_weights(DecoderLayer(PROPOSER), expected)
    x, positions, boxes = torch.randn(1, 20, PROPOSER.width), torch.randn(1, 20, PROPOSER.width), some_boxes(20)
    memory = torch.randn(1, CELLS, PROPOSER.width)
    want = expected(x, positions, boxes[:, :, None], encoder_hidden_states=memory, **LEVEL)
    torch.testing.assert_close(layer(x, positions, memory, boxes), want, atol=TOLERANCE, rtol=0)


def test_cell_positions_equal_transformers():
    embedding = oracle.DeformableDetrSinePositionEmbedding(PROPOSER.width // 2, normalize=True)
    want = embedding((1, PROPOSER.width, PROPOSER.grid, PROPOSER.grid), "cpu", torch.float32)
    torch.testing.assert_close(tiny_detector().cell_positions, want.flatten(2).transpose(1, 2), atol=1e-5, rtol=0)


def test_query_positions_equal_transformers():
    logits = torch.randn(1, 20, 4)
    want = oracle.DeformableDetrModel.get_proposal_pos_embed(SimpleNamespace(config=ORACLE), logits)
    torch.testing.assert_close(sines(logits.sigmoid(), PROPOSER.width // 2), want, atol=1e-5, rtol=0)


def test_proposals_equal_transformers():
    detector, memory = tiny_detector(), torch.randn(1, CELLS, PROPOSER.width)
    padding = torch.zeros(1, CELLS, dtype=torch.bool)
    embed = oracle.DeformableDetrModel.gen_encoder_output_proposals
    embedded, start = embed(detector, memory, padding, LEVEL["spatial_shapes_list"])
    best = detector.class_embed_enc(embedded)[0, :, 0].argsort(descending=True)[: PROPOSER.queries]
    want = (detector.bbox_embed[str(PROPOSER.layers)](embedded) + start).sigmoid()[:, best]
    torch.testing.assert_close(detector.rank(*detector.propose(memory)), want, atol=TOLERANCE, rtol=0)


def test_inverse_sigmoid_equals_transformers_when_a_box_has_no_side():
    x = torch.tensor([0, 1e-7, 1e-5, 0.3, 0.999999, 1])
    torch.testing.assert_close(inverse_sigmoid(x), oracle.inverse_sigmoid(x), atol=0, rtol=0)


def test_detector_keeps_its_contract():
    component = components(TINY)["proposal_detector"]
    (image,) = component.sample(0).values()
    boxes, _, *scores = outputs = ProposalDetector(TINY).eval()(torch.from_numpy(image))
    assert [list(x.shape) for x in outputs] == [spec.dims() for spec in component.outputs]
    assert (boxes[:, :2] <= boxes[:, 2:]).all()
    assert all(score.min() >= 0 and score.max() <= 1 for score in scores)


class OneFile(Checkpoint):
    """A checkpoint of nothing but the given proposer weights."""

    def __init__(self, tensors):
        self.root, self.config, self._tensors = Path("memory"), tiny_detector().config, {"ddetr": tensors}


def original_weights():
    """The weights of `tiny_detector` by their original names."""
    detector = tiny_detector()
    return {original_name(detector, own).removeprefix("ddetr:"): tensor for own, tensor in detector.state_dict().items()}


@pytest.mark.parametrize("names", ["transformer", "decoder", "both"])
def test_detector_loads_heads_under_either_name(names):
    transformer = original_weights()
    decoder = {HEAD.sub("ddetr_transformer.decoder.", name): tensor for name, tensor in transformer.items()}
    assert decoder.keys() != transformer.keys()
    files = {"transformer": transformer, "decoder": decoder, "both": transformer | decoder}
    loaded = OneFile(files[names]).build("proposal_detector").state_dict()
    for name, tensor in tiny_detector().state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_detector_names_the_missing_head_when_a_file_holds_none():
    tensors = {name: x for name, x in original_weights().items() if "class_embed_coco" not in name}
    with pytest.raises(CheckpointError, match=r"missing ddetr:ddetr_transformer.class_embed_coco.2.weight"):
        OneFile(tensors).build("proposal_detector")


@pytest.mark.parametrize(
    "key, waived",
    [
        ("ddetr_transformer.bbox_embed.0.layers.2.bias", True),
        ("ddetr_transformer.decoder.bbox_embed.3.layers.0.weight", True),
        ("ddetr_transformer.decoder.class_embed_sa1b.4.weight", True),
        ("ddetr_transformer.decoder.class_embed_enc.weight", False),
        ("ddetr_transformer.reference_points.weight", False),
        ("vis_encoder.trunk.blocks.0.norm1.weight", False),
    ],
)
def test_detector_waives_only_the_heads_of_earlier_layers(key, waived):
    assert any(re.fullmatch(pattern, key) for pattern in ProposalDetector.unused) == waived


def proposed(case):
    return (case.folder / "proposer_input_448.png").exists()


@cache
def golden_detector(pack):
    return goldens.checkpoint(pack).build("proposal_detector")


def golden_image(case):
    return torch.from_numpy(frames.proposal_frame(case.proposer_image))


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, atol=GOLDEN_TOLERANCE * np.abs(expected).max(), rtol=0)


@goldens.parametrize_cases(proposed)
def test_source_equals_the_original(case):
    image = golden_image(case)
    np.testing.assert_allclose(image[0, :, 3::16, 3::16], case.expected["ddetr.input.slice"], atol=1e-6)
    source = golden_detector(case.pack).source(image)
    assert list(source.shape) == case.expected["ddetr.src.shape"].tolist()
    assert_close(source[0, :, ::5, ::5], case.expected["ddetr.src.slice"])


@goldens.parametrize_cases(proposed)
def test_all_boxes_equal_the_original(case):
    boxes, _, coco_logits, sa1b_logits = (output[0] for output in golden_detector(case.pack).detect(golden_image(case)))
    assert_close(boxes, case.expected["ddetr.all_boxes_cxcywh"])
    assert_close(coco_logits, case.expected["ddetr.all_logits_coco"])
    assert_close(sa1b_logits, case.expected["ddetr.all_logits_sa1b"])


@goldens.parametrize_cases(proposed)
def test_proposals_equal_the_original(case):
    names = [spec.name for spec in components(goldens.checkpoint(case.pack).config)["proposal_detector"].outputs]
    detected = dict(zip(names, (output.numpy() for output in golden_detector(case.pack)(golden_image(case))), strict=True))
    options = case.options
    proposals = rank(detected, options["proposal_topk"], options["coco_score_power"], options["sa1b_score_power"])
    for name, got in proposals.items():
        assert_close(torch.from_numpy(got), case.expected[name.replace("proposal_", "ddetr.")])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_plugin_gets_what_tensorrt_expects_of_one_level():
    attention = DeformableAttention(PROPOSER).eval()
    inputs = (torch.randn(1, 7, PROPOSER.width), torch.randn(1, CELLS, PROPOSER.width), torch.rand(1, 7, 4))
    use_plugin(attention)
    graph = torch.onnx.export(attention, inputs, dynamo=True, verbose=False).model.graph
    (plugin,) = (node for node in graph if node.op_type == "MultiscaleDeformableAttnPlugin_TRT")
    shapes = [list(value.shape) for value in (*plugin.inputs, *plugin.outputs)]
    heads, points, part = PROPOSER.heads, PROPOSER.points, PROPOSER.width // PROPOSER.heads
    assert shapes == [[1, CELLS, heads, part], [1, 2], [1], [1, 7, heads, 1, points, 2], [1, 7, heads, 1, points], [1, 7, heads, part]]
    assert [str(value.dtype) for value in plugin.inputs] == ["FLOAT", "INT32", "INT32", "FLOAT", "FLOAT"]
