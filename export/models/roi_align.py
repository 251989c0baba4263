"""Mean of a feature map over a grid of cells in each box, as torchvision's compiled `roi_align` takes it (spec 5.2).

A custom operator, so that it is exported as one ONNX RoiAlign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("sparrow::roi_align", mutates_args=())
def roi_align(features: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
    """A cell is the mean of bilinear samples, along each axis as many as it covers pixels of the map, rounded up; those that lie
    further than a pixel outside of the map count as zero (aligned=True, sampling_ratio=-1).

    Args:
        features: [1, C, h, w] float.
        boxes: [P, 4] float, xyxy, unbounded; without extent or with its sides swapped a box has no samples and gives zeros.
        size: cells along each side of a box.
        scale: pixels of the map per unit of `boxes`.
    Returns:
        [P, C, size, size] float.
    """
    left, top, right, bottom = (boxes * scale - 0.5).unbind(1)  # [P, 4] -> 4 x [P]
    columns = axis_weights(left, right, size, features.shape[3])  # [P, size, w]
    rows = axis_weights(top, bottom, size, features.shape[2])  # [P, size, h]
    with torch.autocast(features.device.type, enabled=False):  # as the original, in float32 whatever the precision (spec 5.2)
        lines = torch.einsum("pih,chw->pciw", rows, features[0].float())  # [C, h, w] -> [P, C, size, w]
        return torch.einsum("pjw,pciw->pcij", columns, lines)  # -> [P, C, size, size]


def axis_weights(start: Tensor, end: Tensor, size: int, length: int) -> Tensor:
    """How much of each pixel along one axis every cell of a box takes; cells of both axes multiply, as bilinear samples do.

    Args:
        start, end: [P] float, in pixels of the map, pixel centres at whole numbers.
        size: cells of a box.
        length: pixels of the map.
    Returns:
        [P, size, length] float.
    """
    cell = (end - start) / size
    samples = cell.ceil().clamp(min=0)
    sample = torch.arange(int(samples.max()), device=start.device)
    origin = start[:, None] + torch.arange(size, device=start.device) * cell[:, None]  # [P, size]
    offset = (sample + 0.5) * cell[:, None] / samples[:, None]  # [P, most]
    at = origin[:, :, None] + offset[:, None]  # [P, size, most]
    counts = (sample < samples[:, None])[:, None] & (at >= -1) & (at <= length)
    pixel = torch.arange(length, device=start.device)
    weights = (1 - (at.clamp(0, length - 1)[..., None] - pixel).abs()).clamp(min=0)  # [P, size, most, length]
    total = torch.where(counts[..., None], weights, 0).sum(2)  # -> [P, size, length]
    return total / samples.clamp(min=1)[:, None, None]


@roi_align.register_fake
def _(features: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
    return features.new_empty(boxes.shape[0], features.shape[1], size, size, dtype=torch.float32)


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export(custom_translation_table=...)` needs to know."""
    import onnx
    from onnxscript import opset18

    first = onnx.helper.make_tensor("first", onnx.TensorProto.INT64, [1], [0])

    def translation(features: Any, boxes: Any, size: int, scale: float) -> Any:
        # ONNX Runtime fails on a box whose sides are swapped; without extent it gives the same zeros.
        start, end = opset18.Split(boxes, axis=1, num_outputs=2)
        ordered: Any = opset18.Concat(start, opset18.Max(start, end), axis=1)
        map_of_box: Any = opset18.ConstantOfShape(opset18.Shape(boxes, end=1), value=first)
        return opset18.RoiAlign(
            features,
            ordered,
            map_of_box,
            coordinate_transformation_mode="half_pixel",
            mode="avg",
            output_height=size,
            output_width=size,
            sampling_ratio=0,
            spatial_scale=scale,
        )

    return {torch.ops.sparrow.roi_align.default: translation}
