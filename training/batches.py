"""Batches: a pool of scenes and questions on the device, rendered when asked for, and prepared as the server prepares frames."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import ceil
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ensemble import settings
from ensemble.components import VISUAL_PLACEHOLDER
from ensemble.config import LanguageConfig, ModelConfig
from ensemble.frames import encoder_indices
from ensemble.prompt import ASSISTANT, prompt_ids
from ensemble.tensors import Arrays
from ensemble.tokenizer import Tokenizer

from .shapes_rvos.language import Question, absent, description, referring
from .shapes_rvos.render import pack, render
from .shapes_rvos.scene import ATTRIBUTES, MAX_ACTORS, Scene, draw_scene
from .shapes_rvos.visibility import visible_on_first_frame

SIZES = ((240, 320), (256, 256), (240, 320), (200, 360), (240, 320), (320, 180))
"""Sizes that scenes are rendered at, in turn; a batch has one size."""
CHUNK = 64
"""Scenes that are rendered at once for the vision towers."""
NUM_FRAMES = 24
"""Frames of a video."""
QUESTIONS = {referring: 5, absent: 2, description: 1}
"""Questions of every scene, in this order."""
MAX_OBJECTS = QUESTIONS[referring] + QUESTIONS[description] * MAX_ACTORS
"""[SEG]s in the answers to a scene's questions."""
MOSTLY = 0.35
"""Part of a patch that an actor has to cover to be what the patch shows."""
IGNORED = -100
"""Target of a token that is not trained."""
NOTHING = -1
"""What an answer speaks of that finds nothing."""


@dataclass(frozen=True)
class Questions:
    """Every scene's questions and their answers, one behind the other: they share the clip in front of them, and do not see each other.

    Args:
        ids: [S, L] int64: the visual placeholder stands at index `place`, zeros fill up.
        turns: [S, L] int64: the question that a token belongs to, -1 up to the placeholder.
        positions: [S, L] int64: of each token, were its question alone.
        targets: [S, L] int64: the token that should follow, IGNORED outside of the answers.
        spoken: [S, L] int64: the actor that the answer speaks of where a target stands, NOTHING, or IGNORED behind the last one.
        emitting: [2, S, MAX_OBJECTS] int64: where each [SEG] is the target, and each [BOX]; zeros fill up.
        objects: [S, MAX_OBJECTS] int64: the actor of each [SEG], -1 where there is none.
        place: index of the visual placeholder.
    """

    ids: Tensor
    turns: Tensor
    positions: Tensor
    targets: Tensor
    spoken: Tensor
    emitting: Tensor
    objects: Tensor
    place: int

    def of(self, scenes: Tensor) -> dict[str, Tensor]:
        """The rows of some scenes, by name."""
        names = ("ids", "turns", "positions", "targets", "spoken", "objects")
        return {name: getattr(self, name)[scenes] for name in names} | {"emitting": self.emitting[:, scenes]}


