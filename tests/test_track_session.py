"""Tracking sessions of the client: what they send and make of the responses, on a server that misbehaves, and on the real one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from pycocotools import mask as coco
from sparrow_client import (
    AsyncSparrowClient,
    Cancelled,
    InvalidInput,
    Prompt,
    ServerUnavailable,
    SparrowClient,
    TrackedObject,
    UnknownSession,
    _shared_memory,
)
from sparrow_client._prompts import edit_tensors
from sparrow_client._protocol import TrackProtocol
from sparrow_client._shared_memory import FrameRegion, is_this_machine
from sparrow_client._stream import Stream
from sparrow_client._wire import content
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype

from ensemble.masks import binary_masks
from export.seeded import draw_frame
from tests.responses import mask_tensors

HEIGHT, WIDTH = 60, 80
FRAMES = [draw_frame(index / 12, HEIGHT, WIDTH) for index in range(12)]
BOX = Prompt(0, boxes=[0.1, 0.1, 0.5, 0.5])
QUESTION = "Please segment the moving shape in this video."


# What a session sends and hears ----------------------------------------------------------------------------------------


def protocol(prompts=(BOX,), in_flight=2, mask_format="bits"):
    return TrackProtocol(prompts, in_flight, mask_format)


def send(protocol, prompts=(), removed=(), reset=False, region=None, frame=FRAMES[0]):
    protocol.check(frame)
    return protocol.frame(frame, prompts, removed, reset, region)


def answer(request, error="", value=True):
    """The server's response: one object whose mask is all `value`, or an error."""
    response = service_pb2.ModelStreamInferResponse(error_message=error)
    response.infer_response.id = request.id
    if not error:
        frame_idx = request.parameters["frame_idx"].int64_param
        for name, array in mask_tensors(np.full((1, HEIGHT, WIDTH), value), ([1], [1]), frame_idx).items():
            response.infer_response.outputs.add(name=name, shape=[1, *array.shape], datatype=np_to_triton_dtype(array.dtype))
            response.infer_response.raw_output_contents.append(content(array))
    return response


def flags(request):
    return tuple(request.parameters[name].bool_param for name in ("sequence_start", "sequence_end"))


def inputs(request):
    return {tensor.name: list(tensor.shape) for tensor in request.inputs}


def test_session_starts_with_its_prompts_and_numbers_its_frames():
    session = protocol(mask_format="rle")
    requests = [send(session) for _ in range(3)]
    assert inputs(requests[0]) == {"frame": [1, HEIGHT, WIDTH, 3], "boxes": [1, 1, 4], "box_objects": [1, 1]}
    assert inputs(requests[1]) == {"frame": [1, HEIGHT, WIDTH, 3]}
    assert [flags(request) for request in requests] == [(True, False), (False, False), (False, False)]
    assert [request.parameters["frame_idx"].int64_param for request in requests] == [0, 1, 2]
    assert {request.parameters["mask_format"].string_param for request in requests} == {"rle"}
    assert {request.parameters["sequence_id"].int64_param for request in requests} == {session.session_id}
    assert len({request.id for request in requests}) == 3


def test_sessions_have_ids_of_their_own():
    ids = [protocol().session_id for _ in range(100)]
    assert len(set(ids)) == 100
    assert all(0 < session_id < 2**63 for session_id in ids)


def test_edits_go_with_their_frame():
    session = protocol()
    send(session)
    request = send(session, [Prompt(7, points=[0.5, 0.5])], removed=[0], reset=True)
    assert set(inputs(request)) == {"frame", "points", "point_labels", "point_objects", "removed_objects"}
    assert request.parameters["reset"].bool_param


@pytest.mark.parametrize("in_flight", [0, 1, 3])
def test_session_waits_while_more_frames_are_under_way_than_may_be(in_flight):
    session = protocol(in_flight=in_flight)
    requests = [send(session) for _ in range(in_flight)]
    assert not session.must_wait
    requests.append(send(session))
    assert session.must_wait
    session.hear(answer(requests[0]))
    assert not session.must_wait
    assert [result.frame_idx for result in session.take()] == [0]
    assert session.take() == []


