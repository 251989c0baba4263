"""Stage `segmentation`: SAM2 on prompted frames and on what follows them; stands for its pretraining on images and videos."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ensemble import settings
from ensemble.components import ABSENT, BOTTOM_RIGHT, NEGATIVE, PAD, POSITIVE, TOP_LEFT
from export.models.mask_decoder import is_stable, pick

from .batches import NUM_FRAMES, SIZES, Pool, frame_times, grounding
from .loop import Loss
from .losses import mask_boxes, mask_losses
from .model import Model
from .replay import Replay

GRAPHS = ("frame_encoder", "mask_decoder", "mask_downsampler", "memory_attention", "memory_encoder")
LEARNING_RATE = 1.5e-3
LENGTHS = ((0.1, 2), (0.55, 3), (0.8, 5), (math.inf, 8))
"""Progress up to which clips have so many frames; the last ones fill the memory bank: every one of its places is trained."""
BOX_NOISE = 0.05
"""Standard deviation of a box corner, in parts of the box's sides."""
MIN_PIXELS = 40
"""An object of fewer visible pixels is not prompted."""


class Prompts:
    """What the mask decoder is told about O objects on their first frame; the fields are arguments of `MaskDecoder.decode`."""

    def __init__(self, pool: Pool, masks: Tensor, size: int) -> None:
        """Draws a box, one or two points, or a drawn mask for each object.

        Args:
            masks: [O, S, S] bool, on the grounding frame.
            size: S.
        """
        count, device = len(masks), masks.device
        boxes = jitter(pool, mask_boxes(masks)) * size
        kind = pool.integers(10, count)
        self.boxed, self.drawn = kind < 5, kind == 9
        pointed = (kind >= 5) & ~self.drawn
        second = pool.integers(3, count)  # of those that are pointed at: one point, another point on it, one beside it
        self.points = torch.zeros(count, 3, 2, device=device)
        self.points[:, 0] = torch.where(self.boxed[:, None], boxes[:, :2], draw_point(pool, masks))
        outside = draw_point(pool, ~masks & near(masks))
        other = torch.where((second == 1)[:, None], draw_point(pool, masks), outside)
        self.points[:, 1] = torch.where(self.boxed[:, None], boxes[:, 2:], other)
        one, box = layout((POSITIVE, PAD, ABSENT), device), layout((TOP_LEFT, BOTTOM_RIGHT, PAD), device)
        self.labels = torch.where(self.boxed[:, None], box, layout((PAD, PAD, ABSENT), device))
        self.labels = torch.where(pointed[:, None], one, self.labels)
        second_label = torch.where(second == 1, POSITIVE, NEGATIVE)
        two = torch.stack([torch.full_like(second, POSITIVE), second_label, torch.full_like(second, PAD)], 1)
        self.labels = torch.where((pointed & (second > 0))[:, None], two, self.labels)
        self.multimask = ~self.boxed & ~self.drawn & (second == 0)


def near(masks: Tensor) -> Tensor:
    """[O, S, S] bool: pixels around each mask."""
    coarse = F.max_pool2d(masks[:, None].float(), 8)
    return F.interpolate(F.max_pool2d(coarse, 5, 1, 2), scale_factor=8.0)[:, 0] > 0


