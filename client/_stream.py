"""A gRPC stream of inference requests and their responses, for threads and for asyncio.

Requests leave in the order in which they are sent. Somebody else reads the responses, so that waiting for one can be bounded, and asking
whether there is one takes no time. tritonclient's own streams lose the request id of an error. Its header triton_grpc_error is never sent
(ADR 0003).
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelStreamInferResponse

LINGER_S = 5
"""Longest wait for the server to end a stream on which nothing is under way."""


class StreamBroken(Exception):
    """No response will come, or none came in time.

    Args:
        code: gRPC's.
        details: in words.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


class Stream:
    """A stream that a thread reads; leaving its context ends it, with an exception by taking back what is under way.

    Args:
        stub: GRPCInferenceServiceStub of a channel.
    """

    def __init__(self, stub: Any) -> None:
        self._requests: queue.SimpleQueue[ModelInferRequest | None] = queue.SimpleQueue()
        self._responses: queue.SimpleQueue[ModelStreamInferResponse | StreamBroken] = queue.SimpleQueue()
        self._call = stub.ModelStreamInfer(iter(self._requests.get, None))
        self._reader = threading.Thread(target=self._read, name="sparrow stream", daemon=True)
        self._reader.start()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind:
            self.cancel()
        else:
            self.close()

    def send(self, request: ModelInferRequest) -> None:
        self._requests.put(request)

    @property
    def has_response(self) -> bool:
        """Whether `receive` returns, or raises, at once."""
        return not self._responses.empty()

    def receive(self, timeout_s: float) -> ModelStreamInferResponse:
        """The next response; raises StreamBroken."""
        try:
            return response_of(self._responses.get(timeout=timeout_s))
        except queue.Empty:
            raise silent(timeout_s) from None

    def close(self) -> None:
        """Ends the stream behind the last response."""
        self._requests.put(None)
        self._reader.join(LINGER_S)

    def cancel(self) -> None:
        """Ends the stream at once."""
        self._call.cancel()
        self._requests.put(None)

    def _read(self) -> None:
        try:
            for response in self._call:
                self._responses.put(response)
            self._responses.put(ended())
        except grpc.RpcError as error:
            self._responses.put(broken(error))


class AsyncStream:
    """The same with a task in the place of the thread."""

    def __init__(self, stub: Any) -> None:
        self._requests: asyncio.Queue[ModelInferRequest | None] = asyncio.Queue()
        self._responses: asyncio.Queue[ModelStreamInferResponse | StreamBroken] = asyncio.Queue()
        self._call = stub.ModelStreamInfer(self._sent())
        self._reader = asyncio.create_task(self._read())

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind:
            self.cancel()
        else:
            await self.close()

    def send(self, request: ModelInferRequest) -> None:
        self._requests.put_nowait(request)

    @property
    def has_response(self) -> bool:
        return not self._responses.empty()

    async def receive(self, timeout_s: float) -> ModelStreamInferResponse:
        try:
            async with asyncio.timeout(timeout_s):
                return response_of(await self._responses.get())
        except TimeoutError:
            raise silent(timeout_s) from None

    async def close(self) -> None:
        self._requests.put_nowait(None)
        await asyncio.wait([self._reader], timeout=LINGER_S)

    def cancel(self) -> None:
        self._call.cancel()
        self._requests.put_nowait(None)

    async def _sent(self) -> AsyncIterator[ModelInferRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def _read(self) -> None:
        try:
            async for response in self._call:
                self._responses.put_nowait(response)
            self._responses.put_nowait(ended())
        except grpc.RpcError as error:
            self._responses.put_nowait(broken(error))
        except asyncio.CancelledError:  # how grpc.aio says that `cancel` was called
            self._responses.put_nowait(StreamBroken(grpc.StatusCode.CANCELLED, "cancelled"))


def response_of(received: ModelStreamInferResponse | StreamBroken) -> ModelStreamInferResponse:
    if isinstance(received, StreamBroken):
        raise received
    return received


def silent(timeout_s: float) -> StreamBroken:
    return StreamBroken(grpc.StatusCode.DEADLINE_EXCEEDED, f"got no response for {timeout_s:g} s")


def ended() -> StreamBroken:
    return StreamBroken(grpc.StatusCode.UNAVAILABLE, "the server ended the stream")


def broken(error: grpc.RpcError) -> StreamBroken:
    return StreamBroken(error.code(), error.details())
