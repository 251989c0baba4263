"""The asyncio twin of `SparrowClient` and `TrackSession`: the same verbs, awaited; their documentation holds here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc.service_pb2 import ServerReadyRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from ._errors import SparrowClientError, error_from_status
from ._protocol import TrackProtocol
from ._question import AnswerSoFar, Frames, events_from_response, prompts_to_start, question, stack_frames
from ._shared_memory import share_async, shared_bytes, unshare_async
from ._stream import AsyncStream, StreamBroken
from ._track import FAREWELL_TRIES, Session
from ._types import Answer, Event, FrameMasks, Prompt
from ._wire import CHANNEL_OPTIONS, SPARROW, is_last


class AsyncSparrowClient:
    """A connection to a sparrow server, for the running event loop.

    Args:
        url: host:port of its gRPC endpoint.
        timeout_s: longest wait for the next response.
    """

    def __init__(self, url: str = "localhost:8001", *, timeout_s: float = 300) -> None:
        self.url, self.timeout_s = url, timeout_s
        self._channel = grpc.aio.insecure_channel(url, CHANNEL_OPTIONS)
        self._stub = GRPCInferenceServiceStub(self._channel)

    async def __aenter__(self) -> AsyncSparrowClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def is_ready(self) -> bool:
        """Whether the server answers and all its models are loaded."""
        try:
            return bool((await self._stub.ServerReady(ServerReadyRequest(), timeout=self.timeout_s)).ready)
        except grpc.RpcError:
            return False

    async def segment(
        self, frames: Frames | None, prompt: str, *, on_event: Callable[[Event], None] | None = None, **request: Any
    ) -> Answer:
        """As `SparrowClient.segment`."""
        answer = AnswerSoFar()
        async with aclosing(self.stream(frames, prompt, **request)) as events:
            async for event in events:
                answer.add(event)
                if on_event:
                    on_event(event)
        return answer.complete()

    async def stream(self, frames: Frames | None, prompt: str, **request: Any) -> AsyncGenerator[Event, None]:
        """As `SparrowClient.stream`."""
        clip = stack_frames(frames)
        size = shared_bytes(self.url, clip)
        region = await share_async(self._stub, 1, size, self.timeout_s) if size else None
        try:
            message = question(clip, prompt, region, **request)
            async with AsyncStream(self._stub) as stream:
                stream.send(message)
                finished = False
                while not finished:
                    try:
                        response = await stream.receive(self.timeout_s)
                    except StreamBroken as broken:
                        raise error_from_status(broken.code, broken.details, SPARROW, message.id) from broken
                    for event in events_from_response(response):
                        yield event
                    finished = is_last(response.infer_response)
        finally:
            await unshare_async(self._stub, region, self.timeout_s)

    @asynccontextmanager
    async def track(
        self,
        prompt: str | Sequence[Prompt],
        first_frames: Frames | None = None,
        *,
        in_flight: int = 1,
        mask_format: str = "bits",
        **options: Any,
    ) -> AsyncIterator[AsyncTrackSession]:
        """As `SparrowClient.track`: `async with client.track(...) as session`."""
        answer = AnswerSoFar()
        if isinstance(prompt, str):
            async with aclosing(self.stream(first_frames, prompt, **options)) as events:
                async for event in events:
                    answer.add(event)
                    if answer.objects:
                        break
        protocol = TrackProtocol(prompts_to_start(prompt, answer, options), in_flight, mask_format)
        session = AsyncTrackSession(self._stub, self.url, self.timeout_s, protocol, first_frames, answer)
        try:
            yield session
        finally:
            await session.close()


class AsyncTrackSession(Session):
    """Follows objects from frame to frame; opened by `AsyncSparrowClient.track`. One task at a time may use it, `cancel` apart."""

    _stream: AsyncStream | None = None

    async def push(
        self, frame: NDArray[np.uint8], prompts: Sequence[Prompt] = (), *, remove: Sequence[int] = (), reset: bool = False
    ) -> list[FrameMasks]:
        """As `TrackSession.push`."""
        await self._send_first_frames()
        await self._send(frame, prompts, remove, reset)
        return self._protocol.take()

    async def finish(self) -> list[FrameMasks]:
        """As `TrackSession.finish`."""
        await self._send_first_frames()
        while self._stream and self._protocol.is_waiting:
            await self._hear(self._stream)
        return self._protocol.take()

    async def close(self) -> None:
        """As `TrackSession.close`."""
        stream = self._stream
        if stream is None:
            return
        try:
            stream.send(self._protocol.end())
            while self._protocol.is_waiting:
                await self._hear(stream)
        except SparrowClientError:  # the connection broke, now or before
            await self.cancel()
            return
        await stream.close()
        await self._release()

    async def cancel(self) -> None:
        """As `TrackSession.cancel`; a `push` that waits in another task raises Cancelled."""
        if self._stream is None:
            return
        self._stream.cancel()
        self._protocol.abandon("was cancelled")
        for _ in range(FAREWELL_TRIES):
            try:
                await self._stub.ModelInfer(self._protocol.farewell(), timeout=self._farewell_s)
                break
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.CANCELLED:
                    break
        await self._release()

    async def _send_first_frames(self) -> None:
        while self.frame_idx < len(self._first_frames):
            await self._send(self._first_frames[self.frame_idx])

    async def _send(
        self, frame: NDArray[np.uint8], prompts: Sequence[Prompt] = (), remove: Sequence[int] = (), reset: bool = False
    ) -> None:
        self._protocol.check(frame)
        stream = self._stream or await self._open(frame)
        while self._protocol.must_wait:  # an earlier `push` was interrupted
            await self._hear(stream)
        stream.send(self._protocol.frame(frame, prompts, remove, reset, self._region))
        while self._protocol.must_wait or stream.has_response:
            await self._hear(stream)

    async def _hear(self, stream: AsyncStream) -> None:
        try:
            response = await stream.receive(self._timeout_s)
        except StreamBroken as broken:
            raise self._protocol.broke(broken.code, broken.details) from broken
        self._protocol.hear(response)

    async def _open(self, frame: NDArray[np.uint8]) -> AsyncStream:
        if self._shares_memory:
            self._region = await share_async(self._stub, self._protocol.num_slots, frame.nbytes, self._timeout_s)
        self._stream = AsyncStream(self._stub)
        return self._stream

    async def _release(self) -> None:
        self._stream = None
        await unshare_async(self._stub, self._region, self._farewell_s)
        self._region = None
