"""One self-contained page about a run: figures beside the paper's, a bar per video, the best and the worst answers, what failed."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image
from sparrow_client._overlay import blend

from .clips import read_frames
from .samples import Masks, Prediction, Row, Sample

PAPER: dict[str, dict[str, float]] = {
    "mevis": {"valid j_and_f": 47.5, "valid_u j_and_f": 57.4},
    "ref-ytvos": {"valid j_and_f": 68.9},
    "ref-davis17": {"valid j_and_f": 76.8},
    "vidstg": {"gt_viou": 45.06},
    "video-gcg": {"miou": 65.59},
}
"""Benchmark to metric, behind a split where they differ, to what the paper's repository claims of VideoGLaMM + SPARROW. It names no branch,
and its VidSTG figure is not defined there; gt_viou is the candidate (spec 10)."""

SHOWN = 4
"""Answers at either end of the ranking."""
WIDTH = 280
"""Pixels of a picture."""

Read = Callable[[Sample], Prediction]


def write_page(path: Path, run: Mapping[str, Any], rows: Sequence[Row], samples: Sequence[Sample], read: Read) -> None:
    """Writes the page.

    Args:
        path: of the HTML file.
        run: what run.json holds.
        rows: one per scored sample; the first figure in them is what they are ranked by.
        samples: all of the run.
        read: a sample's prediction.
    """
    column = ranking(rows)
    by_key = {sample.key: sample for sample in samples}
    ranked = sorted((row for row in rows if isinstance(row.get(column), float)), key=lambda row: float(row[column]))
    worst, best = ranked[:SHOWN], ranked[max(SHOWN, len(ranked) - SHOWN) :][::-1]
    branch = run["branches"][0]
    page = Environment(autoescape=True).from_string((Path(__file__).parent / "report.html.jinja").read_text())
    fields = {
        "run": run,
        "paper": {(entry["workload"], entry["metric"]): paper_figure(run, entry["metric"]) for entry in run["figures"]},
        "column": column,
        "branch": branch,
        "bars": bars(rows, column),
        "ends": [
            (title, [(row, pictures(by_key[row["sample"]], read(by_key[row["sample"]]), branch)) for row in own])
            for title, own in (("Worst", worst), ("Best", best))
        ],
    }
    path.write_text(page.render(fields))


def ranking(rows: Sequence[Row]) -> str:
    """The column that answers are ranked by: the first J&F, or else the first that holds a figure in some row; empty where none does."""
    columns = [
        name for name in dict.fromkeys(name for row in rows for name in row) if any(isinstance(row.get(name), float) for row in rows)
    ]
    return next((name for name in columns if name.endswith("j_and_f")), next(iter(columns), ""))


def paper_figure(run: Mapping[str, Any], metric: str) -> float | None:
    """The paper's figure of the same name, whichever branch made ours."""
    known = PAPER.get(run["benchmark"], {})
    plain = metric.removeprefix("tracked_").removeprefix("framewise_")
    return known.get(f"{run['split']} {plain}", known.get(plain))


def bars(rows: Sequence[Row], column: str) -> str:
    """SVG: the mean of each video's questions, the lowest on top; empty where there is nothing to show."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    by_video: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if isinstance(row.get(column), float):
            by_video[row["sample"].split("/")[0]].append(row[column])
    if not by_video:
        return ""
    names, values = zip(*sorted(((name, float(np.mean(own))) for name, own in by_video.items()), key=lambda entry: entry[1]), strict=True)
    figure = Figure(figsize=(8, 0.6 + 0.18 * len(names)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.barh(names, values, color="#3b7ea1")
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel(f"{column}, %")
    axes.set_xlim(0, max(100.0, *values))
    axes.tick_params(axis="y", labelsize=7)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def pictures(sample: Sample, prediction: Prediction, branch: str) -> list[str]:
    """First, middle and last frame with the predicted masks, as data URLs of JPEG files."""
    frames = read_frames(sample.clip)
    tracks: list[Masks] = [prediction.masks(branch, index) for index in range(prediction.num_objects)]
    chosen = sorted({0, len(frames) // 2, len(frames) - 1})
    return [
        picture(blend(frames[index], np.array([track[index] for track in tracks], bool).reshape(-1, *frames.shape[1:3])))
        for index in chosen
    ]


def picture(frame: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """[H, W, 3] as a data URL."""
    image = Image.fromarray(frame)
    image.thumbnail((WIDTH, WIDTH))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
