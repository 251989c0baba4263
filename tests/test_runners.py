from dataclasses import replace

import numpy as np
import pytest
import torch

from ensemble.components import components
from ensemble.config import TINY
from export.manifest import ManifestError
from export.models import graph_class
from export.models.language_model import ring_slots
from export.runners import (
    POSITIONS_STEP,
    Engine,
    TorchDecoder,
    TorchGraph,
    as_stored,
    load_graph,
    load_module,
    open_graph,
    save_module,
    share_weights,
)

WIDTH = TINY.language.width


def module(component):
    torch.manual_seed(0)
    return graph_class(component)(TINY).eval()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine_kind": "plan"}, "engine: got engine_kind 'plan', expected one of torch, onnx, aoti, tensorrt."),
        ({"precision": "int8"}, "engine: got precision 'int8', expected one of float32, bfloat16, float16."),
        ({"quantization": "2bit"}, "engine: got quantization '2bit', expected one of none, 8bit, 4bit."),
        ({"components": {"mask_decoder": "plan"}}, "engine: got engine_kind 'plan', expected one of torch, onnx, aoti, tensorrt."),
        ({"precision": "bfloat16"}, "engine: got onnx in bfloat16, expected float32 or float16: ONNX Runtime has no products in bfloat16."),
    ],
)
def test_engine_that_there_is_not_is_refused(fields, message):
    with pytest.raises(ValueError) as refused:
        Engine(**fields)
    assert str(refused.value) == message


def test_engine_travels_as_parameters():
    engine = Engine("torch", "float16", "8bit", {"mask_decoder": "aoti"})
    assert engine.parameters()["engine_kind.mask_decoder"] == "aoti"
    assert Engine.from_parameters({**engine.parameters(), "max_sessions": "8"}) == engine
    assert engine.of("mask_decoder") == Engine("aoti", "float16", "8bit")
    assert engine.of("memory_encoder") == Engine("torch", "float16", "8bit")


