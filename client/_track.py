"""A tracking session over gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from ._errors import SparrowClientError
from ._protocol import TrackProtocol
from ._question import AnswerSoFar, Frames
from ._shared_memory import FAREWELL_S, FrameRegion, is_this_machine, share, unshare
from ._stream import Stream, StreamBroken
from ._types import FrameMasks, Prompt

FAREWELL_TRIES = 3
"""A sequence that Triton is just cancelling refuses its next request, too."""


class Session:
    """What the session has in common with its asyncio twin.

    Args:
        stub: GRPCInferenceServiceStub of a channel.
        url: where that leads.
        timeout_s: longest wait for the next response.
        protocol: state of the session.
        first_frames: frames 0, 1, ...; sent before those that are pushed.
        answer: to the question about them.
    """

    def __init__(
        self, stub: Any, url: str, timeout_s: float, protocol: TrackProtocol, first_frames: Frames | None, answer: AnswerSoFar
    ) -> None:
        self._stub, self._timeout_s, self._farewell_s = stub, timeout_s, min(timeout_s, FAREWELL_S)
        self._shares_memory = is_this_machine(url)
        self._protocol = protocol
        self._first_frames: Frames = () if first_frames is None else first_frames
        self._region: FrameRegion | None = None
        self.session_id = protocol.session_id
        self.text, self.objects = answer.text, answer.objects
        """The answer, where a question was asked."""

    @property
    def frame_idx(self) -> int:
        """Index of the next frame."""
        return self._protocol.frame_idx

    @property
    def shared_memory(self) -> bool:
        """Whether frames reach the server through shared memory."""
        return self._region is not None


class TrackSession(Session):
    """Follows objects from frame to frame; opened by `SparrowClient.track`."""

    _stream: Stream | None = None

    def __enter__(self) -> TrackSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def push(
        self, frame: NDArray[np.uint8], prompts: Sequence[Prompt] = (), *, remove: Sequence[int] = (), reset: bool = False
    ) -> list[FrameMasks]:
        """Sends the next frame and returns the results that have arrived, in order; waits while more than in_flight frames are under way.

        Args:
            frame: [H, W, 3] uint8 RGB, of the size of the first.
            prompts: objects that start, or start anew, on it.
            remove: ids of objects to follow no longer.
            reset: forget all objects so far.
        Raises:
            SparrowClientError: of .frame_idx, which was refused; the frames that were sent behind it are dropped, and the session goes
                on with .frame_idx. ServerUnavailable and UnknownSession end it.
        """
        self._send_first_frames()
        self._send(frame, prompts, remove, reset)
        return self._protocol.take()

    def finish(self) -> list[FrameMasks]:
        """Waits for every frame under way and returns their results; raises as `push`."""
        self._send_first_frames()
        while self._stream and self._protocol.is_waiting:
            self._hear(self._stream)
        return self._protocol.take()

    def close(self) -> None:
        """Frees the session on the server, behind the frames under way; their results are lost."""
        stream = self._stream
        if stream is None:
            return
        try:
            stream.send(self._protocol.end())
            while self._protocol.is_waiting:
                self._hear(stream)
        except SparrowClientError:  # the connection broke, now or before
            self.cancel()
            return
        stream.close()
        self._release()

    def cancel(self) -> None:
        """Takes back the frames under way and frees the session on the server; a `push` that waits in another thread raises Cancelled."""
        if self._stream is None:
            return
        self._stream.cancel()
        self._protocol.abandon("was cancelled")
        for _ in range(FAREWELL_TRIES):
            try:
                self._stub.ModelInfer(self._protocol.farewell(), timeout=self._farewell_s)
                break
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.CANCELLED:
                    break
        self._release()

    def _send_first_frames(self) -> None:
        while self.frame_idx < len(self._first_frames):
            self._send(self._first_frames[self.frame_idx])

    def _send(self, frame: NDArray[np.uint8], prompts: Sequence[Prompt] = (), remove: Sequence[int] = (), reset: bool = False) -> None:
        self._protocol.check(frame)
        stream = self._stream or self._open(frame)
        while self._protocol.must_wait:  # an earlier `push` was interrupted
            self._hear(stream)
        stream.send(self._protocol.frame(frame, prompts, remove, reset, self._region))
        while self._protocol.must_wait or stream.has_response:
            self._hear(stream)

    def _hear(self, stream: Stream) -> None:
        try:
            response = stream.receive(self._timeout_s)
        except StreamBroken as broken:
            raise self._protocol.broke(broken.code, broken.details) from broken
        self._protocol.hear(response)

    def _open(self, frame: NDArray[np.uint8]) -> Stream:
        """The stream of the session, and where the server takes it, shared memory for frames like this."""
        if self._shares_memory:
            self._region = share(self._stub, self._protocol.num_slots, frame.nbytes, self._timeout_s)
        self._stream = Stream(self._stub)
        return self._stream

    def _release(self) -> None:
        self._stream = None
        unshare(self._stub, self._region, self._farewell_s)
        self._region = None
