"""Stage `joint`: answers and masks together, as the original's grounded fine-tuning: [SEG] to masks, [BOX] to proposals.

Every third step is one of `segmentation`, so that the mask decoder does not forget points, boxes and memories.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ensemble import settings
from ensemble.components import ABSENT, BOTTOM_RIGHT, PAD, TEXT, TOP_LEFT

from .batches import NUM_FRAMES, Pool, Questions, frame_times, grounding, proposal_image
from .detection import visible_boxes
from .language import answer_loss, embed, read
from .loop import Loss
from .losses import corners, mask_boxes, pairwise_iou
from .model import Model
from .replay import Replay
from .segmentation import Tracking, decode, decode_loss, jitter, layout

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
OBJECTS = 64
"""Masks that are decoded in a step."""
SAME = 0.5
"""IoU from which a proposal is the object's."""


def prompts_of(model: Model, questions: Questions, rows: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the answers' [SEG] and [BOX] say, for all objects of all questions.

    Returns:
        question [O] (index of `rows`), actor [O], [SEG] embeddings [O, C], [BOX] embeddings [O, C].
    """
    language = model.config.language
    behind = states[:, questions.place + model.config.video_tokens :]
    targets = questions.targets[rows][:, questions.place + 1 :]
    question, turn = torch.where(questions.objects[rows] >= 0)
    actor = questions.objects[rows][question, turn]
    found = []
    for token in (language.seg_token_id, language.box_token_id):
        emitting = behind[targets == token]  # in the order of (question, turn): the states that emit the token
        found.append(model.prompt_projector(emitting).float())
    return question, actor, found[0], found[1]


class Grounding:
    """Loss of masks: from [SEG] alone, then with the box, on the first frame as tracking starts, and on another frame as framewise decodes.

    Args:
        model, pool: of the stage.
        parameters: that are trained.
    """

    def __init__(self, model: Model, pool: Pool, parameters: Sequence[Tensor]) -> None:
        self._model, self._pool = model, pool
        self._replay = Replay(self._decode, parameters, leaves=("seg",))

    def __call__(
        self, seg: Tensor, boxes: Tensor, features: tuple[Tensor, Tensor, Tensor], first: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        """The terms, and one that carries the gradients to the embeddings.

        Args:
            seg: [O, C]
            boxes: [O, 4] xyxy on the first frame, in pixels of the grounding frame.
            features: of frames: each clip's first one at an even index, the other one behind it.
            first: [O] int64 index of the object's first frame.
            targets: [O, 2, S, S] bool.
        """
        pool, count = self._pool, len(seg)
        terms, gradients = self._replay(
            seg=seg,
            points=F.pad(boxes.view(count, 2, 2), (0, 0, 0, 1)),
            embeddings=features[0],
            high_res_1=features[1],
            high_res_0=features[2],
            first=first,
            targets=targets,
            later=pool.integers(2, count),
            guided=pool.uniform(count) < 0.5,
        )
        return terms | {"through": (seg * gradients["seg"]).sum()}

    def _decode(
        self,
        seg: Tensor,
        points: Tensor,
        embeddings: Tensor,
        high_res_1: Tensor,
        high_res_0: Tensor,
        first: Tensor,
        targets: Tensor,
        later: Tensor,
        guided: Tensor,
    ) -> dict[str, Tensor]:
        model, features, device, count = self._model, (embeddings, high_res_1, high_res_0), seg.device, len(seg)
        yes = torch.ones_like(guided)
        with self._pool.half():
            tracked = layout((PAD, PAD, TEXT), device).expand(count, -1)
            started = decode(model, features, first, tracked, points * 0, texts=seg)
            alone, logits, _ = decode_loss(started, targets[:, 0], yes)
            bound = settings.MASK_PROMPT_CLAMP
            boxed = layout((TOP_LEFT, BOTTOM_RIGHT, PAD), device).expand(count, -1)
            earlier = logits.detach().clamp(-bound, bound)
            boxed_decode = decode(model, features, first, boxed, points, mask_prompts=earlier, has_mask_prompt=yes)
            refined, _, _ = decode_loss(boxed_decode, targets[:, 0], ~yes)
            # Framewise: on the first frame or the other one, with the first frame's box or without.
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
    """[O, Q]: attention logits of each object's own proposals, as `ProposalSelector.forward`."""
    selector = model.proposal_selector
    queries, keys = selector.seg_proj(box), selector.prop_proj(features)
    logits: Tensor = (keys @ queries[..., None])[..., 0] / keys.shape[-1] ** 0.5 + scores.clamp(min=1e-6).log()
    return logits


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
    questions, config = pool.questions, model.config
    assert questions
    seen, size = pool.seen, config.sam2.image_size
    parameters = model.parameters_of(GRAPHS)
    ground, tracking = Grounding(model, pool, parameters), Tracking(model, pool, parameters, max(1, clips // 4))

    def grounded(step: int) -> dict[str, Tensor]:
        rows, shape = pool.rows(clips)
        scenes = questions.scene[rows]
        two = torch.stack([torch.zeros(clips, device=pool.device), frame_times(1 + pool.integers(NUM_FRAMES - 1, clips), pool.device)], 1)
        pair, masks = pool.render(scenes, two, shape)
        grounded_frames = grounding(pair.flatten(0, 1), config)
        with pool.half():
            with torch.no_grad():
                features = model.frame_encoder(grounded_frames)
                boxes, proposal_features, scores = propose(model, proposal_image(grounded_frames[::2], config))
            states = read(model, embed(model, questions, rows, seen))
            terms = answer_loss(model, questions.place, questions.targets[rows], states)
            question, actor, seg, box = prompts_of(model, questions, rows, states)
            truth = visible_boxes(masks[:, 0])[question, actor]
            logits = selector_logits(model, box, proposal_features[question], scores[question]).float()
            terms |= selection_loss(logits, boxes[question], truth)

            chosen = pool.integers(len(question), OBJECTS)  # as many in every step: kernels are made for each shape
            question, actor, seg = question[chosen], actor[chosen], seg[chosen]
            targets = F.interpolate(masks[question, :, actor].float(), (size, size), mode="bilinear") > 0.5
            around = jitter(pool, mask_boxes(targets[:, 0])) * size
        return terms | ground(seg, around, features, 2 * question, targets)

    def of(step: int, progress: float) -> dict[str, Tensor]:
        terms = grounded(step)
        if step % SEGMENTATION_EVERY == 0:
            tracked = tracking(5)
            terms["track"], terms["_track_last"] = tracked["mask"] + tracked["iou"] + tracked["score"], tracked["_last"]
        return terms

    return of
