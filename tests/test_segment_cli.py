import json
from typing import Any, ClassVar

import av
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from pycocotools import mask as coco
from sparrow_client import (
    Answer,
    CapacityExceeded,
    InvalidInput,
    Objects,
    ServerUnavailable,
    Summary,
    TextPiece,
    TrackedObject,
)
from sparrow_client import segment as cli

from tests.responses import masks_of

HEIGHT, WIDTH = 24, 33
FIELDS = {
    "answer": "the disc [SEG] é",
    "branch": "tracked",
    "video_init": "text_only",
    "timings_ms": {"total": 12.3},
    "num_frames": 2,
}


def answer_for(num_frames, phrases):
    """What a server might say: noise for masks, a few boxes."""
    rng = np.random.default_rng(0)
    boxes = rng.random((3, 4)).astype(np.float32)
    objects = [TrackedObject(phrase, np.zeros(4, np.float32), boxes[index:], boxes[: index + 1]) for index, phrase in enumerate(phrases)]
    numbers = rng.random((num_frames, len(phrases))).astype(np.float32)
    frames = [
        masks_of(index, rng.random((len(phrases), HEIGHT, WIDTH)) < 0.4, (numbers[index], numbers[index] - 0.5))
        for index in range(num_frames)
    ]
    return Answer(Summary(FIELDS["answer"], "tracked", "text_only", FIELDS["timings_ms"], FIELDS), objects, frames)


class FakeClient:
    """Stands in for SparrowClient: keeps what it is asked and tells a prepared answer, or fails."""

    phrases = ("the disc", "a square")
    failure = None
    calls: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, url, *, timeout_s):
        self.url, self.timeout_s, self.is_open = url, timeout_s, False

    def __enter__(self):
        self.is_open = True
        return self

    def __exit__(self, *exception):
        self.is_open = False

    def segment(self, frames, prompt, *, on_event, **request):
        assert self.is_open
        type(self).calls.append({"url": self.url, "timeout_s": self.timeout_s, "frames": frames, "prompt": prompt, **request})
        on_event(TextPiece("the "))
        if self.failure:
            raise self.failure
        answer = answer_for(len(frames), self.phrases)
        for event in (TextPiece("disc"), Objects(answer.objects), *answer.frames, answer.summary):
            on_event(event)
        return answer


@pytest.fixture
def client(monkeypatch):
    """The class that the command sees; its fields may be set per test."""
    fresh = type("FakeClient", (FakeClient,), {"calls": []})
    monkeypatch.setattr(cli, "SparrowClient", fresh)
    monkeypatch.delenv("SPARROW_SERVER", raising=False)
    return fresh


@pytest.fixture
def clip(tmp_path):
    """A folder of two frames."""
    return write_frames(tmp_path / "clip", "first", "second")


def write_frames(folder, *stems):
    folder.mkdir()
    for level, stem in enumerate(stems):
        Image.new("RGB", (WIDTH, HEIGHT), (level * 50, 90, 90)).save(folder / f"{stem}.png")
    return folder


def run(*arguments, **environment):
    return CliRunner().invoke(cli.segment, [str(argument) for argument in arguments], env=environment)


def succeed(*arguments, **environment):
    result = run(*arguments, **environment)
    assert (result.exit_code, result.exception) == (0, None), result.output
    return result


