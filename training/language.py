"""Stage `alignment`: towers, projectors and language model learn to answer; no masks yet.

In the original only the projectors are trained here, between towers and a language model that others have trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble.config import POOL, ModelConfig
from export.models.language_model import Caches, Step, rotated

from .batches import IGNORED, NOTHING, QUESTIONS, Pool, Seen
from .loop import Loss
from .model import Model
from .replay import Replay
from .shapes_rvos.scene import MAX_ACTORS

GRAPHS = ("vision_encoder", "image_encoder", "token_embedder", "language_decoder")
LEARNING_RATE = 1.5e-3
POINTING = 0.5
"""Weight of the loss of `Pointing`."""


def read(model: Model, embeddings: Tensor, turns: Tensor, positions: Tensor) -> Tensor:
    """The final-norm states [N, S, C] of N rows; what `LanguageDecoder` computes without a cache.

    Args:
        embeddings: [N, S, C]
        turns: [N, S] int64: tokens see those of their own turn and those of turn -1.
        positions: [N, S] int64: of the rotary embedding.
    """
    decoder, index = model.language_decoder, torch.arange(turns.shape[1], device=turns.device)
    theirs = turns[:, None]
    visible = ((turns[:, :, None] == theirs) | (theirs == -1))[:, None] & (index[:, None] >= index)

    def attend(qkv: Tensor, step: Step, caches: Caches | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rotated(qkv, step)
        return F.scaled_dot_product_attention(q, k, v, visible), k, v  # the new tokens are all there is

    step = Step(decoder.cos[positions][:, None], decoder.sin[positions][:, None], attend)
    x = embeddings
    for layer in decoder.layers:
        x, _, _ = layer(x, step, None)
    states: Tensor = decoder.norm(x)
    return states


def see(model: Model, context_frames: Tensor, video_frames: Tensor) -> Tensor:
    """[N, V, C]: the visual tokens of N clips, from the towers' inputs [N * T, 3, size, size]."""
    config, encoder = model.config, model.vision_encoder
    # The graph serves one clip: its frames are the batch of the towers, whose frames (or chunks of them) do not see each other.
    still = encoder.image_mm_projector.pooled(encoder.context_tower(context_frames), config.context.grid)
    moving = encoder.mm_projector.pooled(encoder.video_tower(video_frames), config.video.grid)
    count = len(context_frames) // config.num_frames
    return torch.cat([still.unflatten(0, (count, -1)), moving.unflatten(0, (count, -1))], 1)


def answer(model: Model, place: int, ids: Tensor, turns: Tensor, positions: Tensor, visual: Tensor) -> Tensor:
    """The states [N, V + L - 1 - place, C] of the clip and of all that is behind it, for rows of `Questions`; `visual` of `see`."""
    count, length = visual.shape[:2]
    text = model.token_embedder(ids.clamp(min=0))

    def insert(row: Tensor, clip: Tensor, shift: int) -> Tensor:
        return torch.cat([row[:, :place], clip.to(row.dtype), row[:, place + 1 :] + shift], 1)

    clip = torch.arange(length, device=ids.device).expand(count, -1)
    embeddings = torch.cat([text[:, :place], visual.to(text.dtype), text[:, place + 1 :]], 1)
    states = read(model, embeddings, insert(turns, clip * 0 - 1, 0), insert(positions, place + clip, length - 1))
    return states[:, place:]


