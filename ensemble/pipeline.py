"""A question about a clip or an image to text, objects and masks; written once against `Runner`, knows no Triton.

vision tokens ─► language model ─► [BOX] / [SEG] embeddings ─┐
frame 0 ─► proposals ───────────────────────────────────────►├─► boxes ─► prior filter ─► framewise decode, or tracker
every frame ─► frame encoder ───────────────────────────────►┘
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from threading import Lock
from typing import Any, TypeVar

import numpy as np

from . import frames as preprocess
from . import masks, selection, settings, targets
from .components import components
from .config import LanguageConfig, ModelConfig
from .decoding import BOX, BOX_AND_TEXT, TEXT_ONLY, Prompt, decode_masks
from .errors import InvalidInput
from .generation import SAMPLING
from .options import Options
from .prompt import check_prompt, phrases, prompt_ids
from .runner import DeviceArray, Parameters, Runner, open_session
from .sampling import Sampling
from .tensors import Array, Arrays
from .tokenizer import Tokenizer
from .tracker import FRAME_TENSORS


@dataclass(frozen=True)
class Clip:
    """The pictures of a request.

    Args:
        frames: [T, H, W, 3] uint8 RGB.
        is_video: False: one picture, seen by CLIP alone.
    """

    frames: Array
    is_video: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.frames.shape[1], self.frames.shape[2]


class Answer:
    """What the language model has said so far.

    Args:
        tokenizer: of the checkpoint.
        language: names the special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, language: LanguageConfig) -> None:
        self._tokenizer, self._language = tokenizer, language
        self.token_ids: list[int] = []
        """Everything generated, with the end token."""
        self.text = ""
        """Without the end token."""
        self.seg: list[Array] = []
        self.box: list[Array] = []
        """Embeddings of the [SEG] and [BOX] tokens in order, [C] float32 each."""

    def accept(self, token_ids: Array, embeddings: Array, is_last: bool) -> str:
        """Adds tokens; the new piece of text. A character whose bytes are not complete waits for the next piece."""
        for token_id, embedding in zip(token_ids.tolist(), embeddings, strict=True):
            self.token_ids.append(token_id)
            if token_id == self._language.seg_token_id:
                self.seg.append(embedding)
            elif token_id == self._language.box_token_id:
                self.box.append(embedding)
        text = self._tokenizer.decode([token_id for token_id in self.token_ids if token_id not in self._language.eos_token_ids])
        text = text if is_last else text.rstrip("\ufffd")
        piece, self.text = text[len(self.text) :], text
        return piece


@dataclass(frozen=True)
class Objects:
    """What the masks are decoded from; lists are per object.

    Args:
        embeddings: [N, C] float32.
        selected: boxes before the prior filter, [K, 4] float32 xyxy, normalised, unclamped.
        boxes: those that the filter kept.
    """

    embeddings: Array
    selected: list[Array]
    boxes: list[Array]


Item = TypeVar("Item")
FrameDecoder = Callable[[list[Arrays], bool], Iterator[Arrays]]
"""Features of frames that follow each other, and whether they are the last, to the masks of the objects on each."""


