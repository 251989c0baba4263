"""A compiled package computes what torch does at every size, and runs only on the machine that it was compiled for."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest

from ensemble.components import components
from ensemble.config import TINY
from export import runners, to_repository
from export.gate import pass_gate
from export.manifest import ManifestError
from export.runners import (
    ALONE,
    AotiGraph,
    CompiledLayers,
    CompiledSteps,
    Engine,
    TorchGraph,
    as_stored,
    beside,
    load_compiled,
    load_package,
    open_graph,
    open_graphs,
    save_module,
)
from export.to_aoti import aoti_from_decoder, aoti_from_torch, check_compiler

PART = "prompt_projector"
SETTINGS = {"engine_kind": "aoti", "precision": "bfloat16"}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aoti")
    to_repository.opened.cache_clear()
    to_repository.export_graph(tiny.root, PART, Engine(**SETTINGS), [folder])
    return folder


def test_language_model_passes_the_gate_through_compiled_layers(tiny, tmp_path):
    decoder = tiny.build("language_decoder")
    path = tmp_path / "language_decoder.pt2"
    save_module(decoder, path.with_suffix(".safetensors"), "bfloat16")
    aoti_from_decoder(as_stored(decoder, "language_decoder", "bfloat16"), path, "bfloat16", "cpu")
    module, layers = load_compiled(path, TINY)
    calls = Counter()

    def counted(name):
        return lambda *tensors: (calls.update([name]), getattr(layers, name)(*tensors))[1]

    steps = CompiledSteps(module, CompiledLayers(counted("decode"), counted("prompt")), "bfloat16")
    pass_gate(steps, decoder, "language_decoder", "bfloat16")
    assert set(calls) == {"decode", "prompt"}


@pytest.mark.parametrize("states", [1, 2, 7])
def test_package_computes_what_eager_torch_does_in_its_precision(tiny, folder, states):
    graph = open_graph(SETTINGS, folder, PART, TINY)
    assert isinstance(graph, AotiGraph)
    inputs = components(TINY)[PART].sample(3, states=states)
    got = graph.run(inputs)["prompt_embeddings"]
    eager = TorchGraph(tiny.build(PART), PART, "bfloat16").run(inputs)["prompt_embeddings"]
    exact = TorchGraph(tiny.build(PART), PART).run(inputs)["prompt_embeddings"]
    assert (got.shape, got.dtype) == (exact.shape, np.float32)
    ulp = 2.0**-8 * np.abs(exact).max()  # fused products are rounded less often than eager ones
    np.testing.assert_allclose(got, eager, atol=4 * ulp)
    assert np.abs(got - exact).max() > 0


def test_one_object_and_several_go_through_packages_of_their_own(tiny, tmp_path, monkeypatch):
    attention, path = tiny.build("memory_attention"), tmp_path / "memory_attention.pt2"
    aoti_from_torch(attention, "memory_attention", path, "float32", "cpu")
    loaded = []
    monkeypatch.setattr(runners, "load_package", lambda path: lambda *tensors: (loaded.append(path), packages[path](*tensors))[1])
    packages = {own: load_package(own) for own in (path, beside(path, ALONE))}
    graph = AotiGraph(path, "memory_attention", attention)
    for objects in (1, 3):
        inputs = components(TINY)["memory_attention"].sample(objects, objects=objects)
        expected = TorchGraph(attention, "memory_attention").run(inputs)["conditioned_embeddings"]
        np.testing.assert_allclose(graph.run(inputs)["conditioned_embeddings"], expected, atol=1e-4)  # order of sums
    assert loaded == [beside(path, ALONE), path]


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        (
            "g++ -static-libstdc++",
            r"aoti: .*g\+\+ has linked libstdc\+\+ into a library, expected it to be shared with torch\. .*CXX=/usr/bin/g\+\+",
        ),
        ("false", r"aoti: false makes no shared library\."),
        ("no-such-compiler", r"aoti: got no C\+\+ compiler no-such-compiler, expected one\. Install it\."),
    ],
)
def test_compiler_whose_packages_would_end_the_process_is_refused_at_once(monkeypatch, compiler, says):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(ValueError, match=says):
        check_compiler.__wrapped__()


def test_package_of_another_machine_is_not_run(folder, monkeypatch):
    monkeypatch.setattr(runners, "machine_of", lambda engine: "torch 2.11.0, sm_90")
    with pytest.raises(ManifestError, match=r"got machine torch .*, expected torch 2\.11\.0, sm_90\. Make the engine anew"):
        open_graph(SETTINGS, folder, PART, TINY)


def test_package_without_its_weights_is_not_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "old")
    manifest = tmp_path / "old" / f"{PART}.json"
    fields = json.loads(manifest.read_text())
    del fields["files"][f"{PART}.safetensors"]  # as packages were that held them
    manifest.write_text(json.dumps(fields))
    with pytest.raises(ManifestError, match=rf"{PART}: no {PART}\.safetensors in .*old\. Make the engine anew"):
        open_graph(SETTINGS, tmp_path / "old", PART, TINY)


def test_graphs_of_one_process_run_each_in_their_kind(tiny, folder):
    to_repository.export_graph(tiny.root, "token_embedder", Engine("torch", "bfloat16"), [folder])
    mixed = Engine("torch", "bfloat16", components={PART: "aoti"}).parameters()
    graphs = open_graphs(mixed, folder, ["token_embedder", PART], TINY)
    assert [type(graph) for graph in graphs.values()] == [TorchGraph, AotiGraph]
    with pytest.raises(ManifestError, match=r"token_embedder: got engine_kind torch in .*, expected aoti"):
        open_graphs(SETTINGS, folder, ["token_embedder", PART], TINY)