def fail(*arguments, status=1):
    """The one line that a failed command prints."""
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.output.rstrip().splitlines()[-1:] == errors
    return errors[0]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read_video(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_clip_gives_exactly_these_files(client, clip, tmp_path):
    out = tmp_path / "new" / "out"
    succeed(clip, "the disc?", "-o", out)
    masks = [f"masks/{index}/{stem}.png" for index in (0, 1) for stem in ("first", "second")]
    assert files(out) == sorted(["answer.txt", "overlay.mp4", "result.json", *masks])
    assert (out / "answer.txt").read_text() == "the disc [SEG] é\n"


def test_masks_are_written_as_black_and_white_pictures(client, clip, tmp_path):
    succeed(clip, "the disc?", "-o", tmp_path / "out")
    answer = answer_for(2, client.phrases)
    for index in (0, 1):
        for frame, stem in zip(answer.frames, ("first", "second"), strict=True):
            with Image.open(tmp_path / "out" / "masks" / str(index) / f"{stem}.png") as picture:
                assert picture.mode == "L"
                np.testing.assert_array_equal(np.asarray(picture), frame.masks[index] * 255)


def test_result_holds_the_answer_and_every_mask(client, clip, tmp_path):
    succeed(clip, "the disc?", "-o", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    answer = answer_for(2, client.phrases)
    objects = result.pop("objects")
    assert result == {"prompt": "the disc?", **FIELDS}
    assert [entry["phrase"] for entry in objects] == ["the disc", "a square"]
    for index, entry in enumerate(objects):
        assert set(entry) == {"phrase", "selected_boxes_xyxy_norm", "boxes_xyxy_norm", "frames"}
        np.testing.assert_array_equal(np.float32(entry["selected_boxes_xyxy_norm"]), answer.objects[index].selected_boxes)
        np.testing.assert_array_equal(np.float32(entry["boxes_xyxy_norm"]), answer.objects[index].boxes)
        assert [frame["frame"] for frame in entry["frames"]] == ["first", "second"]
        for got, frame in zip(entry["frames"], answer.frames, strict=True):
            assert got["mask"]["size"] == [HEIGHT, WIDTH]
            np.testing.assert_array_equal(coco.decode(got["mask"]), frame.masks[index])
            assert (got["predicted_iou"], got["object_score"]) == (frame.predicted_iou[index], frame.object_scores[index])
            assert got["visible"] is bool(frame.visible[index])


def test_overlay_of_a_clip_shows_its_frames_in_colour_where_masks_are(client, clip, tmp_path):
    succeed(clip, "the disc?", "-o", tmp_path / "out")
    drawn = read_video(tmp_path / "out" / "overlay.mp4")
    assert [frame.shape for frame in drawn] == [(24, 34, 3)] * 2  # an even width
    client.phrases = ()
    succeed(clip, "the disc?", "-o", tmp_path / "plain")
    for frame, plain in zip(drawn, read_video(tmp_path / "plain" / "overlay.mp4"), strict=True):
        assert abs(frame.astype(int) - plain).mean() > 10


def test_picture_gives_a_picture_as_overlay(client, tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "picture.png")
    succeed(tmp_path / "picture.png", "the disc?", "-o", tmp_path / "out")
    assert files(tmp_path / "out") == ["answer.txt", "masks/0/00000.png", "masks/1/00000.png", "overlay.jpg", "result.json"]
    assert client.calls[0]["modality"] == "image"
    with Image.open(tmp_path / "out" / "overlay.jpg") as picture:
        assert picture.size == (WIDTH, HEIGHT)


def test_answer_without_objects_gives_no_masks(client, clip, tmp_path):
    client.phrases = ()
    result = succeed(clip, "how many?", "-o", tmp_path / "out")
    assert files(tmp_path / "out") == ["answer.txt", "overlay.mp4", "result.json"]
    assert json.loads((tmp_path / "out" / "result.json").read_text())["objects"] == []
    assert "Objects: none" in result.output


def test_summary_says_what_a_person_wants_to_know(client, clip, tmp_path):
    output = succeed(clip, "the disc?", "-o", tmp_path / "out").stdout
    for line in (
        "Answer:  the disc [SEG] é",
        "Objects: the disc, a square  (tracked)",
        f"Overlay: {tmp_path / 'out' / 'overlay.mp4'}",
        "Stages:  total 12 ms",
    ):
        assert line in output.splitlines()


def test_defaults_are_sent_to_the_local_server(client, clip, tmp_path):
    succeed(clip, "the disc?", "-o", tmp_path / "out")
    (call,) = client.calls
    frames = call.pop("frames")
    assert (frames.shape, frames.dtype, int(frames[1, 0, 0, 0])) == ((2, HEIGHT, WIDTH, 3), np.uint8, 50)
    assert call == {
        "url": "localhost:8001",
        "timeout_s": 300,
        "prompt": "the disc?",
        "modality": "video",
        "proposal_debug": False,
    }


def test_options_are_sent_on(client, clip, tmp_path):
    (tmp_path / "boxes.txt").write_text("1, 2, 3, 4, 99\n\n5 6\t7 8.5\n")
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "crop.png")
    options = (
        "--server",
        "host:1",
        "--branch",
        "framewise",
        "--video-init",
        "text_only",
        "--max-new-tokens",
        5,
        "--timeout",
        2.5,
    )
    succeed(
        clip,
        "the disc?",
        "-o",
        tmp_path / "out",
        *options,
        "--target-boxes",
        tmp_path / "boxes.txt",
        "--target-crop",
        tmp_path / "crop.png",
    )
    (call,) = client.calls
    assert (call["url"], call["timeout_s"], call["branch"], call["video_init"], call["max_new_tokens"]) == (
        "host:1",
        2.5,
        "framewise",
        "text_only",
        5,
    )
    assert call["target_boxes"].dtype == np.float32
    assert call["target_boxes"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8.5]]
    assert call["target_crop"].shape == (4, 5, 3)


