"""Frames of several callers on their way through the encoder, over a stand-in in which every input shows."""

import numpy as np
import pytest

from ensemble.config import TINY
from ensemble.errors import ComponentFailed, InvalidInput
from ensemble.features import FrameFeatures
from ensemble.frames import HostPreprocessor
from ensemble.runner import CLOSING, Host


class Encoder:
    """Mean and size of each picture; keeps the number of frames of each call, and fails while it has an error."""

    error = None

    def __init__(self):
        self.calls = []

    def run(self, inputs):
        if self.error:
            raise self.error
        self.calls.append(len(inputs["pictures"]))
        return {"frame_embeddings": inputs["pictures"].mean((1, 2)), "high_res_0": inputs["picture_sizes"]}


@pytest.fixture
def features():
    return FrameFeatures(HostPreprocessor(TINY), Encoder(), Host())


def frame(seed, height=40, width=60):
    return {"frame": np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)}


def test_frames_of_several_sizes_go_through_the_encoder_together_and_come_out_as_alone(features):
    requests = [frame(0), frame(1, 90, 30), frame(2)]
    together = features.step(requests)
    assert features._encoder.calls == [3]
    for request, result in zip(requests, together, strict=True):
        alone = features.run(request)
        assert result["frame_embeddings"].shape == (1, 3)
        assert result["frame_size"].tolist() == list(request["frame"].shape[:2])
        for name, array in alone.items():
            np.testing.assert_array_equal(result[name], array)


def test_bad_frame_fails_alone(features):
    good, bad, other = features.step([frame(0), frame(1, 4, 60), frame(2)])
    assert isinstance(bad, InvalidInput)
    assert "got a frame of 4x60 px, expected 8..4096 px a side" in str(bad)
    assert features._encoder.calls == [2]
    np.testing.assert_array_equal(good["frame_embeddings"], features.run(frame(0))["frame_embeddings"])
    np.testing.assert_array_equal(other["frame_embeddings"], features.run(frame(2))["frame_embeddings"])
    with pytest.raises(InvalidInput):
        features.run(frame(1, 4, 60))
    assert features.step([frame(1, 4, 60)])[0].args == bad.args


def test_encoder_that_fails_fails_the_frames_that_it_was_given(features):
    features._encoder.error = MemoryError("out of memory")
    results = features.step([frame(0), frame(1, 4, 60)])
    assert [type(result) for result in results] == [ComponentFailed, InvalidInput]
    features._encoder.error = None
    assert "frame_embeddings" in features.run(frame(0))


def test_closing_request_of_a_session_goes_through(features):
    result = features.run({"frame": np.zeros((0, 0, 3), np.uint8)})
    assert result["frame_size"].tolist() == CLOSING["tracker"]["frame_size"].tolist()
