"""Checkpoints that are not whole, on the real tritonserver: stage 1 answers without proposals, a SAM2 file only tracks."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.torch import save_file
from sparrow_client import Prompt, SparrowClient, SparrowClientError

from ensemble.frames import HostPreprocessor, session_frame
from ensemble.runner import LocalRunner, open_session
from ensemble.tracker import Tracker
from export.checkpoints import SOURCES, Checkpoint, read_tensors
from export.runners import TorchGraph
from export.seeded import ANSWER, draw_frame
from export.serve import Ports, Server
from export.to_repository import repository_from_checkpoint
from tests.test_checkpoints import sam2_file, without_selector, write_original

pytestmark = pytest.mark.serving

PROMPT = "Please segment the moving shape in this video."
CLIP = np.stack([draw_frame(index / 3, 60, 80) for index in range(3)])
BOX = np.array([[0.2, 0.3, 0.6, 0.8]], np.float32)


@contextmanager
def served(checkpoint, folder):
    """A client of a server with this checkpoint."""
    repository_from_checkpoint(checkpoint, folder, progress=lambda made, anew: None)
    with Server(folder, Ports(0, 0, 0)) as server, SparrowClient(server.url, timeout_s=60) as client:
        yield client


# Stage 1 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage_1(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("stage_1") / "checkpoint"
    shutil.copytree(tiny.root, root)
    shutil.rmtree(root / SOURCES["ddetr"])
    weights = root / SOURCES["sparrow"] / "model.safetensors"
    tensors = without_selector(read_tensors(weights))
    weights.unlink()  # not written to: the tensors are mapped from it
    save_file(tensors, weights)
    with served(Checkpoint(root), root.parent / "repository") as client:
        yield client


@pytest.mark.parametrize("options", [{"branch": "framewise"}, {"branch": "tracked", "video_init": "text_only"}, {"branch": "tracked"}])
def test_stage_1_checkpoint_answers_as_the_whole_one_without_guidance(stage_1, server, options):
    answer = stage_1.segment(CLIP, PROMPT, **options)
    with SparrowClient(server.url, timeout_s=60) as client:
        unguided = client.segment(CLIP, PROMPT, detection_guidance=False, **options)

    assert answer.text == unguided.text == ANSWER
    assert answer.summary.fields["guidance"] == "checkpoint_without_selector"
    assert unguided.summary.fields["guidance"] == "detection_guidance_disabled"
    for entry, other in zip(answer.objects, unguided.objects, strict=True):
        assert len(entry.boxes) == len(entry.selected_boxes) == 0
        np.testing.assert_array_equal(entry.embedding, other.embedding)
    assert len(answer.frames) == len(CLIP)
    for frame, other in zip(answer.frames, unguided.frames, strict=True):
        assert frame.branch == options["branch"]
        np.testing.assert_array_equal(frame.masks, other.masks)


def test_stage_1_checkpoint_tracks_boxes(stage_1):
    with stage_1.track([Prompt(0, boxes=BOX)], in_flight=0) as session:
        assert [session.push(frame)[0].masks.shape for frame in CLIP] == [(1, 60, 80)] * 3


# SAM2 alone ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sam2(tmp_path_factory):
    """A SAM2 file: at 1024 px, since its weights do not tell the size of its pictures."""
    root = tmp_path_factory.mktemp("sam2")
    write_original(root / "original")
    sam2_file(root / "original", root / "sam2_hiera_large.pt")
    return Checkpoint(root / "sam2_hiera_large.pt")


@pytest.fixture(scope="module")
def tracking(sam2, tmp_path_factory):
    with served(sam2, tmp_path_factory.mktemp("tracking") / "repository") as client:
        yield client


def test_sam2_file_tracks_a_box_a_point_and_a_mask_as_in_this_process(tracking, sam2):
    graphs = {name: TorchGraph(sam2.build(name), name) for name in sam2.components}
    runner = LocalRunner(graphs)
    runner.stateful["tracker"] = Tracker(sam2.config, graphs)
    point, mask = np.array([[0.4, 0.6]], np.float32), np.zeros((1, 60, 80), bool)
    mask[:, 20:40, 10:50] = True
    start = {"boxes": BOX, "box_objects": np.array([0], np.int32), "masks": mask, "mask_objects": np.array([2], np.int32)}
    start |= {"points": point, "point_labels": np.ones(1, np.int32), "point_objects": np.array([1], np.int32)}
    prompts = [Prompt(0, boxes=BOX), Prompt(1, points=point), Prompt(2, mask=mask[0])]
    with tracking.track(prompts, in_flight=0) as session, open_session(runner, "tracker", {"mask_format": "bits"}) as local:
        for index, frame in enumerate(CLIP[:2]):
            inputs = session_frame({"frame": frame}, HostPreprocessor(sam2.config))
            features = runner.run("frame_encoder", {name: inputs[name][None] for name in ("pictures", "picture_sizes")})
            expected = local.step({**features, "frame_size": inputs["frame_size"], **({} if index else start)})
            (result,) = session.push(frame)
            assert (result.frame_idx, result.object_ids.tolist()) == (index, [0, 1, 2])
            bits = np.unpackbits(expected["mask_bits"], axis=1, count=frame.shape[0] * frame.shape[1]).reshape(result.masks.shape)
            assert (result.masks == bits.astype(bool)).mean() >= 0.998  # ONNX Runtime against torch: memories are rounded to bfloat16
            np.testing.assert_allclose(result.object_scores, expected["object_scores"], atol=1e-2)


def test_sam2_file_is_asked_a_question_and_says_that_there_is_no_such_model(tracking):
    with pytest.raises(SparrowClientError, match="sparrow") as refused:
        tracking.segment(CLIP, PROMPT)
    assert "\n" not in str(refused.value)
    assert tracking.is_ready()
    with tracking.track([Prompt(0, boxes=BOX)], in_flight=0) as session:
        assert session.push(CLIP[0])[0].masks.shape == (1, 60, 80)