class Timings:
    """Milliseconds spent in each stage; stages overlap, so they do not add up to the total."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self._lock = Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.milliseconds[name] = self.milliseconds.get(name, 0) + 1000 * (time.perf_counter() - start)


class Pipeline:
    """The algorithm of the component `sparrow`.

    Args:
        config: sizes of the model.
        tokenizer: of the checkpoint.
        runner: reaches every other component.
        preprocessor: brings frames to the sizes of the encoders.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, runner: Runner, preprocessor: preprocess.Preprocessor) -> None:
        self.config, self.tokenizer, self.runner, self.preprocessor = config, tokenizer, runner, preprocessor
        self._contract = components(config)["sparrow"]

    def answer(self, inputs: Arrays, parameters: Parameters) -> Generator[Arrays]:
        """Streams the responses to one request: text pieces, the objects, masks frame by frame, a summary.

        Args:
            inputs: of the component `sparrow`.
            parameters: see `Options`.
        Yields:
            Outputs of the component `sparrow`, a few tensors at a time.
        Raises:
            SparrowError: the request is refused or a component failed.
        """
        options = self._resolve(Options.from_parameters(parameters))
        timings = Timings()
        with timings.stage("total"):
            with timings.stage("preprocess"):
                self._contract.check_inputs(inputs)
                with_targets = "target_boxes" in inputs or "target_crop" in inputs or options.target_placeholders
                ids = np.array(prompt_ids(self.tokenizer, read_prompt(inputs), with_targets), np.int32)
                clip = read_clip(inputs, options)
            pool = ThreadPoolExecutor(settings.FRAMES_AHEAD, thread_name_prefix="sparrow")
            try:
                # Proposals and frames do not depend on the text: they are computed while the language model runs.
                proposals = pool.submit(self._proposals, clip, options, timings) if options.detection_guidance else None
                encoded = EncodedFrames(self, clip, pool, timings)
                answer = yield from self._generate(ids, inputs, clip, encoded, options, timings)
                if options.proposal_debug:
                    yield debug_response(
                        preprocess.grounding_frame(clip.frames[0], self.config), proposals.result() if proposals else NO_PROPOSALS
                    )
                if answer.seg:
                    yield from self._masks(clip, answer, encoded, proposals, options, timings)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # nobody waits for what nobody will read
        yield {"summary": np.array([json.dumps(self._summary(ids, clip, answer, options, timings)).encode()], object)}

    def _generate(
        self, ids: Array, inputs: Arrays, clip: Clip, encoded: EncodedFrames, options: Options, timings: Timings
    ) -> Generator[Arrays, None, Answer]:
        """Yields text; returns the answer."""
        answer = Answer(self.tokenizer, self.config.language)
        with timings.stage("vision"):
            indices = preprocess.encoder_indices(len(clip.frames), self.config.num_frames) if clip.is_video else [0]
            seen = [clip.frames[index] for index in indices]
            request: dict[str, Any] = {"prompt_ids": ids, "visual_tokens": self._visual_tokens(seen, clip.is_video)}
            request |= self._target_tokens(indices, inputs, clip, options)
        sampling = Sampling(options.temperature, options.top_k, options.seed)
        parameters = {SAMPLING: sampling.to_json()} if options.do_sample else {}
        with open_session(self.runner, "language_model", parameters) as session:
            for step in range(options.max_new_tokens):
                with timings.stage("decode" if step else "prefill"):
                    output = session.step({"num_tokens": np.ones(1, np.int32), **(request if step == 0 else {})})
                if step == 0:
                    encoded.go_ahead()
                finished = bool(output["finished"][0])
                piece = answer.accept(output["token_ids"], output["prompt_embeddings"], finished or step + 1 == options.max_new_tokens)
                if piece:
                    yield {"text": np.array([piece.encode()], object)}
                if finished:
                    break
        return answer

    def _target_tokens(self, indices: list[int], inputs: Arrays, clip: Clip, options: Options) -> Arrays:
        """The input target_tokens of language_model, where there is a target or room is kept for one (spec 1.7)."""
        most = min(options.target_tokens, settings.MAX_TARGET_TOKENS if clip.is_video else 1)
        if "target_crop" in inputs:
            crops = [inputs["target_crop"]]
        elif "target_boxes" in inputs:
            crops = targets.crop_targets(clip.frames, indices, inputs["target_boxes"])
        elif options.target_placeholders:
            return {"target_tokens": np.zeros((most, self.config.language.width), np.float32)}
        else:
            return {}
        context = self.preprocessor.tower_frames(crops, "context_frames")
        features = self.runner.run("image_encoder", context)["image_tokens"].mean(1)  # [n, S, H] -> [n, H]
        return {"target_tokens": targets.medoids(features, options.target_tokens, options.target_kmeans_steps)[:most]}

    def _visual_tokens(self, seen: Sequence[Array], is_video: bool) -> DeviceArray:
        """[S, H] float32."""
        if not is_video:
            inputs = self.preprocessor.tower_frames(seen, "context_frames")
            return self.runner.run("image_encoder", inputs, on_device=True)["image_tokens"][0]  # [1, S, H] -> [S, H]
        inputs = self.preprocessor.tower_frames(seen, "context_frames", "video_frames")
        return self.runner.run("vision_encoder", inputs, on_device=True)["visual_tokens"]

    def _proposals(self, clip: Clip, options: Options, timings: Timings) -> Arrays:
        """Boxes of frame 0."""
        with timings.stage("proposals"):
            detected = self.runner.run("proposal_detector", {"proposal_image": self.preprocessor.proposal_frame(clip.frames[0])})
            return selection.rank(detected, options.proposal_topk, options.coco_score_power, options.sa1b_score_power)

    def _masks(
        self, clip: Clip, answer: Answer, encoded: EncodedFrames, proposals: Future[Arrays] | None, options: Options, timings: Timings
    ) -> Iterator[Arrays]:
        """Yields the objects, then the masks of every frame."""
        with timings.stage("selection"):
            objects = self._select(clip, answer, encoded[0], proposals, options)
        yield {
            "phrases": np.array([phrase.encode() for phrase in phrases(answer.text)], object),
            "text_embeddings": objects.embeddings,
            **flatten_boxes(objects.selected, "selected_boxes", "selected_box_objects"),
            **flatten_boxes(objects.boxes, "boxes", "box_objects"),
        }
        branches = self._branches(clip, options)
        start = {"framewise": self._framewise, "tracked": self._tracked}
        with ExitStack() as stack:
            decoders = [stack.enter_context(start[branch](clip, objects, options)) for branch in branches]

            def decoded() -> Iterator[list[tuple[Arrays, ...]]]:
                """Of every group of frames, the responses of all branches to each."""
                for frames, are_last in encoded.groups():
                    with timings.stage("masks"):
                        responses = list(zip(*(decode(frames, are_last) for decode in decoders), strict=True))
                    yield responses

            groups = stack.enter_context(closing(one_ahead(decoded())))  # nothing is under way when sessions end
            for frame_idx, responses in enumerate(chain.from_iterable(groups)):
                for branch, response in zip(branches, responses, strict=True):
                    yield {
                        **response,
                        "branch": np.array([branch.encode()], object),
                        "frame_idx": np.array([frame_idx], np.int32),
                        "frame_size": np.array(clip.size, np.int32),
                    }

    def _select(self, clip: Clip, answer: Answer, frame: Arrays, proposals: Future[Arrays] | None, options: Options) -> Objects:
        """Boxes and embeddings of every [SEG] (spec 5)."""
        seg = np.stack(answer.seg)
        if proposals is None:
            none = [np.zeros((0, 4), np.float32)] * len(seg)
            return Objects(seg, none, none)
        found = proposals.result()
        scored = self.runner.run("proposal_selector", {"prompt_embeddings": np.stack(answer.box or answer.seg), **found, **frame})
        probabilities = selection.fuse(
            scored["selector_logits"], scored["roi_logits"], options.roi_fusion_gamma if options.roi_helper else 0.0
        )
        chosen = selection.choose(probabilities, options.selection_threshold)
        selected = selection.align([found["proposal_boxes"][indices] for indices in chosen], len(seg))
        boxes = self._filter(clip, selected, frame, options) if options.box_prior_filter else selected
        return Objects(seg if answer.box else scored["refined_embeddings"], selected, boxes)

    def _filter(self, clip: Clip, selected: list[Array], frame: Arrays, options: Options) -> list[Array]:
        """The box-prior filter: decode frame 0 from each box alone, keep the boxes that their mask fills (spec 5.5)."""
        every = np.concatenate(selected)
        corners = selection.prior_points(every, *clip.size, self.config.sam2.image_size)
        prompts = [Prompt(BOX, multimask=False, points=own) for own in corners]
        logits = self._decode(frame, prompts)["mask_logits"]
        scores = selection.prior_scores(every, masks.prior_masks(logits, *clip.size, settings.PRIOR_MASK_SIZE))
        by_object = np.split(scores, np.cumsum([len(boxes) for boxes in selected])[:-1])
        limits = options.box_prior_min_score, options.box_prior_max_keep
        return [boxes[selection.keep(own, *limits)] for boxes, own in zip(selected, by_object, strict=True)]

    @contextmanager
    def _framewise(self, clip: Clip, objects: Objects, options: Options) -> Iterator[FrameDecoder]:
        """Every frame on its own, with the boxes of frame 0 (spec 6)."""
        owners = np.repeat(np.arange(len(objects.boxes)), [len(boxes) for boxes in objects.boxes])
        if all(map(len, objects.boxes)):
            corners = np.concatenate(objects.boxes).reshape(-1, 2, 2) * np.float32(self.config.sam2.image_size)
            texts = objects.embeddings[owners]
            prompts = [Prompt(BOX_AND_TEXT, multimask=False, points=own, text=text) for own, text in zip(corners, texts, strict=True)]
        else:
            owners = np.arange(len(objects.embeddings))
            prompts = [Prompt(TEXT_ONLY, multimask=False, text=text) for text in objects.embeddings]
        starts = np.flatnonzero(np.diff(owners, prepend=-1))

        def decode(frames: list[Arrays], are_last: bool) -> Iterator[Arrays]:
            for frame in frames:
                decoded = self._decode(frame, prompts)
                best = {name: np.maximum.reduceat(decoded[name], starts) for name in ("mask_logits", "predicted_iou", "object_scores")}
                yield masks.respond(best["mask_logits"], best, clip.size, options.mask_format)

        yield decode

    def _decode(self, frame: Arrays, prompts: list[Prompt]) -> Arrays:
        """Masks of one frame."""
        return decode_masks(self.runner.run, frame, prompts, np.zeros(len(prompts), np.int64))

    @contextmanager
    def _tracked(self, clip: Clip, objects: Objects, options: Options) -> Iterator[FrameDecoder]:
        """Frame 0 from text and boxes, every other frame from memory (spec 7)."""
        start: Arrays = {"text_embeddings": objects.embeddings}
        if options.video_init == "text_then_boxes":
            start |= flatten_boxes(objects.boxes, "boxes", "box_objects")
        frame_size = np.array(clip.size, np.int32)
        with open_session(self.runner, "tracker", {"mask_format": options.mask_format}) as session:

            def decode(frames: list[Arrays], are_last: bool) -> Iterator[Arrays]:
                joined = {name: self.runner.join([frame[name] for frame in frames]) for name in frames[0]}
                response = session.step({**joined, "frame_size": frame_size, **({} if session.started else start)}, end=are_last)
                del response["object_ids"]  # the rows of `phrases`
                rows = {name: np.split(array, len(frames)) for name, array in response.items()}  # every frame has the same objects
                for index in range(len(frames)):
                    yield {name: own[index] for name, own in rows.items()}

            yield decode

    def _branches(self, clip: Clip, options: Options) -> tuple[str, ...]:
        if not clip.is_video:
            return ("framewise",)
        return ("framewise", "tracked") if options.branch == "both" else (options.branch,)

    def _resolve(self, options: Options) -> Options:
        """`options` as this checkpoint can serve them; raises InvalidInput where it cannot."""
        trained = self.config.selector.trained_gamma
        if options.trained_roi_fusion_gamma:
            if trained is None:
                raise InvalidInput("sparrow: got trained_roi_fusion_gamma, but the checkpoint holds none. Send roi_fusion_gamma.")
            options = replace(options, roi_fusion_gamma=min(max(trained, 0.0), 1.0))
        return replace(options, detection_guidance=options.detection_guidance and self.config.guided)

    def _summary(self, ids: Array, clip: Clip, answer: Answer, options: Options, timings: Timings) -> dict[str, Any]:
        branches = self._branches(clip, options)
        return {
            "answer": answer.text,
            "full_text": self.tokenizer.decode([*ids[ids >= 0].tolist(), *answer.token_ids]),
            "preset": self.config.preset,
            "modality": "video" if clip.is_video else "image",
            "branch": "both" if len(branches) > 1 else branches[0],
            "video_init": options.video_init if "tracked" in branches else None,
            "guidance": self._guidance(answer, options),
            "policy": asdict(options),
            "frame_size": list(clip.size),
            "num_frames": len(clip.frames),
            "num_objects": len(answer.seg),
            "num_tokens": len(answer.token_ids),
            "timings_ms": {name: round(value, 1) for name, value in timings.milliseconds.items()},
        }

    def _guidance(self, answer: Answer, options: Options) -> str:
        """Whether proposals took part, in the words of the original's debug_info.txt and one of ours."""
        if not self.config.guided:
            return "checkpoint_without_selector"
        if not options.detection_guidance:
            return "detection_guidance_disabled"
        return "ok" if answer.seg or answer.box else "no_selector_embeddings"


