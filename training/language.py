"""Stage `alignment`: towers, projectors and language model learn to answer; no masks yet.

In the original only the projectors are trained here, between towers and a language model that others have trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from export.models.language_model import Step

from .batches import IGNORED, Pool, Questions, Seen
from .loop import Loss
from .model import Model
from .replay import Replay

GRAPHS = ("vision_encoder", "image_encoder", "token_embedder", "language_decoder")
LEARNING_RATE = 1e-3


def read(model: Model, embeddings: Tensor) -> Tensor:
    """[N, S, C] token embeddings to the final-norm states of all positions [N, S, C]; what `LanguageDecoder` does without a cache."""
    decoder = model.language_decoder
    length = embeddings.shape[1]
    positions = torch.arange(length, device=embeddings.device)
    step = Step(
        cos=decoder.cos[:length],
        sin=decoder.sin[:length],
        visible=positions[:, None] >= positions,
        slots=positions,
        write=lambda cache, axis, slots, rows: rows,  # the new tokens are all there is
    )
    x = embeddings
    for layer in decoder.layers:
        x, _, _ = layer(x, step, x, x)
    states: Tensor = decoder.norm(x)
    return states


def embed(model: Model, questions: Questions, rows: Tensor, seen: Seen) -> Tensor:
    """[N, L - 1 + V, C]: embeddings of N questions with the clip's tokens at the placeholder; `rows` [N] int64."""
    scenes = questions.scene[rows]
    return join(model, questions.place, questions.ids[rows], seen.context_frames(scenes), seen.video_frames(scenes))


def join(model: Model, place: int, ids: Tensor, context_frames: Tensor, video_frames: Tensor) -> Tensor:
    """What `embed` returns, from [N, L] ids and the towers' inputs [N * T, 3, size, size]."""
    config, encoder, count = model.config, model.vision_encoder, len(ids)
    # The graph serves one clip: its frames are the batch of the towers, whose frames (or chunks of them) do not see each other.
    still = encoder.image_mm_projector.pooled(encoder.context_tower(context_frames), config.context.grid)
    moving = encoder.mm_projector.pooled(encoder.video_tower(video_frames), config.video.grid)
    visual = torch.cat([still.unflatten(0, (count, -1)), moving.unflatten(0, (count, -1))], 1)
    text = model.token_embedder(ids.clamp(min=0))
    return torch.cat([text[:, :place], visual.to(text.dtype), text[:, place + 1 :]], 1)


def answer_loss(model: Model, place: int, targets: Tensor, states: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the answers' tokens, the share of right ones, and of answers without a wrong one.

    Args:
        place: of the placeholder.
        targets: [N, L] int64.
        states: [N, L - 1 + V, C] of all positions.
    """
    behind = states[:, place + model.config.video_tokens :]  # the states of the text behind the clip
    targets = targets[:, place + 1 :]
    logits = model.language_decoder.lm_head(behind).float()
    asked = targets != IGNORED
    right = (logits.argmax(2) == targets) & asked
    entropy = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    # Every answer weighs the same: descriptions are long, and say little about how to read a question.
    text = (entropy.sum(1) / asked.sum(1)).mean()
    return {"text": text, "_right": right.sum() / asked.sum(), "_perfect": (right == asked).all(1).float().mean()}


def loss(model: Model, pool: Pool, clips: int = 96) -> Loss:
    """The loss of a step."""
    questions, seen = pool.questions, pool.seen
    assert questions
    place = questions.place

    def answer(ids: Tensor, targets: Tensor, context_frames: Tensor, video_frames: Tensor) -> dict[str, Tensor]:
        with pool.half():
            states = read(model, join(model, place, ids, context_frames, video_frames))
            return answer_loss(model, place, targets, states)

    replay = Replay(answer, model.parameters_of(GRAPHS))

    def of(step: int, progress: float) -> dict[str, Tensor]:
        rows = pool.integers(len(questions.ids), clips)
        scenes = questions.scene[rows]
        terms, _ = replay(
            ids=questions.ids[rows],
            targets=questions.targets[rows],
            context_frames=seen.context_frames(scenes),
            video_frames=seen.video_frames(scenes),
        )
        return terms

    return of
