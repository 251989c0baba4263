"""Stage `joint`: answers and masks together, as the original's grounded fine-tuning: [SEG] to masks, [BOX] to proposals.

Every third step is one of `segmentation`, so that the mask decoder does not forget points, boxes and memories.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ensemble import settings
from ensemble.components import ABSENT, BOTTOM_RIGHT, PAD, TEXT, TOP_LEFT
from export.models.proposal_selector import MIN_SCORE

from .batches import NUM_FRAMES, Pool, frame_times, grounding, proposal_image
from .detection import visible_boxes
from .language import answer, answer_loss, see
from .loop import Loss
from .losses import corners, mask_boxes, pairwise_iou
from .model import Model
from .replay import Replay
from .segmentation import LENGTHS, Tracking, decode, decode_loss, jitter, layout

GRAPHS = (
    "vision_encoder",
    "image_encoder",
    "token_embedder",
    "language_decoder",
    "prompt_projector",
    "mask_decoder",
    "mask_downsampler",
    "memory_attention",
    "memory_encoder",
    "proposal_selector",
)
LEARNING_RATE = 8e-4
SEGMENTATION_EVERY = 3
TEXT_WEIGHT = 3.0
"""Answers must not get worse while masks are learned."""
OBJECTS = 64
"""Masks that are decoded in a step."""
SAME = 0.5
"""IoU from which a proposal is the object's."""


