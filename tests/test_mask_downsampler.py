import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ensemble import masks
from ensemble.components import components
from tests import sam2_oracle

CONFIG = sam2_oracle.config_at(128)
SAM2 = CONFIG.sam2
SIZES = [(48, 64), (480, 854), (512, 768), (37, 23), (8, 301), (SAM2.image_size, SAM2.image_size), (SAM2.image_size, 256)]
"""Frames that are enlarged, reduced, both, and left as they are."""


@pytest.fixture
def oracle():
    return sam2_oracle.Oracle(CONFIG)


def drawn_masks(height, width):
    """[5, H, W] bool: noise, a box, an ellipse, a single row, all of it."""
    y, x = np.mgrid[:height, :width] + 0.5
    ellipse = ((x / width - 0.4) / 0.3) ** 2 + ((y / height - 0.5) / 0.2) ** 2 < 1
    box = (abs(x / width - 0.5) < 0.2) & (abs(y / height - 0.6) < 0.3)
    noise = np.random.default_rng(0).random((height, width)) < 0.4
    return np.stack([noise, box, ellipse, y.astype(int) == height // 2, np.ones_like(box)])


def test_mask_downsampler_equals_sam2(oracle):
    drawn = torch.from_numpy(drawn_masks(SAM2.image_size, SAM2.image_size)).float()
    got, expected = oracle.build("mask_downsampler")(drawn), oracle.sam2.mask_downsample(drawn[:, None])[:, 0]
    assert got.shape == (len(drawn), SAM2.low_res, SAM2.low_res)
    torch.testing.assert_close(got, expected)
    assert (got[1:] != got[0]).flatten(1).any(1).all()  # each mask gives another prompt


def test_onnx_graph_equals_torch_module_at_every_size(oracle, tmp_path):
    module, contract = oracle.build("mask_downsampler"), components(CONFIG)["mask_downsampler"]
    samples = [contract.sample(seed, **own) for seed, own in enumerate([{}, {"objects": 3}, {"objects": 16}])]
    sam2_oracle.assert_onnx_equals_torch(module, "mask_downsampler", tmp_path / "graph.onnx", samples)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_stretched_mask_equals_add_new_mask(height, width):
    side = SAM2.image_size
    for mask in drawn_masks(height, width):
        stretched = torch.from_numpy(mask)[None, None].float()
        if (height, width) != (side, side):
            stretched = F.interpolate(stretched, (side, side), align_corners=False, mode="bilinear", antialias=True)
        expected = stretched[0, 0].numpy()
        got = masks.stretch_mask(mask, side)
        clear = abs(expected - 0.5) > 1e-6  # at one half exactly, the last bit of float32 decides
        np.testing.assert_array_equal(got[clear], expected[clear] >= 0.5)
        assert clear.mean() > 0.7  # of noise, at exactly half the width, a fifth is at one half


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_drawn_logits_equal_the_official_output_for_a_mask(oracle, height, width):
    stretched = np.stack([masks.stretch_mask(mask, SAM2.image_size) for mask in drawn_masks(height, width)])
    features = torch.zeros(len(stretched), SAM2.width, SAM2.grid, SAM2.grid)
    high_res = [torch.zeros(len(stretched), SAM2.width // 2**n, SAM2.grid * m, SAM2.grid * m) for n, m in ((3, 4), (2, 2))]
    low_res, *_ = oracle.sam2._use_mask_as_output(features, high_res, torch.from_numpy(stretched)[:, None].float())
    got = np.stack([masks.drawn_logits(mask, SAM2.low_res) for mask in stretched])
    np.testing.assert_allclose(got, low_res[:, 0].numpy(), atol=1e-5)  # float32 summation order on logits of 10
