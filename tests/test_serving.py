"""The real tritonserver with the tiny checkpoint: answers equal the in-process pipeline, bad requests hurt nobody else."""

from __future__ import annotations

import asyncio
import io
import json
import queue
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from PIL import Image
from pycocotools import mask as coco
from sparrow_client import (
    AsyncSparrowClient,
    CapacityExceeded,
    FrameMasks,
    InvalidInput,
    Objects,
    Prompt,
    ServerUnavailable,
    SparrowClient,
    SparrowClientError,
    Summary,
    TextPiece,
    UnknownSession,
    _shared_memory,
)
from sparrow_client._shared_memory import FrameRegion

from ensemble import settings
from ensemble.errors import SparrowError
from ensemble.options import Options
from ensemble.runner import open_session
from export.local import torch_pipeline
from export.seeded import ANSWER, draw_frame, write_clip

pytestmark = pytest.mark.serving

PROMPT = "Please segment the moving shape in this video."
SAME_BITS = 0.998
"""ONNX Runtime against eager torch: random weights put many logits near zero, where float32 noise decides."""


@pytest.fixture(scope="module")
def pipeline(tiny):
    return torch_pipeline(tiny)


@pytest.fixture
def client(server):
    with SparrowClient(server.url, timeout_s=60) as client:
        yield client


def clip(num_frames=3, height=60, width=80):
    return np.stack([draw_frame(index / max(1, num_frames), height, width) for index in range(num_frames)])


def locally(pipeline, frames, prompt=PROMPT, **options):
    """The in-process answer in the client's terms."""
    inputs = {"frames": frames, "prompt": np.array([prompt.encode()], object)}
    responses = list(pipeline.answer(inputs, {**options, "mask_format": "bits"}))
    text = b"".join(response["text"][0] for response in responses if "text" in response).decode()
    objects = next((response for response in responses if "phrases" in response), None)
    count = frames.shape[1] * frames.shape[2]
    masks = [np.unpackbits(response["mask_bits"], axis=1, count=count).astype(bool) for response in responses if "frame_idx" in response]
    return text, objects, masks, json.loads(responses[-1]["summary"][0])


@pytest.mark.parametrize(
    ("num_frames", "options"),
    [
        (3, {}),
        (3, {"video_init": "text_only"}),
        (3, {"branch": "framewise"}),
        (3, {"branch": "framewise", "detection_guidance": False}),
        (20, {"box_prior_max_keep": 1, "roi_helper": False}),
        (2, {"proposal_topk": 7, "coco_score_power": 1.0, "sa1b_score_power": 0.0, "roi_fusion_gamma": 0.5, "box_prior_filter": False}),
        (2, {"do_sample": True, "temperature": 0.1, "top_k": 3, "seed": 5, "target_placeholders": True}),
        (1, {}),
        (1, {"modality": "video"}),
    ],
)
def test_server_equals_the_pipeline_in_process(client, pipeline, num_frames, options):
    frames = clip(num_frames)
    text, objects, masks, summary = locally(pipeline, frames, **options)
    answer = client.segment(frames, PROMPT, **options)

    assert answer.text == text == ANSWER
    assert [entry.phrase for entry in answer.objects] == ["the moving shape"]
    assert (answer.summary.branch, answer.summary.video_init) == (summary["branch"], summary["video_init"])
    assert answer.summary.branch == ("framewise" if num_frames == 1 and not options else options.get("branch", "tracked"))
    np.testing.assert_allclose(answer.objects[0].embedding, objects["text_embeddings"][0], atol=1e-4)
    np.testing.assert_allclose(answer.objects[0].boxes, objects["boxes"], atol=1e-4)
    np.testing.assert_allclose(answer.objects[0].selected_boxes, objects["selected_boxes"], atol=1e-4)
    assert [frame.frame_idx for frame in answer.frames] == list(range(num_frames))
    for frame, expected in zip(answer.frames, masks, strict=True):
        assert frame.masks.shape == (1, *frames.shape[1:3])
        assert (frame.masks.reshape(1, -1) == expected).mean() >= SAME_BITS
        assert 0 < frame.masks.mean() < 1


def test_both_branches_equal_each_on_its_own(client):
    frames = clip(3)
    both = client.segment(frames, PROMPT, branch="both")
    assert both.summary.branch == "both"
    for branch, masks in both.branches.items():
        alone = client.segment(frames, PROMPT, branch=branch)
        assert [frame.branch for frame in alone.frames] == [branch] * 3
        for one, other in zip(masks, alone.frames, strict=True):
            assert (one.frame_idx, one.branch) == (other.frame_idx, branch)
            np.testing.assert_array_equal(one.masks, other.masks)


