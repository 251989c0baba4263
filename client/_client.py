"""The two public models over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc.service_pb2 import ServerReadyRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from ._errors import error_from_status
from ._protocol import TrackProtocol
from ._question import AnswerSoFar, Frames, events_from_response, prompts_to_start, question, stack_frames
from ._shared_memory import share, shared_bytes, unshare
from ._stream import Stream, StreamBroken
from ._track import TrackSession
from ._types import Answer, Event, Prompt
from ._wire import CHANNEL_OPTIONS, SPARROW, is_last


class SparrowClient:
    """A connection to a sparrow server.

    Args:
        url: host:port of its gRPC endpoint.
        timeout_s: longest wait for the next response.
    """

    def __init__(self, url: str = "localhost:8001", *, timeout_s: float = 300) -> None:
        self.url, self.timeout_s = url, timeout_s
        self._channel = grpc.insecure_channel(url, CHANNEL_OPTIONS)
        self._stub = GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> SparrowClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def is_ready(self) -> bool:
        """Whether the server answers and all its models are loaded."""
        try:
            return bool(self._stub.ServerReady(ServerReadyRequest(), timeout=self.timeout_s).ready)
        except grpc.RpcError:
            return False

    def segment(self, frames: Frames | None, prompt: str, *, on_event: Callable[[Event], None] | None = None, **request: Any) -> Answer:
        """Asks a question about a clip or an image and waits for the whole answer.

        Args:
            frames, prompt, request: as in `stream`.
            on_event: called with every event as it arrives.
        Raises:
            SparrowClientError: the request was refused or failed.
        """
        answer = AnswerSoFar()
        for event in self.stream(frames, prompt, **request):
            answer.add(event)
            if on_event:
                on_event(event)
        return answer.complete()

    def stream(
        self,
        frames: Frames | None,
        prompt: str,
        *,
        encoded_frames: Sequence[bytes] | None = None,
        target_boxes: NDArray[np.float32] | None = None,
        target_crop: NDArray[np.uint8] | None = None,
        **options: str | float | bool,
    ) -> Generator[Event, None, None]:
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
        clip = stack_frames(frames)
        size = shared_bytes(self.url, clip)
        region = share(self._stub, 1, size, self.timeout_s) if size else None
        try:
            request = question(
                clip, prompt, region, encoded_frames=encoded_frames, target_boxes=target_boxes, target_crop=target_crop, **options
            )
            with Stream(self._stub) as stream:
                stream.send(request)
                finished = False
                while not finished:
                    try:
                        response = stream.receive(self.timeout_s)
                    except StreamBroken as broken:
                        raise error_from_status(broken.code, broken.details, SPARROW, request.id) from broken
                    yield from events_from_response(response)
                    finished = is_last(response.infer_response)
        finally:
            unshare(self._stub, region, self.timeout_s)

    def track(
        self,
        prompt: str | Sequence[Prompt],
        first_frames: Frames | None = None,
        *,
        in_flight: int = 1,
        mask_format: str = "bits",
        **options: Any,
    ) -> TrackSession:
        """Opens a tracking session.

        Args:
            prompt: a question about first_frames, whose answer says what to track from frame 0 on, or the objects themselves; the language
                model is then not asked.
            first_frames: [T, H, W, 3] uint8 RGB, or T arrays of one size: frames 0, 1, ... of the session. They are sent before the first
                frame that is pushed, and their results come with its own.
            in_flight: frames that may be under way when `push` returns: the next is sent while these are computed. 0: `push` returns
                exactly the result of its frame.
            mask_format: how masks travel. bits: `FrameMasks.masks`; rle: `.rle`; logits: `.mask_logits`.
            options: with a question, as in `stream`.
        Raises:
            SparrowClientError: the question was refused or failed; InvalidInput when the answer names no object.
        """
        answer = AnswerSoFar()
        if isinstance(prompt, str):
            with closing(self.stream(first_frames, prompt, **options)) as events:
                for event in events:
                    answer.add(event)
                    if answer.objects:
                        break
        protocol = TrackProtocol(prompts_to_start(prompt, answer, options), in_flight, mask_format)
        return TrackSession(self._stub, self.url, self.timeout_s, protocol, first_frames, answer)