class Pool:
    """Scenes and questions on the device that they are rendered on.

    Args:
        split: of shapes-rvos.
        indices: of the scenes.
        tokenizer_folder: of the checkpoint.
        config: sizes.
        device: for everything.
        seed: of what is drawn from it.
        workers: processes that draw scenes.
    """

    def __init__(
        self, split: str, indices: Sequence[int], tokenizer_folder: Path, config: ModelConfig, device: str, seed: int = 0, workers: int = 2
    ) -> None:
        self.config, self.device = config, device
        work = partial(draw_all, split, indices, workers, tokenizer_folder, config.language)
        with get_context("spawn").Pool(workers) as pool:
            pieces = pool.map(work, range(workers))
        packed, attributes, questions = zip(*pieces, strict=True)
        self.packed, self._count = gather(packed, device), len(indices)
        self.attributes = gather(attributes, device)
        """Attribute to [S, MAX_ACTORS] int64: which of its values."""
        self.questions = join([row for own in questions for row in own], device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self._random = random.Random(seed)
        self._seen: Seen | None = None

    def __len__(self) -> int:
        return self._count

    def half(self) -> torch.autocast:
        """Mixed precision, where the device is made for it."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def size(self) -> int:
        """A random index of SIZES."""
        return self._random.randrange(len(SIZES))

    def alike(self, count: int) -> tuple[Tensor, tuple[int, int]]:
        """Random scenes that the vision towers saw at one size: [count] int64, and that size."""
        size = self.size()
        return size + len(SIZES) * self.integers((len(self) - size - 1) // len(SIZES) + 1, count), SIZES[size]

    @property
    def seen(self) -> Seen:
        """What the vision towers see of every scene; rendered when asked for the first time."""
        if self._seen is None:
            self._seen = look(self)
        return self._seen

    def pick(self, count: int) -> Tensor:
        """[count] int64 random scenes."""
        return self.integers(len(self), count)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    @torch.no_grad()
    def render(self, scenes: Tensor, times: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Frames [S, T, 3, H, W] float32 0..255 as a video holds them, and masks [S, T, MAX_ACTORS, H, W] bool."""
        frames, masks = render({name: tensor[scenes] for name, tensor in self.packed.items()}, times, size)
        noise = self.normal(*frames.shape) * (4 * self.uniform(len(frames), 1, 1, 1, 1))  # stands for the codec's
        return (frames + noise).round_().clamp_(0, 255), masks


@dataclass(frozen=True)
class Seen:
    """The vision towers' frames of S scenes, before they are normalised, and what each patch shows.

    Args:
        context, video: [S, T, 3, size, size] uint8.
        context_actors, video_actors: [S, T, grid, grid] int8: the actor that most of a patch shows, -1 for none.
    """

    context: Tensor
    video: Tensor
    context_actors: Tensor
    video_actors: Tensor

    def context_frames(self, scenes: Tensor) -> Tensor:
        """CLIP's input [N * T, 3, size, size] of N scenes."""
        return normalise(self.context[scenes].flatten(0, 1).float() / 255, settings.CLIP_MEAN, settings.CLIP_STD)

    def video_frames(self, scenes: Tensor) -> Tensor:
        """InternVideo's input, as `context_frames`."""
        return normalise(self.video[scenes].flatten(0, 1).float() / 255, settings.IMAGENET_MEAN, settings.IMAGENET_STD)


def look(pool: Pool) -> Seen:
    """Renders the frames that the vision towers see."""
    config, count = pool.config, len(pool)
    context, video = config.context, config.video
    shape = (count, config.num_frames)
    seen = Seen(
        torch.empty((*shape, 3, context.image_size, context.image_size), dtype=torch.uint8, device=pool.device),
        torch.empty((*shape, 3, video.image_size, video.image_size), dtype=torch.uint8, device=pool.device),
        torch.empty((*shape, context.grid, context.grid), dtype=torch.int8, device=pool.device),
        torch.empty((*shape, video.grid, video.grid), dtype=torch.int8, device=pool.device),
    )
    times = encoder_times(config, pool.device)
    for index, size in enumerate(SIZES):
        for scenes in torch.arange(index, count, len(SIZES), device=pool.device).split(CHUNK):
            frames, masks = (x.flatten(0, 1) for x in pool.render(scenes, times.expand(len(scenes), -1), size))
            for name, tensor in (
                ("context", context_pixels(frames, config)),
                ("video", video_pixels(frames, config)),
                ("context_actors", patch_actors(centre_square(masks), context.grid)),
                ("video_actors", patch_actors(masks, video.grid)),
            ):
                own = getattr(seen, name)
                own[scenes] = tensor.unflatten(0, (len(scenes), -1)).to(own.dtype)
    return seen


def patch_actors(masks: Tensor, grid: int) -> Tensor:
    """[N, A, H, W] bool to [N, grid, grid] int64: the actor that most of each patch shows, -1 for none."""
    share, actor = F.adaptive_avg_pool2d(masks.float(), (grid, grid)).max(1)
    return torch.where(share >= MOSTLY, actor, -1)


def centre_square(frames: Tensor) -> Tensor:
    """[..., H, W] to the square that CLIP sees."""
    height, width = frames.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return frames[..., top : top + side, left : left + side]


def draw_all(
    split: str, indices: Sequence[int], workers: int, tokenizer_folder: Path, language: LanguageConfig, worker: int
) -> tuple[Arrays, Arrays, list[Row]]:
    """One process's share of the scenes: packed, the attributes of their actors, and their questions."""
    own = np.array_split(np.array(indices), workers)[worker].tolist()
    scenes = [draw_scene(split, index) for index in own]
    tokenizer = Tokenizer(tokenizer_folder)
    asked = (ask(scene, random.Random(f"{split} {index}")) for index, scene in zip(own, scenes, strict=True))
    questions = [lay_out(tokenizer, each, language) for each in asked]
    attributes = {
        name: np.array([[values.index(getattr(a, name)) for a in s.actors] + [0] * (MAX_ACTORS - len(s.actors)) for s in scenes], np.int64)
        for name, values in ATTRIBUTES.items()
    }
    return {name: tensor.numpy() for name, tensor in pack(scenes).items()}, attributes, questions


def gather(pieces: Sequence[Arrays], device: str) -> dict[str, Tensor]:
    """The shares of all processes, one behind the other."""
    return {name: torch.from_numpy(np.concatenate([own[name] for own in pieces])).to(device) for name in pieces[0]}


def ask(scene: Scene, rng: random.Random) -> list[Question]:
    """Questions of every kind about a scene."""
    there = visible_on_first_frame(scene)
    asked = [referring(scene, rng.choice(there), rng) for _ in range(QUESTIONS[referring])]
    asked += [absent(scene, rng) for _ in range(QUESTIONS[absent])]
    return asked + [description(scene, rng) for _ in range(QUESTIONS[description])]


def tokens(tokenizer: Tokenizer, question: Question) -> tuple[list[int], int]:
    """Ids of a question with its answer and the end token, and where the answer starts."""
    asked = prompt_ids(tokenizer, question.prompt, with_targets=False)
    head = asked[: asked.index(VISUAL_PLACEHOLDER) + 1]
    whole = head + tokenizer.encode(f"\n{question.prompt}{ASSISTANT}{question.answer.replace(' [', '[')}<|end|>")
    if whole[: len(asked)] != asked:
        raise ValueError(f"{question.prompt!r}: its tokens change with the answer behind it")
    return whole, len(asked)


Row = dict[str, NDArray[np.int16]]


def lay_out(tokenizer: Tokenizer, asked: list[Question], language: LanguageConfig) -> Row:
    """A scene's row of every field of `Questions`, not filled up; "seg" and "box" are the two of `emitting`."""
    row: defaultdict[str, list[int]] = defaultdict(list)
    for turn, question in enumerate(asked):
        ids, start = tokens(tokenizer, question)
        tail = ids.index(VISUAL_PLACEHOLDER) + 1
        if not turn:
            row["ids"], row["turns"], row["positions"] = ids[:tail], [-1] * tail, list(range(tail))
            row["targets"], row["spoken"] = [IGNORED] * tail, [IGNORED] * tail
        told = 0  # objects
        for position in range(tail, len(ids)):
            target = ids[position + 1] if start - 1 <= position < len(ids) - 1 else IGNORED
            spoken = IGNORED
            if target != IGNORED:
                spoken = question.objects[told] if told < len(question.objects) else IGNORED if question.objects else NOTHING
            if target in (language.seg_token_id, language.box_token_id):
                row["seg" if target == language.seg_token_id else "box"].append(len(row["ids"]))
                told += target == language.seg_token_id
            for name, value in (("ids", ids[position]), ("turns", turn), ("positions", position), ("targets", target), ("spoken", spoken)):
                row[name].append(value)
        row["objects"] += question.objects
    return {name: np.array(row[name], np.int16) for name in (*row, "seg", "box")}


def join(rows: list[Row], device: str) -> Questions:
    """Questions as tensors."""
    longest = 8 * ceil((max(len(row["ids"]) for row in rows) - 1) / 8) + 1  # one makes place for the clip: attention likes multiples of 8

    def filled(name: str, length: int, fill: int) -> Tensor:
        array = np.full((len(rows), length), fill, np.int64)
        for own, row in zip(array, rows, strict=True):
            own[: len(row[name])] = row[name]
        return torch.from_numpy(array).to(device)

    return Questions(
        filled("ids", longest, 0),
        filled("turns", longest, sum(QUESTIONS.values())),
        filled("positions", longest, 0),
        filled("targets", longest, IGNORED),
        filled("spoken", longest, IGNORED),
        torch.stack([filled("seg", MAX_OBJECTS, 0), filled("box", MAX_OBJECTS, 0)]),
        filled("objects", MAX_OBJECTS, -1),
        rows[0]["ids"].tolist().index(VISUAL_PLACEHOLDER),
    )


def frame_times(indices: Sequence[int] | Tensor, device: str) -> Tensor:
    """Times 0..1 of frames by index."""
    return torch.as_tensor(indices, device=device, dtype=torch.float32) / (NUM_FRAMES - 1)


def encoder_times(config: ModelConfig, device: str) -> Tensor:
    """[T] times of the frames that the vision towers see."""
    return frame_times(encoder_indices(NUM_FRAMES, config.num_frames), device)


def normalise(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[N, 3, h, w] to (frames - mean) / std."""
    return (frames - of_channels(tuple(mean), frames.device)) / of_channels(tuple(std), frames.device)


@cache
def of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[C, 1, 1], kept on the device: to bring it there waits for everything before it."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def grounding(frames: Tensor, config: ModelConfig) -> Tensor:
    """[N, 3, H, W] 0..255 to SAM2's input [N, 3, S, S], as `ensemble.frames.grounding_frame`."""
    size = config.sam2.image_size
    height, width = frames.shape[-2:]
    scale = size / max(height, width)
    resized = F.interpolate(frames, (int(height * scale + 0.5), int(width * scale + 0.5)), mode="bilinear", antialias=True)
    normal = normalise(resized.round(), settings.SAM_MEAN, settings.SAM_STD)
    return F.interpolate(normal, (size, size), mode="bilinear")


def proposal_image(grounded: Tensor, config: ModelConfig) -> Tensor:
    """SAM2's input to the proposer's [N, 3, P, P], as `ensemble.frames.proposal_image` and `proposal_frame`."""
    size = config.proposer.image_size
    return F.interpolate(grounded, (size, size), mode="bicubic", antialias=True)  # both normalisations are the same map


def context_pixels(frames: Tensor, config: ModelConfig) -> Tensor:
    """[N, 3, H, W] 0..255 to CLIP's picture, 0..255 and whole, as `ensemble.frames.context_frame`."""
    size = config.context.image_size
    height, width = frames.shape[-2:]
    short = min(height, width)
    resized = F.interpolate(frames, (int(size * height / short), int(size * width / short)), mode="bicubic", antialias=True)
    return centre_square(resized).round().clamp(0, 255)


def video_pixels(frames: Tensor, config: ModelConfig) -> Tensor:
    """[N, 3, H, W] 0..255 to InternVideo's picture, 0..255 and whole, as `ensemble.frames.video_frame`."""
    size = config.video.image_size
    return F.interpolate(frames, (size, size), mode="bilinear").round()
