"""What the client raises.

    SparrowClientError          carries .model_name and .request_id
    ├── InvalidInput            the request can never succeed: mend it
    ├── UnknownSession          the tracking session is not open: start it again
    ├── CapacityExceeded        a limit of the server is reached: retry later or ask for less
    ├── ServerUnavailable       nobody answers at that address, or not in time
    └── RequestFailed           the server failed: see its log
"""

from __future__ import annotations

import grpc
from tritonclient.utils import InferenceServerException


class SparrowClientError(Exception):
    """A request failed.

    Args:
        message: who, what was got, what was expected, what to do.
        model_name: the public model that was asked.
        request_id: as sent with the request.
    """

    def __init__(self, message: str, model_name: str, request_id: str) -> None:
        super().__init__(message)
        self.model_name, self.request_id = model_name, request_id


class InvalidInput(SparrowClientError):
    """The request can never succeed as it is."""


class UnknownSession(SparrowClientError):
    """The tracking session is not open."""


class CapacityExceeded(SparrowClientError):
    """The request is sound, but a limit of the server is reached."""


class ServerUnavailable(SparrowClientError):
    """Nobody answers at that address, or not in time."""


class RequestFailed(SparrowClientError):
    """The server failed."""


BY_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.NOT_FOUND: UnknownSession,
    grpc.StatusCode.UNAVAILABLE: CapacityExceeded,
    grpc.StatusCode.DEADLINE_EXCEEDED: ServerUnavailable,
}

NOT_STARTED = "must specify the START flag"
"""Triton's own words for a frame of a sequence that is not open."""


def error_from_triton(error: InferenceServerException, model_name: str, request_id: str) -> SparrowClientError:
    """The error of ours that a status and message stand for."""
    message = str(error.message())
    status = next((code for code in grpc.StatusCode if str(code) == error.status()), None)
    kind = BY_STATUS.get(status, RequestFailed) if status else RequestFailed
    if NOT_STARTED in message:
        kind, message = UnknownSession, f"{message}. The session never started, has ended, or was idle too long: open a new one."
    if "failed to connect" in message or "Deadline Exceeded" in message or "Connection refused" in message:
        kind, message = ServerUnavailable, f"{message}. Is `sparrow serve` running at that address?"
    return kind(message, model_name, request_id)
