"""What can go wrong with a request, and the Triton status code it is reported under.

SparrowError
├── InvalidInput      INVALID_ARG   the request can never succeed: mend it
├── UnknownSession    NOT_FOUND     the tracking or generation session is not open: send START
├── CapacityExceeded  UNAVAILABLE   a limit of this server is reached: retry later or ask for less
├── Cancelled         CANCELLED     the caller took the request back before it was worked on
└── ComponentFailed   INTERNAL      a model behind this one failed: see the server's log
"""

import logging
import re


class SparrowError(Exception):
    """A request failed; the message names who, what was got, what was expected and what to do."""

    triton_code = "UNKNOWN"
    """Name of the matching attribute of `pb_utils.TritonError`."""
    grpc_status = "UNKNOWN"
    """Name of the `grpc.StatusCode` that Triton turns it into."""


class InvalidInput(SparrowError):
    """The request can never succeed as it is."""

    triton_code = "INVALID_ARG"
    grpc_status = "INVALID_ARGUMENT"


class UnknownSession(SparrowError):
    """The request names a session that is not open."""

    triton_code = "NOT_FOUND"
    grpc_status = "NOT_FOUND"


class CapacityExceeded(SparrowError):
    """The request is sound, but a limit of this server is reached."""

    triton_code = "UNAVAILABLE"
    grpc_status = "UNAVAILABLE"


class Cancelled(SparrowError):
    """The caller took the request back before it was worked on; nothing has changed."""

    triton_code = "CANCELLED"
    grpc_status = "CANCELLED"


class ComponentFailed(SparrowError):
    """A model that this one depends on failed."""

    triton_code = "INTERNAL"
    grpc_status = "INTERNAL"


def known(component: str, error: Exception) -> SparrowError:
    """An error as it is, or what the caller is told of a bug; the log gets the trace.

    A fresh one: who keeps an error with its trace keeps the tensors of the request alive until the garbage collector comes round.
    """
    if isinstance(error, SparrowError):
        return type(error)(*error.args)
    logging.getLogger(component).error("request failed", exc_info=error)
    return ComponentFailed(f"{component}: {type(error).__name__}: {error}. See the server's log.")


def to_wire(error: SparrowError) -> str:
    """The text of an error as it leaves a model: its class is named, since calls between models and streams lose the status code."""
    return f"{type(error).__name__}: {error}"


def from_wire(text: str) -> SparrowError:
    """The error that `to_wire` wrote, whatever Triton put around it; ComponentFailed for any other text."""
    kinds = {kind.__name__: kind for kind in (InvalidInput, UnknownSession, CapacityExceeded, Cancelled, ComponentFailed)}
    match = re.search(rf"({'|'.join(kinds)}): (.*)", text, re.DOTALL)
    return kinds[match[1]](match[2]) if match else ComponentFailed(text)