def test_proposals_are_shown_when_asked_for(client):
    answer = client.segment(clip(2), PROMPT, proposal_debug=True, proposal_topk=9)
    assert answer.proposals.frame.shape == (256, 256, 3)
    assert answer.proposals.boxes.shape == (9, 4)
    assert (np.diff(answer.proposals.scores) <= 0).all()
    assert answer.summary.fields["guidance"] == "ok"
    without = client.segment(clip(2), PROMPT, proposal_debug=True, detection_guidance=False)
    assert without.proposals.boxes.shape == (0, 4)
    assert without.summary.fields["guidance"] == "detection_guidance_disabled"
    assert client.segment(clip(2), PROMPT).proposals is None


def test_answer_names_the_policy_that_it_was_made_under(client):
    policy = client.segment(GOOD, PROMPT, box_prior_max_keep=1).summary.fields["policy"]
    assert policy == {**asdict(Options()), "box_prior_max_keep": 1, "mask_format": "bits"}


def test_sampled_answers_repeat_with_their_seed(client):
    draws = {seed: client.segment(GOOD, PROMPT, do_sample=True, temperature=10.0, seed=seed, max_new_tokens=8).text for seed in (1, 2)}
    assert draws[1] != draws[2]
    assert client.segment(GOOD, PROMPT, do_sample=True, temperature=10.0, seed=1, max_new_tokens=8).text == draws[1]


def test_stream_brings_text_before_objects_before_masks_in_order(client):
    kinds = [type(event) for event in client.stream(clip(2), PROMPT)]
    assert kinds == [*[TextPiece] * (len(kinds) - 4), Objects, FrameMasks, FrameMasks, Summary]
    assert kinds.count(TextPiece) > 1


def test_encoded_frames_give_the_answer_of_the_same_raw_frames(client):
    frames = clip(2)
    files = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "PNG")
        files.append(file.getvalue())
    raw, encoded = client.segment(frames, PROMPT), client.segment(None, PROMPT, encoded_frames=files)
    for one, other in zip(raw.frames, encoded.frames, strict=True):
        np.testing.assert_array_equal(one.masks, other.masks)


@pytest.fixture
def regions(server, monkeypatch):
    """The shared memory that clips of any size go to; nothing of it is left at the end."""
    monkeypatch.setattr(_shared_memory, "SHARED_CLIP_BYTES", 1)
    made, write = [], FrameRegion.write
    monkeypatch.setattr(FrameRegion, "write", lambda region, *arguments: made.append(region.name) or write(region, *arguments))
    yield made
    assert not [path for path in Path("/dev/shm").glob("sparrow-*") if path.name in made]
    with triton.InferenceServerClient(server.url) as connection:
        assert not set(made) & set(connection.get_system_shared_memory_status().regions)


def test_clip_in_shared_memory_gives_the_answer_of_one_in_the_message(client, regions):
    frames = clip()
    shared = client.segment(frames, PROMPT)
    assert len(regions) == 1
    _shared_memory.SHARED_CLIP_BYTES = frames.nbytes + 1
    in_message = client.segment(frames, PROMPT)
    assert len(regions) == 1
    assert shared.text == in_message.text
    for one, other in zip(shared.frames, in_message.frames, strict=True):
        np.testing.assert_array_equal(one.masks, other.masks)


def test_clip_in_shared_memory_is_given_back_when_the_question_is_refused_or_dropped(client, regions):
    with pytest.raises(InvalidInput, match="markup"):
        client.segment(clip(), "<image> what?")
    with pytest.raises(InvalidInput, match='"sequence_id"'):
        client.segment(clip(), PROMPT, sequence_id=1)
    events = client.stream(clip(20), PROMPT)
    next(events)
    events.close()
    assert len(regions) == 3


def test_asyncio_client_shares_memory_and_gives_it_back_when_it_is_cancelled(server, regions):
    async def ask():
        async with AsyncSparrowClient(server.url, timeout_s=60) as client:
            answer = await client.segment(clip(), PROMPT)
            question = asyncio.create_task(client.segment(clip(20), PROMPT))
            while len(regions) < 2:
                await asyncio.sleep(0.001)
            question.cancel()  # the server may still have to read the clip
            with suppress(asyncio.CancelledError):
                await question
            return answer

    assert len(asyncio.run(ask()).frames) == 3


