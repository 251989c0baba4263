"""`sparrow eval` on a small data set: with a stand-in for the client that answers as told, and through a real server."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sparrow_client import InvalidInput, Objects, Proposals, RequestFailed, ServerUnavailable, Summary, TrackedObject
from sparrow_client._results import rle

from benchmarks import records
from benchmarks.evaluation import asking, cli
from benchmarks.evaluation.mevis import Mevis
from benchmarks.evaluation.samples import Prediction
from tests.responses import masks_of
from tests.test_evaluation_vos import change, truth, write_mevis

FRAMES, HEIGHT, WIDTH = 3, 48, 64
ENV = {
    **dict.fromkeys(("gpu", "driver", "torch", "git", "date")),
    "tritonserver": "2.51.0",
    "engine_kinds": {"frame_features": "onnx"},
    "preset": "",
    "precision": "float32",
}
VIDEOS = {"a": 0, "b": 1}
"""Name to the pixels by which everything is moved."""


def annotation(shift):
    """[T, H, W] ids: two squares that move to the right; the second is not there on the last frame."""
    ids = np.zeros((FRAMES, HEIGHT, WIDTH), np.uint8)
    for index, frame in enumerate(ids):
        frame[4:20, 4 + shift + index : 20 + shift + index] = 1
        frame[24:44, 30 + shift + index : 50 + shift + index] = 2
    ids[-1][ids[-1] == 2] = 0
    return ids


def questions(name):
    """Prompts are unique, as the stand-in knows them apart."""
    referring = [("referring", f"Please segment shape {object_id} in {name}.", [object_id]) for object_id in (1, 2)]
    others = [("description", f"Describe {name}.", [1, 2]), ("absent", f"Please segment the star in {name}.", [])]
    return [{"kind": kind, "prompt": prompt, "answer": "", "objects": objects} for kind, prompt, objects in referring + others]


def write_data(folder):
    """The layout of shapes-rvos."""
    (folder / "videos").mkdir(parents=True)
    names = [f"{index:05d}" for index in range(FRAMES)]
    for name, shift in VIDEOS.items():
        (folder / "Annotations" / name).mkdir(parents=True)
        with av.open(str(folder / "videos" / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for stem, ids in zip(names, annotation(shift), strict=True):
                picture = Image.fromarray(ids, "P")
                picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
                picture.save(folder / "Annotations" / name / f"{stem}.png")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(ids * 100, format="gray")))
            container.mux(stream.encode())
    expressions = {"0": {"exp": "the upper square", "obj_id": "1"}}
    meta = {"videos": {name: {"expressions": expressions, "frames": names} for name in VIDEOS}}
    (folder / "meta_expressions.json").write_text(json.dumps(meta))
    (folder / "questions.json").write_text(json.dumps({name: questions(name) for name in VIDEOS}))


def boxes_of(ids):
    """Normalised xyxy of the objects on a frame, [H, W]."""
    corners = [np.argwhere(ids == object_id) for object_id in np.unique(ids[ids > 0])]
    return np.float32([[*found.min(0)[::-1], *(found.max(0) + 1)[::-1]] for found in corners]) / np.float32([WIDTH, HEIGHT] * 2)


def answer_of(tracks, proposals=None):
    """The events of an answer with these masks, branch to [O, T, H, W]."""
    count = len(tracks["tracked"])
    fields = {"answer": f"{count} objects", "preset": "nano"}
    objects = [
        TrackedObject(f"object {index}", np.zeros(4, np.float32), np.eye(4, dtype=np.float32)[:index], None) for index in range(count)
    ]
    frames = [
        masks_of(index, masks[:, index], (np.ones(count), np.ones(count)), branch)
        for branch, masks in tracks.items()
        for index in range(masks.shape[1] if count else 0)
    ]
    shown = [proposals] if proposals else []
    return [*shown, Objects(objects), *frames, Summary(fields["answer"], "both", None, {}, fields)]


class FakeClient:
    """Answers every question of the data set perfectly, unless told otherwise."""

    def __init__(self):
        self.url, self.calls, self.ready = "", [], [True]
        self.told = {}
        """Prompt to the answer, or what is raised instead, or a function of how often was asked to either."""
        self.perfect = {}
        for name, shift in VIDEOS.items():
            ids = annotation(shift)
            shown = Proposals(np.zeros((8, 8, 3), np.uint8), boxes_of(ids[0]), np.ones(2, np.float32))
            for asked in questions(name):
                masks = np.array([ids == object_id for object_id in asked["objects"]], bool).reshape(-1, *ids.shape)
                self.perfect[asked["prompt"]] = answer_of({"tracked": masks, "framewise": masks}, shown)

    def __call__(self, url, timeout_s):
        self.url = url
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def close(self):
        pass

    def is_ready(self):
        return self.ready.pop(0) if len(self.ready) > 1 else self.ready[0]

    def stream(self, frames, prompt, *, encoded_frames=None, **options):
        self.calls.append(SimpleNamespace(frames=frames, encoded_frames=encoded_frames, prompt=prompt, options=options))
        told = self.told.get(prompt, self.perfect.get(prompt))
        if isinstance(told, BaseException):
            raise told
        yield from told(len(self.calls)) if callable(told) else told

    def tell(self, prompt, tracked, framewise=None):
        """Answers this prompt with these masks, [O, T, H, W]."""
        tracks = {"tracked": tracked, "framewise": tracked if framewise is None else framewise}
        self.told[prompt] = answer_of(tracks, self.perfect[prompt][0])


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    return tmp_path / "results" / "cpu" / "shapes-rvos.jsonl"


@pytest.fixture
def client(monkeypatch):
    fake = FakeClient()
    monkeypatch.setattr(cli, "SparrowClient", fake)
    monkeypatch.setattr(cli, "environment", lambda url, preset: dict(ENV))
    monkeypatch.setattr(asking, "POLL_S", 0)
    monkeypatch.delenv("SPARROW_SERVER", raising=False)
    return fake


@pytest.fixture
def data(tmp_path):
    write_data(tmp_path / "data" / "test")
    return tmp_path / "data"


def run(data, *arguments, benchmark="shapes-rvos"):
    out = data.parent / "out"
    return CliRunner().invoke(cli.evaluate, [benchmark, "--data", str(data), "-o", str(out), *map(str, arguments)])


def succeed(data, *arguments, **options):
    result = run(data, *arguments, **options)
    assert (result.exit_code, result.exception) == (0, None), result.output
    return result.output


def fail(data, *arguments, status=1, **options):
    """The one line that says why."""
    result = run(data, *arguments, **options)
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.output.rstrip().endswith(line)
    return line


COST = ("frames_per_s", "client_memory_mib")


def figures(results):
    """Without what asking took."""
    return {key: line["value"] for key, line in records.latest(results).items() if key[1] not in COST}


def run_file(data):
    return json.loads((data.parent / "out" / "run.json").read_text())


def report(data):
    return list(csv.DictReader(io.StringIO((data.parent / "out" / "report.csv").read_text())))


def test_perfect_answers_get_full_marks(client, data, results):
    output = succeed(data, "--server", "there:1")
    names = (
        "tracked_j_and_f",
        "framewise_j_and_f",
        "right_object_pct",
        "absent_no_mask_pct",
        "multi_phrase_j_and_f",
        "proposal_recall100_pct",
    )
    assert figures(results) == {("test_2_videos", name): 100 for name in names}
    lines = records.latest(results)
    assert {name: lines["test_2_videos", name]["n"] for name in names} == dict(zip(names, (4, 4, 4, 2, 2, 4), strict=True))
    assert all(lines["test_2_videos", name]["unit"] == "%" for name in names)
    assert all(line["env"] == {**ENV, "preset": "nano"} for line in lines.values())
    assert all(name in output for name in names)
    assert client.url == "there:1"


def test_whole_clips_are_asked_about_in_both_branches(client, data):
    succeed(data)
    assert sorted(call.prompt for call in client.calls) == sorted(asked["prompt"] for name in VIDEOS for asked in questions(name))
    for call in client.calls:
        assert call.options == {"branch": "both", "modality": "video", "proposal_debug": True}
        ids = annotation(VIDEOS[call.prompt[-2]])
        np.testing.assert_allclose(call.frames, np.repeat(ids[..., None] * 100.0, 3, -1), atol=60)  # lossy, but every frame in order


def test_figures_tell_what_went_wrong(client, data, results):
    ids = annotation(0)
    one, two = (ids == 1)[None], (ids == 2)[None]
    nothing = np.zeros_like(one)
    client.tell("Please segment shape 1 in a.", two, one)  # the other object, tracked
    client.tell("Please segment shape 2 in a.", nothing[:0])  # no object; right on the last frame, where it is not there
    client.tell("Please segment the star in a.", one)
    client.tell("Describe a.", np.concatenate([two, nothing]))
    client.perfect["Please segment shape 1 in b."][0].boxes[1] += 0.5
    succeed(data)
    assert figures(results) == pytest.approx(
        {
            ("test_2_videos", "tracked_j_and_f"): 100 * (0 + 1 / 3 + 2) / 4,
            ("test_2_videos", "framewise_j_and_f"): 100 * (1 + 1 / 3 + 2) / 4,
            ("test_2_videos", "right_object_pct"): 50,
            ("test_2_videos", "absent_no_mask_pct"): 50,
            ("test_2_videos", "multi_phrase_j_and_f"): 75,
            ("test_2_videos", "proposal_recall100_pct"): 75,
        },
        abs=1e-3,
    )


def test_report_has_a_line_per_question(client, data):
    client.tell("Please segment shape 1 in a.", (annotation(0) == 2)[None], (annotation(0) == 1)[None])
    succeed(data)
    rows = report(data)
    assert [(row["sample"], row["kind"]) for row in rows] == [
        (f"{name}/{index}", kind) for name in VIDEOS for index, kind in enumerate(("referring", "referring", "description", "absent"))
    ]
    assert rows[0] == {
        "sample": "a/0",
        "prompt": "Please segment shape 1 in a.",
        "failure": "",
        "kind": "referring",
        "answer": "1 objects",
        **dict.fromkeys(("tracked_j", "tracked_f", "tracked_j_and_f", "first_frame_j", "right_object"), "0.0"),
        **dict.fromkeys(("framewise_j", "framewise_f", "framewise_j_and_f"), "100.0"),
        "no_mask": "",
        "hidden": "0.0",
    }
    assert (rows[3]["no_mask"], rows[3]["tracked_j"], rows[3]["right_object"]) == ("100.0", "", "")


def test_ablation_asks_once_more_without_guidance(client, data, results):
    succeed(data, "--ablations")
    asked = [call for call in client.calls if call.options == {"branch": "both", "modality": "video", "detection_guidance": False}]
    assert len(asked) == 4 and len(client.calls) == 12
    assert all("Please segment shape" in call.prompt for call in asked)
    assert figures(results)["test_2_videos_box_and_seg", "first_frame_j"] == 100
    assert figures(results)["test_2_videos_seg_alone", "first_frame_j"] == 100
    hidden = [row["hidden"] for row in report(data) if row["kind"] == "referring"]
    for name, value in (("in_sight", "0.0"), ("occluded", "100.0")):
        line = records.latest(results)[f"test_2_videos_{name}", "tracked_j_and_f"]
        assert (line["value"], line["n"]) == (100, hidden.count(value))
    assert records.latest(results)["test_2_videos", "tracked_j_and_f"]["n"] == 4
    assert [row["sample"] for row in report(data)[:6]] == ["a/0", "a/1", "a/2", "a/3", "a/0_seg_alone", "a/1_seg_alone"]


def test_answers_are_not_asked_for_again(client, data, results):
    succeed(data)
    before = (data.parent / "out" / "report.csv").read_text()
    (data.parent / "out" / "predictions" / "b" / "2.json").unlink()
    succeed(data)
    assert [call.prompt for call in client.calls[8:]] == ["Describe b."]
    assert (data.parent / "out" / "report.csv").read_text() == before
    assert len(results.read_text().splitlines()) == 2 * (6 + len(COST))


def test_failures_are_listed_and_asked_again(client, data, results):
    client.told["Describe a."] = RequestFailed("sparrow: the decoder broke.", "sparrow", "")
    half = (annotation(0) == 1)[None, :2]
    client.tell("Please segment shape 1 in a.", half)
    result = run(data)
    assert result.exit_code == 1
    assert "Failed: a/2: sparrow: the decoder broke.\n" in result.output
    assert "Failed: a/0: sparrow: got tracked masks [2, 1], expected [3, 1]. See the server's log.\n" in result.output
    assert "Error: 2 of 8 questions failed, so no figure was added to benchmarks/results." in result.output
    assert not results.exists()
    failed = {row["sample"]: row for row in report(data) if row["failure"]}
    assert set(failed) == {"a/0", "a/2"} == set(run_file(data)["failures"])
    assert failed["a/2"]["failure"] == "sparrow: the decoder broke." and failed["a/2"]["tracked_j"] == ""
    assert {figure["metric"]: figure["n"] for figure in run_file(data)["figures"]}["tracked_j_and_f"] == 3

    client.told.clear()
    succeed(data)
    assert sorted(call.prompt for call in client.calls[8:]) == ["Describe a.", "Please segment shape 1 in a."]
    assert figures(results)["test_2_videos", "tracked_j_and_f"] == 100


def test_stopping_keeps_what_is_finished(client, data, results):
    client.told["Describe a."] = KeyboardInterrupt()
    line = fail(data, "--in-flight", 1)
    kept = sorted((data.parent / "out" / "predictions").rglob("*.json"))
    assert {"a/0.json", "a/1.json"} <= {f"{path.parent.name}/{path.name}" for path in kept} and len(kept) < 8
    assert line == f"Error: Stopped. The answers so far are in {data.parent / 'out'}, and the same command goes on."
    assert not results.exists()
    client.told.clear()
    client.calls.clear()
    succeed(data)
    assert len(client.calls) == 8 - len(kept)


def test_full_disk_ends_the_run_and_keeps_what_is_finished(client, data, monkeypatch):
    def write(path, fields, write_text=Path.write_text):
        if path.name == "2.json.part":
            write_text(path, fields[:10])
            raise OSError(28, "No space left on device")
        write_text(path, fields)

    monkeypatch.setattr(Path, "write_text", write)
    line = fail(data, "--in-flight", 1)
    assert line.startswith("Error: No space left on device. The answers so far are in ")
    assert (
        {"0.json", "1.json"}
        <= {path.name for path in (data.parent / "out" / "predictions" / "a").iterdir()}
        <= {"0.json", "1.json", "3.json"}
    )
    assert not (data.parent / "out" / "report.csv").exists()


@pytest.mark.parametrize(
    "error",
    [
        ServerUnavailable("Connection refused. Is `sparrow serve` running at that address?", "sparrow", ""),
        RequestFailed("Server is stopping, scheduler for model has stopped accepting new inference requests", "sparrow", ""),
    ],
)
def test_restart_of_the_server_is_waited_for(client, data, results, error):
    def gone_once(calls, gone=[]):  # noqa: B006
        if not gone:
            gone.append(True)
            client.ready = [False, False, True]
            raise error
        return client.perfect["Describe a."]

    client.told["Describe a."] = gone_once
    succeed(data)
    assert [call.prompt for call in client.calls].count("Describe a.") == 2
    assert figures(results)["test_2_videos", "multi_phrase_j_and_f"] == 100


def test_server_that_does_not_come_back_ends_the_run(client, data, monkeypatch):
    def gone(calls):
        client.ready = [False]
        raise ServerUnavailable("Connection refused. Is `sparrow serve` running at that address?", "sparrow", "")

    monkeypatch.setattr(asking, "PATIENCE_S", 0.05)
    client.told["Describe a."] = gone
    line = fail(data, "--in-flight", 1)
    assert line.startswith("Error: localhost:8001: the server went away and did not come back for 0.05 s. The answers so far are in ")
    assert {"0.json", "1.json"} <= {path.name for path in (data.parent / "out" / "predictions" / "a").iterdir()}


def test_question_that_brings_the_server_down_fails_alone(client, data):
    client.told["Describe a."] = ServerUnavailable("Socket closed. Is `sparrow serve` running at that address?", "sparrow", "")
    result = run(data)
    assert "Failed: a/2: Socket closed." in result.output and "Error: 1 of 8 questions failed" in result.output
    assert [call.prompt for call in client.calls].count("Describe a.") == asking.ATTEMPTS


def remove(path):
    return lambda folder: (folder / path).unlink()


def write(path, content):
    return lambda folder: (folder / path).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove("questions.json"), "questions.json: missing; "),
        (write("questions.json", b'{"a": ['), "questions.json: not readable as JSON (Expecting value"),
        (write("questions.json", b'{"a": []}'), "2 videos with 2 parts missing (first: ['questions about a']), expected a whole data set"),
        (write("meta_expressions.json", b'{"videos": {}}'), "got 0 videos"),
        (remove("videos/b.mp4"), "1 parts missing (first: ["),
        (remove("Annotations/b/00001.png"), "Annotations/b/00001.png'"),
    ],
)
def test_half_a_data_set_is_refused_in_one_line(client, data, damage, says):
    damage(data / "test")
    assert says in fail(data)
    result = run(data, "--check-data")
    assert result.exit_code == 1 and says in result.output and "Error: " in result.output
    assert not client.calls


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (write("Annotations/b/00002.png", b"PNG"), "00002.png: not a readable picture"),
        (write("videos/b.mp4", b"nothing"), "b.mp4: not a readable video"),
        (
            lambda folder: Image.new("P", (WIDTH, HEIGHT + 2)).save(folder / "Annotations" / "b" / "00000.png"),
            "Annotations/b/00001.png: got 64x48 px, expected 64x50 as the first frame.",
        ),
    ],
)
def test_check_data_opens_every_file(data, damage, says):
    assert run(data, "--check-data").stdout == f"{data}: whole; 8 questions to ask.\n"
    damage(data / "test")
    result = run(data, "--check-data")
    problem, error = result.stdout.splitlines()[-1], result.stderr.splitlines()[-1]
    assert says in problem and error == f"Error: {data}: got 1 problem, expected none. Mend or get again what is named above."
    assert result.exit_code == 1


def test_split_that_is_not_there_is_refused(client, data):
    assert f"{data / 'valid' / 'meta_expressions.json'}: missing; {data} holds test." in fail(data, "--split", "valid")
    assert "'nowhere' is not one of 'test', 'valid', 'train'." in fail(data, "--split", "nowhere", status=2)
    assert not client.calls


def test_unknown_benchmark_is_refused(client, data):
    assert "No such command 'davis'." in fail(data, benchmark="davis", status=2)


def test_results_need_a_folder(client, data):
    result = CliRunner().invoke(cli.evaluate, ["shapes-rvos", "--data", str(data)])
    assert result.exit_code == 2 and "Error: got no folder for the results, expected one. Add -o OUT." in result.output


def test_unreadable_video_fails_alone(client, data):
    (data / "test" / "videos" / "b.mp4").write_bytes(b"nothing")
    result = run(data)
    assert result.exit_code == 1
    assert "Failed: b/0: " in result.output and "b.mp4: not a readable video" in result.output
    assert "Error: 4 of 8 questions failed" in result.output


def test_video_that_differs_from_its_annotations_is_one_line(client, data):
    for path in (data / "test" / "Annotations" / "a").iterdir():
        Image.new("P", (WIDTH, HEIGHT + 2)).save(path)
    assert "prediction of a/0: got frames [3, 48, 64], expected [3, 50, 64] as annotated. Get the data set again." in fail(data)


def test_one_branch_is_scored_alone(client, data, results):
    client.perfect = {
        prompt: [event for event in events if getattr(event, "branch", "framewise") != "tracked" or isinstance(event, Summary)]
        for prompt, events in client.perfect.items()
    }
    succeed(data, "--branch", "framewise")
    assert {call.options["branch"] for call in client.calls} == {"framewise"}
    assert {metric: value for (_, metric), value in figures(results).items()} == {
        **dict.fromkeys(("framewise_j_and_f", "right_object_pct", "absent_no_mask_pct", "multi_phrase_j_and_f"), 100),
        "proposal_recall100_pct": 100,
    }
    assert "got answers of a run with branch framewise, not both. Choose another folder." in fail(data)


def test_request_parameters_are_sent_and_kept(client, data):
    succeed(data, "--option", "video_init=text_only", "--option", "box_prior_max_keep=2", "--option", "roi_helper=false")
    given = {"video_init": "text_only", "box_prior_max_keep": 2, "roi_helper": False}
    assert all(call.options.items() >= given.items() for call in client.calls)
    assert run_file(data)["options"] == {**given, "branch": "both"}
    assert "got answers of a run with box_prior_max_keep 2, not None." in fail(
        data, "--option", "video_init=text_only", "--option", "roi_helper=false"
    )
    assert "got 'branch', expected one of box_prior_filter, " in fail(data, "--option", "branch=both", status=2)
    assert "'many' is not a valid integer." in fail(data, "--option", "box_prior_max_keep=many", status=2)


def test_run_is_kept_with_its_figures(client, data, results):
    succeed(data)
    kept = run_file(data)
    assert (kept["benchmark"], kept["split"], kept["protocol"], kept["branches"]) == (
        "shapes-rvos",
        "test",
        "fixed",
        ["tracked", "framewise"],
    )
    assert (kept["questions"], kept["failures"], kept["environment"]) == (8, {}, {**ENV, "preset": "nano"})
    lines = {(line["workload"], line["metric"]): line["value"] for line in kept["figures"]}
    assert {key: value for key, value in lines.items() if key[1] not in COST} == figures(results)
    assert all(lines["test_8_questions", name] > 0 for name in COST)
    assert kept["figures"][0] == {"metric": "tracked_j_and_f", "workload": "test_2_videos", "value": 100, "unit": "%", "n": 4, "spread": 0}


def test_server_that_does_not_answer_is_one_line(client, data):
    client.ready = [False]
    assert fail(data) == "Error: localhost:8001: got no answer, expected a server that is ready. Is `sparrow serve` running there?"


def test_answers_of_another_server_are_not_taken_for_this_ones(client, data, monkeypatch):
    succeed(data)
    monkeypatch.setattr(cli, "environment", lambda url, preset: {**ENV, "precision": "float16"})
    assert "got answers of a run with precision float32, not float16. Choose another folder." in fail(data)


def test_answers_to_other_questions_are_not_taken_for_these(client, data):
    succeed(data)
    path = data / "test" / "questions.json"
    path.write_text(path.read_text().replace("Describe a.", "What is in a?"))
    assert "got an answer to 'Describe a.', expected one to 'What is in a?'. Choose another folder." in fail(data)


def test_broken_prediction_is_one_line(client, data):
    succeed(data)
    path = data.parent / "out" / "predictions" / "a" / "0.json"
    path.write_text("{")
    assert f"{path}: not a prediction (Expecting property name" in fail(data)


def test_predictions_survive_their_file(tmp_path):
    rng = np.random.default_rng(0)
    size = (FRAMES, HEIGHT, WIDTH)
    masks = rng.random((2, *size)) < 0.4
    boxes = [rng.random((count, 4)).astype(np.float32) for count in (0, 2)]
    tracks = {"tracked": [[rle(mask)["counts"] for mask in track] for track in masks]}
    before = Prediction("what?", "two é", "nano", ["one", "two"], boxes, rng.random((5, 4)).astype(np.float32), size, tracks)
    none = replace(before, phrases=[], selected_boxes=[], proposals=before.proposals[:0], tracks={"tracked": []})
    for prediction in (before, none):
        asking.write_prediction(tmp_path / "a" / "0.json", prediction)
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["0.json"]
        after = asking.read_prediction(tmp_path / "a" / "0.json")
        assert (after.prompt, after.answer, after.preset, after.phrases) == ("what?", "two é", "nano", prediction.phrases)
        assert (after.size, after.tracks) == (size, prediction.tracks)
        np.testing.assert_array_equal(after.proposals, prediction.proposals)
        for got, expected in zip(after.selected_boxes, prediction.selected_boxes, strict=True):
            np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal([before.masks("tracked", index) for index in range(3)], [*masks, np.zeros(size, bool)])


# Clips of pictures


@pytest.fixture
def mevis(tmp_path, client):
    """A data set that the stand-in knows all answers to."""
    write_mevis(tmp_path / "data")
    for sample in Mevis(tmp_path / "data", "valid_u").samples():
        masks = truth(sample.key)[None]
        client.perfect[sample.prompt] = answer_of({"tracked": masks, "framewise": masks})
    return tmp_path / "data"


def test_pictures_are_sent_as_they_are(client, mevis):
    output = succeed(mevis, benchmark="mevis")
    assert "tracked_j_and_f" in output and (mevis.parent / "out" / "framewise.zip").exists()
    call = next(call for call in client.calls if "0 in b" in call.prompt)
    assert call.frames is None
    assert call.encoded_frames == [path.read_bytes() for path in sorted((mevis / "valid_u" / "JPEGImages" / "b").iterdir())]
    assert call.options == {"box_prior_max_keep": 1, "max_new_tokens": 512, "modality": "video", "branch": "both"}
    lines = {(line["workload"], line["metric"]): line["value"] for line in run_file(mevis)["figures"] if line["metric"] not in COST}
    assert lines == {("valid_u", f"{branch}_{measure}"): 100 for branch in asking.BRANCHES for measure in ("j_and_f", "j", "f")}


def test_picture_that_the_server_cannot_read_is_named(client, mevis):
    picture = mevis / "valid_u" / "JPEGImages" / "b" / "00001.jpg"
    picture.write_bytes(b"\xff\xd8\xff")
    (prompt,) = [prompt for prompt in client.perfect if "0 in b" in prompt]
    client.told[prompt] = InvalidInput("sparrow.encoded_frames[1]: got 3 bytes that are no readable JPEG or PNG.", "sparrow", "")
    result = run(mevis, benchmark="mevis")
    assert f"Failed: b/0: {picture}: not a readable picture" in result.output
    assert "Error: 1 of 4 questions failed" in result.output
    assert not (mevis.parent / "out" / "tracked.zip").exists()


def test_refusal_of_readable_pictures_is_the_servers(client, mevis):
    (prompt,) = [prompt for prompt in client.perfect if "0 in b" in prompt]
    client.told[prompt] = InvalidInput("sparrow: got 2000 tokens, expected at most 512.", "sparrow", "")
    assert "Failed: b/0: sparrow: got 2000 tokens, expected at most 512." in run(mevis, benchmark="mevis").output


def test_question_that_cannot_be_scored_has_failed(client, mevis, results):
    change(mevis / "valid_u" / "mask_dict.json", lambda masks: masks.pop("3"))
    result = run(mevis, benchmark="mevis")
    assert result.exit_code == 1 and "Failed: b/0: b: expression 0: got 0 masks for 3 frames" in result.output
    assert not results.parent.exists()


@pytest.mark.serving
def test_a_real_server_is_evaluated(server, data, results):
    succeed(data, "--server", server.url, "--ablations")
    lines = records.latest(results)
    scores = [line["value"] for (_, metric), line in lines.items() if metric not in COST]
    assert len(scores) == 12 and all(0 <= score <= 100 for score in scores)
    assert lines["test_2_videos", "absent_no_mask_pct"]["value"] == 0  # the tiny model answers everything with an object
    assert {line["env"]["preset"] for line in lines.values()} == {"tiny"}
    prediction = json.loads((data.parent / "out" / "predictions" / "a" / "0.json").read_text())
    assert 0 < len(prediction["proposals"]) <= 100
    assert [len(track) for tracks in prediction["tracks"].values() for track in tracks] == [FRAMES, FRAMES]
    assert json.loads((data.parent / "out" / "predictions" / "a" / "0_seg_alone.json").read_text())["selected_boxes"] == [[]]


@pytest.mark.serving
def test_a_real_server_is_asked_about_pictures(server, tmp_path):
    write_mevis(tmp_path / "data")
    succeed(tmp_path / "data", "--server", server.url, benchmark="mevis")
    lines = {line["metric"]: line for line in run_file(tmp_path / "data")["figures"]}
    assert lines["tracked_j_and_f"]["n"] == 4 and 0 <= lines["tracked_j_and_f"]["value"] <= 100
    assert (tmp_path / "out" / "tracked" / "b" / "0" / "00002.png").exists()
