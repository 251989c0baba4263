"""`make bench-serving`: packs become perf_analyzer's requests and options, and what it writes becomes figures; a failed request fails."""

import base64
import json
import os
import subprocess

import numpy as np
import pytest
from click.testing import CliRunner
from tritonclient.utils import deserialize_bytes_tensor

from benchmarks import load, perf_analyzer, plots, records, tables
from benchmarks.packs import PACKS, Pack, PackError, input_data, read_pack
from benchmarks.perf_analyzer import Latency, Load, PerfAnalyzerError, arguments, latency

CPU = {"gpu": None, "preset": "nano", "precision": "float32", "git": "0", "date": "2026-01-01"}
CLIP = Pack("clip", "sparrow", 2, [1], 8, prompt="Where is it?", masks=True)
SESSION = Pack("session", "sparrow_track", 3, [1, 2], 9, boxes=[[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]], parameters={"mask_format": "bits"})
REPORT = "Concurrency,Inferences/Second,p50 latency,p90 latency,p95 latency,p99 latency,Avg latency\n2,15.9,40000,60000,61000,62500,50000\n"
PROFILE = b'{"requests":[%s]}' % b",".join(
    b'{"timestamp":%d,"request_inputs":{"encoded_frames":"\xff\xd8\\"timestamp\\":7"},"response_timestamps":[%d,%d],"response_outputs":[nan]}'
    % (sent, sent + first, sent + 90_000_000)
    for sent, first in ((1000, 20_000_000), (2000, 40_000_000))
)


