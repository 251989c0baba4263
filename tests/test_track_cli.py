"""`sparrow track` on the real tritonserver."""

from __future__ import annotations

import functools
import http.server
import json
import signal
import subprocess
import sys
import threading
import time

import av
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from pycocotools import mask as coco
from sparrow_client import Prompt, SparrowClient
from sparrow_client._overlay import blend, write_video
from sparrow_client.track import track

from export.seeded import ANSWER, draw_frame

HEIGHT, WIDTH, NUM_FRAMES, FPS = 48, 64, 9, 5
FRAMES = [draw_frame(index / NUM_FRAMES, HEIGHT, WIDTH) for index in range(NUM_FRAMES)]
QUESTION = "Please segment the moving shape in this video."
BOX = "0.2,0.3,0.6,0.8"


@pytest.fixture
def folder(tmp_path):
    """The frames as pictures."""
    (tmp_path / "frames").mkdir()
    for index, frame in enumerate(FRAMES):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{index:05d}.png")
    return tmp_path / "frames"


@pytest.fixture
def video(tmp_path):
    """The frames as a video, whose container does not know how many there are."""
    write_video(tmp_path / "clip.mkv", FRAMES, FPS)
    return tmp_path / "clip.mkv"


def run(*arguments, server=None):
    environment = {"SPARROW_SERVER": server.url if server else "127.0.0.1:1"}
    return CliRunner().invoke(track, [str(argument) for argument in arguments], env=environment)


def succeed(*arguments, server):
    result = run(*arguments, server=server)
    assert (result.exit_code, result.exception) == (0, None), result.output
    return result


def fail(*arguments, server=None, status=1):
    """The one line that a failed command prints."""
    result = run(*arguments, server=server)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.output.rstrip().splitlines()[-1]


def files(out):
    return sorted(path.name for path in out.iterdir())


def lines(out):
    return [json.loads(line) for line in (out / "tracks.jsonl").read_text().splitlines()]