def test_refused_frame_takes_the_count_back_and_those_behind_it_are_dropped():
    session = protocol(in_flight=3)
    requests = [send(session) for _ in range(4)]
    session.hear(answer(requests[0]))
    with pytest.raises(InvalidInput, match=r"^tracker: no\.$") as error:
        session.hear(answer(requests[1], "in ensemble 'sparrow_track', InvalidInput: tracker: no."))
    assert (error.value.frame_idx, error.value.request_id, error.value.model_name) == (1, requests[1].id, "sparrow_track")
    assert session.frame_idx == 1
    again = send(session)
    assert again.parameters["frame_idx"].int64_param == 1
    assert again.id not in {request.id for request in requests}
    for request in requests[2:]:
        session.hear(answer(request, "InvalidInput: tracker: got frame 2, expected frame 1."))
    session.hear(answer(again, value=False))
    results = session.take()  # that of frame 0, which was heard before the refusal, is not lost
    assert [result.frame_idx for result in results] == [0, 1]
    assert [bool(result.masks.any()) for result in results] == [True, False]


def test_refused_start_is_sent_again_with_its_prompts():
    session = protocol(in_flight=1)
    requests = [send(session), send(session)]
    with pytest.raises(InvalidInput):
        session.hear(answer(requests[0], "InvalidInput: no."))
    session.hear(answer(requests[1], "UnknownSession: not open."))
    again = send(session)
    assert flags(again) == (True, False)
    assert "boxes" in inputs(again)


def test_prompts_that_cannot_be_sent_leave_the_session_as_it_was():
    session = protocol()
    send(session)
    with pytest.raises(InvalidInput, match="says nothing") as error:
        send(session, [Prompt(3)])
    assert error.value.frame_idx == session.frame_idx == 1
    assert send(session).parameters["frame_idx"].int64_param == 1


@pytest.mark.parametrize(
    "frame", [FRAMES[0].astype(np.float32), FRAMES[0][..., :1], FRAMES[0][..., 0], FRAMES[0][:0], np.zeros((0, 0, 3), np.uint8)]
)
def test_what_is_no_frame_is_refused_before_it_is_sent(frame):
    with pytest.raises(InvalidInput, match=r"sparrow_track.frame: got \[.*\] (uint8|float32), expected \[height, width, 3\] uint8"):
        protocol().check(frame)


def test_negative_in_flight_is_refused():
    with pytest.raises(InvalidInput, match="got in_flight = -1, expected 0 or more"):
        protocol(in_flight=-1)


def test_broken_session_names_its_oldest_frame_and_is_over():
    session = protocol()
    requests = [send(session) for _ in range(3)]
    session.hear(answer(requests[0]))
    error = session.broke(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    assert isinstance(error, ServerUnavailable)
    assert (error.frame_idx, error.request_id) == (1, requests[1].id)
    assert not session.is_waiting
    assert [result.frame_idx for result in session.take()] == [0]
    with pytest.raises(UnknownSession, match="the session broke off"):
        session.check(FRAMES[0])
    with pytest.raises(UnknownSession):
        session.end()


def test_end_is_the_last_request_and_drops_what_is_under_way():
    session = protocol()
    requests = [send(session), send(session)]
    requests.append(session.end())
    assert flags(requests[-1]) == (False, True)
    assert inputs(requests[-1]) == {"frame": [1, 0, 0, 3]}
    for request in requests:
        assert session.is_waiting
        session.hear(answer(request, "InvalidInput: whatever"))
    assert not session.is_waiting
    assert session.take() == []
    with pytest.raises(UnknownSession, match="the session was closed"):
        session.check(FRAMES[0])


def test_late_response_is_ignored_when_the_session_was_abandoned():
    session = protocol()
    request = send(session)
    session.abandon("was cancelled")
    session.hear(answer(request))
    assert session.take() == []


# Prompts ---------------------------------------------------------------------------------------------------------------


def test_prompts_become_rows_that_name_their_objects():
    mask = np.zeros((4, 5), bool)
    tensors = edit_tensors(
        [
            Prompt(3, embedding=[1, 2], boxes=[[0, 0, 1, 1], [0, 0, 0.5, 0.5]], points=[[0.1, 0.2], [0.3, 0.4]], point_labels=[1, 0]),
            Prompt(-1, boxes=[0.2, 0.2, 0.3, 0.3]),
            Prompt(9, points=[0.5, 0.6]),
            Prompt(4, mask=mask),
        ],
        [5],
    )
    expected = {
        "text_embeddings": ([[1, 2]], np.float32),
        "text_objects": ([3], np.int32),
        "boxes": ([[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0.2, 0.2, 0.3, 0.3]], np.float32),
        "box_objects": ([3, 3, -1], np.int32),
        "points": ([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], np.float32),
        "point_labels": ([1, 0, 1], np.int32),
        "point_objects": ([3, 3, 9], np.int32),
        "masks": ([mask], bool),
        "mask_objects": ([4], np.int32),
        "removed_objects": ([5], np.int32),
    }
    assert set(tensors) == set(expected)
    for name, (values, dtype) in expected.items():
        np.testing.assert_array_equal(tensors[name], np.array(values, dtype))
        assert tensors[name].dtype == dtype


def test_object_of_an_answer_prompts_with_its_embedding_and_boxes():
    entry = TrackedObject("the dog", np.float32([1, 2]), np.zeros((3, 4), np.float32), np.float32([[0, 0, 1, 1]]))
    assert set(edit_tensors([entry.prompt(2)], [])) == {"text_embeddings", "text_objects", "boxes", "box_objects"}
    without_boxes = TrackedObject("the dog", np.float32([1, 2]), np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32))
    assert set(edit_tensors([without_boxes.prompt(2)], [])) == {"text_embeddings", "text_objects"}


