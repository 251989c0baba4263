"""What a GPU makes of frames against Pillow and OpenCV, on the CPU."""

import numpy as np
import pytest

from ensemble.config import FULL, TINY
from ensemble.frames import HostPreprocessor
from export import resize
from export.resize import TorchPreprocessor, open_preprocessor

SIZES = [(480, 854), (854, 480), (720, 576), (1080, 1920), (240, 320), (333, 999), (17, 300), (8, 8), (224, 336), (1024, 1024)]
SWAPPED = [(4096, 2000), (4096, 41)]
"""Pillow resizes the columns of such frames first."""
TOWERS = "context_frames", "video_frames"


def named(size):
    return "x".join(map(str, size))


def drawn(height, width):
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8)


def both(config):
    return TorchPreprocessor(config), HostPreprocessor(config)


@pytest.mark.parametrize("config", [FULL, TINY], ids=["full", "tiny"])
@pytest.mark.parametrize("size", SIZES, ids=named)
def test_pictures_equal_those_of_pillow(config, size):
    got, expected = (own.encoder_frame(drawn(*size)) for own in both(config))
    np.testing.assert_array_equal(got["pictures"], expected["pictures"])
    np.testing.assert_array_equal(got["picture_sizes"], expected["picture_sizes"])


@pytest.mark.parametrize("config", [FULL, TINY], ids=["full", "tiny"])
@pytest.mark.parametrize("size", SIZES, ids=named)
def test_frames_for_the_towers_equal_those_of_pillow_and_opencv(config, size):
    frames = [drawn(*size), drawn(*size)[::-1]]
    got, expected = (own.tower_frames(frames, *TOWERS) for own in both(config))
    for name in TOWERS:
        np.testing.assert_array_equal(got[name], expected[name])


@pytest.mark.parametrize("config", [FULL, TINY], ids=["full", "tiny"])
@pytest.mark.parametrize("size", SIZES, ids=named)
def test_frames_for_the_proposer_equal_those_of_pillow(config, size):
    got, expected = (own.proposal_frame(drawn(*size)) for own in both(config))
    np.testing.assert_array_equal(got, expected)


def test_frames_of_several_sizes_go_to_the_towers_together():
    frames = [drawn(40, 60), drawn(33, 70), drawn(40, 60)]
    got, expected = (own.tower_frames(frames, "context_frames") for own in both(TINY))
    assert got.keys() == {"context_frames"}
    np.testing.assert_array_equal(got["context_frames"], expected["context_frames"])


@pytest.mark.parametrize("size", SWAPPED, ids=named)
def test_where_pillow_takes_the_columns_first_pictures_differ_by_one_grey_level_at_most(size):
    got, expected = (own.encoder_frame(drawn(*size))["pictures"] for own in both(FULL))
    assert np.abs(np.asarray(got, int) - expected).max() == 1


def test_configuration_says_who_resizes(monkeypatch):
    monkeypatch.setattr(resize, "torch_device", lambda: "cuda")
    assert isinstance(open_preprocessor({"resize_on": "cpu"}, TINY), HostPreprocessor)
    assert isinstance(open_preprocessor({"resize_on": "gpu"}, TINY), TorchPreprocessor)
    monkeypatch.setattr(resize, "torch_device", lambda: "cpu")
    assert isinstance(open_preprocessor({"resize_on": "gpu"}, TINY), HostPreprocessor)
