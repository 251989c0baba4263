"""What the client raises.

SparrowClientError          carries .model_name and .request_id
├── InvalidInput            the request can never succeed: mend it
├── UnknownSession          the tracking session is not open: start it again
├── CapacityExceeded        a limit of the server is reached: retry later or ask for less
├── ServerUnavailable       nobody answers at that address, or not in time
└── RequestFailed           the server failed: see its log
"""

from __future__ import annotations

import re

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


BY_NAME: dict[str, type[SparrowClientError]] = {
    "InvalidInput": InvalidInput,
    "UnknownSession": UnknownSession,
    "CapacityExceeded": CapacityExceeded,
    "ComponentFailed": RequestFailed,
}
"""How the server names an error in its message: a stream has no other place for it."""

NO_CONNECTION = ("failed to connect", "errors resolving", "Socket closed", "Connection reset", "Deadline Exceeded")
"""gRPC's own words where nobody answers."""

NOT_STARTED = "must specify the START flag"
"""Triton's own words for a frame of a sequence that is not open."""

UNKNOWN_MODEL = "Request for unknown model"
"""Triton's own words for a model that its repository does not hold."""

BAD_TENSOR = "input '"
"""Triton's own words for a tensor whose dtype or shape it refuses before the model sees it."""


def error_from_triton(error: InferenceServerException, model_name: str, request_id: str) -> SparrowClientError:
    """The error of ours that Triton's stands for."""
    message = str(error.message())
    named = re.search(rf"({'|'.join(BY_NAME)}): (.*)", message, re.DOTALL)
    if named:
        return BY_NAME[named[1]](named[2], model_name, request_id)
    if any(words in message for words in NO_CONNECTION):
        return ServerUnavailable(f"{message}. Is `sparrow serve` running at that address?", model_name, request_id)
    if NOT_STARTED in message:
        advice = "The session never started, has ended, or was idle too long: open a new one."
        return UnknownSession(f"{message}. {advice}", model_name, request_id)
    if UNKNOWN_MODEL in message:
        advice = "A SAM2 file alone can only track: use `track`, or export a whole checkpoint."
        return InvalidInput(f"{model_name}: this server has no such model. {advice}", model_name, request_id)
    return (InvalidInput if BAD_TENSOR in message else RequestFailed)(message, model_name, request_id)
