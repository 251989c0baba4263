"""The last rung: golden cases asked of the real tritonserver through the client, against what the original computed (goldens' README)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from sparrow_client import SparrowClient

from ensemble.frames import grounding_frame, proposal_image
from export.local import torch_pipeline
from export.runners import Engine
from export.serve import Ports, Server
from export.to_repository import repository_from_checkpoint
from tests import goldens

pytestmark = pytest.mark.serving

ENGINE = Engine("torch")
"""The default, ONNX Runtime, gives the same and takes 1.5 times as long here; test_goldens compares its graphs with the original."""


@dataclass(frozen=True)
class Reference:
    """What the server should answer; lists are per object."""

    embeddings: np.ndarray
    selected_boxes: list[np.ndarray]
    boxes: list[np.ndarray]
    masks: np.ndarray
    """[T, N, H, W] bool."""


def of_the_original(case):
    expected, count = case.expected, len(case.expected["seg.emb"])
    shape = expected["masks.shape"]
    bits = np.unpackbits(expected["masks.packed"], axis=-1, count=shape[2] * shape[3])
    guided = case.meta["flags"]["use_detection_guidance"]
    none = [np.zeros((0, 4), np.float32)] * count
    return Reference(
        embeddings=expected["sel.refined" if is_refined(case) else "seg.emb"],
        selected_boxes=[expected[f"sel.before.tok{index}"] for index in range(count)] if guided else none,
        boxes=[expected[f"sel.after.tok{index}"] for index in range(count)] if guided else none,
        masks=bits.reshape(shape).astype(bool),
    )


def in_process(case, pipeline):
    responses = list(pipeline.answer(case.inputs, {**case.options, "mask_format": "bits"}))
    found = next(response for response in responses if "phrases" in response)
    height, width = case.frames.shape[1:3]
    bits = np.stack([response["mask_bits"] for response in responses if "frame_idx" in response])
    masks = np.unpackbits(bits, axis=-1, count=height * width).reshape(*bits.shape[:2], height, width)

    def by_object(boxes, owners):
        return [found[boxes][found[owners] == index] for index in range(len(found["phrases"]))]

    return Reference(
        embeddings=found["text_embeddings"],
        selected_boxes=by_object("selected_boxes", "selected_box_objects"),
        boxes=by_object("boxes", "box_objects"),
        masks=masks.astype(bool),
    )


def is_refined(case):
    """Whether the proposals change the [SEG] embeddings."""
    return case.meta["flags"]["use_detection_guidance"] and not len(case.expected.get("box.step", ()))


def sees_the_originals_picture(case):
    """Whether our 448 px picture is the original's: where it has rounding ties, some grey levels follow float noise."""
    if not (case.folder / "proposer_input_448.png").exists():
        return True
    config = goldens.checkpoint(case.pack).config
    return np.array_equal(proposal_image(grounding_frame(case.frames[0], config), config), case.proposer_image)


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """A client of one server per pack."""
    with ExitStack() as stack:
        connected = {}
        for pack in goldens.PACKS:
            folder = tmp_path_factory.mktemp(f"served-{pack}") / "repository"
            repository_from_checkpoint(goldens.checkpoint(pack), folder, progress=lambda made, anew: None, engine=ENGINE)
            server = stack.enter_context(Server(folder, Ports(0, 0, 0)))
            connected[pack] = stack.enter_context(SparrowClient(server.url, timeout_s=120))
        yield connected


@pytest.fixture(scope="module")
def answers(clients):
    """The served answer to a case, asked once."""

    @cache
    def answer(case):
        inputs = case.inputs
        return clients[case.pack].segment(inputs.pop("frames"), inputs.pop("prompt")[0].decode(), **inputs, **case.options)

    return answer


@pytest.fixture(scope="module")
def references():
    """The original's answer, or that of the pipeline in this process where the proposer sees another picture.

    In process the tests put the original's picture there (test_goldens); through a server nothing can.
    """
    pipeline = cache(lambda pack: torch_pipeline(goldens.checkpoint(pack)))
    return cache(lambda case: of_the_original(case) if sees_the_originals_picture(case) else in_process(case, pipeline(case.pack)))


@goldens.parametrize_cases()
def test_served_text_is_the_originals(case, answers):
    summary = answers(case).summary
    assert summary.fields["full_text"] == case.meta["expected_text"]
    assert summary.fields["num_tokens"] == len(case.expected["generated_ids"])
    assert summary.fields["num_objects"] == len(answers(case).objects) == len(case.expected.get("seg.emb", ()))
    assert summary.branch == ("tracked" if case.meta["flags"]["use_sam2_video_branch"] else "framewise")


@goldens.parametrize_cases(lambda case: "seg.emb" not in case.expected)
def test_served_answer_without_seg_has_no_objects_and_no_masks(case, answers):
    assert not answers(case).objects
    assert not answers(case).frames


@goldens.parametrize_cases(lambda case: "seg.emb" in case.expected)
def test_served_embeddings_are_the_originals(case, answers, references):
    expected = references(case).embeddings if is_refined(case) else case.expected["seg.emb"]
    np.testing.assert_allclose([entry.embedding for entry in answers(case).objects], expected, atol=1e-3)


@goldens.parametrize_cases(lambda case: "masks.shape" in case.expected)
def test_served_boxes_are_the_originals(case, answers, references):
    for index, entry in enumerate(answers(case).objects):
        np.testing.assert_allclose(entry.selected_boxes, references(case).selected_boxes[index], atol=1e-3)
        np.testing.assert_allclose(entry.boxes, references(case).boxes[index], atol=1e-3)


@goldens.parametrize_cases(lambda case: "masks.shape" in case.expected)
def test_served_masks_are_the_originals(case, answers, references):
    masks, expected = np.stack([frame.masks for frame in answers(case).frames]), references(case).masks
    assert masks.shape == expected.shape
    if case.meta["flags"]["use_sam2_video_branch"]:
        assert (masks == expected).mean((1, 2, 3)).min() >= 0.998
        return
    assert (masks == expected).mean() >= 0.9998
    overlap, union = ((operation(masks, expected)).sum((0, 2, 3)) for operation in (np.logical_and, np.logical_or))
    assert (overlap >= 0.999 * union).all()  # the IoU of every object, of an empty one too
