"""Client of a sparrow server: ask a video a question, get the answer and a mask track for every object it mentions.

    from sparrow_client import SparrowClient

    with SparrowClient("localhost:8001") as client:
        answer = client.segment(frames, "Please segment the horse.")
        print(answer.text, answer.objects[0].phrase, answer.frames[0].masks.shape)

        with client.track("Please segment the horse.", first_frames) as session:
            for frame in camera:
                for result in session.push(frame):
                    print(result.frame_idx, result.object_ids, result.visible, result.masks.shape)
            for result in session.finish():
                ...

`AsyncSparrowClient` has the same verbs for asyncio. NumPy and tritonclient are all it needs.
"""

from ._async_client import AsyncSparrowClient, AsyncTrackSession
from ._client import SparrowClient
from ._errors import (
    Cancelled,
    CapacityExceeded,
    InvalidInput,
    RequestFailed,
    ServerUnavailable,
    SparrowClientError,
    UnknownSession,
)
from ._track import TrackSession
from ._types import Answer, FrameMasks, Objects, Prompt, Proposals, Summary, TextPiece, TrackedObject

__all__ = [
    "Answer",
    "AsyncSparrowClient",
    "AsyncTrackSession",
    "Cancelled",
    "CapacityExceeded",
    "FrameMasks",
    "InvalidInput",
    "Objects",
    "Prompt",
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