class EncodedFrames:
    """Features of a clip's frames, a few frames ahead of whoever reads them; each frame is encoded once.

    Frame 0 is encoded at once. A GPU goes on when the prompt has been read, for which it has no processors to spare, and while an answer is
    decoded, whether or not that will want masks; a CPU has no time for what may be in vain.

    Args:
        pipeline: encodes.
        clip: T frames.
        pool: works ahead.
    """

    def __init__(self, pipeline: Pipeline, clip: Clip, pool: ThreadPoolExecutor, timings: Timings) -> None:
        self._pipeline, self._clip, self._pool, self._timings = pipeline, clip, pool, timings
        self._futures: dict[int, Future[Arrays]] = {}
        self._ahead = settings.FRAMES_AHEAD if pipeline.runner.on_gpu else settings.ENCODER_BATCH
        self._submit(range(1))

    def go_ahead(self) -> None:
        """Called when the prompt has been read."""
        if self._pipeline.runner.on_gpu:
            self._submit(range(self._ahead))

    def __getitem__(self, index: int) -> Arrays:
        """Features of one frame, [1, ...]."""
        self._submit(range(index, index + 1 + self._ahead))
        return self._futures[index].result()

    def groups(self) -> Iterator[tuple[list[Arrays], bool]]:
        """Every frame once and in order: frame 0, whose masks are waited for, then the next with those behind it that are there already.

        Yields:
            frames, and whether they are the last.
        """
        index = 0
        while index < len(self._clip.frames):
            frames = [self[index]]
            while index and len(frames) < settings.TRACKED_TOGETHER and self._is_there(index + len(frames)):
                frames.append(self[index + len(frames)])
            for _ in frames:
                del self._futures[index]
                index += 1
            yield frames, index == len(self._clip.frames)

    def _is_there(self, index: int) -> bool:
        return index in self._futures and self._futures[index].done()

    def _submit(self, indices: range) -> None:
        for index in indices:
            if index < len(self._clip.frames) and index not in self._futures:
                self._futures[index] = self._pool.submit(self._encode, index)

    def _encode(self, index: int) -> Arrays:
        with self._timings.stage("encode"):
            features = self._pipeline.runner.run("frame_features", {"frame": self._clip.frames[index]}, on_device=True)
        return {name: features[name] for name in FRAME_TENSORS}


