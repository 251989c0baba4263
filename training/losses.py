"""What is made small: masks, boxes and their matching."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

OBJECTNESS = 0.25, 2.0
"""Alpha and gamma of the focal loss (DETR's)."""
BOX_WEIGHTS = {"class": 2.0, "l1": 5.0, "giou": 2.0}
"""Weights of the matching and of the loss (Deformable-DETR's)."""


def mask_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Per mask, the loss (cross-entropy + dice) and the IoU that was reached.

    Args:
        logits: [..., h, w], stretched to half the size of the targets.
        targets: [..., H, W] float32, 0 or 1, broadcast against the logits; at half the size they say how much of a pixel is covered.
    Returns:
        two [...] float32.
    """
    targets = F.avg_pool2d(targets.flatten(0, -3), 2).unflatten(0, targets.shape[:-2])
    full = stretch(logits.float(), targets.shape[-1])
    targets = targets.expand_as(full)
    # An object may be small: its own pixels weigh as much as all others near the boundary.
    entropy = F.binary_cross_entropy_with_logits(full, targets, reduction="none").mean((-2, -1))
    soft = full.sigmoid()
    overlap, total = (soft * targets).sum((-2, -1)), (soft + targets).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    with torch.no_grad():
        ours, theirs = full > 0, targets > 0.5
        iou = ((ours & theirs).sum((-2, -1)) + 1e-6) / ((ours | theirs).sum((-2, -1)) + 1e-6)
    return 5 * entropy + dice, iou


@cache
def stretching(old: int, new: int, device: torch.device) -> Tensor:
    """[new, old]: linear interpolation as a matrix."""
    return F.interpolate(torch.eye(old)[None, None], (new, old), mode="bilinear")[0, 0].to(device)


def stretch(maps: Tensor, size: int) -> Tensor:
    """[..., s, s] to [..., size, size], bilinear; as products of matrices, whose gradients need no atomic additions."""
    matrix = stretching(maps.shape[-1], size, maps.device)
    return matrix @ maps @ matrix.T


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Focal loss of every element."""
    alpha, gamma = OBJECTNESS
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    hit = logits.sigmoid() * targets + (1 - logits.sigmoid()) * (1 - targets)
    return (alpha * targets + (1 - alpha) * (1 - targets)) * (1 - hit) ** gamma * entropy


def corners(boxes: Tensor) -> Tensor:
    """[..., 4] cxcywh to xyxy."""
    centres, sides = boxes.chunk(2, -1)
    return torch.cat([centres - sides / 2, centres + sides / 2], -1)


def pairwise_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of [..., P, 4] and [..., G, 4] xyxy boxes: two [..., P, G]."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)
    overlap, outer = sides.prod(-1), hull.prod(-1).clamp(min=1e-9)
    areas = ((a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1), (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1))
    union = (areas[0] + areas[1] - overlap).clamp(min=1e-9)
    return overlap / union, overlap / union - (outer - union) / outer


def mask_boxes(masks: Tensor) -> Tensor:
    """[..., H, W] bool to [..., 4] float32 xyxy, normalised; zeros for an empty mask."""
    height, width = masks.shape[-2:]
    rows, columns = masks.any(-1), masks.any(-2)
    edges = []
    for line, length in ((columns, width), (rows, height)):
        index = torch.arange(length, device=masks.device)
        first = torch.where(line, index, length).amin(-1)
        last = torch.where(line, index, -1).amax(-1) + 1
        edges.append((first / length, last / length))
    (left, right), (top, bottom) = edges
    boxes = torch.stack([left, top, right, bottom], -1)
    return torch.where(masks.flatten(-2).any(-1)[..., None], boxes, 0.0)


def match(logits: Tensor, boxes: Tensor, targets: Tensor, repeats: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which queries stand for which objects (Hungarian, as DETR).

    Args:
        logits: [N, Q]
        boxes: [N, Q, 4] xyxy, normalised.
        targets: [N, G, 4] xyxy, normalised; without extent where there are fewer objects.
        repeats: queries of each object.
    Returns:
        image, query, object: three [M] int64.
    """
    from scipy.optimize import linear_sum_assignment

    there = (targets[..., 2:] > targets[..., :2]).all(-1)  # [N, G]
    _, giou = pairwise_iou(boxes, targets)
    l1 = (boxes[:, :, None] - targets[:, None]).abs().sum(-1)
    cost = -BOX_WEIGHTS["class"] * logits[..., None].sigmoid() + BOX_WEIGHTS["l1"] * l1 - BOX_WEIGHTS["giou"] * giou  # [N, Q, G]
    costs, present = cost.detach().cpu().numpy(), there.cpu().numpy()
    picked: list[tuple[int, int, int]] = []
    for image, own in enumerate(present):
        objects = own.nonzero()[0].repeat(repeats)
        queries, columns = linear_sum_assignment(costs[image][:, objects])
        picked += zip([image] * len(queries), queries.tolist(), objects[columns].tolist(), strict=True)
    image, query, target = torch.tensor(picked, device=boxes.device).T
    return image, query, target


def detection_loss(logits: list[Tensor], boxes: Tensor, targets: Tensor, repeats: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Asks matched queries to be objects where those are, and the others not to be.

    Args:
        logits: [N, Q] of each classifier.
        boxes: [N, Q, 4] cxcywh, normalised.
        targets, repeats: of `match`.
    Returns:
        scalar, and what `match` returns.
    """
    xyxy = corners(boxes.float())
    image, query, target = match(torch.stack(logits).float().mean(0), xyxy, targets, repeats)
    wanted = torch.zeros_like(logits[0], dtype=torch.float32)
    wanted[image, query] = 1
    loss = torch.stack([focal(own.float(), wanted).sum() for own in logits]).mean() * BOX_WEIGHTS["class"]
    mine, theirs = xyxy[image, query], targets[image, target]
    loss = loss + BOX_WEIGHTS["l1"] * (mine - theirs).abs().sum()
    _, matched = pairwise_iou(mine[:, None], theirs[:, None])
    return (loss + BOX_WEIGHTS["giou"] * (1 - matched).sum()) / max(len(image), 1), (image, query, target)
