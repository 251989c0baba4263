"""The folders that `sparrow segment` and `sparrow track` write."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._media import Media, MediaError
from ._overlay import VideoWriter, blend, write_picture, write_video
from ._types import BRANCHES, Answer, FrameMasks

RESULTS = ("result.json", "tracks.jsonl")
"""A folder that holds one of these is an earlier result."""

PREVIEW_S = 0.5
"""Between two states of the live preview."""


def prepare_folder(out: Path) -> None:
    """Creates the folder for the results; raises MediaError when it holds anything but an earlier result."""
    if out.exists() and not out.is_dir():
        raise MediaError(f"{out}: a file, expected a folder. Choose another.")
    if out.exists() and any(out.iterdir()) and not any((out / name).exists() for name in RESULTS):
        raise MediaError(f"{out}: not empty, and no earlier result. Choose another folder.")
    out.mkdir(parents=True, exist_ok=True)


def clear_folder(out: Path) -> None:
    """Removes the results of an earlier run, and nothing else."""
    for branch in ("", *(f"_{name}" for name in BRANCHES)):
        shutil.rmtree(out / f"masks{branch}", ignore_errors=True)
        for suffix in ("jpg", "mp4"):
            (out / f"overlay{branch}.{suffix}").unlink(missing_ok=True)
    for name in ("answer.txt", "preview.jpg", *RESULTS):
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
    drawn = (blend(frame, masks.get(index, nothing)) for index, frame in enumerate(media.frames))
    if media.modality == "image":
        write_picture(path.with_suffix(".jpg"), next(drawn))
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
                {"frame": media.names[frame.frame_idx], "branch": frame.branch, **object_fields(frame, index)} for frame in answer.frames
            ],
        }
        for index, entry in enumerate(answer.objects)
    ]
    return {"prompt": prompt, **answer.summary.fields, "objects": objects}


class TrackFiles:
    """tracks.jsonl, overlay.mp4 and the live preview.jpg of a session, frame by frame; answer.txt where there is an answer.

    Those of an earlier run are replaced when the first frame is there.

    Args:
        out: folder.
        fps: frames per second of the overlay.
        answer: to the question that started the session, or "".
    """

    def __init__(self, out: Path, fps: float, answer: str) -> None:
        self._out, self._fps, self._answer = out, fps, answer
        self._files = ExitStack()
        self._drawn: NDArray[np.uint8] | None = None
        self._preview_at = 0.0
        self.num_frames = 0

    def __enter__(self) -> TrackFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.close()
        if self._drawn is not None:
            self._write_preview(self._drawn)

    def add(self, picture: NDArray[np.uint8], frame: FrameMasks) -> None:
        """A frame, [H, W, 3] uint8 RGB, and its masks."""
        if not self.num_frames:
            clear_folder(self._out)
            if self._answer:
                (self._out / "answer.txt").write_text(self._answer + "\n")
            self._lines = self._files.enter_context((self._out / "tracks.jsonl").open("w", buffering=1))  # a line is there at once
            self._video = self._files.enter_context(VideoWriter(self._out / "overlay.mp4", self._fps))
        self._lines.write(json.dumps(track_fields(frame)) + "\n")
        self._drawn = blend(picture, frame.masks)
        self._video.add(self._drawn)
        self.num_frames += 1
        if time.monotonic() >= self._preview_at:
            self._write_preview(self._drawn)
            self._preview_at = time.monotonic() + PREVIEW_S

    def _write_preview(self, drawn: NDArray[np.uint8]) -> None:
        """Never half a picture: viewers may read it at any time."""
        unfinished = self._out / ".preview.jpg"
        write_picture(unfinished, drawn)
        os.replace(unfinished, self._out / "preview.jpg")


def track_fields(frame: FrameMasks) -> dict[str, Any]:
    """A line of tracks.jsonl."""
    objects = [{"object_id": int(object_id), **object_fields(frame, index)} for index, object_id in enumerate(frame.object_ids)]
    return {"frame": frame.frame_idx, "objects": objects}


def object_fields(frame: FrameMasks, index: int) -> dict[str, Any]:
    """An object on a frame, by its row."""
    return {
        "mask": rle(frame.masks[index]),
        "box_xyxy_px": frame.boxes_px[index].tolist(),
        "area_px": int(frame.areas_px[index]),
        "predicted_iou": float(frame.predicted_iou[index]),
        "object_score": float(frame.object_scores[index]),
        "visible": bool(frame.visible[index]),
    }


def rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """[H, W] in COCO's compressed format."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}
