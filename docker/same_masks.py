"""Compares the masks of two answers that `sparrow segment` wrote: `python same_masks.py FOLDER FOLDER`."""

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

LEAST_IOU = 0.9
"""Mean over the frames: half precision moves edges, a wrong engine gives other masks."""


def read_masks(folder: Path) -> list[NDArray[np.bool_]]:
    """[H, W, T] of each object."""
    objects = json.loads((folder / "result.json").read_text())["objects"]
    return [coco.decode([frame["mask"] for frame in entry["frames"]]).astype(bool) for entry in objects]


def main(base: Path, other: Path) -> str:
    """Prints the size of every object and its IoU with that of `base`; what is wrong, or nothing."""
    expected, got = read_masks(base), read_masks(other)
    if not expected or len(expected) != len(got):
        return f"{other}: got {len(got)} objects, expected as many as {base} has, {len(expected)}, and at least one."
    for index, (before, now) in enumerate(zip(expected, got, strict=True)):
        union = (before | now).sum((0, 1))
        iou = np.where(union, (before & now).sum((0, 1)) / np.maximum(union, 1), 1).mean()
        sys.stdout.write(f"object {index}: {now.shape[2]} frames, {now.mean():.1%} of the picture, IoU {iou:.4f}\n")
        if not now.any() or iou < LEAST_IOU:
            return f"{other}: object {index} has other masks than in {base}, expected an IoU of at least {LEAST_IOU}."
    return ""


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])) or 0)