def prompts_of(model: Model, place: int, emitting: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """What the answers' [SEG]s and [BOX]es say: embeddings [N, K, C] each, of nothing where there are fewer.

    Args:
        place, emitting: of `Questions`, for N rows.
        states: [N, T, C] behind the clip.
    """
    # The states that emit the tokens.
    at = (emitting - place - 1).clamp(min=0)[..., None].expand(-1, -1, -1, states.shape[2])
    seg, box = (model.prompt_projector(states.gather(1, own).flatten(0, 1)).unflatten(0, own.shape[:2]).float() for own in at)
    return seg, box


def grounding_loss(
    model: Model,
    seg: Tensor,
    points: Tensor,
    features: tuple[Tensor, Tensor, Tensor],
    first: Tensor,
    targets: Tensor,
    later: Tensor,
    guided: Tensor,
) -> dict[str, Tensor]:
    """Loss of masks: [SEG] alone, then with the box, on the first frame as tracking starts; and on one of two frames as framewise decodes.

    Args:
        seg: [O, C]
        points: [O, 3, 2]: the corners of a box on the first frame, in pixels of the grounding frame, and nothing.
        features: of frames: each clip's first one at an even index, the other one behind it.
        first: [O] int64 index of the object's first frame.
        targets: [O, 2, S, S] bool.
        later: [O] int64: 1 to decode the other frame.
        guided: [O] bool: with the box.
    """
    device, count = seg.device, len(seg)
    yes = torch.ones_like(guided)
    tracked = layout((PAD, PAD, TEXT), device).expand(count, -1)
    started = decode(model, features, first, tracked, points * 0, texts=seg)
    alone, logits, _ = decode_loss(started, targets[:, 0], yes)
    bound = settings.MASK_PROMPT_CLAMP
    boxed = layout((TOP_LEFT, BOTTOM_RIGHT, PAD), device).expand(count, -1)
    earlier = logits.detach().clamp(-bound, bound)
    boxed_decode = decode(model, features, first, boxed, points, mask_prompts=earlier, has_mask_prompt=yes)
    refined, _, _ = decode_loss(boxed_decode, targets[:, 0], ~yes)
    text_alone, box_and_text = layout((TEXT, ABSENT, ABSENT), device), layout((TOP_LEFT, BOTTOM_RIGHT, TEXT), device)
    labels = torch.where(guided[:, None], box_and_text, text_alone)
    framewise = decode(model, features, first + later, labels, points, texts=seg)
    apart, _, _ = decode_loss(framewise, targets[torch.arange(count, device=device), later], ~yes)
    terms = {}
    for name, own in (("alone", alone), ("refined", refined), ("framewise", apart)):
        terms[name] = own["mask"] + own["iou"] + own["score"]
        terms[f"_{name}_iou"] = own["_reached"]
    return terms


@torch.no_grad()
def propose(model: Model, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The proposals of frames: boxes [N, Q, 4] xyxy, features [N, Q, C], scores [N, Q]; best first."""
    detector = model.proposal_detector
    boxes, features, coco, sa1b = detector.detect(images)
    scores = coco.float().sigmoid() ** settings.COCO_SCORE_POWER * sa1b.float().sigmoid() ** settings.SA1B_SCORE_POWER
    order = scores.argsort(1, descending=True)
    boxes, features = (x.float().gather(1, order[..., None].expand(-1, -1, x.shape[-1])) for x in (boxes, features))
    return corners(boxes), features, scores.gather(1, order)


def selector_logits(model: Model, box: Tensor, features: Tensor, scores: Tensor) -> Tensor:
    """[N, K, Q]: attention logits of each clip's prompts [N, K, C] over its proposals, as `ProposalSelector.forward`."""
    selector = model.proposal_selector
    queries, keys = selector.seg_proj(box), selector.prop_proj(features)
    logits: Tensor = queries @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5 + scores.clamp(min=MIN_SCORE).log()[:, None]
    return logits


def boxes_of(masks: Tensor, objects: Tensor) -> Tensor:
    """[N, K, 4]: where the objects [N, K] of the answers are visible on the first of the frames [N, T, A, H, W]; zeros for none."""
    boxes = visible_boxes(masks[:, 0]).gather(1, objects.clamp(min=0)[..., None].expand(-1, -1, 4))
    return boxes * (objects >= 0)[..., None]


def selection_loss(logits: Tensor, boxes: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Whether each proposal is the object.

    Args:
        logits: [O, Q]
        boxes: [O, Q, 4] xyxy.
        targets: [O, 4] xyxy.
    """
    iou = pairwise_iou(boxes, targets[:, None])[0][..., 0]  # [O, Q]
    wanted = (iou >= SAME).float()
    found = wanted.any(1).float()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    # The right ones and the wrong ones weigh the same, however many there are.
    right = (entropy * wanted).sum(1) / wanted.sum(1).clamp(min=1)
    wrong = (entropy * (1 - wanted)).sum(1) / (1 - wanted).sum(1).clamp(min=1)
    # And the best one must come first.
    ranked = -(F.log_softmax(logits, 1) * wanted / wanted.sum(1, keepdim=True).clamp(min=1)).sum(1)
    count = found.sum().clamp(min=1)
    hit = wanted.gather(1, logits.argmax(1, keepdim=True))[:, 0]
    return {"selection": ((right + 4 * wrong + ranked) * found).sum() / count, "_selected": hit.sum() / count}


def loss(model: Model, pool: Pool, clips: int = 64) -> Loss:
    """The loss of a step."""
    questions, config, seen = pool.questions, model.config, pool.seen
    place, size, few = questions.place, config.sam2.image_size, max(1, clips * 3 // 8)
    parameters = model.parameters_of(GRAPHS)
    tracking = Tracking(model, pool, parameters, max(1, clips // 8))

    def of_answers(
        ids: Tensor,
        turns: Tensor,
        positions: Tensor,
        targets: Tensor,
        emitting: Tensor,
        context: Tensor,
        video: Tensor,
        frames: Tensor,
        truth: Tensor,
        chosen: Tensor,
        points: Tensor,
        masks: Tensor,
        later: Tensor,
        guided: Tensor,
    ) -> dict[str, Tensor]:
        with pool.half():
            with torch.no_grad():
                features = model.frame_encoder.encode(frames)
                boxes, proposal_features, scores = propose(model, proposal_image(frames[::2], config))
            states = answer(model, place, ids, turns, positions, see(model, context, video))[:, config.video_tokens :]
            terms = answer_loss(model, targets[:, place + 1 :], turns[:, place + 1 :], states)
            terms["text"] = TEXT_WEIGHT * terms["text"]
            seg, box = prompts_of(model, place, emitting[:, :few], states[:few])
            logits = selector_logits(model, box, proposal_features, scores).float()
            terms |= selection_loss(logits.flatten(0, 1), boxes.repeat_interleave(seg.shape[1], 0), truth.flatten(0, 1))
            first = 2 * (chosen // seg.shape[1])
            return terms | grounding_loss(model, seg.flatten(0, 1)[chosen], points, features, first, masks, later, guided)

    replay = Replay(of_answers, parameters)

    def grounded() -> dict[str, Tensor]:
        scenes, shape = pool.alike(clips)
        rows = questions.of(scenes)
        del rows["spoken"]
        objects = rows.pop("objects")[:few]  # there are many in each clip: masks of a few clips do
        two = torch.stack([torch.zeros(few, device=pool.device), frame_times(1 + pool.integers(NUM_FRAMES - 1, few), pool.device)], 1)
        pair, masks = pool.render(scenes[:few], two, shape)
        # As many in every step: kernels are made for each shape.
        chosen = (pool.uniform(objects.numel()) + (objects.flatten() >= 0)).topk(min(OBJECTS, objects.numel())).indices
        clip, actor = chosen // objects.shape[1], objects.flatten()[chosen].clamp(min=0)
        targets = F.interpolate(masks[clip, :, actor].float(), (size, size), mode="bilinear") > 0.5
        around = jitter(pool, mask_boxes(targets[:, 0])) * size
        terms = replay(
            **rows,
            context=seen.context_frames(scenes),
            video=seen.video_frames(scenes),
            frames=grounding(pair.flatten(0, 1), config),
            truth=boxes_of(masks, objects),
            chosen=chosen,
            points=F.pad(around.view(-1, 2, 2), (0, 0, 0, 1)),
            masks=targets,
            later=pool.integers(2, len(chosen)),
            guided=pool.uniform(len(chosen)) < 0.5,
        )
        return terms

    def of(step: int, progress: float) -> dict[str, Tensor]:
        terms = grounded()
        if step % SEGMENTATION_EVERY == 0:
            tracked = tracking(LENGTHS[-1][1])
            terms["track"], terms["_track_last"] = tracked["mask"] + tracked["iou"] + tracked["score"], tracked["_last"]
        return terms

    return of
