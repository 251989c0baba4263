"""What can go wrong with a request, and the Triton status code it is reported under.

    SparrowError
    ├── InvalidInput      INVALID_ARG   the request can never succeed: mend it
    ├── UnknownSession    NOT_FOUND     the tracking or generation session is not open: send START
    ├── CapacityExceeded  UNAVAILABLE   a limit of this server is reached: retry later or ask for less
    └── ComponentFailed   INTERNAL      a model behind this one failed: see the server's log
"""


class SparrowError(Exception):
    """A request failed; the message names who, what was got, what was expected and what to do."""

    triton_code = "UNKNOWN"
    """Name of the matching attribute of `pb_utils.TritonError`."""


class InvalidInput(SparrowError):
    """The request can never succeed as it is."""

    triton_code = "INVALID_ARG"


class UnknownSession(SparrowError):
    """The request names a session that is not open."""

    triton_code = "NOT_FOUND"


class CapacityExceeded(SparrowError):
    """The request is sound, but a limit of this server is reached."""

    triton_code = "UNAVAILABLE"


class ComponentFailed(SparrowError):
    """A model that this one depends on failed."""

    triton_code = "INTERNAL"
