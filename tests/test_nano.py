"""The shipped checkpoint through a real server: it finds the right object, follows it, and says what is not there."""

from pathlib import Path

import numpy as np
import pytest
from sparrow_client import SparrowClient

from benchmarks.evaluation.asking import BRANCHES, Asking, Reader
from benchmarks.evaluation.clips import read_frames
from benchmarks.evaluation.shapes_rvos import ShapesRvos
from export.checkpoints import Checkpoint
from export.local import onnx_pipeline, torch_pipeline
from export.serve import Ports, Server
from export.to_repository import repository_from_checkpoint
from tests.test_serving import locally
from training.shapes_rvos.files import write_split

pytestmark = pytest.mark.serving

VIDEOS = 6
FLOORS = {
    "tracked_j_and_f": 70,
    "framewise_j_and_f": 70,
    "right_object_pct": 85,
    "absent_no_mask_pct": 80,
    "multi_phrase_j_and_f": 75,
    "proposal_recall100_pct": 95,
}
"""In percent, on the first videos of the validation split: some points below what was measured on 40 others (README), since one wrong
answer of so few costs three points. Random weights reach 10, 10, 0, 0, 7 and 0."""
SAME = 0.99
"""Mask IoU of engines: float32 adds up in another order, which moves pixels along the outline."""


@pytest.fixture(scope="module")
def nano():
    return Checkpoint(Path(__file__).parent.parent / "training" / "nano")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_split(folder / "valid", "valid", VIDEOS)
    return ShapesRvos(folder, "valid")


@pytest.fixture(scope="module")
def nano_repository(nano, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    repository_from_checkpoint(nano, folder, progress=lambda made, anew: None)
    return folder


@pytest.fixture(scope="module")
def client(nano_repository):
    with Server(nano_repository, Ports(0, 0, 0)) as running, SparrowClient(running.url, timeout_s=120) as client:
        yield client


def test_answers_reach_the_floors(shapes, client, tmp_path):
    samples = shapes.samples()
    assert not Asking(client, tmp_path, {**shapes.options, "branch": "both"}, in_flight=2).ask_all(samples)
    scores = shapes.score(Reader(tmp_path), samples, BRANCHES, tmp_path, "fixed")
    reached = {figure.metric: float(np.mean(figure.samples)) for figure in scores.figures}
    assert reached.keys() == FLOORS.keys()
    assert not {name: (reached[name], floor) for name, floor in FLOORS.items() if reached[name] < floor}


def test_torch_and_onnx_and_the_server_agree_on_the_masks(shapes, nano, nano_repository, client, tmp_path):
    for graph in nano_repository.glob("*/1/*.onnx"):
        if not (tmp_path / graph.name).exists():
            (tmp_path / graph.name).symlink_to(graph)
    pipelines = torch_pipeline(nano), onnx_pipeline(nano, tmp_path)
    for sample in [sample for sample in shapes.samples() if sample.key.startswith("valid_00000/")][:2]:
        frames = read_frames(sample.clip)
        answer = client.segment(frames, sample.prompt)
        served = np.stack([frame.masks[0] for frame in answer.frames])
        assert served.any()
        for pipeline in pipelines:
            text, _, masks, _ = locally(pipeline, frames, sample.prompt)
            assert text == answer.text
            own = np.stack(masks).reshape(served.shape)
            assert (own & served).sum() / (own | served).sum() >= SAME