def test_target_boxes_and_crop_are_read(client, pipeline):
    frames = clip(3)
    boxes = np.array([[10, 10, 40, 40], [12, 10, 42, 40]], np.float32)
    answer = client.segment(frames, PROMPT, target_boxes=boxes)
    assert answer.text == ANSWER
    assert client.segment(frames[:1], PROMPT, target_crop=frames[0, 10:40, 10:40]).text == ANSWER
    plain = client.segment(frames, PROMPT)
    assert np.abs(answer.objects[0].embedding - plain.objects[0].embedding).max() > 1e-4  # the language model saw the targets


def test_rle_is_cocos_compressed_format(server):
    with triton.InferenceServerClient(server.url) as connection:
        frame = draw_frame(0, 60, 80)
        inputs = track_inputs(frame, boxes=[[0.2, 0.2, 0.6, 0.6]])
        options = {"sequence_id": 77, "sequence_start": True, "sequence_end": True}
        rle = connection.infer("sparrow_track", inputs, **options).as_numpy("mask_rle")[0, 0]
        bits = connection.infer("sparrow_track", inputs, parameters={"mask_format": "bits"}, **options).as_numpy("mask_bits")[0, 0]
    mask = coco.decode({"size": [60, 80], "counts": rle})
    np.testing.assert_array_equal(mask, np.unpackbits(bits, count=60 * 80).reshape(60, 80))


# sparrow_track ---------------------------------------------------------------------------------------------------------


def track_inputs(frame, **objects):
    """Raw inputs of a sparrow_track request."""
    tensors = {"frame": (frame, "UINT8")}
    if "boxes" in objects:
        boxes = np.array(objects["boxes"], np.float32)
        tensors["boxes"] = (boxes, "FP32")
        tensors["box_objects"] = (np.arange(len(boxes), dtype=np.int32), "INT32")
    inputs = []
    for name, (array, dtype) in tensors.items():
        tensor = triton.InferInput(name, (1, *array.shape), dtype)
        tensor.set_data_from_numpy(np.ascontiguousarray(array[None]))
        inputs.append(tensor)
    return inputs


def test_tracking_an_answer_frame_by_frame_equals_the_answer(client):
    frames = clip(5)
    answer = client.segment(frames, PROMPT)
    with client.track([answer.objects[0].prompt(0)], in_flight=0) as session:
        tracked = [result for frame in frames for result in session.push(frame)]
    for one, other in zip(answer.frames, tracked, strict=True):
        np.testing.assert_array_equal(one.masks, other.masks)