@pytest.mark.parametrize(
    ("prompts", "removed", "message"),
    [
        ([Prompt(1)], [], "a prompt for object 1 that says nothing"),
        ([Prompt(1, boxes=[])], [], "a prompt for object 1 that says nothing"),
        ([Prompt(1, points=[[0, 0], [1, 1]], point_labels=[1])], [], "got 1 point_labels for the 2 points of object 1"),
        ([Prompt(1, boxes=[0, 0, 1, 1], point_labels=[1])], [], "got 1 point_labels for the 0 points of object 1"),
        ([Prompt(1, boxes=[0, 0, 1, 1]), Prompt(2, boxes=[0, 0, 1])], [], r"got boxes of shapes \[\(4,\), \(3,\)\]"),
        ([Prompt(2**31, boxes=[0, 0, 1, 1])], [], "got 2147483648 in box_objects"),
        ([], [-(2**31) - 1], "got -2147483649 in removed_objects"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(prompts, removed, message):
    with pytest.raises(InvalidInput, match=message):
        edit_tensors(prompts, removed)


# Shared memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def leaves_no_memory():
    """The test leaves no shared memory behind, however its sessions end."""
    before = set(Path("/dev/shm").glob("sparrow-*"))
    yield
    assert set(Path("/dev/shm").glob("sparrow-*")) <= before


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("localhost:8001", True),
        ("127.0.0.1:8001", True),
        ("[::1]:8001", True),
        ("unix:/tmp/triton", True),
        ("gpu-3:8001", False),
        ("10.0.0.1:8001", False),
        ("localhost.example.com:8001", False),
    ],
)
def test_shared_memory_is_offered_to_servers_on_this_machine(url, here):
    assert is_this_machine(url) is here


def test_frames_under_way_never_share_a_slot():
    session = protocol(in_flight=2)
    region = FrameRegion(3, FRAMES[0].nbytes)
    region.unlink()
    slots = {}
    rng = np.random.default_rng(0)
    for index in range(40):
        request = send(session, region=region, frame=FRAMES[index % 12])
        frame = request.inputs[0]
        assert frame.parameters["shared_memory_region"].string_param == region.name
        assert frame.parameters["shared_memory_byte_size"].int64_param == FRAMES[0].nbytes
        assert len(request.raw_input_contents) == len(request.inputs) - 1
        offset = frame.parameters["shared_memory_offset"].int64_param
        assert offset not in slots.values()
        assert os.pread(region._file, FRAMES[0].nbytes, offset) == FRAMES[index % 12].tobytes()
        slots[request.id] = offset
        while len(slots) > 2 or (slots and rng.random() < 0.3):
            response = answer(type(request)(id=next(iter(slots))))
            if rng.random() < 0.2:
                response.error_message = "InvalidInput: no."
            with suppress(InvalidInput):
                session.hear(response)
            del slots[response.infer_response.id]
    region.close()


def test_frame_of_another_size_travels_in_the_message():
    region = FrameRegion(3, FRAMES[0].nbytes)
    region.unlink()
    request = send(protocol(), region=region, frame=FRAMES[0][1:])
    assert not request.inputs[0].parameters
    assert request.raw_input_contents[0] == FRAMES[0][1:].tobytes()
    region.close()


def test_memory_that_is_not_there_is_an_error_and_leaves_no_file(monkeypatch, leaves_no_memory):
    with pytest.raises(OSError):  # the system has its own words
        FrameRegion(2**20, 2**30)
    monkeypatch.setattr(_shared_memory, "FOLDER", "/nowhere")
    with pytest.raises(FileNotFoundError):
        FrameRegion(1, 1)


# A server that misbehaves ----------------------------------------------------------------------------------------------


class Fake(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers frames below `answered`, then nothing; takes no shared memory."""

    answered = 2

    def __init__(self):
        self.released = threading.Event()
        self.unary = []

    def ModelStreamInfer(self, requests, context):
        for request in requests:
            if request.parameters["frame_idx"].int64_param >= self.answered:
                self.released.wait(10)
                return
            yield answer(request)

    def ModelInfer(self, request, context):
        self.unary.append(request)
        return service_pb2.ModelInferResponse()


@pytest.fixture
def fake():
    servicer, server = Fake(), grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    servicer.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    servicer.server = server
    server.start()
    yield servicer
    servicer.released.set()
    server.stop(0)


def test_server_that_falls_silent_is_an_error_in_time_and_the_session_can_be_closed(fake):
    with SparrowClient(fake.url, timeout_s=0.3) as client, client.track([BOX]) as session:
        assert [result.frame_idx for frame in FRAMES[:3] for result in session.push(frame)] == [0, 1]
        with pytest.raises(ServerUnavailable, match=r"got no response for 0.3 s") as error:
            session.push(FRAMES[3])
        assert error.value.frame_idx == 2
        with pytest.raises(UnknownSession, match="the session broke off"):
            session.push(FRAMES[4])
        assert session.finish() == []
    assert [flags(request) for request in fake.unary] == [(True, True)]  # the session was freed all the same


def test_server_that_dies_is_an_error_and_the_session_can_be_closed(fake):
    with SparrowClient(fake.url, timeout_s=30) as client:
        session = client.track([BOX], in_flight=3)
        for frame in FRAMES[:4]:
            session.push(frame)
        fake.released.set()
        fake.server.stop(0).wait()
        with pytest.raises(ServerUnavailable):
            session.finish()
        began = time.monotonic()
        session.close()
        session.close()
        assert time.monotonic() - began < 5


def test_server_without_shared_memory_gets_frames_in_messages(fake, leaves_no_memory):
    with SparrowClient(fake.url, timeout_s=5) as client, client.track([BOX], in_flight=0) as session:
        (result,) = session.push(FRAMES[0])
        assert not session.shared_memory
        assert result.masks.all()


def test_cancel_wakes_a_push_that_waits_in_another_thread(fake):
    with SparrowClient(fake.url, timeout_s=30) as client, ThreadPoolExecutor(1) as pool:
        session = client.track([BOX], in_flight=0)
        session.push(FRAMES[0])
        session.push(FRAMES[1])
        waiting = pool.submit(session.push, FRAMES[2])
        while not session._protocol.must_wait:
            time.sleep(0.01)
        session.cancel()
        with pytest.raises(Cancelled):
            waiting.result(timeout=5)
        with pytest.raises(UnknownSession, match="the session was cancelled"):
            session.push(FRAMES[3])


def test_interrupted_push_loses_nothing(fake):
    async def run():
        async with AsyncSparrowClient(fake.url, timeout_s=5) as client, client.track([BOX], in_flight=0) as session:
            await session.push(FRAMES[0])
            fake.answered = 1
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(session.push(FRAMES[1]), 0.1)
            assert session.frame_idx == 2  # it is under way, and its result will come
            await session.cancel()

    asyncio.run(run())


def test_session_that_never_got_a_frame_closes_without_a_server():
    with SparrowClient("127.0.0.1:1") as client, client.track([BOX]) as session:
        assert session.frame_idx == 0
        assert session.finish() == []
        session.cancel()


def test_options_without_a_question_are_refused():
    with SparrowClient("127.0.0.1:1") as client, pytest.raises(InvalidInput, match="got max_new_tokens, expected options with a question"):
        client.track([BOX], max_new_tokens=3)


# The real server -------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(server):
    with SparrowClient(server.url, timeout_s=60) as client:
        yield client


@pytest.fixture
def remote(server):
    """A client that cannot know that the server is on this machine."""
    with SparrowClient(f"127.0.0.2:{server.ports.grpc}", timeout_s=60) as client:
        yield client


def follow(client, frames=FRAMES, prompts=(BOX,), **options):
    """Every result of a session."""
    with client.track(prompts, **options) as session:
        results = [result for frame in frames for result in session.push(frame)]
        return results + session.finish()


async def follow_async(client, frames=FRAMES, prompts=(BOX,), **options):
    async with client.track(prompts, **options) as session:
        results = [result for frame in frames for result in await session.push(frame)]
        return results + await session.finish()


def assert_equal(results, expected):
    assert [result.frame_idx for result in results] == [result.frame_idx for result in expected]
    for one, other in zip(results, expected, strict=True):
        for name in ("object_ids", "masks", "boxes_px", "areas_px", "predicted_iou", "object_scores", "visible"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)


@pytest.fixture(scope="module")
def expected(server):
    """The results of a session that waits for every frame."""
    with SparrowClient(server.url, timeout_s=60) as client, client.track([BOX], in_flight=0) as session:
        results = []
        for index, frame in enumerate(FRAMES):
            (result,) = session.push(frame)
            assert (result.frame_idx, session.frame_idx) == (index, index + 1)
            results.append(result)
    assert len({result.masks.tobytes() for result in results}) > 1
    return results


@pytest.mark.serving
@pytest.mark.parametrize("in_flight", [1, 2, 50])
def test_pipelined_frames_give_what_waiting_for_each_gives(client, expected, in_flight):
    assert_equal(follow(client, in_flight=in_flight), expected)


@pytest.mark.serving
def test_frames_in_messages_give_what_shared_memory_gives(client, remote, expected, leaves_no_memory):
    with client.track([BOX]) as here, remote.track([BOX]) as there:
        for frame in FRAMES:
            here.push(frame)
            there.push(frame)
        assert (here.shared_memory, there.shared_memory) == (True, False)
    assert_equal(follow(remote), expected)


@pytest.mark.serving
def test_server_that_cannot_open_the_memory_gets_frames_in_messages(client, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(_shared_memory, "FOLDER", str(tmp_path))  # not where the server looks
    with client.track([BOX], in_flight=0) as session:
        results = [result for frame in FRAMES for result in session.push(frame)]
        assert not session.shared_memory
    assert_equal(results, expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.serving
def test_memory_is_given_back_when_a_session_ends(server, client):
    with triton.InferenceServerClient(server.url) as connection:
        before = dict(connection.get_system_shared_memory_status().regions)  # those of clients that were killed stay
        with client.track([BOX]) as session:
            session.push(FRAMES[0])
            assert len(connection.get_system_shared_memory_status().regions) == len(before) + 1
        assert dict(connection.get_system_shared_memory_status().regions) == before


@pytest.mark.serving
def test_every_mask_format_holds_the_same_masks(client, expected):
    for result, bits in zip(follow(client, mask_format="rle"), expected, strict=True):
        np.testing.assert_array_equal([coco.decode(rle) for rle in result.rle], bits.masks)
    for result, bits in zip(follow(client, mask_format="logits"), expected, strict=True):
        np.testing.assert_array_equal(binary_masks(result.mask_logits, HEIGHT, WIDTH), bits.masks)


@pytest.mark.serving
def test_question_starts_a_session_that_equals_its_answer(client):
    frames = np.stack(FRAMES[:5])
    for options in ({}, {"video_init": "text_only"}):
        answer = client.segment(frames, QUESTION, **options)
        for in_flight in (0, 2):
            with client.track(QUESTION, frames, in_flight=in_flight, **options) as session:
                assert session.text == answer.text
                assert [entry.phrase for entry in session.objects] == [entry.phrase for entry in answer.objects]
                np.testing.assert_array_equal(session.objects[0].embedding, answer.objects[0].embedding)
                assert session.frame_idx == 0
                results = session.push(FRAMES[5])
                assert len(results) >= 6 - in_flight
                results += session.finish()
            assert [result.frame_idx for result in results] == list(range(6))
            for one, other in zip(answer.frames, results, strict=False):
                np.testing.assert_array_equal(one.masks, other.masks)


@pytest.mark.serving
def test_first_frames_alone_are_tracked_by_finish(client):
    with client.track(QUESTION, FRAMES[:3]) as session:
        assert [result.frame_idx for result in session.finish()] == [0, 1, 2]


@pytest.mark.serving
def test_answer_that_names_no_object_is_an_error(client):
    with pytest.raises(InvalidInput, match=r"sparrow: got the answer '.+', expected one that names an object"):
        client.track(QUESTION, FRAMES[:2], max_new_tokens=2)


MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[10:40, 20:50] = True
KINDS = {
    "box": (Prompt(0, boxes=[0.1, 0.1, 0.5, 0.5]), {"boxes": [[0.1, 0.1, 0.5, 0.5]], "box_objects": [0]}),
    "boxes": (
        Prompt(5, boxes=[[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.6, 0.6]]),
        {"boxes": [[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.6, 0.6]], "box_objects": [5, 5]},
    ),
    "point": (Prompt(-3, points=[0.4, 0.5]), {"points": [[0.4, 0.5]], "point_labels": [1], "point_objects": [-3]}),
    "points": (
        Prompt(0, points=[[0.4, 0.5], [0.9, 0.9]], point_labels=[1, 0]),
        {"points": [[0.4, 0.5], [0.9, 0.9]], "point_labels": [1, 0], "point_objects": [0, 0]},
    ),
    "mask": (Prompt(2, mask=MASK), {"masks": MASK[None], "mask_objects": [2]}),
    "embedding": (Prompt(1, embedding=np.linspace(-1, 1, 64)), {"text_embeddings": [np.linspace(-1, 1, 64)], "text_objects": [1]}),
}


@pytest.mark.serving
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_of_each_kind_gives_what_its_tensors_give(server, client, kind):
    prompt, tensors = KINDS[kind]
    dtypes = {"boxes": np.float32, "points": np.float32, "text_embeddings": np.float32, "masks": bool}
    inputs = []
    for name, values in {"frame": FRAMES[0], **tensors}.items():
        array = np.asarray(values, dtypes.get(name, np.uint8 if name == "frame" else np.int32))[None]
        inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    (result,) = follow(client, FRAMES[:1], [prompt])
    with triton.InferenceServerClient(server.url) as connection:
        options = {"sequence_id": 31, "sequence_start": True, "sequence_end": True, "parameters": {"mask_format": "bits"}}
        raw = connection.infer("sparrow_track", inputs, **options)
    np.testing.assert_array_equal(result.encoded, raw.as_numpy("mask_bits")[0])
    assert result.object_ids.tolist() == [prompt.object_id]
    if kind == "mask":
        assert (result.masks[0] == MASK).mean() > 0.95


@pytest.mark.serving
def test_objects_come_and_go_at_any_frame(client):
    with client.track([BOX, Prompt(7, points=[0.5, 0.5])], in_flight=0) as session:
        edits = [
            {},
            {"prompts": [Prompt(3, mask=MASK)]},
            {"remove": [0]},
            {"prompts": [Prompt(7, boxes=[0.3, 0.3, 0.9, 0.9])]},
            {},
            {"prompts": [Prompt(1, boxes=[0.1, 0.1, 0.5, 0.5])], "reset": True},
        ]
        ids = [session.push(frame, **edit)[0].object_ids.tolist() for frame, edit in zip(FRAMES, edits, strict=False)]
    assert ids == [[0, 7], [0, 7, 3], [7, 3], [7, 3], [7, 3], [1]]


@pytest.mark.serving
def test_prompt_starts_its_object_anew(client):
    with client.track([Prompt(0, boxes=[0.6, 0.6, 0.9, 0.9])], in_flight=0) as session:
        for frame in FRAMES[:3]:
            session.push(frame)
        (again,) = session.push(FRAMES[0], [BOX])
    (alone,) = follow(client, FRAMES[:1])
    np.testing.assert_array_equal(again.masks, alone.masks)


@pytest.mark.serving
@pytest.mark.parametrize("in_flight", [0, 3])
def test_refused_frame_among_pipelined_ones_is_named_and_the_session_goes_on(client, in_flight):
    """Frames 4, 5 and 6 are of another size; what was sent behind a refused frame is dropped and sent again."""
    video = [frame[: HEIGHT - (index in (4, 5, 6))] for index, frame in enumerate(FRAMES)]
    results, refused, waiting = [], [], list(range(len(video)))
    counted = {}
    with client.track([BOX], in_flight=in_flight) as session:
        while True:
            try:
                if waiting:
                    counted[session.frame_idx] = index = waiting.pop(0)
                    results += session.push(video[index])
                else:
                    results += session.finish()
                    break
            except InvalidInput as error:
                assert "expected 60x80 px" in str(error)
                refused.append(counted[error.frame_idx])
                waiting = list(range(counted[error.frame_idx] + 1, len(video)))
    assert refused == [4, 5, 6]
    good = [frame for index, frame in enumerate(FRAMES) if index not in refused]
    assert_equal(results, follow(client, good, in_flight=0))


def open_again(client, session_id):
    """Starts a session under an id, which the server refuses while it holds one."""
    again = client.track([BOX], in_flight=0)
    again._protocol.session_id = session_id
    with again:
        return again.push(FRAMES[0])


@pytest.mark.serving
@pytest.mark.parametrize("num_frames", [1, 2, 6])
def test_cancelled_session_is_freed_at_once(client, num_frames, leaves_no_memory):
    for _ in range(4):
        session = client.track([BOX], in_flight=50)
        for frame in FRAMES[:num_frames]:
            session.push(frame)
        session.cancel()
        with pytest.raises(UnknownSession, match="the session was cancelled"):
            session.push(FRAMES[0])
        session.close()
        assert len(open_again(client, session.session_id)) == 1


@pytest.mark.serving
def test_closed_session_is_freed_at_once_with_frames_under_way(client):
    with client.track([BOX], in_flight=50) as session:
        for frame in FRAMES:
            session.push(frame)
    assert len(open_again(client, session.session_id)) == 1


@pytest.mark.serving
def test_session_that_the_server_closed_is_told_so_and_closes_quietly(client):
    with client.track([BOX], in_flight=2) as session:
        session.push(FRAMES[0])
        session.finish()
        with client.track([BOX]) as other:  # ends it behind its back
            other._protocol.session_id, other._protocol.frame_idx = session.session_id, 1
            other.push(FRAMES[1])
            other.finish()
        with pytest.raises(UnknownSession) as error:
            session.push(FRAMES[2])
            session.finish()
        assert error.value.frame_idx == 1


KILLED = """
import sys
from sparrow_client import Prompt, SparrowClient
from tests.test_track_session import FRAMES

session = SparrowClient(sys.argv[1]).track([Prompt(0, boxes=[0.2, 0.2, 0.9, 0.9])], in_flight=8)
for index in range(100000):
    session.push(FRAMES[index % 12])
    if index == 10:
        print(session.session_id, flush=True)
"""


def free(client, session_id):
    """Ends the session of a client that is gone: while one is open, Triton takes seconds to stop and leaves memory behind."""
    gone = client.track([BOX])
    gone._protocol.session_id = session_id
    gone._stream = Stream(client._stub)
    gone.cancel()


@pytest.mark.serving
def test_client_that_is_killed_disturbs_no_other_session(server, client, expected, leaves_no_memory):
    root = Path(__file__).parent.parent
    with client.track([BOX]) as session:
        results = []
        for frame in FRAMES:
            if frame is FRAMES[4]:
                other = subprocess.Popen([sys.executable, "-c", KILLED, server.url], cwd=root, stdout=subprocess.PIPE, text=True)
                session_id = int(other.stdout.readline())
            results += session.push(frame)
            if frame is FRAMES[6]:
                os.kill(other.pid, signal.SIGKILL)
                other.communicate()
        results += session.finish()
    assert_equal(results, expected)
    free(client, session_id)


ABANDONED = """
import sys
from sparrow_client import Prompt, SparrowClient
from tests.test_track_session import FRAMES

session = SparrowClient(sys.argv[1]).track([Prompt(0, boxes=[0.2, 0.2, 0.9, 0.9])], in_flight=8)
for frame in FRAMES:
    session.push(frame)
print(session.session_id)
"""


@pytest.mark.serving
def test_session_that_is_never_closed_does_not_keep_its_program_alive(server, client):
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", ABANDONED, server.url], cwd=root, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    free(client, int(run.stdout))


# asyncio ---------------------------------------------------------------------------------------------------------------


def with_async_client(server, action):
    async def run():
        async with AsyncSparrowClient(server.url, timeout_s=60) as client:
            return await action(client)

    return asyncio.run(run())


@pytest.mark.serving
@pytest.mark.parametrize("in_flight", [0, 2])
def test_async_session_equals_the_other(server, expected, in_flight):
    assert_equal(with_async_client(server, lambda client: follow_async(client, in_flight=in_flight)), expected)


@pytest.mark.serving
def test_async_answer_equals_the_other(server, client):
    frames = np.stack(FRAMES[:3])
    answer, events = client.segment(frames, QUESTION), []
    twin = with_async_client(server, lambda client: client.segment(frames, QUESTION, on_event=events.append))
    assert twin.text == answer.text
    assert events[-1] is twin.summary
    for one, other in zip(twin.frames, answer.frames, strict=True):
        np.testing.assert_array_equal(one.masks, other.masks)

    async def ask(client):
        assert await client.is_ready()
        async with client.track(QUESTION, frames) as session:
            assert session.text == answer.text
            return await session.finish()

    for one, other in zip(with_async_client(server, ask), answer.frames, strict=True):
        np.testing.assert_array_equal(one.masks, other.masks)


@pytest.mark.serving
def test_eight_async_sessions_at_once_equal_each_alone(server, client):
    prompts = [[Prompt(index, boxes=[0.05 * index, 0.1, 0.05 * index + 0.5, 0.6])] for index in range(8)]

    async def together(client):
        return await asyncio.gather(*(follow_async(client, prompts=own, in_flight=index % 3) for index, own in enumerate(prompts)))

    for results, own in zip(with_async_client(server, together), prompts, strict=True):
        alone = follow(client, prompts=own)
        assert [result.frame_idx for result in results] == list(range(12))
        for one, other in zip(results, alone, strict=True):
            assert one.object_ids.tolist() == [own[0].object_id]
            assert (one.masks == other.masks).mean() >= 0.998  # batches of other sizes round differently


@pytest.mark.serving
def test_async_session_is_refused_cancelled_and_closed_as_the_other(server, client):
    async def run(client):
        async with client.track([BOX], in_flight=3) as session:
            await session.push(FRAMES[0])
            with pytest.raises(InvalidInput) as error:
                await session.push(FRAMES[1][1:])
                await session.finish()
            assert error.value.frame_idx == session.frame_idx == 1
            results = await session.push(FRAMES[1]) + await session.finish()
            assert results[-1].frame_idx == 1
            await session.push(FRAMES[2])
            await session.cancel()
            with pytest.raises(UnknownSession, match="the session was cancelled"):
                await session.push(FRAMES[3])
        return session.session_id

    assert len(open_again(client, with_async_client(server, run))) == 1


def test_async_client_says_so_when_nobody_answers():
    async def run():
        async with AsyncSparrowClient("127.0.0.1:1", timeout_s=5) as client:
            assert not await client.is_ready()
            with pytest.raises(ServerUnavailable):
                await client.segment(np.stack(FRAMES[:1]), QUESTION)
            with pytest.raises(ServerUnavailable):
                async with client.track([BOX]) as session:
                    await session.push(FRAMES[0])
                    await session.finish()

    asyncio.run(run())
