"""The two public models over gRPC."""

from __future__ import annotations

import json
import queue
import secrets
import uuid
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from ._errors import InvalidInput, RequestFailed, ServerUnavailable, error_from_triton
from ._stubs import INPUTS
from ._types import Answer, Event, FrameMasks, Objects, Proposals, Summary, TextPiece, frame_masks, objects_from_tensors, summary_from_json

SPARROW, SPARROW_TRACK = "sparrow", "sparrow_track"

STREAM_FAILED = "no longer in valid state"
"""tritonclient's own words where the connection broke before the request was sent."""

Frames = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]


class SparrowClient:
    """A connection to a sparrow server.

    Args:
        url: host:port of its gRPC endpoint.
        timeout_s: longest wait for the next response.
    """

    def __init__(self, url: str = "localhost:8001", *, timeout_s: float = 300) -> None:
        self.url, self.timeout_s = url, timeout_s
        self._triton = triton.InferenceServerClient(url)

    def __enter__(self) -> SparrowClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._triton.close()

    def is_ready(self) -> bool:
        """Whether the server answers and all its models are loaded."""
        try:
            return bool(self._triton.is_server_ready(client_timeout=self.timeout_s))
        except InferenceServerException:
            return False

    def segment(self, frames: Frames | None, prompt: str, *, on_event: Callable[[Event], None] | None = None, **request: Any) -> Answer:
        """Asks a question about a clip or an image and waits for the whole answer.

        Args:
            frames, prompt, request: as in `stream`.
            on_event: called with every event as it arrives.
        Raises:
            SparrowClientError: the request was refused or failed.
        """
        objects: list[Any] = []
        masks: list[FrameMasks] = []
        proposals: Proposals | None = None
        for event in self.stream(frames, prompt, **request):
            if on_event:
                on_event(event)
            if isinstance(event, Objects):
                objects = event.objects
            elif isinstance(event, FrameMasks):
                masks.append(event)
            elif isinstance(event, Summary):
                return Answer(event, objects, masks, proposals)
            elif isinstance(event, Proposals):
                proposals = event
        raise RequestFailed("sparrow: the stream ended without a summary. See the server's log.", SPARROW, "")

    def stream(
        self,
        frames: Frames | None,
        prompt: str,
        *,
        encoded_frames: Sequence[bytes] | None = None,
        target_boxes: NDArray[np.float32] | None = None,
        target_crop: NDArray[np.uint8] | None = None,
        **options: str | float | bool,
    ) -> Iterator[Event]:
        """Asks a question about a clip or an image; closing the iterator cancels the request.

        Args:
            frames: [T, H, W, 3] uint8 RGB, or T arrays of one size; None with encoded_frames.
            prompt: the question.
            encoded_frames: T JPEG or PNG files, instead of frames.
            target_boxes: [R, 4] float32 pixels, xyxy or xywh, a row per frame: where the target is.
            target_crop: [h, w, 3] uint8 RGB picture of the target.
            options: request parameters of `sparrow`, e.g. branch="framewise" (model_repository/README.md).
        Yields:
            TextPiece as the text is generated, Proposals if asked for, Objects once, FrameMasks per frame, Summary at the end.
        Raises:
            SparrowClientError: the request was refused or failed.
        """
        tensors: dict[str, NDArray[Any]] = {"prompt": np.array([prompt.encode()], object)}
        if frames is not None:
            tensors["frames"] = stack_frames(frames)
        if encoded_frames is not None:
            tensors["encoded_frames"] = np.array(encoded_frames, object)
        if target_boxes is not None:
            tensors["target_boxes"] = np.asarray(target_boxes, np.float32)
        if target_crop is not None:
            tensors["target_crop"] = target_crop
        for response in self._stream(tensors, {**options, "mask_format": "bits"}):
            if "text" in response:
                yield TextPiece(response["text"][0].decode())
            elif "phrases" in response:
                yield Objects(objects_from_tensors(response))
            elif "frame_idx" in response:
                yield frame_masks(response, response["branch"][0].decode(), int(response["frame_idx"][0]), *response["frame_size"])
            elif "proposal_frame" in response:
                yield Proposals(response["proposal_frame"], response["proposal_boxes"], response["proposal_scores"])
            elif "summary" in response:
                yield summary_from_json(json.loads(response["summary"][0]))

    def track(
        self,
        *,
        embeddings: NDArray[np.float32] | None = None,
        boxes: NDArray[np.float32] | None = None,
        box_objects: Sequence[int] | NDArray[np.int32] | None = None,
    ) -> TrackSession:
        """A tracking session; the objects are those of an answer (`TrackedObject`) or plain boxes on the first frame.

        Args:
            embeddings: [N, C] float32.
            boxes: [K, 4] float32 xyxy, normalised to 0..1.
            box_objects: object of each box; by default each box is an object.
        """
        start: dict[str, NDArray[Any]] = {}
        if embeddings is not None:
            start["text_embeddings"] = np.asarray(embeddings, np.float32)
        if boxes is not None:
            start["boxes"] = np.asarray(boxes, np.float32)
            start["box_objects"] = np.asarray(range(len(boxes)) if box_objects is None else box_objects, np.int32)
        return TrackSession(self, start)

    def _stream(self, tensors: dict[str, NDArray[Any]], parameters: dict[str, Any]) -> Iterator[dict[str, NDArray[Any]]]:
        """One request, its responses as they arrive; each request has a connection of its own, so that they do not mix."""
        request_id = uuid.uuid4().hex
        inputs = to_inputs(SPARROW, tensors)
        responses: queue.Queue[tuple[Any, InferenceServerException | None]] = queue.Queue()
        connection = triton.InferenceServerClient(self.url)
        finished = False
        try:
            # Not with the header triton_grpc_error: errors and cancellations together then crash Triton 24.10 (ADR 0003).
            connection.start_stream(lambda result, error: responses.put((result, error)))
            try:
                connection.async_stream_infer(
                    SPARROW, inputs, request_id=request_id, parameters=parameters, enable_empty_final_response=True
                )
            except InferenceServerException as error:
                if STREAM_FAILED not in error.message():  # else the queue says why
                    raise InvalidInput(f"sparrow: {error.message()} Mend the options.", SPARROW, request_id) from error
            while not finished:
                result, failure = next_response(responses, self.timeout_s, request_id)
                if failure is not None:
                    raise error_from_triton(failure, SPARROW, request_id)
                response = result.get_response()
                finished = response.parameters["triton_final_response"].bool_param
                yield {output.name: result.as_numpy(output.name) for output in response.outputs}
        finally:
            connection.stop_stream(cancel_requests=not finished)
            connection.close()


