"""The client without a server; tests/test_serving.py has the rest."""

import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import sparrow_client
from grpc import StatusCode
from pycocotools import mask as coco
from sparrow_client import (
    Cancelled,
    CapacityExceeded,
    InvalidInput,
    Prompt,
    RequestFailed,
    ServerUnavailable,
    SparrowClient,
    SparrowClientError,
    UnknownSession,
    _question,
    _stubs,
    _types,
    _wire,
)
from sparrow_client._errors import error_from_status, error_from_text

from ensemble import errors
from ensemble.components import components
from ensemble.config import FULL
from tests.responses import masks_of

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
    np.testing.assert_array_equal(_question.stack_frames(FRAMES), FRAMES)
    np.testing.assert_array_equal(_question.stack_frames(list(FRAMES)), FRAMES)


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
        _question.stack_frames(frames)
    assert (str(refused.value), refused.value.model_name) == (message, "sparrow")


def test_tensors_are_sent_as_they_are():
    prompt = np.array(["Größe?".encode()], object)
    frames = np.random.default_rng(0).integers(0, 256, FRAMES.shape, np.uint8)[:, ::-1]
    request = _wire.to_request("sparrow", {"frames": frames, "prompt": prompt}, {"seed": 3, "do_sample": True, "branch": "both"}, "id-7")
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in request.inputs] == [
        ("frames", "UINT8", [2, 16, 24, 3]),
        ("prompt", "BYTES", [1]),
    ]
    assert list(request.raw_input_contents) == [frames.tobytes(), b"\x08\0\0\0" + "Größe?".encode()]
    parameters = request.parameters
    assert (parameters["seed"].int64_param, parameters["do_sample"].bool_param, parameters["branch"].string_param) == (3, True, "both")
    assert (request.model_name, request.id) == ("sparrow", "id-7")


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
        _wire.to_request(model, {name: np.zeros((2, 4), dtype)}, {}, "id-7")
    assert str(refused.value) == f"{model}.{name}: got dtype {dtype}, expected {expected}. Convert it."
    assert (refused.value.model_name, refused.value.request_id) == (model, "id-7")


MASKS = np.random.default_rng(0).random((3, 37, 23)) < 0.4
SCORES = ([0.25, 0.5, 0.75], [1, -1, 2])


def test_frame_masks_undo_the_server_s_bits():
    got = masks_of(7, MASKS, SCORES, "framewise")
    np.testing.assert_array_equal(got.masks, MASKS)
    assert got.masks is got.masks  # unpacked once
    assert (got.frame_idx, got.branch, got.masks.dtype) == (7, "framewise", bool)
    assert got.object_ids.tolist() == [0, 1, 2]
    assert got.areas_px.tolist() == MASKS.sum((1, 2)).tolist()
    for mask, (x1, y1, x2, y2) in zip(MASKS, got.boxes_px, strict=True):
        assert mask[y1:y2, x1:x2].sum() == mask.sum()
    assert got.predicted_iou.tolist() == [0.25, 0.5, 0.75]
    assert got.object_scores.tolist() == [1, -1, 2]
    assert got.visible.tolist() == [True, False, True]


def test_frame_masks_are_there_in_the_format_that_was_asked_for_alone():
    for mask_format, attribute in {"bits": "masks", "rle": "rle", "logits": "mask_logits"}.items():
        got = masks_of(7, MASKS, SCORES, mask_format=mask_format)
        assert len(getattr(got, attribute)) == 3
        for other in {"masks", "rle", "mask_logits"} - {attribute}:
            with pytest.raises(ValueError, match=f"FrameMasks: got masks as {mask_format}, expected .*mask_format='"):
                getattr(got, other)


def test_frame_masks_of_rle_are_cocos():
    for mask, rle in zip(MASKS, masks_of(7, MASKS, SCORES, mask_format="rle").rle, strict=True):
        assert rle["size"] == [37, 23]
        np.testing.assert_array_equal(coco.decode(rle), mask)


def test_frame_masks_of_no_objects_are_empty():
    assert masks_of(7, MASKS[:0], ([], [])).masks.shape == (0, 37, 23)


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
        (errors.Cancelled, Cancelled),
        (errors.ComponentFailed, RequestFailed),
    ],
)
@pytest.mark.parametrize("around", ["{}", "in ensemble 'sparrow_track', {}", "[request id: 7] {}"])
def test_errors_of_the_server_keep_their_kind_and_words(server_error, kind, around):
    words = "tracker.boxes: got 3,\nexpected 4."
    error = error_from_text(around.format(errors.to_wire(server_error(words))), "sparrow_track", "id-7", 5)
    assert type(error) is kind
    assert str(error) == words
    assert (error.model_name, error.request_id, error.frame_idx) == ("sparrow_track", "id-7", 5)


@pytest.mark.parametrize(
    ("message", "kind", "advice"),
    [
        ("sequence 5 of model 'tracker' must specify the START flag on the first request", UnknownSession, "open a new one."),
        ("unexpected shape for input 'frames' for model 'sparrow'. Expected [-1,-1,-1,3], got [2,3]", InvalidInput, ""),
        ("something else", RequestFailed, ""),
        ("", RequestFailed, ""),
    ],
)
def test_triton_s_own_errors_are_told_apart(message, kind, advice):
    error = error_from_text(message, "sparrow", "")
    assert type(error) is kind
    assert isinstance(error, SparrowClientError)
    assert str(error).startswith(message)
    assert str(error).endswith(advice)


@pytest.mark.parametrize(
    ("code", "kind", "advice"),
    [
        (StatusCode.UNAVAILABLE, ServerUnavailable, "Is `sparrow serve` running at that address?"),
        (StatusCode.UNIMPLEMENTED, ServerUnavailable, "Is `sparrow serve` running at that address?"),
        (StatusCode.DEADLINE_EXCEEDED, ServerUnavailable, "Is the server overloaded?"),
        (StatusCode.CANCELLED, Cancelled, "was taken back."),
        (StatusCode.INTERNAL, RequestFailed, "See the server's log."),
    ],
)
def test_broken_connections_are_told_apart(code, kind, advice):
    error = error_from_status(code, "no luck", "sparrow", "id-7")
    assert type(error) is kind
    assert str(error).endswith(advice)
    assert (error.model_name, error.request_id, error.frame_idx) == ("sparrow", "id-7", None)


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
    "track": lambda client: client.track([Prompt(0, boxes=[0, 0, 1, 1])], in_flight=0).push(FRAMES[0]),
    "question": lambda client: client.track("Where is it?", FRAMES),
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
