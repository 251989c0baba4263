"""Where the gate refuses an engine, `sparrow export --bisect` says where it drifts."""

import numpy as np
import pytest
from click.testing import CliRunner

from export import to_repository
from export.checkpoints import Checkpoint
from export.cli import export
from export.drift import locate_drift, outputs_of
from export.gate import GateError
from export.runners import Engine

PART = "prompt_projector"


@pytest.fixture
def faulty(tiny, monkeypatch):
    """Prompt projectors that compute the same in float32, but by way of values that float16 does not have."""
    build = Checkpoint.build

    def planted(checkpoint, component):
        module = build(checkpoint, component)
        if component == PART:
            first, _, last = module.text_hidden_fcs
            first.weight *= 1e6
            first.bias *= 1e6
            last.weight /= 1e6
        return module

    monkeypatch.setattr(Checkpoint, "build", planted)
    return tiny


def test_first_layer_that_drifts_is_named(faulty):
    module = faulty.build(PART)
    assert "when torch runs in float16 is text_hidden_fcs.0, cosine nan" in locate_drift(module, PART, "float16")
    assert "fine at every layer" in locate_drift(module, PART, "bfloat16")


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_where_torch_is_fine_it_is_the_engine(tiny, precision):
    said = locate_drift(tiny.build("memory_attention"), "memory_attention", precision)
    assert said == f"Torch in {precision} is fine at every layer: the drift is the engine's own."


def test_outputs_are_those_of_every_layer_in_order(tiny):
    module = tiny.build(PART)
    states = np.float32([[1] * module.config.language.width])
    with outputs_of(module) as outputs:
        expected = module(module.text_hidden_fcs[0].weight.new_tensor(states))
    assert [name for name, _ in outputs] == ["text_hidden_fcs.0", "text_hidden_fcs.1", "text_hidden_fcs.2", "text_hidden_fcs"]
    assert np.array_equal(outputs[-1][1], expected)
    module(expected.new_tensor(states))
    assert len(outputs) == 4  # nothing listens any more


@pytest.mark.parametrize(("options", "said"), [((), False), (("--bisect",), True)])
def test_export_names_the_layer_where_it_is_asked_to(faulty, tmp_path, options, said):
    to_repository.opened.cache_clear()
    arguments = [str(faulty.root), PART, "-o", str(tmp_path / "repository"), "--engine", "torch", "--precision", "float16", *options]
    result = CliRunner().invoke(export, arguments)
    assert result.exit_code == 1
    assert "prompt_projector.prompt_embeddings in float16: got cosine nan" in result.output
    assert ("The first layer that drifts when torch runs in float16 is text_hidden_fcs.0" in result.output) == said


def test_engine_that_differs_from_torch_is_told_apart(tiny, tmp_path, monkeypatch):
    class Wrong:
        def run(self, inputs):
            return {"prompt_embeddings": np.zeros((len(inputs["final_states"]), tiny.config.sam2.width), np.float32)}

    monkeypatch.setattr(to_repository, "load_graph", lambda *arguments: Wrong())
    with pytest.raises(GateError, match=r"got cosine 0 .* Torch in bfloat16 is fine at every layer: the drift is the engine's own"):
        to_repository.export_graph(tiny.root, PART, Engine("torch", "bfloat16"), [tmp_path], bisect=True)
