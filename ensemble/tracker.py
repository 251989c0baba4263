"""Tracking sessions: one step takes the next frame of several sessions and returns their masks (spec 7)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from . import masks, settings
from .components import components
from .config import ModelConfig
from .decoding import BOX, TRACKED, TRACKED_TEXT, Prompts, decode_masks, gate
from .errors import InvalidInput, SparrowError
from .memory import MemoryBank
from .runner import Runner, SequenceRequest
from .sessions import SessionStore
from .tensors import Array, Arrays

FRAME_TENSORS = ("frame_embeddings", "high_res_1", "high_res_0")


@dataclass
class TrackState:
    """What a tracking session keeps between frames."""

    bank: MemoryBank | None = None
    """None until the conditioning frame is decoded."""


@dataclass(frozen=True)
class Frame:
    """A request's frame in the running step."""

    index: int
    request: SequenceRequest
    state: TrackState
    num_objects: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the caller's frame."""
        height, width = self.request.inputs["frame_size"]
        return int(height), int(width)


class Tracker:
    """The server of the component `tracker`.

    Args:
        config: sizes of the model.
        runner: reaches memory_attention, mask_decoder and memory_encoder.
    """

    def __init__(self, config: ModelConfig, runner: Runner) -> None:
        self._config, self._runner = config, runner
        self._contract = components(config)["tracker"]
        self.sessions: SessionStore[TrackState] = SessionStore("tracker", settings.MAX_SESSIONS, settings.SESSION_IDLE_S)

    def step(self, requests: list[SequenceRequest]) -> list[Arrays | SparrowError]:
        """One result per request, in order; a bad request fails alone.

        Results hold the masks of the request's objects at its frame's size; a closing request gets no objects.
        """
        results: dict[int, Arrays | SparrowError] = {}
        frames: list[Frame] = []
        admitted: list[int] = []
        for position, request in enumerate(requests):
            try:
                self._contract.check_inputs(request.inputs)
                masks.mask_format(request.parameters)  # here, so that a wrong one fails alone
                if request.inputs["frame_size"].any():
                    frames.append(self._admit(request, len(frames)))
                    admitted.append(position)
                else:
                    results[position] = self._respond(self._no_objects(), (1, 1), request)
            except SparrowError as error:
                results[position] = error
        try:
            results |= zip(admitted, self._track(frames), strict=True)
        except SparrowError as error:
            results |= dict.fromkeys(admitted, error)
        for position, request in enumerate(requests):
            if request.end or (request.start and isinstance(results[position], SparrowError)):
                self.sessions.close(request.session_id)
        return [results[position] for position in range(len(requests))]

    def _admit(self, request: SequenceRequest, index: int) -> Frame:
        """The request as a frame of this step; raises SparrowError when it cannot be served."""
        missing = [name for name in FRAME_TENSORS if name not in request.inputs]
        if missing:
            raise InvalidInput(f"tracker.{missing[0]}: got nothing, expected the features of a frame. Add them to the request.")
        if request.start:
            num_objects = count_objects(request.inputs)
            return Frame(index, request, self.sessions.open(request.session_id, TrackState()), num_objects)
        state = self.sessions.get(request.session_id)
        assert state.bank is not None  # a session whose first frame failed was closed
        return Frame(index, request, state, len(state.bank.maps))

    def _track(self, frames: list[Frame]) -> list[Arrays]:
        """Decodes, remembers and encodes the objects of all frames together."""
        if not frames:
            return []
        features = {name: np.stack([frame.request.inputs[name] for frame in frames]) for name in FRAME_TENSORS}
        prompted = [frame for frame in frames if frame.state.bank is None]
        continued = [frame for frame in frames if frame.state.bank is not None]
        decoded = {frame.index: result for frame, result in self._decode_prompted(prompted, features)}
        decoded |= {frame.index: result for frame, result in self._decode_continued(continued, features)}

        maps = self._runner.run(
            "memory_encoder",
            {
                "frame_embeddings": features["frame_embeddings"],
                "object_frame": object_frames(frames),
                "mask_logits": np.concatenate([decoded[frame.index]["mask_logits"] for frame in frames]),
                "prompted": np.repeat([frame.state.bank is None for frame in frames], [frame.num_objects for frame in frames]),
                "object_scores": np.concatenate([decoded[frame.index]["object_scores"] for frame in frames]),
            },
        )["memory_maps"]
        for frame, new_maps in zip(frames, split(maps, frames), strict=True):
            pointers = decoded[frame.index]["object_pointers"]
            if frame.state.bank is None:
                frame.state.bank = MemoryBank(new_maps, pointers, self._config.sam2.num_maps)
            else:
                frame.state.bank.append(new_maps, pointers)
        return [self._respond(decoded[frame.index], frame.size, frame.request) for frame in frames]

    def _decode_prompted(self, frames: list[Frame], features: Arrays) -> Iterable[tuple[Frame, Arrays]]:
        """Conditioning frames: the text, then each box in turn with the mask so far as a prompt (spec 7.3 A, B)."""
        if not frames:
            return []
        object_frame = object_frames(frames)
        texts, boxes = [], []
        for frame in frames:
            inputs = frame.request.inputs
            text = inputs.get("text_embeddings", np.zeros((0, self._config.sam2.width), np.float32))
            texts += [*text, *[None] * (frame.num_objects - len(text))]
            owners = inputs.get("box_objects", np.zeros(0, np.int32))
            boxes += [inputs["boxes"][owners == index] if len(owners) else [] for index in range(frame.num_objects)]

        state: Arrays = {}
        with_text = [index for index, text in enumerate(texts) if text is not None]
        if with_text:
            prompts = Prompts(TRACKED_TEXT, object_frame[with_text], multimask=True, text=np.stack([texts[index] for index in with_text]))
            state = scatter(state, gate(decode_masks(self._runner, features, prompts)), with_text, len(texts))
        for turn in range(max(map(len, boxes))):
            # The first box of an object without text has no mask to start from, so it takes a call of its own.
            fresh = [index for index, own in enumerate(boxes) if turn < len(own) and turn == 0 and texts[index] is None]
            chained = [index for index, own in enumerate(boxes) if turn < len(own) and index not in fresh]
            for chosen in filter(None, (fresh, chained)):
                corners = np.clip([boxes[index][turn] for index in chosen], 0, 1).reshape(-1, 2, 2) * self._config.sam2.image_size
                bound = settings.MASK_PROMPT_CLAMP
                earlier = None if chosen is fresh else np.clip(state["mask_logits"][chosen], -bound, bound)
                prompts = Prompts(BOX, object_frame[chosen], multimask=False, corners=corners.astype(np.float32), masks=earlier)
                state = scatter(state, gate(decode_masks(self._runner, features, prompts)), chosen, len(texts))
        return zip(frames, split_all(state, frames), strict=True)

    def _decode_continued(self, frames: list[Frame], features: Arrays) -> Iterable[tuple[Frame, Arrays]]:
        """Later frames: condition on each object's memories, decode without a prompt (spec 7.5)."""
        banks = [frame.state.bank for frame in frames if frame.state.bank is not None]
        if not banks:
            return []
        object_frame = object_frames(frames)
        counts = [frame.num_objects for frame in frames]
        num_maps = max(bank.maps.shape[1] for bank in banks)
        num_pointers = max(bank.pointers.shape[1] for bank in banks)
        rows = np.stack([pad_absent(bank.rows, num_maps) for bank in banks])
        distances = np.stack([pad_absent(bank.pointer_distances, num_pointers) for bank in banks])
        conditioned = self._runner.run(
            "memory_attention",
            {
                "frame_embeddings": features["frame_embeddings"],
                "object_frame": object_frame,
                "memory_maps": np.concatenate([pad_slots(bank.maps, num_maps) for bank in banks]),
                "memory_rows": rows.repeat(counts, 0),
                "object_pointers": np.concatenate([pad_slots(bank.pointers, num_pointers) for bank in banks]),
                "pointer_distances": distances.repeat(counts, 0),
            },
        )["conditioned_embeddings"]
        prompts = Prompts(TRACKED, object_frame, multimask=True)
        decoded = gate(decode_masks(self._runner, features, prompts, conditioned))
        return zip(frames, split_all(decoded, frames), strict=True)

    def _no_objects(self) -> Arrays:
        low_res = self._config.sam2.low_res
        none = np.zeros(0, np.float32)
        return {"mask_logits": np.zeros((0, low_res, low_res), np.float32), "predicted_iou": none, "object_scores": none}

    def _respond(self, decoded: Arrays, size: tuple[int, int], request: SequenceRequest) -> Arrays:
        """The outputs of a request: masks at the frame's size and their scores."""
        return masks.respond(masks.binary_masks(decoded["mask_logits"], *size), decoded, request.parameters)