def read_video(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.serving
def test_question_about_a_video_gives_a_line_for_every_frame(server, video, tmp_path):
    out = tmp_path / "new" / "out"
    output = succeed(video, QUESTION, "-o", out, "--first-frames", 4, server=server).stdout
    assert files(out) == ["answer.txt", "overlay.mp4", "preview.jpg", "tracks.jsonl"]
    assert (out / "answer.txt").read_text() == ANSWER + "\n"
    assert [line["frame"] for line in lines(out)] == list(range(NUM_FRAMES))
    for line in lines(out):
        (entry,) = line["objects"]
        assert set(entry) == {"object_id", "mask", "box_xyxy_px", "area_px", "predicted_iou", "object_score", "visible"}
        mask = coco.decode(entry["mask"])
        assert (mask.shape, mask.sum()) == ((HEIGHT, WIDTH), entry["area_px"])
        x1, y1, x2, y2 = entry["box_xyxy_px"]
        assert mask[y1:y2, x1:x2].sum() == mask.sum()
    for line in (f"Answer:  {ANSWER}", "Objects: the moving shape", f"Tracks:  {out / 'tracks.jsonl'}  (9 frames)"):
        assert line in output


@pytest.mark.serving
def test_tracks_and_overlay_show_what_a_session_gives(server, folder, tmp_path):
    succeed(folder, "--box", BOX, "-o", tmp_path / "out", server=server)
    with SparrowClient(server.url) as client, client.track([Prompt(0, boxes=[0.2, 0.3, 0.6, 0.8])]) as session:
        results = [result for frame in FRAMES for result in session.push(frame)] + session.finish()
    drawn = read_video(tmp_path / "out" / "overlay.mp4")
    assert len(drawn) == NUM_FRAMES
    for frame, result, line, picture in zip(FRAMES, results, lines(tmp_path / "out"), drawn, strict=True):
        (entry,) = line["objects"]
        np.testing.assert_array_equal(coco.decode(entry["mask"]), result.masks[0])
        assert (entry["predicted_iou"], entry["object_score"]) == (result.predicted_iou[0], result.object_scores[0])
        assert abs(picture.astype(int) - blend(frame, result.masks)).mean() < 12
    with Image.open(tmp_path / "out" / "preview.jpg") as preview:  # the last frame
        assert abs(np.asarray(preview).astype(int) - drawn[-1]).mean() < 12


@pytest.mark.serving
def test_boxes_points_and_masks_are_objects_in_this_order(server, folder, tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:30, 10:40] = 3
    Image.fromarray(mask).save(tmp_path / "mask.png")
    prompts = ("--mask", tmp_path / "mask.png", "--point", "0.5,0.5", "--box", BOX, "--box", "0.1,0.1,0.9,0.9")
    output = succeed(folder, *prompts, "-o", tmp_path / "out", server=server).stdout
    assert "Answer" not in output
    assert files(tmp_path / "out") == ["overlay.mp4", "preview.jpg", "tracks.jsonl"]
    assert all([entry["object_id"] for entry in line["objects"]] == [0, 1, 2, 3] for line in lines(tmp_path / "out"))
    assert (coco.decode(lines(tmp_path / "out")[0]["objects"][3]["mask"]) == (mask > 0)).mean() > 0.95


@pytest.mark.serving
def test_input_may_be_shorter_than_what_is_asked_about(server, folder, tmp_path):
    succeed(folder, QUESTION, "-o", tmp_path / "out", server=server)
    assert len(lines(tmp_path / "out")) == NUM_FRAMES
    succeed(folder / "00000.png", QUESTION, "-o", tmp_path / "out", server=server)
    assert len(lines(tmp_path / "out")) == 1


@pytest.mark.serving
def test_url_is_read_as_it_comes(server, video, tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        succeed(f"http://127.0.0.1:{web.server_port}/{video.name}", "--box", BOX, "-o", tmp_path / "out", server=server)
        web.shutdown()
    assert len(lines(tmp_path / "out")) == NUM_FRAMES


@pytest.mark.serving
def test_results_replace_those_of_an_earlier_run(server, folder, tmp_path):
    out = tmp_path / "out"
    succeed(folder, QUESTION, "-o", out, server=server)
    (out / "notes.txt").write_text("mine")
    succeed(folder / "00000.png", "--box", BOX, "-o", out, server=server)
    assert files(out) == ["notes.txt", "overlay.mp4", "preview.jpg", "tracks.jsonl"]
    assert len(lines(out)) == 1


@pytest.mark.serving
def test_frame_that_is_refused_ends_the_run_with_what_there_is(server, folder, tmp_path):
    Image.fromarray(FRAMES[0][:40]).save(folder / "00005.png")
    error = fail(folder, "--box", BOX, "-o", tmp_path / "out", server=server)
    assert error == "Error: tracker: got a frame of 40x64 px, expected 48x64 px as the session's first. Resize it, or open another session."
    assert 4 <= len(lines(tmp_path / "out")) <= 5
    assert len(read_video(tmp_path / "out" / "overlay.mp4")) == len(lines(tmp_path / "out"))


@pytest.mark.serving
def test_ctrl_c_ends_an_endless_input_with_what_there_is(server, folder, tmp_path):
    for index in range(NUM_FRAMES, 5000):
        (folder / f"{index:05d}.png").hardlink_to(folder / f"{index % NUM_FRAMES:05d}.png")
    out = tmp_path / "out"
    # Tests that run in the background inherit that Ctrl-C is ignored, and would hand it on.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from sparrow_client.cli import main; main()"
    command = [sys.executable, "-c", code, "track", folder, "--box", BOX, "-o", out, "--server", server.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not ((out / "preview.jpg").exists() and len(lines(out)) > 3):
        time.sleep(0.05)
    with Image.open(out / "preview.jpg") as preview:
        assert preview.size == (WIDTH, HEIGHT)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    num_frames = len(lines(out))
    assert f"({num_frames} frames)" in output or f"({num_frames - 1} frames)" in output
    assert 3 < num_frames < 5000
    assert num_frames - len(read_video(out / "overlay.mp4")) in (0, 1)  # the signal may come between the two


def test_what_to_track_has_to_be_said_once(folder, tmp_path):
    assert fail(folder, "-o", tmp_path / "out", status=2) == "Error: Say what to track: PROMPT, or --box, --point and --mask."
    assert fail(folder, QUESTION, "--box", BOX, "-o", tmp_path / "out", status=2).startswith("Error: Say what to track")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "prompt", [("--box", "1,2,3"), ("--box", "a,b,c,d"), ("--point", "1,2,3"), ("--point", ""), ("--first-frames", "1025")]
)
def test_prompt_that_is_no_prompt_is_a_usage_error(folder, tmp_path, prompt):
    assert f"Invalid value for '{prompt[0]}'" in fail(folder, *prompt, "-o", tmp_path / "out", status=2)


def test_bad_input_is_one_line_and_makes_no_folder(folder, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mask.png").write_bytes(b"no picture")
    for arguments, message in {
        (tmp_path / "gone.mp4", QUESTION): "no such file. Check the path.",
        (tmp_path / "clip.mp4", QUESTION): "not a readable video",
        (tmp_path / "empty", QUESTION): "no .jpg, .jpeg, .png files in the folder",
        (folder, "--mask", tmp_path / "mask.png"): "not a readable picture",
        ("rtsp://127.0.0.1:1/camera", QUESTION): "not a readable video",
    }.items():
        error = fail(*arguments, "-o", tmp_path / "out")
        assert error.startswith("Error: ")
        assert message in error
        assert not (tmp_path / "out").exists()


def test_folder_of_somebody_else_is_left_alone(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "not empty, and no earlier result" in fail(folder, QUESTION, "-o", tmp_path / "out")
    assert files(tmp_path / "out") == ["thesis.txt"]


def test_server_that_is_not_there_is_one_line(folder, tmp_path):
    for what in ((QUESTION,), ("--box", BOX)):
        assert "Is `sparrow serve` running at that address?" in fail(folder, *what, "-o", tmp_path / "out")
        assert files(tmp_path / "out") == []