def draw_point(pool: Pool, masks: Tensor) -> Tensor:
    """[O, S, S] bool to [O, 2] x, y of a random pixel of each, in pixels."""
    size = masks.shape[-1]
    index = (pool.uniform(len(masks), size * size) + masks.flatten(1)).argmax(1)  # `multinomial` would wait for the GPU
    return torch.stack([index % size, index // size], 1).float() + 0.5


def jitter(pool: Pool, boxes: Tensor) -> Tensor:
    """[O, 4] xyxy boxes with corners moved a little."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return boxes + pool.normal(*boxes.shape) * sides * BOX_NOISE


def decode(
    model: Model, features: tuple[Tensor, Tensor, Tensor], frame: Tensor, labels: Tensor, points: Tensor, **more: Tensor
) -> tuple[Tensor, ...]:
    """`MaskDecoder.decode` of O objects on the frames' own embeddings, or on conditioned ones.

    Args:
        features: outputs of frame_encoder for F frames.
        frame: [O] int64.
        labels, points: [O, S], [O, S, 2].
        more: conditioned, has_memory, texts, mask_prompts and has_mask_prompt, where they are not the default.
    """
    embeddings, high_res_1, high_res_0 = features
    count, width, low = len(frame), embeddings.shape[1], high_res_0.shape[-1]
    no = torch.zeros(count, dtype=torch.bool, device=frame.device)
    conditioned = more.get("conditioned")
    return model.mask_decoder.decode(
        embeddings if conditioned is None else conditioned,
        high_res_1,
        high_res_0,
        frame if conditioned is None else torch.arange(count, device=frame.device),
        frame,
        more.get("has_memory", no),
        points,
        labels,
        more.get("texts", embeddings.new_zeros(count, width)),
        more.get("mask_prompts", embeddings.new_zeros(count, low, low)),
        more.get("has_mask_prompt", no),
    )


def decode_loss(decoded: tuple[Tensor, ...], targets: Tensor, multimask: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Loss of a decode, and what SAM2 chooses.

    Args:
        decoded: of `decode`.
        targets: [O, S, S] bool.
        multimask: [O] bool.
    Returns:
        the terms; the chosen logits [O, L, L]; the index of the token that makes the pointer [O].
    """
    masks, predicted, scores, _ = decoded
    losses, iou = mask_losses(masks, targets[:, None].float())  # [O, 4]
    present = targets.flatten(1).any(1)
    weight = present.float() / present.sum().clamp(min=1)
    # Both the single mask and the best of three are trained, whoever is asked for one of them.
    mask_loss = losses[:, 0] + losses[:, 1:].amin(1)
    iou_loss = (predicted.float() - iou).square().sum(1)
    score_loss = F.binary_cross_entropy_with_logits(scores.float(), present.float())
    best = predicted[:, 1:].argmax(1) + 1
    token = torch.where(multimask, best, 0)
    chosen = torch.where(multimask | ~is_stable(masks[:, 0]), best, 0)
    reached = iou.gather(1, chosen[:, None])[:, 0]
    terms = {
        "mask": (mask_loss * weight).sum(),
        "iou": (iou_loss * weight).sum(),
        "score": 0.5 * score_loss,
        "_reached": (reached * weight).sum(),
    }
    return terms, pick(masks, chosen), token


def draw_times(pool: Pool, count: int, num_frames: int) -> Tensor:
    """[count, num_frames] times of frames at one random stride each, half of them from the first frame."""
    stride = 1 + pool.integers(3, count)
    room = NUM_FRAMES - 1 - stride * (num_frames - 1)
    start = (pool.uniform(count) * (room + 1)).long() * pool.integers(2, count)
    return frame_times(start[:, None] + stride[:, None] * torch.arange(num_frames, device=pool.device), pool.device)


class Tracking:
    """Loss of prompted objects and of their tracks through a few frames.

    Args:
        model, pool: of the stage.
        parameters: that are trained.
        clips, objects: how many, and how many of each.
    """

    def __init__(self, model: Model, pool: Pool, parameters: Sequence[Tensor], clips: int, objects: int = 2) -> None:
        self._model, self._pool, self._clips, self._objects = model, pool, clips, objects
        self._replays: defaultdict[int, Replay] = defaultdict(lambda: Replay(self._track, parameters))

    def __call__(self, num_frames: int) -> dict[str, Tensor]:
        """The terms of a fresh batch of clips of so many frames; the first frame is prompted."""
        pool, clips, size = self._pool, self._clips, self._model.config.sam2.image_size
        frames, masks = pool.render(pool.pick(clips), draw_times(pool, clips, num_frames), SIZES[pool.size()])
        masks = F.interpolate(masks.flatten(0, 1).float(), (size, size), mode="bilinear") > 0.5  # [B T, A, S, S]
        masks = masks.unflatten(0, (clips, num_frames))
        visible = masks[:, 0].flatten(2).sum(2) >= MIN_PIXELS  # [B, A]
        order = (pool.uniform(*visible.shape) + visible).argsort(1, descending=True)[:, : self._objects]  # visible ones first, at random
        # One twice where there is no other: shapes stay the same.
        actor = torch.where(visible.gather(1, order), order, order[:, :1]).flatten()
        clip = torch.arange(clips, device=pool.device).repeat_interleave(self._objects)
        targets = masks[clip, :, actor]  # [O, T, S, S]
        prompts = Prompts(pool, targets[:, 0], size)
        terms = self._replays[num_frames](
            frames=grounding(frames.flatten(0, 1), self._model.config),
            targets=targets,
            clip=clip,
            labels=prompts.labels,
            points=prompts.points,
            multimask=prompts.multimask,
            drawn=prompts.drawn,
            again=prompts.boxed & (pool.uniform(len(clip)) < 0.5),
        )
        return terms

    def _track(
        self,
        frames: Tensor,
        targets: Tensor,
        clip: Tensor,
        labels: Tensor,
        points: Tensor,
        multimask: Tensor,
        drawn: Tensor,
        again: Tensor,
    ) -> dict[str, Tensor]:
        """The loss; random numbers were drawn before.

        Args:
            frames: [B * T, 3, S, S], SAM-normalised.
            targets: [O, T, S, S] bool.
            clip: [O] int64 of each object.
            labels, points, multimask: its prompt.
            drawn: [O] bool: the prompt is the object's mask itself.
            again: [O] bool: the prompt is given a second time, with the mask so far.
        """
        model = self._model
        with self._pool.half():
            count, num_frames = len(clip), targets.shape[1]
            levels = [level.unflatten(0, (-1, num_frames)).unbind(1) for level in model.frame_encoder.encode(frames)]
            steps = list(zip(*levels, strict=True))  # of each frame: the features of all clips
            prompts = model.mask_downsampler(targets[:, 0].float())
            started = decode(model, steps[0], clip, labels, points, has_memory=drawn, mask_prompts=prompts, has_mask_prompt=drawn)
            terms, logits, token = decode_loss(started, targets[:, 0], multimask)
            total = [terms]
            bound = settings.MASK_PROMPT_CLAMP
            earlier = torch.where(again[:, None, None], logits.detach().clamp(-bound, bound).to(prompts.dtype), prompts)
            refined = decode(model, steps[0], clip, labels, points, has_memory=drawn, mask_prompts=earlier, has_mask_prompt=again | drawn)
            terms, refined_logits, refined_token = decode_loss(refined, targets[:, 0], multimask)
            total.append(terms)
            logits = torch.where(again[:, None, None], refined_logits, logits)
            tokens = torch.where(again[:, None], pick(refined[3], refined_token), pick(started[3], token))
            low = F.interpolate(targets[:, :1].float(), logits.shape[-2:], mode="bilinear", antialias=True)[:, 0]
            logits = torch.where(drawn[:, None, None], (20 * low - 10).to(logits.dtype), logits)

            maps: list[Tensor] = []
            pointers: list[Tensor] = []
            yes = torch.ones_like(drawn)
            for index, features in enumerate(steps):
                present = targets[:, index].flatten(1).any(1).float() * 2 - 1  # the truth: a wrong score would spoil the memory
                if index:
                    conditioned = attend(model, features, clip, maps, pointers)
                    nothing = layout((PAD, PAD, ABSENT), clip.device).expand(count, -1)
                    decoded = decode(model, features, clip, nothing, points * 0, conditioned=conditioned, has_memory=yes)
                    terms, logits, token = decode_loss(decoded, targets[:, index], yes)
                    total.append(terms)
                    tokens = pick(decoded[3], token)
                # Gradients reach earlier masks through pointers; through the full-size mask they would cost more than all else.
                maps.append(model.memory_encoder(features[0], clip, logits.detach(), yes if index == 0 else ~yes, present))
                pointers.append(model.mask_decoder.point(tokens, present))
            mean = {name: torch.stack([terms[name] for terms in total]).mean() for name in total[0]}
            return {**mean, "_first": total[0]["_reached"], "_last": total[-1]["_reached"]}


@cache
def layout(values: tuple[int, ...], device: torch.device) -> Tensor:
    """A constant on the device."""
    return torch.tensor(values, device=device)


def attend(model: Model, features: tuple[Tensor, Tensor, Tensor], frame: Tensor, maps: list[Tensor], pointers: list[Tensor]) -> Tensor:
    """[O, C, g, g]: frames conditioned on the memories so far, the first of which is the prompted frame's."""
    sam2, now, count = model.config.sam2, len(maps), len(frame)
    recent = list(range(max(1, now - sam2.num_maps + 1), now))
    rows = layout((sam2.num_maps - 1, *(now - index - 1 for index in recent)), frame.device)
    distances = layout(tuple(now - index for index in range(now)), frame.device)
    conditioned: Tensor = model.memory_attention(
        features[0],
        frame,
        torch.stack([maps[0], *(maps[index] for index in recent)], 1),
        rows.expand(count, -1),
        torch.stack(pointers, 1),
        distances.expand(count, -1),
    )
    return conditioned


def loss(model: Model, pool: Pool, clips: int = 24) -> Loss:
    """The loss of a step: longer clips later."""
    tracking = Tracking(model, pool, model.parameters_of(GRAPHS), clips)

    def of(step: int, progress: float) -> dict[str, Tensor]:
        return tracking(next(length for end, length in LENGTHS if progress < end))

    return of
