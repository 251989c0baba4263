"""The client without a server; tests/test_serving.py has the rest."""

import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import sparrow_client
from sparrow_client import (
    CapacityExceeded,
    InvalidInput,
    RequestFailed,
    ServerUnavailable,
    SparrowClient,
    SparrowClientError,
    UnknownSession,
    _client,
    _stubs,
    _types,
)
from sparrow_client._errors import error_from_triton
from tritonclient.utils import InferenceServerException

from ensemble import errors, masks
from ensemble.components import components
from ensemble.config import FULL

FRAMES = np.zeros((2, 16, 24, 3), np.uint8)
TIMEOUT_S = 0.4


def test_everything_public_is_there():
    for name in sparrow_client.__all__:
        assert hasattr(sparrow_client, name)


def test_import_needs_numpy_and_tritonclient_alone():
    code = "import sys, sparrow_client; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert {"sparrow_client", "numpy", "tritonclient"} <= loaded
    assert not loaded & {"av", "click", "cv2", "ensemble", "export", "PIL", "pycocotools", "torch", "tqdm"}


def test_stubs_name_the_inputs_of_the_public_components():
    for name in ("sparrow", "sparrow_track"):
        assert list(_stubs.INPUTS[name]) == [spec.name for spec in components(FULL)[name].inputs]


def test_stack_frames_takes_an_array_or_a_list_of_frames():
    np.testing.assert_array_equal(_client.stack_frames(FRAMES), FRAMES)
    np.testing.assert_array_equal(_client.stack_frames(list(FRAMES)), FRAMES)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "sparrow.frames: got 0 frames, expected 1 or more. Send the frames of the clip."),
        (FRAMES[:0], "sparrow.frames: got 0 frames, expected 1 or more. Send the frames of the clip."),
        (
            [FRAMES[0], FRAMES[1, 1:]],
            "sparrow.frames: got frames of sizes [(16, 24, 3), (15, 24, 3)], expected one size. Resize them.",
        ),
    ],
)
def test_stack_frames_refuses_no_frames_and_frames_of_several_sizes(frames, message):
    with pytest.raises(InvalidInput) as refused:
        _client.stack_frames(frames)
    assert (str(refused.value), refused.value.model_name) == (message, "sparrow")


def test_tensors_are_sent_as_they_are():
    prompt = np.array(["Größe?".encode()], object)
    sent = {tensor.name(): tensor for tensor in _client.to_inputs("sparrow", {"frames": FRAMES[:, ::-1], "prompt": prompt})}
    assert (sent["frames"].datatype(), sent["frames"].shape()) == ("UINT8", [2, 16, 24, 3])
    assert (sent["prompt"].datatype(), sent["prompt"].shape()) == ("BYTES", [1])
    assert sent["prompt"]._get_content()[4:] == "Größe?".encode()


@pytest.mark.parametrize(
    ("model", "name", "dtype", "expected"),
    [
        ("sparrow", "frames", "float32", "UINT8"),
        ("sparrow", "target_crop", "int64", "UINT8"),
        ("sparrow_track", "boxes", "float64", "FP32"),
    ],
)
def test_tensor_of_another_dtype_is_refused_before_it_is_sent(model, name, dtype, expected):
    with pytest.raises(InvalidInput) as refused:
        _client.to_inputs(model, {name: np.zeros((2, 4), dtype)})
    assert str(refused.value) == f"{model}.{name}: got dtype {dtype}, expected {expected}. Convert it."
    assert refused.value.model_name == model


def test_frame_masks_undo_the_server_s_bits():
    chosen = np.random.default_rng(0).random((3, 37, 23)) < 0.4
    scores = {"predicted_iou": np.float32([0.1, 0.2, 0.3]), "object_scores": np.float32([1, -1, 2])}
    got = _types.frame_masks(masks.respond(chosen, scores, {"mask_format": "bits"}), "framewise", 7, 37, 23)
    np.testing.assert_array_equal(got.masks, chosen)
    assert (got.frame_idx, got.branch, got.masks.dtype) == (7, "framewise", bool)
    assert got.predicted_iou is scores["predicted_iou"]
    assert got.object_scores is scores["object_scores"]
    assert got.visible.tolist() == [True, False, True]


def test_frame_masks_of_no_objects_are_empty():
    none = np.zeros(0, np.float32)
    response = masks.respond(np.zeros((0, 37, 23), bool), {"predicted_iou": none, "object_scores": none}, {"mask_format": "bits"})
    assert _types.frame_masks(response, "tracked", 0, 37, 23).masks.shape == (0, 37, 23)


