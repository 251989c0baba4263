"""What the client raises.

SparrowClientError          carries .model_name, .request_id and, for a frame of a session, .frame_idx
├── InvalidInput            the request can never succeed: mend it
├── UnknownSession          the tracking session is not open: start it again
├── CapacityExceeded        a limit of the server is reached: retry later or ask for less
├── Cancelled               the caller took the request back
├── ServerUnavailable       nobody answers at that address, or not in time
└── RequestFailed           the server failed: see its log
"""

from __future__ import annotations

import re

import grpc


class SparrowClientError(Exception):
    """A request failed.

    Args:
        message: who, what was got, what was expected, what to do.
        model_name: the public model that was asked.
        request_id: as sent with the request.
        frame_idx: index of the frame in its tracking session; None where the request was no frame.
    """

    def __init__(self, message: str, model_name: str, request_id: str, frame_idx: int | None = None) -> None:
        super().__init__(message)
        self.model_name, self.request_id, self.frame_idx = model_name, request_id, frame_idx


class InvalidInput(SparrowClientError):
    """The request can never succeed as it is."""


class UnknownSession(SparrowClientError):
    """The tracking session is not open."""


class CapacityExceeded(SparrowClientError):
    """The request is sound, but a limit of the server is reached."""


class Cancelled(SparrowClientError):
    """The caller took the request back."""


class ServerUnavailable(SparrowClientError):
    """Nobody answers at that address, or not in time."""


class RequestFailed(SparrowClientError):
    """The server failed."""


BY_NAME: dict[str, type[SparrowClientError]] = {
    "InvalidInput": InvalidInput,
    "UnknownSession": UnknownSession,
    "CapacityExceeded": CapacityExceeded,
    "Cancelled": Cancelled,
    "ComponentFailed": RequestFailed,
}
"""How the server names an error in its message: a stream has no other place for it."""

NOT_STARTED = "must specify the START flag"
"""Triton's own words for a frame of a sequence that is not open."""

UNKNOWN_MODEL = "Request for unknown model"
"""Triton's own words for a model that its repository does not hold."""

BAD_TENSOR = "input '"
"""Triton's own words for a tensor whose dtype or shape it refuses before the model sees it."""


def error_from_text(message: str, model_name: str, request_id: str, frame_idx: int | None = None) -> SparrowClientError:
    """The error of ours that the server's answer to a request stands for."""
    carried = (model_name, request_id, frame_idx)
    named = re.search(rf"({'|'.join(BY_NAME)}): (.*)", message, re.DOTALL)
    if named:
        return BY_NAME[named[1]](named[2], *carried)
    if NOT_STARTED in message:
        advice = "The session never started, has ended, was idle too long, or a request of it was cancelled: open a new one."
        return UnknownSession(f"{message}. {advice}", *carried)
    if UNKNOWN_MODEL in message:
        advice = "A SAM2 file alone can only track: use `track`, or export a whole checkpoint."
        return InvalidInput(f"{model_name}: this server has no such model. {advice}", *carried)
    return (InvalidInput if BAD_TENSOR in message else RequestFailed)(message, *carried)


def error_from_status(
    code: grpc.StatusCode, details: str, model_name: str, request_id: str, frame_idx: int | None = None
) -> SparrowClientError:
    """The error of ours for a connection that broke, was cancelled, or stayed silent for too long."""
    carried = (model_name, request_id, frame_idx)
    if code is grpc.StatusCode.CANCELLED:
        return Cancelled(f"{model_name}: the request was taken back.", *carried)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ServerUnavailable(f"{model_name}: {details}. Is the server overloaded?", *carried)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED):
        return ServerUnavailable(f"{details}. Is `sparrow serve` running at that address?", *carried)
    return RequestFailed(f"{model_name}: {details}. See the server's log.", *carried)
