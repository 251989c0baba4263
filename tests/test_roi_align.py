import math

import onnxruntime
import pytest
import torch
from torch import nn

from export.models.roi_align import onnx_translations, roi_align

TOLERANCE = 1e-5
"""Float32 summation order on values of order 1. Measured: 2e-6."""

HEIGHT, WIDTH, SCALE = 20, 24, 0.25
BOXES = {
    "inside": [(8, 12, 60, 50), (3.3, 4.7, 91.9, 70.1), (0, 0, 96, 80)],
    "partly outside": [(-30, 10, 40, 60), (50, -70, 70, 20), (70, 60, 130, 120), (-40, -40, 150, 140)],
    "wholly outside": [(-90, 10, -20, 50), (10, 90, 60, 200), (101, 0, 400, 80)],
    # One sample per cell when cells are two: on the last position that counts, and just beyond.
    "at the limit": [(-4, -4, 4, 4), (-4.3, -4.3, 3.3, 3.3), (96, 80, 104, 88), (96.2, 80.2, 104, 88)],
    "tiny": [(40, 40, 40.5, 40.25), (-1, 30, -0.9, 30.1), (95.9, 79.9, 96, 80)],
    "without extent": [(40, 40, 40, 60), (40, 40, 60, 40), (40, 40, 40, 40), (60, 50, 40, 70), (60, 70, 40, 50)],
}


pytestmark = pytest.mark.usefixtures("inference")


def box_tensor(*kinds):
    return torch.tensor([box for kind in kinds or BOXES for box in BOXES[kind]], dtype=torch.float32)


def one_sample(image, y, x):
    """[C, H, W] -> [C]: bilinear, as the compiled kernel of torchvision takes it."""
    height, width = image.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return torch.zeros(len(image))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    above = image[:, top, left] * (1 - x + left) + image[:, top, right] * (x - left)
    below = image[:, bottom, left] * (1 - x + left) + image[:, bottom, right] * (x - left)
    return above * (1 - y + top) + below * (y - top)


def slow_roi_align(features, boxes, size, scale):
    """One sample at a time."""
    regions = torch.zeros(len(boxes), features.shape[1], size, size)
    for region, box in zip(regions, boxes.tolist(), strict=True):
        left, top, right, bottom = (side * scale - 0.5 for side in box)
        height, width = (bottom - top) / size, (right - left) / size
        down, across = max(math.ceil(height), 0), max(math.ceil(width), 0)
        for row in range(size):
            for column in range(size):
                for i in range(down):
                    for j in range(across):
                        y = top + row * height + (i + 0.5) * height / down
                        x = left + column * width + (j + 0.5) * width / across
                        region[:, row, column] += one_sample(features[0], y, x) / (down * across)
    return regions


@pytest.mark.parametrize("kind", BOXES)
@pytest.mark.parametrize("size", [2, 7])
def test_roi_align_equals_the_kernels_rule_sample_by_sample(kind, size):
    features, boxes = torch.randn(1, 3, HEIGHT, WIDTH), box_tensor(kind)
    torch.testing.assert_close(
        roi_align(features, boxes, size, SCALE), slow_roi_align(features, boxes, size, SCALE), atol=TOLERANCE, rtol=0
    )


def test_roi_align_is_zero_when_a_box_is_far_away_or_has_no_extent():
    regions = roi_align(torch.randn(1, 3, HEIGHT, WIDTH), box_tensor("wholly outside", "without extent"), 7, SCALE)
    assert not regions.any()


def test_roi_align_averages_as_many_samples_as_a_cell_has_pixels():
    features = torch.arange(16.0).expand(1, 1, 16, 16)
    centred = torch.tensor([[4.0, 4.0, 12.0, 12.0]])
    assert roi_align(features, centred, 2, 1.0).tolist() == [[[[5.5, 9.5], [5.5, 9.5]]]]


class Regions(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, features, boxes):
        return roi_align(features, boxes, self.size, SCALE)


@pytest.mark.parametrize("size", [2, 7])
def test_exported_roi_align_equals_ours_for_any_number_of_boxes(size):
    module, features = Regions(size).eval(), torch.randn(1, 3, HEIGHT, WIDTH)
    program = torch.onnx.export(
        module,
        (features, box_tensor("inside")),
        dynamo=True,
        dynamic_shapes=({}, {0: "boxes"}),
        opset_version=18,
        custom_translation_table=onnx_translations(),
        verbose=False,
    )
    assert [node.op_type for node in program.model.graph].count("RoiAlign") == 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for boxes in (box_tensor(), box_tensor("tiny")[:1]):
        inputs = {given.name: x.numpy() for given, x in zip(session.get_inputs(), (features, boxes), strict=True)}
        (got,) = session.run(None, inputs)
        torch.testing.assert_close(torch.from_numpy(got), module(features, boxes), atol=TOLERANCE, rtol=0)
