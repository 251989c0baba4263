"""System shared memory in which a server on this machine finds frames."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc.service_pb2 import SystemSharedMemoryRegisterRequest, SystemSharedMemoryUnregisterRequest

from ._wire import Place

FOLDER = "/dev/shm"
"""Where POSIX shared memory is a file, on Linux; elsewhere there is none to share with a server."""

FAREWELL_S = 5
"""Longest wait for what only clears up."""

RETRY_S, IN_USE = 0.005, "currently in use"
"""How often the server is asked again to let go of memory, and how it says (2.51) that it cannot yet."""

SHARED_CLIP_BYTES = 4 << 20
"""From this size on a clip is not sent in the message: to share memory with a server takes two more calls."""

THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def is_this_machine(url: str) -> bool:
    """Whether a server's address says that it is here. It may still be in another container, which registering finds out."""
    return url.startswith("unix:") or url.rpartition(":")[0].strip("[]") in THIS_MACHINE


def shared_bytes(url: str, clip: NDArray[np.uint8] | None) -> int:
    """What the server at `url` had better read of a clip from memory: all or nothing."""
    return clip.nbytes if clip is not None and clip.nbytes >= SHARED_CLIP_BYTES and is_this_machine(url) else 0


class FrameRegion:
    """Room for some frames, or clips, of one size.

    It is written to as a file: that takes a third of the time of mapping it first, page by page.

    Args:
        num_slots: of them.
        slot_bytes: bytes of one.
    Raises:
        OSError: this system has no such memory, or not enough: it is reserved at once.
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self.name = f"sparrow-{secrets.token_hex(8)}"
        self.slot_bytes, self._size = slot_bytes, num_slots * slot_bytes
        self._path = f"{FOLDER}/{self.name}"
        self._file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(self._file, 0, self._size)
        except OSError:
            self.unlink()
            self.close()
            raise

    @property
    def registration(self) -> SystemSharedMemoryRegisterRequest:
        return SystemSharedMemoryRegisterRequest(name=self.name, key=f"/{self.name}", byte_size=self._size)

    @property
    def unregistration(self) -> SystemSharedMemoryUnregisterRequest:
        return SystemSharedMemoryUnregisterRequest(name=self.name)

    def unlink(self) -> None:
        """Takes the name away, once the server has opened it or refused to: nothing is left behind however this process ends."""
        os.unlink(self._path)

    def write(self, slot: int, frames: NDArray[np.uint8]) -> Place:
        """Copies frames of `slot_bytes` to a slot and returns where they are."""
        offset = slot * self.slot_bytes
        left, place = np.ascontiguousarray(frames).data.cast("B"), offset
        while left:
            written = os.pwrite(self._file, left, place)
            left, place = left[written:], place + written
        return Place(self.name, offset)

    def close(self) -> None:
        os.close(self._file)


def share(stub: Any, num_slots: int, slot_bytes: int, timeout_s: float) -> FrameRegion | None:
    """Memory that the server has opened, too; None where it cannot.

    Args:
        stub: GRPCInferenceServiceStub of a channel.
        num_slots, slot_bytes: as of `FrameRegion`.
        timeout_s: longest wait for the server.
    """
    with suppress(OSError):  # this system has no shared memory, or not enough
        region = FrameRegion(num_slots, slot_bytes)
        try:
            stub.SystemSharedMemoryRegister(region.registration, timeout=timeout_s)
            return region
        except grpc.RpcError:  # the server forbids it, or is on another machine after all
            region.close()
        finally:
            region.unlink()
    return None


def unshare(stub: Any, region: FrameRegion | None, timeout_s: float) -> None:
    """Takes memory back, if there is any, as soon as nobody reads it: a request that was taken back ends a little later.

    Args:
        stub: as of `share`.
        region: the memory.
        timeout_s: longest wait for the server, FAREWELL_S at the most.
    """
    if region:
        deadline = time.monotonic() + min(timeout_s, FAREWELL_S)
        while not unregistered(stub, region, deadline) and time.monotonic() < deadline:
            time.sleep(RETRY_S)
        region.close()


def unregistered(stub: Any, region: FrameRegion, deadline: float) -> bool:
    """Whether the server has nothing more to do with it; it refuses to let go of what a request may still read."""
    try:
        stub.SystemSharedMemoryUnregister(region.unregistration, timeout=deadline - time.monotonic())
    except grpc.RpcError as error:
        return IN_USE not in (error.details() or "")
    return True


async def share_async(stub: Any, num_slots: int, slot_bytes: int, timeout_s: float) -> FrameRegion | None:
    """`share` for asyncio."""
    with suppress(OSError):
        region = FrameRegion(num_slots, slot_bytes)
        try:
            await stub.SystemSharedMemoryRegister(region.registration, timeout=timeout_s)
            return region
        except grpc.RpcError:
            region.close()
        finally:
            region.unlink()
    return None


async def unshare_async(stub: Any, region: FrameRegion | None, timeout_s: float) -> None:
    """`unshare` for asyncio."""
    if region:
        deadline = time.monotonic() + min(timeout_s, FAREWELL_S)
        while not await unregistered_async(stub, region, deadline) and time.monotonic() < deadline:
            await asyncio.sleep(RETRY_S)
        region.close()


async def unregistered_async(stub: Any, region: FrameRegion, deadline: float) -> bool:
    """`unregistered` for asyncio."""
    try:
        await stub.SystemSharedMemoryUnregister(region.unregistration, timeout=deadline - time.monotonic())
    except grpc.RpcError as error:
        return IN_USE not in (error.details() or "")
    return True
