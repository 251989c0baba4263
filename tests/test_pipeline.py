"""How a clip's frames reach the tracker: together where they are encoded already, and never waited for to fill a request."""

import time

import numpy as np
import pytest

from ensemble import settings
from ensemble.runner import Session
from export.local import torch_pipeline
from export.seeded import draw_frame

PROMPT = "Please segment the moving shape in this video."
NUM_FRAMES = 8


class Watched:
    """A runner that keeps the number of frames of each request to the tracker.

    Args:
        runner: does the work.
        clip: its frames.
        before_encode: called with this runner and the index of a frame before it is encoded.
        before_track: called with this runner before a request to the tracker.
        before_token: called with this runner before a request to the language model.
        on_gpu: whether it says that there is a GPU.
    """

    def __init__(self, runner, clip, before_encode, before_track, before_token, on_gpu):
        self._runner, self._clip, self.join, self.on_gpu = runner, clip, runner.join, on_gpu
        self._before_encode, self._before_track, self._before_token = before_encode, before_track, before_token
        self.encoded, self.tracked = 0, []

    def run(self, component, inputs, on_device=False):
        if component != "frame_features":
            return self._runner.run(component, inputs, on_device)
        self._before_encode(self, next(index for index, own in enumerate(self._clip) if (own == inputs["frame"]).all()))
        outputs = self._runner.run(component, inputs, on_device)
        self.encoded += 1
        return outputs

    def session(self, component, parameters):
        session = self._runner.session(component, parameters)

        def send(request):
            if "frame_embeddings" in request.inputs:
                self._before_track(self)
                self.tracked.append(len(request.inputs["frame_embeddings"]))
            elif component == "language_model":
                self._before_token(self)
            return session._send(request)

        return Session(component, session._id, parameters, send)


def nothing(*watched):
    pass


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)  # what has returned is told to those who wait for it


@pytest.fixture(scope="module")
def pipeline(tiny):
    return torch_pipeline(tiny)


def answer(pipeline, monkeypatch, before_encode=nothing, before_track=nothing, before_token=nothing, on_gpu=True, **options):
    """The masks of a clip, and the frames of each request to the tracker."""
    frames = np.stack([draw_frame(index / NUM_FRAMES, 60, 80) for index in range(NUM_FRAMES)])
    with monkeypatch.context() as patch:
        watched = Watched(pipeline.runner, frames, before_encode, before_track, before_token, on_gpu)
        patch.setattr(pipeline, "runner", watched)
        responses = list(pipeline.answer({"frames": frames, "prompt": np.array([PROMPT.encode()], object)}, options))
    return [response for response in responses if "frame_idx" in response], watched.tracked


def all_encoded(watched):
    if not watched.tracked:
        wait_until(lambda: watched.encoded == NUM_FRAMES)


@pytest.mark.parametrize("options", [{}, {"branch": "both"}, {"mask_format": "bits"}, {"mask_format": "logits"}], ids=str)
def test_frames_that_are_encoded_are_tracked_together_and_answered_one_by_one(pipeline, monkeypatch, options):
    responses, tracked = answer(pipeline, monkeypatch, before_track=all_encoded, **options)
    assert tracked == [1, 4, 3]  # the first masks wait for nothing
    branches = ("framewise", "tracked") if options.get("branch") else ("tracked",)
    order = [(response["frame_idx"].tolist(), response["branch"][0].decode()) for response in responses]
    assert order == [([index], branch) for index in range(NUM_FRAMES) for branch in branches]
    monkeypatch.setattr(settings, "TRACKED_TOGETHER", 1)
    expected, tracked = answer(pipeline, monkeypatch, **options)
    assert tracked == [1] * NUM_FRAMES
    for response, other in zip(responses, expected, strict=True):
        assert set(response) == set(other)
        for name, array in other.items():
            np.testing.assert_array_equal(response[name], array)


def test_frame_that_is_not_encoded_is_not_waited_for(pipeline, monkeypatch):
    def hold_the_fourth(watched, index):
        if index >= 3:
            wait_until(lambda: len(watched.tracked) >= 2)

    def the_first_three(watched):
        if not watched.tracked:
            wait_until(lambda: watched.encoded == 3)

    responses, tracked = answer(pipeline, monkeypatch, hold_the_fourth, the_first_three)
    assert tracked[:2] == [1, 2]
    assert len(responses) == sum(tracked) == NUM_FRAMES


def test_gpu_encodes_the_clip_while_an_answer_is_decoded(pipeline, monkeypatch):
    encoded = []

    def count(watched):
        encoded.append(watched.encoded)
        wait_until(lambda: watched.encoded == (1 if len(encoded) == 1 else NUM_FRAMES))

    responses, tracked = answer(pipeline, monkeypatch, before_token=count)
    assert max(encoded[:2]) <= 1  # by when the prompt has been read
    assert tracked == [1, 4, 3]
    assert len(responses) == NUM_FRAMES


def test_cpu_encodes_frame_0_alone_before_it_knows_that_masks_are_wanted(pipeline, monkeypatch):
    encoded = []
    answer(pipeline, monkeypatch, before_token=lambda watched: encoded.append(watched.encoded), on_gpu=False)
    assert max(encoded) <= 1