def test_server_can_be_named_in_the_environment(client, clip, tmp_path):
    succeed(clip, "the disc?", "-o", tmp_path / "out", SPARROW_SERVER="elsewhere:9")
    assert client.calls[0]["url"] == "elsewhere:9"


def test_earlier_result_is_replaced_and_nothing_else(client, clip, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "picture.png")
    succeed(tmp_path / "picture.png", "the disc?", "-o", out)
    (out / "notes.txt").write_text("mine")
    client.phrases = ("the disc",)
    succeed(clip, "again?", "-o", out)
    assert files(out) == ["answer.txt", "masks/0/first.png", "masks/0/second.png", "notes.txt", "overlay.mp4", "result.json"]
    assert json.loads((out / "result.json").read_text())["prompt"] == "again?"


def test_folder_with_other_files_is_refused_and_left_alone(client, clip, tmp_path):
    error = fail(clip, "the disc?", "-o", clip)
    assert error == f"Error: {clip}: not empty, and no earlier result. Choose another folder."
    assert files(clip) == ["first.png", "second.png"]
    assert not client.calls


def test_file_is_refused_as_folder(client, clip, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert fail(clip, "the disc?", "-o", tmp_path / "out") == f"Error: {tmp_path / 'out'}: a file, expected a folder. Choose another."
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    "failure",
    [
        InvalidInput("sparrow.prompt: got the markup '[SEG]' in the text. Remove it.", "sparrow", "1"),
        ServerUnavailable("failed to connect. Is `sparrow serve` running at that address?", "sparrow", ""),
        CapacityExceeded("tracker: all 16 are in use.", "sparrow", "1"),
    ],
)
def test_failure_of_the_server_is_one_line_and_keeps_the_earlier_result(client, clip, tmp_path, failure):
    succeed(clip, "the disc?", "-o", tmp_path / "out")
    before = files(tmp_path / "out")
    client.failure = failure
    assert fail(clip, "the disc?", "-o", tmp_path / "out") == f"Error: {failure}"
    assert files(tmp_path / "out") == before


def test_bad_input_is_one_line_and_makes_no_folder(client, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    assert fail(tmp_path / "clip.mp4", "the disc?", "-o", tmp_path / "out").startswith(
        f"Error: {tmp_path / 'clip.mp4'}: not a readable video"
    )
    assert (
        fail(tmp_path / "gone.mp4", "the disc?", "-o", tmp_path / "out") == f"Error: {tmp_path / 'gone.mp4'}: no such file. Check the path."
    )
    assert not (tmp_path / "out").exists()
    assert not client.calls


@pytest.mark.parametrize("content", [b"1 2 3", b"1 2 3 4\n1 2", b"a b c d", b"", b"\xff\xfe\x00"])
def test_bad_boxes_are_one_line(client, clip, tmp_path, content):
    (tmp_path / "boxes.txt").write_bytes(content)
    error = fail(clip, "the disc?", "-o", tmp_path / "out", "--target-boxes", tmp_path / "boxes.txt")
    assert error.startswith(f"Error: {tmp_path / 'boxes.txt'}: ")
    assert error.endswith("four numbers a line.")
    assert not client.calls


@pytest.mark.parametrize(
    "options",
    [("--branch", "all"), ("--top-k", "0"), ("--video-init", "boxes"), ("--sample-fps", "0"), ("--sample-fps", "-1"), ("--timeout", "x")],
)
def test_option_out_of_range_is_a_usage_error(client, clip, tmp_path, options):
    assert f"Invalid value for '{options[0]}'" in fail(clip, "the disc?", "-o", tmp_path / "out", *options, status=2)


def test_folder_for_the_results_has_to_be_named(client, clip):
    assert "Missing option '-o'" in fail(clip, "the disc?", status=2)
