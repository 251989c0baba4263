"""`python -m benchmarks.components`: which figures it adds, of which graphs."""

import pytest
from click.testing import CliRunner

from benchmarks import components as bench
from benchmarks import records, serving
from ensemble.components import components
from ensemble.config import TINY
from export.runners import Engine
from export.to_repository import repository_from_checkpoint

GRAPHS = ("mask_downsampler", "prompt_projector")


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Runs it on few samples; its figures by suite, workload and metric."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    for name, value in {"REPEATS": 3, "WARM_UP": 1, "PROMPT_TOKENS": 20, "NEW_TOKENS": 2, "PREFILLS": 2}.items():
        monkeypatch.setattr(bench, name, value)

    def run(repository, *options):
        done = CliRunner().invoke(bench.main, [str(repository), *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return {(path.stem, *key): line for path in tmp_path.glob("*/*.jsonl") for key, line in records.latest(path).items()}

    return run


@pytest.fixture(scope="module")
def in_torch(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    only = components(TINY)["language_model"].parts
    repository_from_checkpoint(tiny, folder, progress=lambda made, anew: None, engine=Engine("torch", "bfloat16"), only=only)
    return folder


def test_every_graph_has_a_latency_and_the_language_model_its_rates(repository, measure):
    lines = measure(repository, *(word for graph in (*GRAPHS, "language_decoder") for word in ("--graph", graph)))
    component = {(workload, metric): line["n"] for (suite, workload, metric), line in lines.items() if suite == "component"}
    assert component == {
        **{(f"tiny_onnx_float32_{count}_objects", "mask_downsampler.latency_ms"): 3 for count in (1, 4, 8)},
        ("tiny_torch_float32", "prompt_projector.latency_ms"): 3,
    }
    llm = {(workload, metric): line["n"] for (suite, workload, metric), line in lines.items() if suite == "llm"}
    for count in (1, 8):
        workload = f"tiny_torch_float32_batch_{count}_prompt_20"
        assert {metric: n for (name, metric), n in llm.items() if name == workload} == {
            "prefill_ms": 2 * count,
            "decode_ms_per_token": 2,
            "tokens_per_s": 2,
        }
    gated = {workload.split("float32_")[1] for suite, workload, _ in lines if suite == "gate"}
    assert gated == {*GRAPHS, "language_decoder"}


def test_run_that_is_cut_off_keeps_what_it_has_measured(repository, measure, monkeypatch):
    lines_of = bench.latency_lines

    def cut_off(folder, made, *others):
        if made.component == GRAPHS[1]:
            raise KeyboardInterrupt
        return lines_of(folder, made, *others)

    monkeypatch.setattr(bench, "latency_lines", cut_off)
    with pytest.raises(AssertionError, match="Aborted"):
        measure(repository, "--graph", GRAPHS[0], "--graph", GRAPHS[1])
    kept = [metric for path in records.RESULTS.glob("*/component.jsonl") for _, metric in records.latest(path)]
    assert set(kept) == {f"{GRAPHS[0]}.latency_ms"}


def test_sparrow_bench_takes_a_repository_instead_of_a_server(repository, monkeypatch):
    measured = []
    monkeypatch.setattr(bench, "measure", measured.append)
    done = CliRunner().invoke(serving.bench, [str(repository)], catch_exceptions=False)
    assert (done.exit_code, measured) == (0, [repository])


def test_graphs_in_torch_can_be_compared_with_what_torch_compile_makes_of_them(in_torch, measure):
    lines = measure(in_torch, "--compiled", "--graph", "prompt_projector")
    assert list(lines) == [("component", "tiny_torch_bfloat16_compiled", "prompt_projector.latency_ms")]


def test_quantisation_stands_in_the_name(in_torch, measure):
    pytest.importorskip("bitsandbytes")
    lines = measure(in_torch, "--quantization", "4bit", "--graph", "language_decoder")
    assert ("llm", "tiny_torch_bfloat16_4bit_batch_1_prompt_20", "prefill_ms") in lines