def test_objects_get_the_boxes_that_name_them():
    boxes = np.arange(20, dtype=np.float32).reshape(5, 4)
    objects = _types.objects_from_tensors(
        {
            "phrases": np.array(["der große Hund".encode(), b""], object),
            "text_embeddings": np.float32([[1, 2], [3, 4]]),
            "selected_boxes": boxes,
            "selected_box_objects": np.int32([1, 0, 0, 1, 1]),
            "boxes": boxes[1:2],
            "box_objects": np.int32([0]),
        }
    )
    assert [entry.phrase for entry in objects] == ["der große Hund", ""]
    assert [entry.embedding.tolist() for entry in objects] == [[1, 2], [3, 4]]
    np.testing.assert_array_equal(objects[0].selected_boxes, boxes[[1, 2]])
    np.testing.assert_array_equal(objects[1].selected_boxes, boxes[[0, 3, 4]])
    np.testing.assert_array_equal(objects[0].boxes, boxes[[1]])
    assert objects[1].boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("server_error", "kind"),
    [
        (errors.InvalidInput, InvalidInput),
        (errors.UnknownSession, UnknownSession),
        (errors.CapacityExceeded, CapacityExceeded),
        (errors.ComponentFailed, RequestFailed),
    ],
)
@pytest.mark.parametrize("around", ["{}", "in ensemble 'sparrow_track', {}", "[request id: 7] {}"])
def test_errors_of_the_server_keep_their_kind_and_words(server_error, kind, around):
    words = "tracker.boxes: got 3,\nexpected 4."
    triton_error = InferenceServerException(around.format(f"{server_error.__name__}: {words}"), status="StatusCode.INTERNAL")
    error = error_from_triton(triton_error, "sparrow_track", "id-7")
    assert type(error) is kind
    assert str(error) == words
    assert (error.model_name, error.request_id) == ("sparrow_track", "id-7")


@pytest.mark.parametrize(
    ("message", "kind", "advice"),
    [
        (
            "failed to connect to all addresses; Connection refused",
            ServerUnavailable,
            "Is `sparrow serve` running at that address?",
        ),
        ("errors resolving nowhere:1: Domain name not found", ServerUnavailable, "Is `sparrow serve` running at that address?"),
        ("Deadline Exceeded", ServerUnavailable, "Is `sparrow serve` running at that address?"),
        ("sequence 5 of model 'tracker' must specify the START flag on the first request", UnknownSession, "open a new one."),
        ("unexpected shape for input 'frames' for model 'sparrow'. Expected [-1,-1,-1,3], got [2,3]", InvalidInput, ""),
        ("something else", RequestFailed, ""),
        ("", RequestFailed, ""),
    ],
)
def test_triton_s_own_errors_are_told_apart(message, kind, advice):
    error = error_from_triton(InferenceServerException(message), "sparrow", "")
    assert type(error) is kind
    assert isinstance(error, SparrowClientError)
    assert str(error).startswith(message)
    assert str(error).endswith(advice)


@pytest.fixture
def closed_port():
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return port


@pytest.fixture
def silent_port():
    """A port that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


CALLS = {
    "segment": lambda client: client.segment(FRAMES, "Where is it?"),
    "stream": lambda client: next(client.stream(FRAMES, "Where is it?")),
    "track": lambda client: client.track(boxes=np.float32([[0, 0, 1, 1]])).push(FRAMES[0]),
}


@pytest.mark.parametrize("port", ["closed_port", "silent_port"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_server_is_unavailable_within_the_timeout_when_nobody_answers(request, call, port):
    began = time.monotonic()
    with (
        SparrowClient(f"127.0.0.1:{request.getfixturevalue(port)}", timeout_s=TIMEOUT_S) as client,
        pytest.raises(ServerUnavailable) as error,
    ):
        call(client)
    assert time.monotonic() - began < 3 * TIMEOUT_S
    assert error.value.model_name in ("sparrow", "sparrow_track")
    assert error.value.request_id


@pytest.mark.parametrize("port", ["closed_port", "silent_port"])
def test_client_is_not_ready_when_nobody_answers(request, port):
    with SparrowClient(f"127.0.0.1:{request.getfixturevalue(port)}", timeout_s=TIMEOUT_S) as client:
        assert client.is_ready() is False


@pytest.mark.parametrize("options", [{"branch": None}, {"max_new_tokens": [1]}, {"max_new_tokens": np.int64(3)}, {"timeout": 5}])
def test_option_that_cannot_be_sent_is_refused_at_once(silent_port, options):
    with (
        SparrowClient(f"127.0.0.1:{silent_port}", timeout_s=60) as client,
        pytest.raises(InvalidInput, match=f'"{next(iter(options))}"'),
    ):
        client.segment(FRAMES, "Where is it?", **options)


def test_session_that_never_got_a_frame_closes_without_a_server(closed_port):
    with SparrowClient(f"127.0.0.1:{closed_port}") as client, client.track(embeddings=np.zeros((1, 4))) as session:
        assert session.frame_idx == 0


def test_sessions_have_ids_of_their_own():
    with SparrowClient() as client:
        ids = [client.track().session_id for _ in range(100)]
    assert len(set(ids)) == 100
    assert all(0 < session_id < 2**63 for session_id in ids)


def test_track_numbers_boxes_as_objects_unless_told_otherwise():
    boxes = [[0, 0, 1, 1], [0, 0, 0.5, 0.5]]
    with SparrowClient() as client:
        each, shared = client.track(boxes=boxes), client.track(boxes=boxes, box_objects=[0, 0], embeddings=[[1, 2]])
    assert each._start["box_objects"].tolist() == [0, 1]
    assert set(each._start) == {"boxes", "box_objects"}
    assert shared._start["box_objects"].tolist() == [0, 0]
    assert {name: str(array.dtype) for name, array in shared._start.items()} == {
        "text_embeddings": "float32",
        "boxes": "float32",
        "box_objects": "int32",
    }
