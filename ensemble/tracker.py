"""Tracking sessions: one step takes the next frames of several sessions and returns their masks (spec 7).

request ─► edits ─┬─ objects that start: their prompts, turn by turn ─► mask_decoder ─► memory_encoder ─────────┬─► memory bank
                  └─ the others: memory bank ─► memory_attention ─► mask_decoder ─► memory_encoder, as one call ┴─► masks of the frame

A step goes round by round: the first takes the first frame of every request, with its edits, the others the frames behind it, whose objects
all go on. All rounds are launched before the host waits for the masks of the first: it makes responses while the device works on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from typing import Any

import numpy as np

from . import masks, metrics, settings
from .components import components, propagation
from .config import ModelConfig
from .decoding import TRACKED, Prompt, Propagation, decode_masks, gated
from .errors import Cancelled, CapacityExceeded, InvalidInput, SparrowError, known
from .memory import MemoryBank, bank_bytes
from .options import TrackOptions
from .prompts import NO_EDITS, Edits, ObjectPrompt, read_edits
from .runner import Device, DeviceArray, Graph, Host, SequenceRequest
from .sessions import SessionStore
from .tensors import Array, Arrays

FRAME_TENSORS = ("frame_embeddings", "high_res_1", "high_res_0")


@dataclass(frozen=True)
class Limits:
    """What a deployment may change, in tracker/config.pbtxt; units and reasons stand in `settings`."""

    max_sessions: int = settings.MAX_SESSIONS
    max_session_objects: int = settings.MAX_OBJECTS
    max_memory_mib: int = settings.MAX_MEMORY_MIB
    session_idle_s: int = settings.SESSION_IDLE_S
    evictable_idle_s: int = settings.EVICTABLE_IDLE_S

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"tracker: got {name} = {value}, expected 1 or more.")

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], triton_idle_s: float) -> Limits:
        """The limits of a config.pbtxt; raises ValueError for one that makes no sense there.

        Args:
            parameters: name to number.
            triton_idle_s: after which Triton itself forgets a session, and nobody could say why any more.
        """
        limits = cls(**{entry.name: int(parameters[entry.name]) for entry in fields(cls)})
        if limits.session_idle_s >= triton_idle_s:
            raise ValueError(
                f"tracker: got session_idle_s = {limits.session_idle_s}, expected less than the {triton_idle_s:g} s of "
                "max_sequence_idle_microseconds in the same config.pbtxt. Raise that too."
            )
        return limits


@dataclass
class TrackState:
    """What a tracking session keeps between frames."""

    size: tuple[int, int]
    """Height and width of its frames."""
    frame_idx: int = 0
    """Next frame."""
    banks: dict[int, MemoryBank] = field(default_factory=dict)
    """The caller's object id to its memory, in the order of arrival."""
    num_objects: int = 0
    """Objects after the running step."""


@dataclass(frozen=True)
class Target:
    """An object on a frame of the running round.

    Args:
        frame: index of its frame in the round.
        object_id: the caller's.
        start: its prompts, where it starts here, or
        bank: its memory.
    """

    frame: int
    object_id: int
    start: ObjectPrompt | None = None
    bank: MemoryBank | None = None


@dataclass(frozen=True)
class Frame:
    """A request's frame in the running step.

    Args:
        request: brings it.
        state: of its session.
        options: of the request.
        targets: its objects.
        frame_idx: its index in the session.
        place: its index in the request.
    """

    request: SequenceRequest
    state: TrackState
    options: TrackOptions
    targets: list[Target]
    frame_idx: int
    place: int = 0


Seen = Callable[[], Arrays]
"""Waits for what the host sees of an object: mask_logits, [L, L] float32, gated; predicted_iou and object_scores, scalars."""


@dataclass(frozen=True)
class Decoded:
    """An object's mask and what its memory takes.

    Args:
        seen: its mask and scores, on their way to the host.
        maps: [C, g, g], on the device.
        pointer: [D], on the device.
    """

    seen: Seen
    maps: DeviceArray
    pointer: DeviceArray


