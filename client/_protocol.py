"""What a tracking session sends, and what the responses mean; no I/O.

push ─► frame() ─► request ─► stream ─► hear() ─┬─ masks: take() gives them out in order
                                                └─ refused: its error; what was sent behind it is dropped, the count goes back to it
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelStreamInferResponse

from ._errors import InvalidInput, SparrowClientError, UnknownSession, error_from_status, error_from_text
from ._prompts import edit_tensors
from ._shared_memory import FrameRegion
from ._types import FrameMasks, Prompt, frame_masks
from ._wire import SPARROW_TRACK, Place, Step, Tensors, from_response, to_request

NOTHING = np.zeros((0, 0, 3), np.uint8)
"""The frame of a request that brings none."""


@dataclass
class Sent:
    """A request under way.

    Args:
        frame_idx: index of its frame.
        size_hw: height and width of its frame.
        slot: where its frame is in shared memory.
        dropped: nobody waits for its response.
    """

    frame_idx: int
    size_hw: tuple[int, int]
    slot: int
    dropped: bool = False


class TrackProtocol:
    """The state of a session on the client's side.

    Every frame says which one it is, so that the server refuses those behind a frame that it refused, and nothing is tracked out of order.

    Args:
        prompts: what the session starts from, sent with frame 0.
        in_flight: frames that may be under way when `push` returns.
        mask_format: rle, bits or logits.
    Raises:
        InvalidInput: in_flight is negative.
    """

    def __init__(self, prompts: Sequence[Prompt], in_flight: int, mask_format: str) -> None:
        if in_flight < 0:
            raise InvalidInput(
                f"{SPARROW_TRACK}: got in_flight = {in_flight}, expected 0 or more. 0 waits for every frame.", SPARROW_TRACK, ""
            )
        self.session_id = secrets.randbits(63) | 1
        self.frame_idx = 0
        """Next frame."""
        self.num_slots = in_flight + 1
        """Frames under way at most."""
        self._prompts, self._in_flight, self._mask_format = prompts, in_flight, mask_format
        self._under_way: dict[str, Sent] = {}
        """Request id to what was sent under it, in order."""
        self._ready: list[FrameMasks] = []
        self._num_sent = 0
        self._over = ""
        """Why nothing more can be sent."""

    @property
    def must_wait(self) -> bool:
        """Whether more frames are under way than may be."""
        return len(self._under_way) > self._in_flight

    @property
    def is_waiting(self) -> bool:
        """Whether a response is still to come."""
        return bool(self._under_way)

    def check(self, frame: NDArray[np.uint8]) -> None:
        """Raises UnknownSession when the session is over, InvalidInput for what is not a frame."""
        if self._over:
            raise UnknownSession(f"{SPARROW_TRACK}: the session {self._over}. Open another.", SPARROW_TRACK, "", self.frame_idx)
        if frame.dtype != np.uint8 or frame.shape[2:] != (3,) or not frame.size:
            got = f"{list(frame.shape)} {frame.dtype}"
            raise InvalidInput(
                f"{SPARROW_TRACK}.frame: got {got}, expected [height, width, 3] uint8. Convert it.", SPARROW_TRACK, "", self.frame_idx
            )

    def frame(
        self, frame: NDArray[np.uint8], prompts: Sequence[Prompt], removed: Sequence[int], reset: bool, region: FrameRegion | None
    ) -> ModelInferRequest:
        """The request of the next frame, which `check` let pass; copies it to its slot of `region` where it fits; raises InvalidInput."""
        slot = min(set(range(self.num_slots)) - {sent.slot for sent in self._under_way.values()})
        places = {"frame": region.write(slot, frame)} if region and region.slot_bytes == frame.nbytes else {}
        parameters = {"mask_format": self._mask_format, "frame_idx": self.frame_idx, "reset": reset}
        starts = self.frame_idx == 0
        try:
            tensors = {"frame": frame, **edit_tensors([*self._prompts, *prompts] if starts else prompts, removed)}
            request = self._request(tensors, parameters, Step(self.session_id, start=starts), places)
        except InvalidInput as error:
            error.frame_idx = self.frame_idx
            raise
        self._under_way[request.id] = Sent(self.frame_idx, (frame.shape[0], frame.shape[1]), slot)
        self.frame_idx += 1
        return request

    def hear(self, response: ModelStreamInferResponse) -> None:
        """Takes a response; raises the error of a refused frame."""
        request_id = response.infer_response.id
        sent = self._under_way.pop(request_id, None)
        if sent is None or sent.dropped:
            return
        if response.error_message:
            self._drop()
            self.frame_idx = sent.frame_idx
            raise error_from_text(response.error_message, SPARROW_TRACK, request_id, sent.frame_idx)
        tensors = {name: array[0] for name, array in from_response(response.infer_response).items()}  # [1, ...] -> [...]
        self._ready.append(frame_masks(tensors, "tracked", sent.size_hw, self._mask_format))

    def take(self) -> list[FrameMasks]:
        """The results since the last time, in order."""
        ready, self._ready = self._ready, []
        return ready

    def end(self) -> ModelInferRequest:
        """The last request, behind all others, whose responses nobody waits for any more; raises UnknownSession when the session broke."""
        if self._over:
            raise UnknownSession(f"{SPARROW_TRACK}: the session {self._over}.", SPARROW_TRACK, "")
        self._over = "was closed"
        request = self._part(Step(self.session_id, end=True))
        self._under_way[request.id] = Sent(self.frame_idx, (0, 0), 0)
        self._drop()
        return request

    def broke(self, code: grpc.StatusCode, details: str) -> SparrowClientError:
        """Ends the session, since no response will come any more; the error of the oldest frame under way."""
        request_id, frame_idx = next(((request_id, sent.frame_idx) for request_id, sent in self._under_way.items()), ("", self.frame_idx))
        error = error_from_status(code, details, SPARROW_TRACK, request_id, frame_idx)
        self.abandon("broke off")
        return error

    def abandon(self, reason: str) -> None:
        """Ends the session without a word to the server; `farewell` has them."""
        self._under_way.clear()
        self._over = self._over or reason

    def farewell(self) -> ModelInferRequest:
        """What frees the session after its stream was cut off, wherever that was: Triton forgets a sequence when one of its requests is
        cancelled, and would not let END alone through to the tracker, which still holds it.
        """
        return self._part(Step(self.session_id, start=True, end=True))

    def _part(self, step: Step) -> ModelInferRequest:
        return self._request({"frame": NOTHING}, {}, step, {})

    def _request(self, tensors: Tensors, parameters: dict[str, Any], step: Step, places: dict[str, Place]) -> ModelInferRequest:
        self._num_sent += 1
        batched = {name: array[None] for name, array in tensors.items()}  # [...] -> [1, ...]
        return to_request(SPARROW_TRACK, batched, parameters, f"{self.session_id}-{self._num_sent}", step, places)

    def _drop(self) -> None:
        for sent in self._under_way.values():
            sent.dropped = True
