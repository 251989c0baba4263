"""System shared memory in which a server on this machine finds the frames of a session."""

from __future__ import annotations

import mmap
import os
import secrets

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc.service_pb2 import SystemSharedMemoryRegisterRequest, SystemSharedMemoryUnregisterRequest

from ._wire import Place

FOLDER = "/dev/shm"
"""Where POSIX shared memory is a file, on Linux; elsewhere there is none to share with a server."""

THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def is_this_machine(url: str) -> bool:
    """Whether a server's address says that it is here. It may still be in another container, which registering finds out."""
    return url.startswith("unix:") or url.rpartition(":")[0].strip("[]") in THIS_MACHINE


class FrameRegion:
    """Room for some frames of one size.

    The space is reserved at once: writing to memory that /dev/shm turns out not to have would kill the process.

    Args:
        num_slots: frames.
        slot_bytes: bytes of one.
    Raises:
        OSError: this system has no such memory, or not enough.
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self.name = f"sparrow-{secrets.token_hex(8)}"
        self.slot_bytes = slot_bytes
        self._path = f"{FOLDER}/{self.name}"
        descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, num_slots * slot_bytes)
            self._memory = mmap.mmap(descriptor, num_slots * slot_bytes)
        except OSError:
            self.unlink()
            raise
        finally:
            os.close(descriptor)

    @property
    def registration(self) -> SystemSharedMemoryRegisterRequest:
        return SystemSharedMemoryRegisterRequest(name=self.name, key=f"/{self.name}", byte_size=len(self._memory))

    @property
    def unregistration(self) -> SystemSharedMemoryUnregisterRequest:
        return SystemSharedMemoryUnregisterRequest(name=self.name)

    def unlink(self) -> None:
        """Takes the name away, once the server has opened it or refused to: nothing is left behind however this process ends."""
        os.unlink(self._path)

    def write(self, slot: int, frame: NDArray[np.uint8]) -> Place:
        """Copies a frame of `slot_bytes` to a slot and returns where it is."""
        offset = slot * self.slot_bytes
        np.ndarray(frame.shape, np.uint8, self._memory, offset)[...] = frame
        return Place(self.name, offset)

    def close(self) -> None:
        self._memory.close()