class Tracker:
    """The server of the component `tracker`.

    Args:
        config: sizes of the model.
        graphs: its parts.
        device: where they run and memories stay.
        limits: of sessions, objects and memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        graphs: Mapping[str, Graph],
        device: Device | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._config, self._graphs, self._device = config, graphs, device or Host()
        self._limits = limits or Limits()
        self.propagation = self._device.compose(propagation(config), Propagation(config.sam2, self._device), graphs)
        """Takes objects that go on to their next frame."""
        self._one_each = cache(lambda count: self._device.put(np.arange(count)))
        """Number of objects to the frame of each, where every object brings its own."""
        self.metrics = metrics.Metrics()
        self._contract = components(config)["tracker"]
        self._bank_bytes = bank_bytes(config.sam2, self._device)
        self.sessions: SessionStore[TrackState] = SessionStore(
            "tracker", self._limits.max_sessions, self._limits.session_idle_s, self._limits.evictable_idle_s
        )
        self.sessions.on_close = partial(self.metrics.add, metrics.CLOSED, 1)
        self._elapsed: list[tuple[str, Callable[[], float]]] = []
        """Stages of the running step and what tells their seconds."""
        self._report()

    def step(self, requests: list[SequenceRequest]) -> list[Arrays | SparrowError]:
        """One result per request, in order; a bad request fails alone and changes nothing.

        Results hold the masks of the request's objects at the size of its frames, those of the first before those of the next; a closing
        request gets no objects. Should frames behind the first fail, the sessions of the step have gone half way and are closed.
        """
        results: dict[int, Arrays | SparrowError] = {}
        frames: dict[int, Frame] = {}
        ours: set[int] = set()  # positions; a START may be refused because somebody else's session is open
        for position, request in enumerate(requests):
            try:
                frame = self._admit(request, len(frames))
                ours.add(position)
                if frame is None:
                    results[position] = self._respond(Frame(request, TrackState((1, 1)), TrackOptions(), [], frame_idx=0), [])
                else:
                    frames[position] = frame
            except Exception as error:
                results[position] = known("tracker", error)
        try:
            results |= zip(frames, self._track(list(frames.values())), strict=True)
        except Exception as error:
            results |= dict.fromkeys(frames, known("tracker", error))
        finally:
            for frame in frames.values():
                frame.state.num_objects = len(frame.state.banks)
        for position, request in enumerate(requests):
            failed = isinstance(results[position], SparrowError)
            if failed:
                self.metrics.add(metrics.REFUSED, 1, type(results[position]).__name__)
            if failed and position in frames and frames[position].state.frame_idx > frames[position].frame_idx:
                self.sessions.fail(request.session_id)
            if (request.end or (request.start and failed)) and (position in ours or not request.start):
                self.sessions.close(request.session_id)
        self._report()
        return [results[position] for position in range(len(requests))]

    def expire(self) -> None:
        self.sessions.expire()
        self._report()

    def _report(self) -> None:
        objects = self._num_objects()
        self.metrics.set(metrics.SESSIONS, len(self.sessions))
        self.metrics.set(metrics.OBJECTS, objects)
        self.metrics.set(metrics.MEMORY, objects * self._bank_bytes)

    def _num_objects(self, but: TrackState | None = None) -> int:
        """Objects of all sessions but one."""
        return sum(state.num_objects for state in self.sessions.states() if state is not but)

    # Admission -------------------------------------------------------------------------------------------------------

    def _admit(self, request: SequenceRequest, index: int) -> Frame | None:
        """The first frame of a request, None where it only closes; raises SparrowError when it cannot be served."""
        if request.cancelled:
            raise Cancelled("tracker: the request was cancelled before its turn. The session is as it was.")
        self._contract.check_inputs(request.inputs)
        options = TrackOptions.from_parameters(request.parameters)
        height, width = request.inputs["frame_size"].tolist()
        if not height * width:
            return None
        missing = [name for name in FRAME_TENSORS if name not in request.inputs]
        if missing:
            raise InvalidInput(f"tracker.{missing[0]}: got nothing, expected the features of a frame. Add them to the request.")
        edits = read_edits(request.inputs, options.reset, (height, width), self._config.sam2.image_size)
        if request.start:
            if not edits.started:
                raise InvalidInput(
                    "tracker: got no objects with START, expected text_embeddings, boxes, points or masks. Say what to track."
                )
            if options.reset:
                self.sessions.close(request.session_id)
            try:
                state = self.sessions.open(request.session_id, TrackState((height, width)))
            except CapacityExceeded:
                self.metrics.add(metrics.LIMITED, 1, "sessions")
                raise
        else:
            state = self.sessions.get(request.session_id)
        try:
            self._check_frame(state, (height, width), options.frame_idx)
            targets = plan(index, state, edits)
            self._reserve(request.session_id, state, len(targets))
        except SparrowError:
            if request.start:
                self.sessions.close(request.session_id)
            raise
        return Frame(request, state, options, targets, state.frame_idx)

    def _check_frame(self, state: TrackState, size: tuple[int, int], frame_idx: int) -> None:
        """Raises InvalidInput for a frame of another size, or one that is not due."""
        if size != state.size:
            got, expected = ("x".join(map(str, pixels)) for pixels in (size, state.size))
            raise InvalidInput(
                f"tracker: got a frame of {got} px, expected {expected} px as the session's first. Resize it, or open another session."
            )
        if frame_idx not in (-1, state.frame_idx):
            raise InvalidInput(f"tracker: got frame {frame_idx}, expected frame {state.frame_idx}. Send every frame once and in order.")

    def _reserve(self, session_id: int, state: TrackState, num_objects: int) -> None:
        """Makes sure that there is room for the objects of a session; raises CapacityExceeded."""
        limits, got = self._limits, f"tracker: got {num_objects} objects for session {session_id}"
        grows = num_objects > state.num_objects
        if grows and num_objects > limits.max_session_objects:
            self.metrics.add(metrics.LIMITED, 1, "session_objects")
            raise CapacityExceeded(f"{got}, expected at most {limits.max_session_objects}. Remove some, or open another session for them.")
        most = limits.max_memory_mib * 2**20 // self._bank_bytes
        while grows and (others := self._num_objects(but=state)) + num_objects > most:
            if not self.sessions.evict(keep=session_id):
                self.metrics.add(metrics.LIMITED, 1, "memory")
                raise CapacityExceeded(
                    f"{got}, but the {limits.max_memory_mib} MiB of memory hold {most}, and {others} are in use. "
                    "Retry when a session has ended, or track fewer."
                )
        state.num_objects = num_objects

    # The step --------------------------------------------------------------------------------------------------------

    def _track(self, first: list[Frame]) -> list[Arrays]:
        """The responses to the requests of these frames and of those that follow them: launches all rounds, then makes what is there."""
        self._elapsed = []
        launched: list[tuple[Frame, list[Seen]]] = []
        frames = first
        while frames:
            launched += zip(frames, self._launch(frames), strict=True)
            frames = following(frames)
        parts: dict[int, list[Arrays]] = {frame.request.session_id: [] for frame in first}
        for frame, own in launched:
            seen = [wait() for wait in own]
            with self._stage("respond", Host()):
                parts[frame.request.session_id].append(self._respond(frame, seen))
        self.metrics.add(metrics.FRAMES, len(launched))
        for stage, elapsed in self._elapsed:
            self.metrics.add(metrics.STAGE, elapsed(), stage)
        return [{name: np.concatenate([part[name] for part in own]) for name in own[0]} for own in parts.values()]

    def _launch(self, frames: list[Frame]) -> list[list[Seen]]:
        """One round: decodes and remembers the objects of all frames together; waits for nothing but objects that start."""
        targets = [target for frame in frames for target in frame.targets]
        self.metrics.observe(metrics.STEP_FRAMES, len(frames))
        self.metrics.observe(metrics.STEP_OBJECTS, len(targets))
        features = {name: self._device.stack([frame.request.inputs[name][frame.place] for frame in frames]) for name in FRAME_TENSORS}
        decoded: dict[tuple[int, int], Decoded] = {}
        for chunk in chunks(targets):
            results = self._decode(chunk, features)
            decoded |= {(target.frame, target.object_id): result for target, result in zip(chunk, results, strict=True)}
        own = [[decoded[target.frame, target.object_id] for target in frame.targets] for frame in frames]
        for frame, results in zip(frames, own, strict=True):
            self._remember(frame, results)
        return [[result.seen for result in results] for results in own]

    def _remember(self, frame: Frame, results: list[Decoded]) -> None:
        """Brings a session to its next frame, from which on it is not as it was: a step that fails later closes it."""
        frame.state.frame_idx += 1
        banks = {}
        for target, result in zip(frame.targets, results, strict=True):
            if target.bank is None:
                banks[target.object_id] = MemoryBank(self._config.sam2, self._device, result.maps, result.pointer)
            else:
                target.bank.append(result.maps, result.pointer)
                banks[target.object_id] = target.bank
        frame.state.banks = banks

    def _decode(self, chunk: list[Target], features: Mapping[str, DeviceArray]) -> list[Decoded]:
        """A chunk's masks and memories: its objects all start, or have memories of one age."""
        object_frame: DeviceArray = np.array([target.frame for target in chunk], np.int64)
        if self._device.on_gpu and len(chunk) <= settings.MAX_FRAME_BATCH:  # one shape, captured once, whatever frames the objects are on
            features = {name: self._device.stack([array[target.frame] for target in chunk]) for name, array in features.items()}
            object_frame = self._one_each(len(chunk))
        starts = chunk[0].bank is None
        with self._stage("start" if starts else "track"):
            outputs = self._start(chunk, object_frame, features) if starts else self._continue(chunk, object_frame, features)
        arrived = self._device.fetch({name: outputs[name] for name in ("mask_logits", "predicted_iou", "object_scores")})
        seen = cache(arrived)  # its objects share one wait
        kept = (self._device.put(outputs[name]) for name in ("memory_maps", "object_pointers"))
        return [Decoded(partial(row, seen, index), *own) for index, own in enumerate(zip(*kept, strict=True))]

    def _continue(self, chunk: list[Target], object_frame: DeviceArray, features: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        """Condition on each object's memories, decode without a prompt, remember (spec 7.5)."""
        banks = [target.bank for target in chunk if target.bank is not None]
        inputs = {
            **features,
            "object_frame": object_frame,
            "memory_maps": self._device.stack([bank.maps for bank in banks]),
            "memory_rows": np.stack([bank.rows for bank in banks]),
            "object_pointers": self._device.stack([bank.pointers for bank in banks]),
            "pointer_distances": np.stack([bank.pointer_distances for bank in banks]),
        }
        return self._device.run(self.propagation, inputs)

    def _start(self, chunk: list[Target], object_frame: DeviceArray, features: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        """The prompts of each object in turn, all but the first with the mask so far (spec 7.3 A, B); a drawn mask is the result itself."""
        state: Arrays = {}
        drawn = {i: t.start.mask for i, t in enumerate(chunk) if t.start is not None and t.start.mask is not None}
        turns = [[] if target.start is None else target.start.turns(self._config.sam2) for target in chunk]
        for index, prompt in zip(drawn, self._mask_prompts(list(drawn.values())), strict=True):
            turns[index] = [prompt]
        for turn in range(max(map(len, turns))):
            waiting = [index for index, own in enumerate(turns) if turn < len(own)]
            for chosen in buckets(waiting):
                prompts = [turns[index][turn] for index in chosen]
                if turn:
                    bound = settings.MASK_PROMPT_CLAMP
                    earlier = np.clip(state["mask_logits"][chosen], -bound, bound)
                    prompts = [replace(prompt, mask=mask) for prompt, mask in zip(prompts, earlier, strict=True)]
                decoded = decode_masks(self._run, features, prompts, object_frame[chosen], self._device)
                state = scatter(state, self._device.hosts(gated(decoded, self._device)), chosen, len(chunk))
        for index, mask in drawn.items():  # the decoder only gave the pointer
            state["mask_logits"][index] = masks.drawn_logits(mask, self._config.sam2.low_res)
            state["predicted_iou"][index], state["object_scores"][index] = 1, settings.DRAWN_MASK_LOGIT
        remembered = {
            "frame_embeddings": features["frame_embeddings"],
            "object_frame": object_frame,
            "mask_logits": state["mask_logits"],
            "prompted": np.full(len(chunk), True),
            "object_scores": state["object_scores"],
        }
        return {**state, **self._run("memory_encoder", remembered)}

    def _mask_prompts(self, drawn: list[Array]) -> list[Prompt]:
        """What tells the mask decoder of masks that the caller drew; the embedding is the frame's own (sam2_base.py track_step)."""
        if not drawn:
            return []
        prompts = self._device.host(self._run("mask_downsampler", {"masks": np.stack(drawn).astype(np.float32)})["mask_prompts"])
        return [Prompt(TRACKED, multimask=False, mask=mask, remembers=True) for mask in prompts]

    def _run(self, component: str, inputs: dict[str, DeviceArray]) -> dict[str, DeviceArray]:
        return self._device.run(self._graphs[component], inputs)

    @contextmanager
    def _stage(self, name: str, device: Device | None = None) -> Iterator[None]:
        with (device or self._device).timed() as elapsed:
            yield
        self._elapsed.append((name, elapsed))

    def _respond(self, frame: Frame, seen: list[Arrays]) -> Arrays:
        """The outputs of a request for one of its frames: masks at the frame's size and their scores, of what was seen of its objects."""
        low_res = self._config.sam2.low_res
        logits = np.stack([own["mask_logits"] for own in seen]) if seen else np.zeros((0, low_res, low_res), np.float32)
        scores = {name: np.array([own[name] for own in seen], np.float32) for name in ("predicted_iou", "object_scores")}
        return {
            "frame_idx": np.array([frame.frame_idx], np.int32),
            "object_ids": np.array([target.object_id for target in frame.targets], np.int32),
            **masks.respond(logits, scores, frame.state.size, frame.options.mask_format),
        }


def following(frames: list[Frame]) -> list[Frame]:
    """The next frame of every request that has one; its objects all go on."""
    rest = [frame for frame in frames if frame.place + 1 < len(frame.request.inputs[FRAME_TENSORS[0]])]
    return [
        replace(frame, targets=plan(index, frame.state, NO_EDITS), frame_idx=frame.frame_idx + 1, place=frame.place + 1)
        for index, frame in enumerate(rest)
    ]


def row(arrived: Callable[[], Arrays], index: int) -> Arrays:
    """One object of a call whose results are on their way."""
    return {name: array[index] for name, array in arrived().items()}


def plan(frame: int, state: TrackState, edits: Edits) -> list[Target]:
    """The objects of a frame after its edits: a prompt starts its object anew, at its old place (ADR 0014); raises InvalidInput."""
    unknown = edits.removed - set(state.banks)
    if unknown:
        raise InvalidInput(f"tracker.removed_objects: got {min(unknown)}, expected one of {list(state.banks)}. Remove what is tracked.")
    both = edits.removed & set(edits.started)
    if both:
        raise InvalidInput(f"tracker.removed_objects: got {min(both)}, which the request also starts. A prompt starts it anew by itself.")
    kept = {} if edits.reset else {id: bank for id, bank in state.banks.items() if id not in edits.removed}
    continued = {id: Target(frame, id, bank=bank) for id, bank in kept.items()}
    return list((continued | {id: Target(frame, id, start=prompt) for id, prompt in edits.started.items()}).values())


def chunks(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """The objects that share calls: those that start, or have memories of one age, in few sizes. No call pays for padding or a mask, shapes
    are few, and who else is in the step does not change an object's.
    """
    groups: dict[int, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.bank.age if target.bank else 0, []).append(target)
    for group in groups.values():
        yield from buckets(group)


def buckets(entries: list[Any]) -> Iterator[list[Any]]:
    """Pieces of OBJECT_BATCHES, the largest first: a step pays for no padding."""
    start = 0
    while start < len(entries):
        size = next(size for size in settings.OBJECT_BATCHES if size <= len(entries) - start)
        yield entries[start : start + size]
        start += size


def scatter(state: Arrays, update: Arrays, chosen: list[int], num_objects: int) -> Arrays:
    """`state` with the rows `chosen` replaced; rows that were never written are zero."""
    state = state or {name: np.zeros((num_objects, *array.shape[1:]), array.dtype) for name, array in update.items()}
    for name, array in update.items():
        state[name][chosen] = array
    return state