@pytest.fixture
def results(tmp_path, monkeypatch):
    for module in (load, plots, records, tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a shell script in perf_analyzer's place."""

    def write(script):
        path = tmp_path / "bin" / "perf_analyzer"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    return write


def decoded(tensor, dtype):
    return np.frombuffer(base64.b64decode(tensor["content"]["b64"]), dtype).reshape(tensor["shape"])


def option(words, name):
    return [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]


@pytest.mark.parametrize("path", sorted(PACKS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_pack_can_be_read_and_says_what_it_is(path):
    pack = read_pack(path)
    assert path.read_text().startswith("# ")
    assert pack.name == path.stem
    assert pack.requests % max(pack.concurrency) == 0
    assert ("480x854" in pack.name) and (pack.model != "sparrow_track" or f"{len(pack.boxes)}obj" in pack.name)


@pytest.mark.parametrize(
    "text", ["model = ", 'model = "sparrow"', 'model = "sparrow"\nframes = 1\nconcurrency = [1]\nrequests = 1\nobject = 3']
)
def test_what_is_no_pack_is_refused(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(PackError, match=r"mine\.toml: not a pack \(.+\)\. Write it like those"):
        read_pack(path)


def test_a_question_is_one_step_with_its_frames_as_files():
    ((step,),) = input_data(CLIP.steps())["data"]
    texts = {name: deserialize_bytes_tensor(base64.b64decode(tensor["content"]["b64"])) for name, tensor in step.items()}
    assert texts["prompt"].tolist() == [b"Where is it?"]
    assert [file[:3] for file in texts["encoded_frames"]] == [b"\xff\xd8\xff"] * 2
    assert step["encoded_frames"]["shape"] == [2]


def test_a_session_is_a_stream_whose_first_step_has_the_objects():
    (steps,) = input_data(SESSION.steps())["data"]
    assert [sorted(step) for step in steps] == [["box_objects", "boxes", "frame"], ["frame"], ["frame"]]
    assert decoded(steps[0]["boxes"], np.float32).tolist() == np.array(SESSION.boxes, np.float32).tolist()
    assert decoded(steps[0]["box_objects"], np.int32).tolist() == [0, 1]
    assert decoded(steps[1]["frame"], np.uint8).shape == (480, 854, 3)


def test_options_say_how_a_pack_is_sent(tmp_path):
    words = arguments(SESSION, Load(2, "system"), "host:1", tmp_path / "session.json")
    assert words[words.index("-m") + 1] == "sparrow_track" and words[words.index("-u") + 1] == "host:1"
    assert "--streaming" in words
    assert option(words, "input-data") == [f"{tmp_path}/session.json"]
    assert (option(words, "concurrency-range"), option(words, "shared-memory")) == (["2"], ["system"])
    assert option(words, "request-parameter") == ["mask_format:bits:string"]
    assert (option(words, "sequence-length"), option(words, "sequence-length-variation")) == (["3"], ["0"])
    assert option(words, "sequence-id-range") != option(arguments(SESSION, Load(2), "", tmp_path), "sequence-id-range")
    assert not option(arguments(CLIP, Load(1), "host:1", tmp_path), "sequence-length")
    typed = Pack("typed", "sparrow", 1, [1], 1, parameters={"roi_helper": True, "max_new_tokens": 4})
    assert option(arguments(typed, Load(1), "", tmp_path), "request-parameter") == ["roi_helper:true:bool", "max_new_tokens:4:int"]


def test_latencies_are_read_from_the_report_and_first_responses_from_the_profile():
    assert latency(REPORT, PROFILE, requests=2) == Latency(50, 40, 62.5, [20, 40])
    assert latency(REPORT, b"", requests=2) == Latency(50, 40, 62.5, [])


def test_a_profile_that_breaks_off_is_left_out():
    assert latency(REPORT, PROFILE[: len(PROFILE) // 2 + 20], requests=2).first == []


def test_figures_name_pack_and_concurrency():
    lines = load.figures(SESSION, Load(2, "system"), Latency(50, 40, 62.5, []), CPU)
    assert {line["workload"] for line in lines} == {"session_system@2"}
    assert {line["metric"]: line["value"] for line in lines} == {"track_frame_ms_p50": 40, "track_frame_ms_p99": 62.5, "frames_per_s": 40}
    assert all((line["n"], line["spread"]) == (9, None) for line in lines)
    lines = load.figures(CLIP, Load(1), Latency(50, 40, 62.5, [20, 40]), CPU)
    assert {line["metric"]: line["value"] for line in lines} == {
        "first_answer_ms": 40,
        "first_answer_ms_p99": 62.5,
        "frames_per_s": 40,
        "first_text_ms": 30,
    }


def test_a_measured_run_follows_one_that_warms_up(program, tmp_path):
    program(
        f"echo \"$@\" >> {tmp_path}/calls\nprintf '{REPORT}' > {tmp_path}/session.csv".replace("\n2,", "\\n2,").replace("000\n'", "000\\n'")
    )
    assert perf_analyzer.measure(SESSION, Load(2), "host:1", tmp_path / "session.json").p50 == 40
    warm_up, measured = (tmp_path / "calls").read_text().splitlines()
    assert "--request-count=4" in warm_up and "--request-count=9" in measured
    assert "--profile-export-file" not in measured


def test_a_failed_request_fails_the_run(program, tmp_path):
    program("echo 'Request concurrency: 1'; echo 'Thread [0] had error: InvalidInput: sparrow.frames: got neither'; exit 99")
    with pytest.raises(
        PerfAnalyzerError, match=r"ended with 99: Thread \[0\] had error: InvalidInput: sparrow.frames: got neither\. It was"
    ):
        perf_analyzer.measure(CLIP, Load(1), "host:1", tmp_path / "clip.json")


def test_without_perf_analyzer_the_message_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(perf_analyzer, "PLACES", (tmp_path,))
    with pytest.raises(PerfAnalyzerError, match=r"not found on the PATH\. Get it: benchmarks/perf_analyzer\.sh"):
        perf_analyzer.find()


def test_accuracy_is_the_newest_of_the_preset(results):
    for folder, preset, date, value in (("cpu", "nano", "2026-02", 80), ("cpu", "full", "2026-03", 90), ("gpu", "nano", "2026-01", 70)):
        path = results / folder / "shapes-rvos.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        line = records.figure("shapes-rvos", f"test_{date}", "tracked_j_and_f", value, "%", 1, 0, {**CPU, "preset": preset, "date": date})
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    assert [line["value"] for line in load.accuracy("nano")] == [80]
    assert load.accuracy("tiny") == []


def test_tables_and_plots_show_what_was_put_under_load(results, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "PLOTS", tmp_path / "plots")
    records.append([records.record("serving", "nano", "ready_s", 2, "s", [2], {**CPU, "torch": "2"})])
    plots.main()
    assert not (tmp_path / "plots").exists()
    for pack, concurrency in ((CLIP, 1), (SESSION, 1), (SESSION, 2)):
        records.append(
            load.figures(pack, Load(concurrency), Latency(50, 40, 62.5, []), {**CPU, "driver": None, "torch": "2", "tritonserver": "2.51"})
        )
    plots.main()
    assert "session" in (tmp_path / "plots" / "cpu.svg").read_text()
    assert "| session@2 | track_frame_ms_p50 | 40 ms | 9 |  |\n" in tables.table(results / "cpu" / "serving.jsonl", ["*@*"])
    assert "ready_s" not in tables.table(results / "cpu" / "serving.jsonl", ["*@*"])


@pytest.fixture
def under_load(results, server, tmp_path):
    """Puts the server under the load of a pack, by the real perf_analyzer."""
    try:
        perf_analyzer.find()
    except PerfAnalyzerError as error:
        pytest.skip(str(error))

    def run(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return CliRunner().invoke(load.main, ["--server", server.url, "--pack", str(path), "--work", str(tmp_path / "work")])

    return run


def test_sessions_are_measured_on_a_running_server(under_load, results):
    run = under_load('model = "sparrow_track"\nframes = 3\nboxes = [[0.1, 0.3, 0.3, 0.6]]\nconcurrency = [1, 2]\nrequests = 6')
    assert run.exit_code == 0, run.output
    lines = records.latest(next(results.glob("*/serving.jsonl")))
    assert {(workload, metric) for workload, metric in lines} == {
        (f"mine@{count}", metric) for count in (1, 2) for metric in ("track_frame_ms_p50", "track_frame_ms_p99", "frames_per_s")
    }
    assert all(line["value"] > 0 and line["env"]["preset"] == "tiny" for line in lines.values())


def test_questions_are_measured_on_a_running_server(under_load, results):
    run = under_load('model = "sparrow"\nprompt = "Where is it?"\nframes = 2\nmasks = true\nconcurrency = [2]\nrequests = 4')
    assert run.exit_code == 0, run.output
    lines = records.latest(next(results.glob("*/serving.jsonl")))
    assert lines["mine@2", "first_answer_ms"]["value"] <= lines["mine@2", "first_answer_ms_p99"]["value"]


def test_an_answer_that_is_not_what_the_pack_says_is_not_measured(under_load, results):
    run = under_load('model = "sparrow"\nprompt = "Where is it?"\nframes = 2\nconcurrency = [1]\nrequests = 1')
    assert run.exit_code == 1
    assert "mine: the answer 'the moving shape [BOX] [SEG]' has masks for 2 frames, expected 0. Use a checkpoint" in run.output
    assert not results.exists()


def test_a_request_that_the_server_refuses_fails_the_run(under_load, results):
    run = under_load('model = "sparrow_track"\nframes = 2\nboxes = [[0.5, 0.3, 0.3, 0.6]]\nconcurrency = [1]\nrequests = 2')
    assert run.exit_code == 1
    assert "perf_analyzer: ended with" in run.output and "InvalidInput: tracker.boxes" in run.output
    assert not results.exists()


def test_the_script_that_gets_perf_analyzer_asks_for_a_folder():
    run = subprocess.run(["benchmarks/perf_analyzer.sh"], cwd=PACKS.parent.parent, capture_output=True, text=True)
    assert run.returncode == 1 and "usage: benchmarks/perf_analyzer.sh FOLDER" in run.stderr
