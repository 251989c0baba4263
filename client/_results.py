"""The folder that `sparrow segment` writes: answer.txt, result.json, masks and an overlay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._media import Media, MediaError
from ._overlay import blend, write_picture, write_video
from ._types import BRANCHES, Answer, FrameMasks


def prepare_folder(out: Path) -> None:
    """Creates the folder for the results; raises MediaError when it holds anything but an earlier result."""
    if out.exists() and not out.is_dir():
        raise MediaError(f"{out}: a file, expected a folder. Choose another.")
    if out.exists() and any(out.iterdir()) and not (out / "result.json").exists():
        raise MediaError(f"{out}: not empty, and no earlier result. Choose another folder.")
    out.mkdir(parents=True, exist_ok=True)


def clear_folder(out: Path) -> None:
    """Removes the results of an earlier run, and nothing else."""
    for branch in ("", *(f"_{name}" for name in BRANCHES)):
        shutil.rmtree(out / f"masks{branch}", ignore_errors=True)
        for suffix in ("jpg", "mp4"):
            (out / f"overlay{branch}.{suffix}").unlink(missing_ok=True)
    for name in ("answer.txt", "result.json"):
        (out / name).unlink(missing_ok=True)


def write_results(out: Path, prompt: str, media: Media, answer: Answer) -> None:
    """answer.txt, result.json, masks/<object>/<frame>.png and the overlay, in place of those of an earlier run.

    With both branches, masks and overlays carry the branch in their names: masks_tracked, overlay_tracked.mp4.
    """
    clear_folder(out)
    (out / "answer.txt").write_text(answer.text + "\n")
    (out / "result.json").write_text(json.dumps(result_fields(prompt, media, answer), indent=2))
    for branch, frames in answer.branches.items():
        end = f"_{branch}" if len(answer.branches) > 1 else ""
        write_masks(out / f"masks{end}", media, answer, frames)
        write_overlay(out / f"overlay{end}", media, frames)


def write_masks(folder: Path, media: Media, answer: Answer, frames: list[FrameMasks]) -> None:
    """<object>/<frame>.png, 0 or 255."""
    for index in range(len(answer.objects)):
        (folder / str(index)).mkdir(parents=True)
        for frame in frames:
            write_picture(folder / str(index) / f"{media.names[frame.frame_idx]}.png", frame.masks[index].astype(np.uint8) * 255)


def write_overlay(path: Path, media: Media, frames: list[FrameMasks]) -> None:
    """The input with its masks, as .jpg or .mp4."""
    masks = {frame.frame_idx: frame.masks for frame in frames}
    nothing = np.zeros((0, *media.frames.shape[1:3]), bool)
    drawn = [blend(frame, masks.get(index, nothing)) for index, frame in enumerate(media.frames)]
    if media.modality == "image":
        write_picture(path.with_suffix(".jpg"), drawn[0])
    else:
        write_video(path.with_suffix(".mp4"), drawn, media.fps)


def result_fields(prompt: str, media: Media, answer: Answer) -> dict[str, Any]:
    """result.json: the answer, and per object its boxes and an RLE mask per frame in COCO's compressed format."""
    objects = [
        {
            "phrase": entry.phrase,
            "selected_boxes_xyxy_norm": entry.selected_boxes.tolist(),
            "boxes_xyxy_norm": entry.boxes.tolist(),
            "frames": [
                {
                    "frame": media.names[frame.frame_idx],
                    "branch": frame.branch,
                    "mask": rle(frame.masks[index]),
                    "predicted_iou": float(frame.predicted_iou[index]),
                    "object_score": float(frame.object_scores[index]),
                    "visible": bool(frame.visible[index]),
                }
                for frame in answer.frames
            ],
        }
        for index, entry in enumerate(answer.objects)
    ]
    return {"prompt": prompt, **answer.summary.fields, "objects": objects}


def rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """[H, W] in COCO's compressed format."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}
