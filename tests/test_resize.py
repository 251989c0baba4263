"""The resize that a GPU does against Pillow's, on the CPU."""

import numpy as np
import pytest

from ensemble import frames
from ensemble.config import FULL, TINY
from export import resize

SIZES = [(480, 854), (854, 480), (720, 576), (1080, 1920), (240, 320), (333, 999), (17, 300), (8, 8), (1024, 1024)]


def drawn(height, width):
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("config", [FULL, TINY], ids=["full", "tiny"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_pictures_equal_those_of_pillow(config, size):
    frame = drawn(*size)
    got, expected = resize.encoder_frame(frame, config), frames.encoder_frame(frame, config)
    np.testing.assert_array_equal(got["pictures"], expected["pictures"])
    np.testing.assert_array_equal(got["picture_sizes"], expected["picture_sizes"])


@pytest.mark.parametrize("size", [(4096, 2000), (4096, 41)], ids=lambda size: "x".join(map(str, size)))
def test_where_pillow_takes_the_columns_first_pictures_differ_by_one_grey_level_at_most(size):
    frame = drawn(*size)
    got, expected = (own.encoder_frame(frame, FULL)["pictures"] for own in (resize, frames))
    assert np.abs(np.asarray(got, int) - expected).max() == 1


def test_configuration_says_who_resizes(monkeypatch):
    monkeypatch.setattr(resize, "torch_device", lambda: "cuda")
    assert resize.open_encoder_frame({"resize_on": "cpu"}) is frames.encoder_frame
    assert resize.open_encoder_frame({"resize_on": "gpu"}) is resize.encoder_frame
    monkeypatch.setattr(resize, "torch_device", lambda: "cpu")
    assert resize.open_encoder_frame({"resize_on": "gpu"}) is frames.encoder_frame
