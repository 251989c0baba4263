import json

import pytest
from click.testing import CliRunner

from benchmarks import records, serving, tables

ENV = dict.fromkeys(("gpu", "driver", "torch", "tritonserver", "engine_kinds", "preset", "precision", "git", "date"))


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


def figure(metric, value, samples=(1, 2, 3, 4, 5), **env):
    return records.record("serving", "clip", metric, value, "ms", samples, {**ENV, **env})


def test_record_has_the_fields_that_others_rely_on():
    line = figure("first_answer_ms", 3)
    assert list(line) == ["suite", "workload", "metric", "value", "unit", "n", "spread", "env"]
    assert (line["value"], line["n"], line["spread"]) == (3, 5, 2)


@pytest.mark.parametrize(("gpu", "folder"), [(None, "cpu"), ("NVIDIA H200", "nvidia-h200")])
def test_figures_are_added_behind_the_earlier_ones_of_the_same_machine(results, gpu, folder):
    for value in (3, 2):
        path = records.append([figure("first_answer_ms", value, gpu=gpu)])
    assert path == results / folder / "serving.jsonl"
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [3, 2]
    assert records.latest(path)["clip", "first_answer_ms"]["value"] == 2


def test_table_shows_the_latest_figures_and_replaces_the_one_before(results):
    records.append([figure("first_answer_ms", 3), figure("ready_s", 7)])
    text = "above\n<!-- results: cpu/serving -->\nold\n<!-- end -->\nbelow"
    rendered = tables.render(text)
    assert "| clip | first_answer_ms | 3 ms | 5 | 2 |\n| clip | ready_s | 7 ms |" in rendered
    assert "old" not in rendered
    assert rendered.startswith("above\n") and rendered.endswith("\nbelow")
    assert tables.render(rendered) == rendered


def test_readme_shows_what_was_measured_last():
    assert tables.main(check=True) == 0


def test_table_says_how_a_gpu_was_shared_where_records_do(results):
    records.append([figure("first_answer_ms", 3, gpu="NVIDIA H200")])
    text = "<!-- results: nvidia-h200/serving -->\n<!-- end -->"
    assert "gpu_sharing" not in tables.render(text)
    records.append([figure("first_answer_ms", 2, gpu="NVIDIA H200", gpu_sharing="MPS")])
    assert "On gpu NVIDIA H200, gpu_sharing MPS.\n" in tables.render(text)


def test_bench_measures_a_running_server(results, server, monkeypatch):
    monkeypatch.setattr(serving, "TRACK_FRAMES", 3)
    monkeypatch.setenv("SPARROW_GPU_SHARING", "time slices")
    run = CliRunner().invoke(serving.bench, ["--server", server.url, "--repeats", "2"])
    assert run.exit_code == 0, run.output
    (path,) = results.glob("*/serving.jsonl")
    lines = records.latest(path)
    assert {metric for _, metric in lines} == {"first_answer_ms", "track_frame_ms_p50", "track_frame_ms_p99", "frames_per_s"}
    assert all(line["value"] > 0 and line["env"]["preset"] == "tiny" for line in lines.values())
    assert lines["clip_16f_480x854", "first_answer_ms"]["n"] == 2
    assert all(line["env"]["gpu_sharing"] == "time slices" for line in lines.values())
    engine_kinds = lines["clip_16f_480x854", "first_answer_ms"]["env"]["engine_kinds"]
    assert (engine_kinds["frame_features"], engine_kinds["language_model"]) == ("onnx", "torch")
