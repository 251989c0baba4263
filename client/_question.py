"""A question to `sparrow` as a request, its responses as events, and events as an answer; no I/O."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelStreamInferResponse

from ._errors import InvalidInput, RequestFailed, error_from_text
from ._shared_memory import FrameRegion
from ._types import (
    Answer,
    Event,
    FrameMasks,
    Objects,
    Prompt,
    Proposals,
    Summary,
    TextPiece,
    TrackedObject,
    frame_masks,
    objects_from_tensors,
    summary_from_json,
)
from ._wire import SPARROW, SPARROW_TRACK, from_response, to_request

Frames = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]

MASK_FORMAT = "bits"
"""Of answers."""


def question(
    clip: NDArray[np.uint8] | None,
    prompt: str,
    region: FrameRegion | None = None,
    *,
    encoded_frames: Sequence[bytes] | None = None,
    target_boxes: NDArray[np.float32] | None = None,
    target_crop: NDArray[np.uint8] | None = None,
    **options: str | float | bool,
) -> ModelInferRequest:
    """The request of `SparrowClient.stream`; its clip, from `stack_frames`, goes to memory that is shared with the server, where given."""
    tensors: dict[str, NDArray[Any]] = {"prompt": np.array([prompt.encode()], object)}
    places = {}
    if clip is not None:
        tensors["frames"] = clip
        places = {"frames": region.write(0, clip)} if region else {}
    if encoded_frames is not None:
        tensors["encoded_frames"] = np.array(encoded_frames, object)
    if target_boxes is not None:
        tensors["target_boxes"] = np.asarray(target_boxes, np.float32)
    if target_crop is not None:
        tensors["target_crop"] = target_crop
    request = to_request(SPARROW, tensors, {**options, "mask_format": MASK_FORMAT}, uuid.uuid4().hex, places=places)
    request.parameters["triton_enable_empty_final_response"].bool_param = True  # the last response may come after the summary
    return request


def stack_frames(frames: Frames | None) -> NDArray[np.uint8] | None:
    """[T, H, W, 3], of frames that are given; raises InvalidInput when there are none or their sizes differ."""
    if frames is None:
        return None
    shapes = list(dict.fromkeys(np.shape(frame) for frame in frames))
    if not shapes:
        raise InvalidInput("sparrow.frames: got 0 frames, expected 1 or more. Send the frames of the clip.", SPARROW, "")
    if len(shapes) > 1:
        raise InvalidInput(f"sparrow.frames: got frames of sizes {shapes[:3]}, expected one size. Resize them.", SPARROW, "")
    return np.asarray(frames)


def events_from_response(response: ModelStreamInferResponse) -> list[Event]:
    """What a response says: one event, or none in the empty response that only ends the stream; raises the error of a refusal."""
    if response.error_message:
        raise error_from_text(response.error_message, SPARROW, response.infer_response.id)
    tensors = from_response(response.infer_response)
    if "text" in tensors:
        return [TextPiece(tensors["text"][0].decode())]
    if "phrases" in tensors:
        return [Objects(objects_from_tensors(tensors))]
    if "frame_idx" in tensors:
        height, width = tensors["frame_size"].tolist()
        return [frame_masks(tensors, tensors["branch"][0].decode(), (height, width), MASK_FORMAT)]
    if "proposal_frame" in tensors:
        return [Proposals(tensors["proposal_frame"], tensors["proposal_boxes"], tensors["proposal_scores"])]
    if "summary" in tensors:
        return [summary_from_json(json.loads(tensors["summary"][0]))]
    return []


class AnswerSoFar:
    """Gathers the events of a question; holds what an `Answer` holds, as far as it has come."""

    def __init__(self) -> None:
        self.text = ""
        self.objects: list[TrackedObject] = []
        self.frames: list[FrameMasks] = []
        self.proposals: Proposals | None = None
        self.summary: Summary | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, TextPiece):
            self.text += event.text
        elif isinstance(event, Objects):
            self.objects = event.objects
        elif isinstance(event, FrameMasks):
            self.frames.append(event)
        elif isinstance(event, Proposals):
            self.proposals = event
        else:
            self.summary = event

    def complete(self) -> Answer:
        """The answer at the end of the stream; raises RequestFailed where there is no summary."""
        if self.summary is None:
            raise RequestFailed("sparrow: the stream ended without a summary. See the server's log.", SPARROW, "")
        return Answer(self.summary, self.objects, self.frames, self.proposals)


def prompts_to_start(prompt: str | Sequence[Prompt], answer: AnswerSoFar, options: Mapping[str, Any]) -> Sequence[Prompt]:
    """What a session starts from: the objects of the answer to a question, numbered in their order, or the prompts that the caller has.

    Args:
        prompt: the question, or the prompts.
        answer: to the question.
        options: of the question.
    Raises:
        InvalidInput: the answer names no object, or there are options without a question.
    """
    if not isinstance(prompt, str):
        if options:
            raise InvalidInput(
                f"{SPARROW_TRACK}: got {', '.join(options)}, expected options with a question only. Remove them.", SPARROW_TRACK, ""
            )
        return prompt
    if not answer.objects:
        raise InvalidInput(f"{SPARROW}: got the answer {answer.text!r}, expected one that names an object. Ask for one.", SPARROW, "")
    prompts = [entry.prompt(index) for index, entry in enumerate(answer.objects)]
    # As the same question would be answered by `segment`.
    return [replace(prompt, boxes=None) for prompt in prompts] if options.get("video_init") == "text_only" else prompts