def one_ahead(items: Iterator[Item]) -> Generator[Item]:
    """The items, none of which is None; the next is made while one is dealt with."""
    with ThreadPoolExecutor(1, thread_name_prefix="sparrow") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


NO_PROPOSALS: Arrays = {"proposal_boxes": np.zeros((0, 4), np.float32), "proposal_scores": np.zeros(0, np.float32)}


def debug_response(grounding: Array, proposals: Arrays) -> Arrays:
    """The proposals and the picture that they were found in, as the original shows them."""
    return {
        "proposal_frame": preprocess.denormalise(grounding),
        "proposal_boxes": proposals["proposal_boxes"],
        "proposal_scores": proposals["proposal_scores"],
    }


def read_prompt(inputs: Arrays) -> str:
    """The user's text; raises InvalidInput when it is no UTF-8, empty, or holds markup."""
    try:
        prompt = str(inputs["prompt"][0].decode())
    except UnicodeDecodeError as error:
        raise InvalidInput(f"sparrow.prompt: got bytes that are no UTF-8 ({error}). Encode the text as UTF-8.") from error
    check_prompt(prompt)
    return prompt


def read_clip(inputs: Arrays, options: Options) -> Clip:
    """The frames of a request; raises InvalidInput when there are none, two kinds of them, or several for an image."""
    if ("frames" in inputs) == ("encoded_frames" in inputs):
        raise InvalidInput("sparrow.frames: got neither or both of frames and encoded_frames, expected one of them. Send one.")
    pictures = (
        inputs["frames"] if "frames" in inputs else preprocess.decode_frames(list(inputs["encoded_frames"]), "sparrow.encoded_frames")
    )
    is_video = len(pictures) > 1 if options.modality == "auto" else options.modality == "video"
    if len(pictures) > 1 and not is_video:
        raise InvalidInput(f"sparrow.frames: got {len(pictures)} frames with modality image, expected 1. Send one, or modality video.")
    return Clip(pictures, is_video)


def flatten_boxes(by_object: list[Array], boxes: str, owners: str) -> Arrays:
    """Boxes of all objects in one tensor and the object of each, under the two names."""
    counts = [len(own) for own in by_object]
    return {boxes: np.concatenate(by_object).astype(np.float32), owners: np.repeat(np.arange(len(by_object), dtype=np.int32), counts)}