def answer_loss(model: Model, targets: Tensor, turns: Tensor, states: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the answers' tokens, the share of right ones, and of answers without a wrong one, by kind.

    Args:
        targets, turns: [N, T] int64, behind the clip.
        states: [N, T, C]
    """
    logits = model.language_decoder.lm_head(states).float()
    asked = targets != IGNORED
    right = (logits.argmax(2) == targets) & asked
    entropy = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    of_turn = F.one_hot(turns, sum(QUESTIONS.values()) + 1).float() * asked[..., None]  # the last one: what fills up
    tokens = of_turn.sum(1)[:, :-1]  # [N, questions]
    # Every answer weighs the same: descriptions are long, and say little about how to read a question.
    each = torch.einsum("nt,ntq->nq", entropy, of_turn)[:, :-1] / tokens
    perfect = (torch.einsum("nt,ntq->nq", right.float(), of_turn)[:, :-1] == tokens).float().mean(0)
    terms = {"text": each.mean(), "_right": right.sum() / asked.sum()}
    for kind, share in zip(QUESTIONS, perfect.split(list(QUESTIONS.values())), strict=True):
        terms[f"_{kind.__name__}"] = share.mean()
    return terms


class Pointing(nn.Module):
    """Asks the states of an answer to point at the visual tokens that show what they speak of: words alone are a long way to that.

    Args:
        config: sizes.
        width: of the space in which states and visual tokens are compared.
    """

    def __init__(self, config: ModelConfig, width: int = 64) -> None:
        super().__init__()
        self.states, self.visual = nn.Linear(config.language.width, width), nn.Linear(config.language.width, width)
        self.nothing = nn.Parameter(torch.randn(width))

    def forward(self, spoken: Tensor, states: Tensor, visual: Tensor, shares: Tensor) -> dict[str, Tensor]:
        """The loss, and the share of states that point at the right thing.

        Args:
            spoken: [N, T] int64, of `Questions`, behind the clip.
            states: [N, T, C]
            visual: [N, V, C] final states of the clip.
            shares: [N, MAX_ACTORS, V] float32, of `shares_of`.
        """
        count = len(visual)
        keys = torch.cat([self.visual(visual), self.nothing.to(visual.dtype).expand(count, 1, -1)], 1)
        logits = (self.states(states) @ keys.transpose(1, 2)).float() / keys.shape[2] ** 0.5  # [N, T, V + 1]
        wanted = F.pad(shares / shares.sum(2, keepdim=True).clamp(min=1e-6), (0, 1, 0, 1))  # [N, actors and nothing, V + 1]
        wanted[:, -1, -1] = 1
        row = torch.where(spoken == NOTHING, MAX_ACTORS, spoken.clamp(min=0))
        wanted = wanted.gather(1, row[..., None].expand(-1, -1, wanted.shape[2]))
        there = ((spoken != IGNORED) & (wanted.sum(2) > 0.5)).float()
        entropy = -(logits.log_softmax(2) * wanted).sum(2)
        right = wanted.gather(2, logits.argmax(2, keepdim=True))[..., 0] > 0
        total = there.sum().clamp(min=1)
        return {"pointing": POINTING * (entropy * there).sum() / total, "_pointed": (right * there).sum() / total}


def shares_of(seen: Seen, scenes: Tensor, config: ModelConfig) -> Tensor:
    """[N, MAX_ACTORS, V] float32: how much of each visual token's patches shows each actor."""
    found = []
    for actors in (seen.context_actors[scenes], seen.video_actors[scenes]):
        shown = F.one_hot(actors.long() + 1, MAX_ACTORS + 1)[..., 1:].float()  # [N, T, grid, grid, A]
        pooled = F.avg_pool2d(shown.flatten(0, 1).permute(0, 3, 1, 2), POOL)
        found.append(pooled.unflatten(0, (len(scenes), -1)).transpose(1, 2).flatten(2))  # [N, A, T * cells]
    return torch.cat(found, 2)


def loss(model: Model, pool: Pool, clips: int = 64) -> tuple[Loss, list[nn.Parameter]]:
    """The loss of a step, and the heads, which are trained too."""
    questions, seen, config = pool.questions, pool.seen, model.config
    place, visual_tokens = questions.place, config.video_tokens
    pointing = Pointing(config).to(pool.device)

    def of_answers(
        ids: Tensor, turns: Tensor, positions: Tensor, targets: Tensor, spoken: Tensor, context: Tensor, video: Tensor, shares: Tensor
    ) -> dict[str, Tensor]:
        with pool.half():
            states = answer(model, place, ids, turns, positions, see(model, context, video))
            clip, text = states.split([visual_tokens, states.shape[1] - visual_tokens], 1)
            terms: dict[str, Tensor] = pointing(spoken[:, place + 1 :], text, clip, shares)
            return answer_loss(model, targets[:, place + 1 :], turns[:, place + 1 :], text) | terms

    replay = Replay(of_answers, [*model.parameters_of(GRAPHS), *pointing.parameters()])

    def of(step: int, progress: float) -> dict[str, Tensor]:
        scenes = pool.pick(clips)
        rows = {name: row for name, row in questions.of(scenes).items() if name not in ("emitting", "objects")}
        terms = replay(**rows, context=seen.context_frames(scenes), video=seen.video_frames(scenes), shares=shares_of(seen, scenes, config))
        return terms

    return of, list(pointing.parameters())
