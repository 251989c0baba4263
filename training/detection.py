"""Stage `detection`: the proposer, from the trunk that `segmentation` has trained; stands for its pretraining on COCO and SA-1B."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .batches import NUM_FRAMES, SIZES, Pool, frame_times, grounding, proposal_image
from .loop import Loss
from .losses import corners, detection_loss, mask_boxes, pairwise_iou
from .model import Model
from .towers import Naming

GRAPHS = ("proposal_detector",)
LEARNING_RATE = 1e-3
MIN_PIXELS = 40
"""An object of fewer visible pixels of the frame is none."""
CELL_REPEATS = 4
"""Cells of the encoder that each object is matched with; queries of the decoder are matched with one."""


def start(model: Model) -> None:
    """Copies the trunk of the frame encoder: the original's proposer has that of SAM2 too (spec 4.2)."""
    model.proposal_detector.trunk.load_state_dict(model.frame_encoder.trunk.state_dict())


def visible_boxes(masks: Tensor) -> Tensor:
    """[N, A, H, W] bool to [N, A, 4] boxes of what is visible of each actor; zeros where that is too little."""
    enough = masks.flatten(2).sum(2) >= MIN_PIXELS
    return mask_boxes(masks & enough[..., None, None])


def loss(model: Model, pool: Pool, images: int = 96) -> tuple[Loss, list[nn.Parameter]]:
    """The loss of a step, and heads that say what and where a query found: its features have to tell objects apart (spec 5.1)."""
    detector = model.proposal_detector
    naming = Naming(model.config.proposer.width, without=("motion",)).to(pool.device)
    place = nn.Linear(model.config.proposer.width, 4).to(pool.device)

    def of(step: int, progress: float) -> dict[str, Tensor]:
        scenes = pool.pick(images)
        frames, masks = pool.render(scenes, frame_times(pool.integers(NUM_FRAMES, images, 1), pool.device), SIZES[pool.size()])
        targets = visible_boxes(masks[:, 0])
        with pool.half():
            memory = detector.encode(proposal_image(grounding(frames[:, 0], model.config), model.config))
        memory = memory.float()
        cell_logits, cell_boxes = detector.propose(memory)
        cells, _ = detection_loss([cell_logits], cell_boxes, targets, CELL_REPEATS)
        references = detector.rank(cell_logits, cell_boxes).detach()
        boxes, features, coco, sa1b = detector.refine(memory, references)
        queries, (image, query, actor) = detection_loss([coco, sa1b], boxes, targets, 1)
        classes = {name: values[scenes[image]] for name, values in pool.attributes.items()}
        found = features[image, query]
        named = naming(found, actor, classes)
        with torch.no_grad():
            there = (targets[..., 2:] > targets[..., :2]).all(-1)
            best = pairwise_iou(corners(boxes), targets)[0].amax(1)[there]
        return {
            "cells": cells,
            "queries": queries,
            "names": 0.5 * named.pop("loss"),
            "place": 5 * (place(found) - targets[image, actor]).abs().mean(),
            **named,
            "_recall": (best >= 0.5).float().mean(),
            "_iou": best.mean(),
        }

    return of, [*naming.parameters(), *place.parameters()]