def count_objects(inputs: Arrays) -> int:
    """Objects of a START request; raises InvalidInput when there are none, too many, or one without text and box."""
    texts = len(inputs.get("text_embeddings", ()))
    owners = inputs.get("box_objects", np.zeros(0, np.int32))
    if len(owners) != len(inputs.get("boxes", ())):
        raise InvalidInput(f"tracker.box_objects: got {len(owners)}, expected one per box. Say which object each box belongs to.")
    num_objects = max(texts, int(owners.max()) + 1 if len(owners) else 0)
    if not num_objects:
        raise InvalidInput("tracker: got no objects with START, expected text_embeddings or boxes. Say what to track.")
    bare = sorted(set(range(texts, num_objects)) - set(owners.tolist()))
    if bare:
        raise InvalidInput(f"tracker.box_objects: got none for object {bare[0]}, expected text or a box for each. Number objects from 0.")
    return num_objects


def object_frames(frames: list[Frame]) -> Array:
    """[O] int64: frame of each object, objects of a frame together."""
    return np.repeat(np.array([frame.index for frame in frames], np.int64), [frame.num_objects for frame in frames])


def split(objects: Array, frames: list[Frame]) -> list[Array]:
    """The rows of each frame's objects."""
    return np.split(objects, np.cumsum([frame.num_objects for frame in frames])[:-1])


def split_all(objects: Arrays, frames: list[Frame]) -> list[Arrays]:
    """`split` of every tensor."""
    parts = {name: split(array, frames) for name, array in objects.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(len(frames))]


def scatter(state: Arrays, update: Arrays, chosen: list[int], num_objects: int) -> Arrays:
    """`state` with the rows `chosen` replaced; rows that were never written are zero."""
    state = state or {name: np.zeros((num_objects, *array.shape[1:]), array.dtype) for name, array in update.items()}
    for name, array in update.items():
        state[name][chosen] = array
    return state


def pad_slots(bank: Array, slots: int) -> Array:
    """[O, M, ...] to [O, slots, ...]; the padding is masked out by the caller."""
    return np.pad(bank, [(0, 0), (0, slots - bank.shape[1]), *[(0, 0)] * (bank.ndim - 2)])


def pad_absent(rows: Array, slots: int) -> Array:
    """[M] to [slots] with -1, which masks out a slot."""
    return np.pad(rows, (0, slots - len(rows)), constant_values=-1)
