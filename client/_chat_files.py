"""The files that the original's chat.py writes for a request, for scripts that read them (chat.py, spec 9)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ._media import Media
from ._overlay import write_picture
from ._types import Answer, FrameMasks, Proposals

FOLDERS = {"framewise": "sam2_video_branch_off", "tracked": "sam2_video_branch_on"}
"""Branch to the original's folder."""

RED = np.array([255, 0, 0], np.uint8)
BOX_COLOURS = ((230, 25, 75), (60, 180, 75), (0, 130, 200), (255, 225, 25), (245, 130, 48), (145, 30, 180))

NOTHING = np.zeros((0, 4), np.float32)


def write_chat_files(root: Path, arguments: Mapping[str, Any], media: Media, answer: Answer, proposal_debug: str) -> None:
    """Writes <root>/run_args.txt and a folder per branch; what is there already is deleted, as the original does.

    Args:
        root: <vis_save_path>/<stem of the input> in the original.
        arguments: what the command was called with.
        media: frames that were sent.
        answer: what came back; with `proposals` unless proposal_debug is none.
        proposal_debug: none, proposal (the proposals alone), or selected and both (also the boxes chosen from them).
    """
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    (root / "run_args.txt").write_text("".join(f"{name}: {arguments[name]}\n" for name in sorted(arguments)))
    for branch, frames in answer.branches.items():
        folder = root / FOLDERS[branch]
        folder.mkdir()
        (folder / "caption.txt").write_text(answer.summary.fields["full_text"])
        for frame in frames:
            write_frame(folder, frame, media.frames[frame.frame_idx])
        if proposal_debug != "none":
            write_proposal_debug(folder / "proposal_debug", answer, proposal_debug)


def write_frame(folder: Path, frame: FrameMasks, picture: NDArray[np.uint8]) -> None:
    """img_frames/, pred_masks_<object>/ and masked_images/ of one frame."""
    index = frame.frame_idx
    write(folder / "img_frames" / f"frame_{index}.jpg", picture)
    for object_idx, mask in enumerate(frame.masks):
        write(folder / f"pred_masks_{object_idx}" / f"mask_{index}.png", mask.astype(np.uint8) * 255)
        masked = picture.copy()
        masked[mask] = (picture[mask] * 0.5 + RED * 0.5).astype(np.uint8)
        write(folder / "masked_images" / f"masked_img_{index}_{object_idx}.jpg", masked)


def write_proposal_debug(folder: Path, answer: Answer, proposal_debug: str) -> None:
    """proposal_debug/: the first frame, stretched to a square, with boxes; the boxes as text; whether guidance took part."""
    folder.mkdir()
    reason = answer.summary.fields["guidance"]
    enabled = reason in ("ok", "no_selector_embeddings")
    (folder / "debug_info.txt").write_text(f"enabled: {enabled}\nreason: {reason}\n")
    if answer.proposals is None:
        return
    found = answer.proposals if reason == "ok" else Proposals(answer.proposals.frame, NOTHING, np.zeros(0, np.float32))
    write(folder / "frame_for_proposals.jpg", found.frame)
    write(folder / "proposals_before_filter.jpg", draw(found.frame, found.boxes, [], width=2))
    lines = [f"{index}\t{columns(box)}\t{score:.6f}" for index, (box, score) in enumerate(zip(found.boxes, found.scores, strict=True))]
    write_lines(folder / "proposals_before_filter.txt", lines, "No proposals.")
    if proposal_debug == "proposal":
        return
    for name, boxes, width in (
        ("selected_before_filter", [entry.selected_boxes for entry in answer.objects], 3),
        ("selected_after_filter", [entry.boxes for entry in answer.objects], 4),
    ):
        labels = [f"tok{token}" for token, own in enumerate(boxes) for _ in own]
        write(folder / f"{name}.jpg", draw(found.frame, np.concatenate([NOTHING, *boxes]), labels, width))
        lines = [f"tok{token}\t{index}\t{columns(box)}" for token, own in enumerate(boxes) for index, box in enumerate(own)]
        write_lines(folder / f"{name}.txt", lines, "No selected boxes.")


def draw(frame: NDArray[np.uint8], boxes: NDArray[np.float32], labels: Sequence[str], width: int) -> NDArray[np.uint8]:
    """A copy of a frame with normalised boxes, clipped to it, and a label each where there are labels."""
    picture = Image.fromarray(frame)
    pen = ImageDraw.Draw(picture)
    corners = np.clip(np.round(boxes * np.tile([picture.width, picture.height], 2)), 0, np.tile([picture.width - 1, picture.height - 1], 2))
    for index, (x1, y1, x2, y2) in enumerate(corners):
        colour = BOX_COLOURS[index % len(BOX_COLOURS)]
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=width)
        if labels:
            pen.text((x1 + width + 1, y1 + 1), labels[index], fill=colour)
    return np.asarray(picture)


def columns(box: NDArray[np.float32]) -> str:
    return "\t".join(f"{value:.6f}" for value in box)


def write(path: Path, picture: NDArray[np.uint8]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_picture(path, picture)


def write_lines(path: Path, lines: Sequence[str], nothing: str) -> None:
    path.write_text("".join(f"{line}\n" for line in lines or [nothing]))
