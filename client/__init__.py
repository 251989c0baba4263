"""Client of a sparrow server: ask a video a question, get the answer and a mask track for every object it mentions.

    from sparrow_client import SparrowClient

    with SparrowClient("localhost:8001") as client:
        answer = client.segment(frames, "Please segment the horse.")
        print(answer.text, answer.objects[0].phrase, answer.frames[0].masks.shape)

NumPy and tritonclient are all it needs.
"""

from ._client import SparrowClient, TrackSession
from ._errors import CapacityExceeded, InvalidInput, RequestFailed, ServerUnavailable, SparrowClientError, UnknownSession
from ._types import Answer, FrameMasks, Objects, Proposals, Summary, TextPiece, TrackedObject

__all__ = [
    "Answer",
    "CapacityExceeded",
    "FrameMasks",
    "InvalidInput",
    "Objects",
    "Proposals",
    "RequestFailed",
    "ServerUnavailable",
    "SparrowClient",
    "SparrowClientError",
    "Summary",
    "TextPiece",
    "TrackSession",
    "TrackedObject",
    "UnknownSession",
]