class TrackSession:
    """Follows objects from frame to frame; one request per frame.

    Args:
        client: connection.
        start: tensors that go with the first frame.
    """

    def __init__(self, client: SparrowClient, start: dict[str, NDArray[Any]]) -> None:
        self._client, self._start = client, start
        self.session_id = secrets.randbits(63) | 1
        self.frame_idx = 0
        """Next frame."""
        self._open = False

    def __enter__(self) -> TrackSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def push(self, frame: NDArray[np.uint8]) -> FrameMasks:
        """The next frame, [H, W, 3] uint8 RGB, to the masks of all objects in it.

        Raises:
            SparrowClientError: the frame was refused or failed.
        """
        tensors = {"frame": frame, **({} if self.frame_idx else self._start)}
        response = self._infer(tensors, start=self.frame_idx == 0, end=False)
        self._open = True
        self.frame_idx += 1
        return frame_masks(response, "tracked", self.frame_idx - 1, *frame.shape[:2])

    def close(self) -> None:
        """Frees the session on the server."""
        if self._open:
            self._open = False
            self._infer({"frame": np.zeros((0, 0, 3), np.uint8)}, start=False, end=True)

    def _infer(self, tensors: dict[str, NDArray[Any]], start: bool, end: bool) -> dict[str, NDArray[Any]]:
        request_id = f"{self.session_id}-{self.frame_idx}"
        batched = {name: array[None] for name, array in tensors.items()}  # [...] -> [1, ...]
        try:
            result = self._client._triton.infer(
                SPARROW_TRACK,
                to_inputs(SPARROW_TRACK, batched),
                sequence_id=self.session_id,
                sequence_start=start,
                sequence_end=end,
                request_id=request_id,
                client_timeout=self._client.timeout_s,
                parameters={"mask_format": "bits"},
            )
        except InferenceServerException as error:
            raise error_from_triton(error, SPARROW_TRACK, request_id) from error
        return {output.name: result.as_numpy(output.name)[0] for output in result.get_response().outputs}


def to_inputs(model: str, tensors: dict[str, NDArray[Any]]) -> list[triton.InferInput]:
    """Tensors of a request, under the dtypes that the arrays have; the server checks them."""
    inputs = []
    for name, array in tensors.items():
        expected = INPUTS[model][name]
        got = triton.np_to_triton_dtype(array.dtype)
        if got != expected:
            raise InvalidInput(f"{model}.{name}: got dtype {array.dtype}, expected {expected}. Convert it.", model, "")
        tensor = triton.InferInput(name, array.shape, expected)
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        inputs.append(tensor)
    return inputs


def stack_frames(frames: Frames) -> NDArray[np.uint8]:
    """[T, H, W, 3]; raises InvalidInput when there are none or their sizes differ."""
    shapes = list(dict.fromkeys(np.shape(frame) for frame in frames))
    if not shapes:
        raise InvalidInput("sparrow.frames: got 0 frames, expected 1 or more. Send the frames of the clip.", SPARROW, "")
    if len(shapes) > 1:
        raise InvalidInput(f"sparrow.frames: got frames of sizes {shapes[:3]}, expected one size. Resize them.", SPARROW, "")
    return np.asarray(frames)


def next_response(responses: queue.Queue[Any], timeout_s: float, request_id: str) -> tuple[Any, InferenceServerException | None]:
    try:
        result, error = responses.get(timeout=timeout_s)
    except queue.Empty:
        raise ServerUnavailable(f"sparrow: got no response for {timeout_s:g} s. Is the server overloaded?", SPARROW, request_id) from None
    return result, error
