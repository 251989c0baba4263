"""The files of the original's chat.py, by its own words (spec 9)."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sparrow_client import Answer, Proposals, Summary, TrackedObject
from sparrow_client._chat_files import write_chat_files
from sparrow_client._media import Media

from tests.responses import masks_of

SIZE = 20, 30
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (2, *SIZE, 3), np.uint8)
BOXES = np.float32([[0.1, 0.2, 0.5, 0.75], [-0.125, 0, 1.25, 1]])


def answer(branch, guidance="ok", num_objects=2, proposals=True):
    branches = ("framewise", "tracked") if branch == "both" else (branch,)
    numbers = np.zeros(num_objects, np.float32)
    frames = [
        masks_of(index, RNG.random((num_objects, *SIZE)) < 0.4, (numbers, numbers), name)
        for index in range(2 if num_objects else 0)
        for name in branches
    ]
    objects = [TrackedObject("thing", numbers, BOXES[: 2 - index], BOXES[:1]) for index in range(num_objects)]
    fields = {"full_text": "<s> <|user|> what? <|assistant|> thing [SEG] <|end|>", "guidance": guidance}
    found = Proposals(RNG.integers(0, 256, (64, 64, 3), np.uint8), BOXES, np.float32([0.9, 0.25])) if proposals else None
    return Answer(Summary("thing [SEG]", branch, None, {}, fields), objects, frames, found)


def write(root, answer, proposal_debug="none"):
    write_chat_files(root, {"prompt_text": "what?", "input_path": "a.mp4"}, Media(PICTURES, "video", ["a", "b"], 1), answer, proposal_debug)
    return root


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


DEBUG = ["debug_info.txt", "frame_for_proposals.jpg", "proposals_before_filter.jpg", "proposals_before_filter.txt"]
SELECTED = [f"selected_{when}_filter.{suffix}" for when in ("before", "after") for suffix in ("jpg", "txt")]


@pytest.mark.parametrize(
    ("branch", "folders"),
    [
        ("framewise", ["sam2_video_branch_off"]),
        ("tracked", ["sam2_video_branch_on"]),
        ("both", ["sam2_video_branch_off", "sam2_video_branch_on"]),
    ],
)
@pytest.mark.parametrize(
    ("proposal_debug", "debug"), [("none", []), ("proposal", DEBUG), ("selected", DEBUG + SELECTED), ("both", DEBUG + SELECTED)]
)
def test_files_are_the_originals(tmp_path, branch, folders, proposal_debug, debug):
    frames = ["caption.txt"]
    for index in (0, 1):
        frames += [f"img_frames/frame_{index}.jpg"]
        frames += [f"{path}" for n in (0, 1) for path in (f"pred_masks_{n}/mask_{index}.png", f"masked_images/masked_img_{index}_{n}.jpg")]
    expected = ["run_args.txt", *(f"{folder}/{name}" for folder in folders for name in (*frames, *(f"proposal_debug/{n}" for n in debug)))]
    assert files(write(tmp_path / "clip", answer(branch), proposal_debug)) == sorted(expected)


def test_contents_are_the_originals(tmp_path):
    result = answer("tracked")
    root = write(tmp_path / "clip", result, "selected")
    assert (root / "run_args.txt").read_text() == "input_path: a.mp4\nprompt_text: what?\n"
    folder = root / "sam2_video_branch_on"
    assert (folder / "caption.txt").read_text() == result.summary.fields["full_text"]
    for frame in result.frames:
        for index, mask in enumerate(frame.masks):
            with Image.open(folder / f"pred_masks_{index}" / f"mask_{frame.frame_idx}.png") as picture:
                assert picture.mode == "L"
                np.testing.assert_array_equal(np.asarray(picture), mask * 255)
    debug = folder / "proposal_debug"
    assert (debug / "debug_info.txt").read_text() == "enabled: True\nreason: ok\n"
    first = "0.100000\t0.200000\t0.500000\t0.750000"
    second = "-0.125000\t0.000000\t1.250000\t1.000000"
    assert (debug / "proposals_before_filter.txt").read_text() == f"0\t{first}\t0.900000\n1\t{second}\t0.250000\n"
    assert (debug / "selected_before_filter.txt").read_text() == f"tok0\t0\t{first}\ntok0\t1\t{second}\ntok1\t0\t{first}\n"
    assert (debug / "selected_after_filter.txt").read_text() == f"tok0\t0\t{first}\ntok1\t0\t{first}\n"


def test_masked_pictures_are_half_red_inside_the_mask_alone(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("sparrow_client._chat_files.write_picture", lambda path, picture: drawn.__setitem__(path.name, picture))
    result = answer("framewise")
    write(tmp_path / "clip", result)
    mask = result.frames[1].masks[0]
    np.testing.assert_array_equal(drawn["masked_img_1_0.jpg"][~mask], PICTURES[1][~mask])
    np.testing.assert_array_equal(drawn["masked_img_1_0.jpg"][mask], (PICTURES[1][mask] * 0.5 + np.array([127.5, 0, 0])).astype(np.uint8))


@pytest.mark.parametrize("reason", ["no_selector_embeddings", "detection_guidance_disabled"])
def test_debug_says_why_there_are_no_boxes(tmp_path, reason):
    debug = write(tmp_path / "clip", answer("tracked", reason, num_objects=0), "both") / "sam2_video_branch_on" / "proposal_debug"
    assert (debug / "debug_info.txt").read_text() == f"enabled: {reason == 'no_selector_embeddings'}\nreason: {reason}\n"
    assert (debug / "proposals_before_filter.txt").read_text() == "No proposals.\n"
    assert (debug / "selected_after_filter.txt").read_text() == "No selected boxes.\n"


def test_answer_without_masks_leaves_the_caption(tmp_path):
    assert files(write(tmp_path / "clip", answer("tracked", num_objects=0))) == ["run_args.txt", "sam2_video_branch_on/caption.txt"]


def test_earlier_files_are_deleted(tmp_path):
    (tmp_path / "clip").mkdir()
    Path(tmp_path / "clip" / "old.txt").write_text("old")
    assert "old.txt" not in files(write(tmp_path / "clip", answer("tracked")))