def test_sessions_side_by_side_equal_each_alone(server):
    def follow(seed):
        rng = np.random.default_rng(seed)
        height, width = (int(side) for side in rng.integers(40, 90, 2))
        prompts = [Prompt(index, boxes=[*corner, *corner + 0.4]) for index, corner in enumerate(rng.uniform(0, 0.5, (1 + seed % 3, 2)))]
        with SparrowClient(server.url, timeout_s=60) as client, client.track(prompts, in_flight=0) as session:
            return [session.push(draw_frame(index / 6, height, width))[0].masks for index in range(6)]

    alone = [follow(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(follow, range(6)))
    for one, other in zip(alone, together, strict=True):
        for mask, twin in zip(one, other, strict=True):
            assert (mask == twin).mean() >= SAME_BITS


# Bad input -------------------------------------------------------------------------------------------------------------

GOOD = clip(2)
BAD_QUESTIONS = {
    "empty prompt": ({"prompt": ""}, "sparrow.prompt: got an empty text"),
    "blank prompt": ({"prompt": " \n"}, "sparrow.prompt: got an empty text"),
    "long prompt": ({"prompt": "horse " * 2000}, f"tokens with the template, expected at most {settings.MAX_PROMPT_TOKENS}"),
    "image markup": ({"prompt": "the <image> dog"}, "sparrow.prompt: got the markup '<image>'"),
    "video markup": ({"prompt": "<video>"}, "sparrow.prompt: got the markup '<video>'"),
    "target markup": ({"prompt": "a <tsf> b"}, "sparrow.prompt: got the markup '<tsf>'"),
    "seg markup": ({"prompt": "say [SEG]"}, "sparrow.prompt: got the markup '[SEG]'"),
    "box markup": ({"prompt": "say [BOX]"}, "sparrow.prompt: got the markup '[BOX]'"),
    "template markup": ({"prompt": "<|end|> now"}, "sparrow.prompt: got the markup '<|end|>'"),
    "no frames": ({"frames": None}, "sparrow.frames: got neither or both"),
    "zero frames": ({"frames": GOOD[:0]}, "sparrow.frames: got 0 frames"),
    "float frames": ({"frames": GOOD.astype(np.float32)}, "sparrow.frames: got dtype float32, expected UINT8"),
    "two channels": ({"frames": GOOD[..., :2]}, "frames"),
    "four channels": ({"frames": np.concatenate([GOOD, GOOD[..., :1]], -1)}, "frames"),
    "changing size": ({"frames": [GOOD[0], GOOD[1, 1:]]}, "sparrow.frames: got frames of sizes"),
    "1x1": ({"frames": GOOD[:, :1, :1]}, "sparrow.frames: got [2, 1, 1, 3] uint8"),
    "8000x8000": ({"frames": np.zeros((1, 8000, 8000, 3), np.uint8)}, "sparrow.frames: got [1, 8000, 8000, 3] uint8"),
    "too many frames": ({"frames": np.zeros((1025, 16, 16, 3), np.uint8)}, "Keep clip_frames within 1..1024"),
    "not a picture": ({"frames": None, "encoded_frames": [b"no picture"]}, "sparrow.encoded_frames[0]: got 10 bytes that are no readable"),
    "unknown option": ({"colour": "red"}, "sparrow: got an option 'colour'"),
    "wrong option": ({"branch": "all"}, "sparrow: got branch = 'all', expected tracked or framewise or both"),
    "option out of range": ({"max_new_tokens": 0}, "sparrow: got max_new_tokens = 0, expected int 1..1024"),
    "two pictures as an image": ({"modality": "image"}, "sparrow.frames: got 2 frames with modality image"),
}


@pytest.mark.parametrize("case", BAD_QUESTIONS)
def test_bad_question_is_refused_with_a_reason(client, case):
    request, message = BAD_QUESTIONS[case]
    request = {"frames": GOOD, "prompt": PROMPT, **request}
    with pytest.raises(InvalidInput) as error:
        client.segment(request.pop("frames"), request.pop("prompt"), **request)
    assert message in str(error.value)


def test_refusals_carry_their_status_for_callers_without_our_client(server):
    responses = queue.Queue()
    with triton.InferenceServerClient(server.url) as connection:
        connection.start_stream(lambda result, error: responses.put(error))
        prompt = triton.InferInput("prompt", [1], "BYTES")
        prompt.set_data_from_numpy(np.array([b""], object))
        connection.async_stream_infer("sparrow", [prompt])
        assert (
            responses.get(timeout=30).message().startswith("[StatusCode.INVALID_ARGUMENT] InvalidInput: sparrow.prompt: got an empty text")
        )
        for frames, dtype in ((np.zeros((2, 16, 16, 3), np.float32), "FP32"), (np.zeros((2, 16, 16, 4), np.uint8), "UINT8")):
            tensor = triton.InferInput("frames", frames.shape, dtype)
            tensor.set_data_from_numpy(frames)
            connection.async_stream_infer("sparrow", [tensor, prompt])
            assert "frames" in responses.get(timeout=30).message()
        frame = triton.InferInput("frame", [1, 1, 1, 3], "UINT8")
        frame.set_data_from_numpy(np.zeros((1, 1, 1, 3), np.uint8))
        with pytest.raises(triton.InferenceServerException) as error:
            connection.infer("sparrow_track", [frame], sequence_id=5, sequence_start=True)
        assert error.value.status() == "StatusCode.INVALID_ARGUMENT"


BOX = Prompt(0, boxes=[0.1, 0.1, 0.5, 0.5])
BAD_FRAMES = {
    "1x1": (np.zeros((1, 1, 3), np.uint8), InvalidInput, "sparrow_track.frame: got a frame of 1x1 px"),
    "8000x8000": (np.zeros((8000, 8000, 3), np.uint8), InvalidInput, "sparrow_track.frame: got a frame of 8000x8000 px"),
    "float": (np.zeros((40, 40, 3), np.float32), InvalidInput, "sparrow_track.frame: got [40, 40, 3] float32"),
    "grey": (np.zeros((40, 40, 1), np.uint8), InvalidInput, "sparrow_track.frame: got [40, 40, 1] uint8"),
    "other size": (GOOD[0, 1:], InvalidInput, "tracker: got a frame of 59x80 px, expected 60x80 px"),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_bad_frame_is_refused_and_the_session_goes_on(client, case):
    frame, kind, message = BAD_FRAMES[case]
    with client.track([BOX], in_flight=0) as session:
        (before,) = session.push(GOOD[0])
        with pytest.raises(kind, match=None) as error:
            session.push(frame)
        assert message in str(error.value)
        assert error.value.frame_idx == 1
        (after,) = session.push(GOOD[1])
    assert (before.frame_idx, after.frame_idx) == (0, 1)
    assert before.masks.shape == after.masks.shape == (1, *GOOD.shape[1:3])


def test_track_without_start_unknown_and_ended_sessions_are_told_so(server, client):
    with client.track([BOX]) as session:
        session.push(GOOD[0])
    for session_id in (4242, session.session_id):
        session = client.track([BOX], in_flight=0)
        session._protocol.session_id, session._protocol.frame_idx = session_id, 1
        with pytest.raises(UnknownSession, match=r"must specify the START flag.*open a new one"):
            session.push(GOOD[0])


BAD_OBJECTS = {
    "none": ([], InvalidInput, "got no objects with START"),
    "too many": ([Prompt(index, points=[0.5, 0.5]) for index in range(17)], CapacityExceeded, "got 17 objects .*, expected at most 16"),
    "turned box": ([Prompt(0, boxes=[0.5, 0.1, 0.1, 0.5])], InvalidInput, "expected x1 <= x2 and y1 <= y2"),
    "mask of another size": ([Prompt(0, mask=np.ones((3, 4), bool))], InvalidInput, "tracker.masks: got masks of 3x4 px"),
}


@pytest.mark.parametrize("case", BAD_OBJECTS)
def test_session_with_bad_objects_is_refused_and_leaves_nothing_behind(client, case):
    prompts, kind, message = BAD_OBJECTS[case]
    with client.track(prompts, in_flight=0) as refused, pytest.raises(kind, match=message) as error:
        refused.push(GOOD[0])
    assert error.value.frame_idx == 0
    with client.track([BOX], in_flight=0) as again, pytest.raises(UnknownSession, match="must specify the START flag"):
        again._protocol.session_id, again._protocol.frame_idx = refused.session_id, 1
        again.push(GOOD[0])


def test_sessions_beyond_the_cap_are_refused_until_one_ends(server, client):
    sessions = [client.track([BOX], in_flight=0) for _ in range(settings.MAX_SESSIONS + 1)]
    try:
        for session in sessions[:-1]:
            session.push(GOOD[0])
        with pytest.raises(CapacityExceeded, match=f"all {settings.MAX_SESSIONS} are in use. Retry when one has ended"):
            sessions[-1].push(GOOD[0])
        sessions[0].close()
        assert [result.frame_idx for result in sessions[-1].push(GOOD[0])] == [0]
    finally:
        for session in sessions:
            session.close()


def test_good_requests_are_answered_as_alone_while_bad_ones_are_refused(server, client):
    expected = client.segment(GOOD, PROMPT)

    def ask(index):
        with SparrowClient(server.url, timeout_s=120) as other:
            if index % 2:
                request, _ = list(BAD_QUESTIONS.values())[index % len(BAD_QUESTIONS)]
                request = {"frames": GOOD, "prompt": PROMPT, **request}
                with pytest.raises(SparrowClientError):
                    other.segment(request.pop("frames"), request.pop("prompt"), **request)
                return None
            return other.segment(GOOD, PROMPT)

    with ThreadPoolExecutor(6) as pool:
        answers = [answer for answer in pool.map(ask, range(24)) if answer]
    assert len(answers) == 12
    for answer in answers:
        assert answer.text == expected.text
        for one, other in zip(answer.frames, expected.frames, strict=True):
            assert (one.masks == other.masks).mean() >= SAME_BITS


def test_cancelled_requests_free_what_they_held(server, client):
    for _ in range(2 * settings.MAX_GENERATIONS):
        stream = client.stream(clip(4), PROMPT)
        next(stream)
        stream.close()
    assert client.segment(GOOD, PROMPT).text == ANSWER


def test_component_models_can_be_asked_on_their_own(server):
    with triton.InferenceServerClient(server.url) as connection:
        assert all(connection.is_model_ready(entry["name"]) for entry in connection.get_model_repository_index(as_json=True)["models"])
        states = triton.InferInput("final_states", [2, 64], "FP32")
        states.set_data_from_numpy(np.zeros((2, 64), np.float32))
        with pytest.raises(triton.InferenceServerException, match="prompt_projector"):
            connection.infer("prompt_projector", [states])  # a part of language_model, not a model
        frame = triton.InferInput("frame", [1, 60, 80, 3], "UINT8").set_data_from_numpy(np.zeros((1, 60, 80, 3), np.uint8))
        assert connection.infer("frame_features", [frame]).as_numpy("frame_embeddings").shape == (1, 1, 64, 16, 16)


def test_local_sessions_close_when_the_pipeline_fails(pipeline):
    with pytest.raises(SparrowError), open_session(pipeline.runner, "tracker") as session:
        session.step({"frame_size": np.array([4, 4], np.int32)})
    assert len(pipeline.runner.stateful["tracker"].sessions) == 0


# Command line ----------------------------------------------------------------------------------------------------------


def sparrow(*arguments, server):
    command = [sys.executable, "-c", "from sparrow_client.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={"SPARROW_SERVER": server.url, "PATH": "/usr/bin:/bin"})


def test_segment_writes_what_the_server_answered(server, tmp_path):
    write_clip(tmp_path / "clip.mp4", num_seconds=3)
    run = sparrow("segment", tmp_path / "clip.mp4", PROMPT, "-o", tmp_path / "out", server=server)
    assert run.returncode == 0, run.stderr
    assert ANSWER in run.stdout
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (tmp_path / "out" / "answer.txt").read_text() == ANSWER + "\n"
    assert {"prompt", "answer", "branch", "timings_ms", "objects"} <= result.keys()
    assert [frame["frame"] for frame in result["objects"][0]["frames"]] == ["00000", "00001", "00002"]
    for frame in result["objects"][0]["frames"]:
        png = np.asarray(Image.open(tmp_path / "out" / "masks" / "0" / f"{frame['frame']}.png"))
        np.testing.assert_array_equal(coco.decode(frame["mask"]) * 255, png)
    assert (tmp_path / "out" / "overlay.mp4").stat().st_size > 0


def test_cli_failures_are_one_readable_line(server, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name, message in {"broken.mp4": "not a readable video", "empty.mp4": "not a readable video", "absent.mp4": "no such file"}.items():
        run = sparrow("segment", tmp_path / name, PROMPT, "-o", tmp_path / "out", server=server)
        assert run.returncode == 1
        assert message in run.stderr
        assert len(run.stderr.strip().splitlines()) == 1
    write_clip(tmp_path / "clip.mp4", num_seconds=2)
    run = sparrow("segment", tmp_path / "clip.mp4", "", "-o", tmp_path / "out", server=server)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("Error: sparrow.prompt: got an empty text")


def test_port_in_use_is_one_readable_line(server, repository):
    run = sparrow("serve", "--grpc-port", server.ports.grpc, "--http-port", 0, "--metrics-port", 0, repository, server=server)
    assert run.returncode == 1
    assert f"grpc port {server.ports.grpc}: Address already in use" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_serve_leaves_nothing_behind_when_it_is_stopped(repository, tmp_path, stop):
    command = [sys.executable, "-c", "from sparrow_client.cli import main; main()", "serve", "--log", str(tmp_path / "log")]
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([*command, *ports, str(repository)], env=environment, stderr=subprocess.PIPE, text=True)
    lines = iter(process.stderr.readline, "")  # on a GPU there is one before
    url = next(ready[1] for line in lines if (ready := re.match(r"Ready: gRPC (\S+),", line)))
    with SparrowClient(url, timeout_s=60) as client, client.track([Prompt(0, boxes=[0.2, 0.2, 0.6, 0.6])], in_flight=0) as session:
        session.push(clip(1)[0])
    time.sleep(2 * settings.SWEEP_S)  # by then its figures have been passed on
    process.send_signal(stop)
    assert process.communicate(timeout=30) == (None, "")
    assert process.returncode == 0
    assert "Fatal Python error" not in (tmp_path / "log").read_text()
    assert not list(tmp_path.glob("sparrow-*"))
    with SparrowClient(url, timeout_s=5) as client:
        assert not client.is_ready()


def test_nobody_listening_is_server_unavailable():
    with SparrowClient("localhost:1", timeout_s=5) as client:
        assert not client.is_ready()
        with pytest.raises(ServerUnavailable, match="sparrow serve"):
            client.segment(GOOD, PROMPT)
