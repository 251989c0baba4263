"""What a training leaves to read: its curves as one picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .loop import LOG_EVERY_S

SHOWN = {
    "segmentation": ("first", "last"),
    "detection": ("recall", "iou"),
    "towers": ("context_shape", "video_motion"),
    "alignment": ("referring", "absent", "description"),
    "joint": ("alone_iou", "framewise_iou", "track_last", "selected", "referring"),
    "selection": ("fused_right", "roi_right"),
}
"""Stage to the terms of its curve that are drawn; all of them shares or IoU, 0 to 1."""


def draw_curves(logs: Path, path: Path) -> None:
    """Draws the curves <stage>.jsonl of a folder, over the minutes of each stage, as SVG."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "sparrow", "svg.fonttype": "none", "font.size": 8}
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(15, 2.6), sharey=True, constrained_layout=True)
    for axis, (stage, terms) in zip(axes, SHOWN.items(), strict=True):
        lines = [json.loads(line) for line in (logs / f"{stage}.jsonl").read_text().splitlines()]
        for term in terms:
            axis.plot(*points(lines, term), label=term)
        axis.set(title=stage, xlabel="minutes", xlim=0, ylim=(0, 1))
        axis.legend(loc="lower right", fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def points(lines: Sequence[dict[str, float]], term: str) -> tuple[list[float], list[float]]:
    """Minutes and value, where there is one."""
    there = [(index * LOG_EVERY_S / 60, line[term]) for index, line in enumerate(lines) if term in line]
    return [minutes for minutes, _ in there], [value for _, value in there]