def test_modules_of_one_process_hold_equal_weights_once_and_others_apart():
    clips, images, stranger = module("vision_encoder"), module("image_encoder"), module("vision_encoder")
    images.context_tower.load_state_dict(clips.context_tower.state_dict())
    with torch.no_grad():
        stranger.context_tower.get_parameter(name := next(iter(dict(stranger.context_tower.named_parameters())))).add_(1)
    before = {id(one): [tensor.clone() for tensor in one.state_dict().values()] for one in (clips, images, stranger)}
    share_weights([clips, images, stranger])
    for own, shared in zip(clips.context_tower.parameters(), images.context_tower.parameters(), strict=True):
        assert own is shared
    assert stranger.context_tower.get_parameter(name) is not clips.context_tower.get_parameter(name)
    for one in (clips, images, stranger):
        for tensor, expected in zip(one.state_dict().values(), before[id(one)], strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_stored_modules_are_opened_in_their_precision(tmp_path, precision):
    projector = module("prompt_projector")
    save_module(projector, tmp_path / "prompt_projector.safetensors", precision)
    stored = load_module(tmp_path / "prompt_projector.safetensors", "prompt_projector", TINY)
    assert {tensor.dtype for tensor in stored.state_dict().values()} == {getattr(torch, precision)}

    inputs = components(TINY)["prompt_projector"].sample(0, states=3)
    expected = TorchGraph(projector, "prompt_projector").run(inputs)["prompt_embeddings"]
    path = tmp_path / "prompt_projector.safetensors"
    got = load_graph(Engine("torch", precision), path, "prompt_projector", TINY).run(inputs)["prompt_embeddings"]
    assert got.dtype == np.float32
    tolerance = 0 if precision == "float32" else 2e-3  # one half-precision ulp is 1e-3 of a value
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def test_norms_are_stored_in_float32():
    kept = as_stored(module("memory_attention"), "memory_attention", "float16")
    dtypes = {name: tensor.dtype for name, tensor in kept.state_dict().items()}
    assert {dtype for name, dtype in dtypes.items() if "norm" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "norm" not in name} == {torch.float16}


def test_graph_that_was_not_exported_is_named_with_the_way_to_make_it(tmp_path):
    with pytest.raises(ManifestError, match=r"frame_encoder: no frame_encoder.json in .*sparrow export CHECKPOINT"):
        open_graph({}, tmp_path, "frame_encoder", TINY)


def test_cache_grows_with_answers_and_positions_without_changing_them():
    ends = (TorchGraph(module("token_embedder"), "token_embedder"), TorchGraph(module("prompt_projector"), "prompt_projector"))
    growing, fresh = (TorchDecoder(module("language_decoder"), *ends) for _ in range(2))
    rng = np.random.default_rng(0)
    prompts = [rng.standard_normal((length, WIDTH)).astype(np.float32) for length in (POSITIONS_STEP - 2, 9)]
    for slot, prompt in enumerate(prompts):
        growing.prefill(slot, [prompt])
    for token_id in (5, 6, 7, 8):  # over the end of the first step
        got = growing.decode([0, 1], [token_id, token_id])

    for slot, prompt in enumerate(prompts):
        whole = np.concatenate([prompt, fresh.embed([5, 6, 7, 8])])
        expected = fresh.prefill(0, [whole])
        np.testing.assert_allclose(got.logits(slot), expected.logits(0), atol=1e-4)  # float32 summation order
        np.testing.assert_allclose(got.states[slot], expected.states[0], atol=1e-4)
        np.testing.assert_allclose(got.prompt_embeddings[slot], expected.prompt_embeddings[0], atol=1e-4)
        assert got.likeliest[slot] == expected.likeliest[0] == got.logits(slot).argmax()


def test_cache_ends_with_what_a_token_may_see():
    config = replace(TINY, language=replace(TINY.language, layers=1))
    projector = TorchGraph(module("prompt_projector"), "prompt_projector")
    decoder = TorchDecoder(graph_class("language_decoder")(config).eval(), None, projector)
    decoder.prefill(0, [np.zeros((config.max_sequence - 1, WIDTH), np.float32)])
    assert decoder._keys.shape[3] == ring_slots(config) == config.language.sliding_window + 1


def test_steps_run_ahead_while_tokens_are_the_likeliest_and_change_no_answer():
    """Two answers that start, join and end at different times, one of which takes other tokens than the likeliest."""
    ends = (TorchGraph(module("token_embedder"), "token_embedder"), TorchGraph(module("prompt_projector"), "prompt_projector"))
    plain, ahead = (TorchDecoder(module("language_decoder"), *ends) for _ in range(2))
    ahead._runs_ahead = True
    launched = []
    launch = ahead._launch
    ahead._launch = lambda ids: launched.append(len(ids)) or launch(ids)
    rng = np.random.default_rng(0)
    prompts = [rng.standard_normal((length, WIDTH)).astype(np.float32) for length in (20, 9)]

    def both(slots, token_ids):
        got, expected = (decoder.decode(slots, token_ids) for decoder in (ahead, plain))
        for name in ("likeliest", "states", "prompt_embeddings"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
        np.testing.assert_array_equal(got.logits(len(slots) - 1), expected.logits(len(slots) - 1))
        return got.likeliest.tolist()

    def started(slot):
        outlook, _ = (decoder.prefill(slot, [prompts[slot]]) for decoder in (plain, ahead))
        return outlook.likeliest.tolist()

    token_ids = started(0)
    for _ in range(4):
        token_ids = both([0], token_ids)
    assert launched == [1] * 5  # each but the first was there when it was asked for, and one is ahead
    both([0], [token_ids[0] ^ 1])  # drawn: what was launched is of no use
    assert launched == [1] * 6
    token_ids = both([0, 1], [3, *started(1)])
    for _ in range(3):
        token_ids = both([0, 1], token_ids)
    both([1], token_ids[1:])
    assert launched == [1] * 6 + [2] * 6
