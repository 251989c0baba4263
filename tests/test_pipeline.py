"""How the pipeline brings frames to the tracker: one by one as they are encoded, several at once where they are there already."""

import json
import time
from threading import Event

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
        before_encode, before_track: called with the number of such calls so far.
    """

    def __init__(self, runner, before_encode=lambda calls: None, before_track=lambda calls: None):
        self._runner, self._before_encode, self._before_track = runner, before_encode, before_track
        self.join = runner.join
        self.started = self.encoded = 0
        self.tracked = []

    def run(self, component, inputs, on_device=False):
        if component != "frame_encoder":
            return self._runner.run(component, inputs, on_device)
        self.started += 1
        self._before_encode(self.started - 1)
        outputs = self._runner.run(component, inputs, on_device)
        self.encoded += 1
        return outputs

    def session(self, component, parameters):
        session = self._runner.session(component, parameters)
        if component != "tracker":
            return session

        def send(request):
            if "frame_embeddings" in request.inputs:
                self._before_track(len(self.tracked))
                self.tracked.append(len(request.inputs["frame_embeddings"]))
            return session._send(request)

        return Session(component, session._id, parameters, send)


@pytest.fixture(scope="module")
def pipeline(tiny):
    return torch_pipeline(tiny)


@pytest.fixture
def answered(pipeline, monkeypatch):
    """Answers a question over a runner."""

    def answer(runner, **options):
        monkeypatch.setattr(pipeline, "runner", runner)
        frames = np.stack([draw_frame(index / NUM_FRAMES, 60, 80) for index in range(NUM_FRAMES)])
        responses = list(pipeline.answer({"frames": frames, "prompt": np.array([PROMPT.encode()], object)}, options))
        assert json.loads(responses[-1]["summary"][0])["num_objects"]
        return [response for response in responses if "frame_idx" in response]

    runner = pipeline.runner
    yield lambda options, **hooks: (answer(watched := Watched(runner, **hooks), **options), watched)


def test_frames_that_are_there_go_to_the_tracker_together_and_come_back_one_by_one(answered, monkeypatch):
    deadline = time.monotonic() + 60

    def wait_for_all(calls):
        while not calls and watched_now().encoded < NUM_FRAMES and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # until their futures know

    with monkeypatch.context() as patch:
        patch.setattr(settings, "TRACKED_TOGETHER", 1)
        expected, watched = answered({"branch": "both"})
    assert watched.tracked == [1] * NUM_FRAMES
