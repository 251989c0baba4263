"""What every benchmark is made of: clips with questions, what the server answers, and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

Masks = NDArray[np.bool_]
Frames = NDArray[np.uint8]
Floats = NDArray[np.float64]
Row = dict[str, Any]
"""A line of report.csv by its columns; figures in percent."""


class DatasetError(Exception):
    """A data set that is not there, or is not whole: who, what was got, what was expected, what to do."""


@dataclass(frozen=True)
class Clip:
    """Frames on disk; none of them is in memory.

    Args:
        pictures: a file for each frame; or else
        video: a file, and
        indices: which of its frames, ascending; None: all.
        size: height and width that frames are resized to, bilinear as OpenCV does; None: as they are.
    """

    pictures: tuple[Path, ...] = ()
    video: Path | None = None
    indices: tuple[int, ...] | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Sample:
    """One request to the server.

    Args:
        key: unique; the path of its prediction under OUT/predictions, without suffix, e.g. "blackswan/0".
        clip: what is shown.
        prompt: what is asked.
        kind: what the answer is scored as, where a benchmark has several kinds of questions.
        options: of the request, beside those of the command line.
    """

    key: str
    clip: Clip
    prompt: str
    kind: str = "referring"
    options: Mapping[str, str | float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """What the server answered.

    Args:
        prompt: the question.
        answer: the text.
        preset: of the model.
        phrases: the words of the answer that name each object.
        selected_boxes: per object those that were chosen for it, [K, 4] xyxy, normalised.
        proposals: [P, 4] what they were chosen from; none unless `proposal_debug` was asked for.
        size: T, H, W of the masks.
        tracks: branch to objects to frames: counts of COCO's compressed RLE.
    """

    prompt: str
    answer: str
    preset: str
    phrases: list[str]
    selected_boxes: list[NDArray[np.float32]]
    proposals: NDArray[np.float32]
    size: tuple[int, int, int]
    tracks: dict[str, list[list[str]]]

    @property
    def num_objects(self) -> int:
        return len(self.phrases)

    def masks(self, branch: str, index: int) -> Masks:
        """[T, H, W] of one object; all False for one that the answer does not name."""
        return np.stack([self.mask(branch, index, frame) for frame in range(self.size[0])])

    def mask(self, branch: str, index: int, frame: int) -> Masks:
        """[H, W] of one object on one frame."""
        if index >= len(self.tracks[branch]):
            return np.zeros(self.size[1:], bool)
        mask: Masks = coco.decode({"size": self.size[1:], "counts": self.tracks[branch][index][frame]}).view(bool)
        return mask


@dataclass(frozen=True)
class Figure:
    """A figure of a run, the mean of its samples.

    Args:
        metric: name.
        samples: a value per question, object or video.
        unit: of them.
        workload: what it is about, behind the name of the split, e.g. "annot1"; empty: everything.
    """

    metric: str
    samples: Sequence[float]
    unit: str = "%"
    workload: str = ""


@dataclass(frozen=True)
class Scores:
    """What a benchmark says of its predictions.

    Args:
        rows: of report.csv, at least "sample", "prompt" and "answer" first; one per sample. "failure" says why one has no figure, although
            it has a prediction.
        figures: to be kept.
    """

    rows: Sequence[Row]
    figures: Sequence[Figure]


Predictions = Callable[[Sample], Prediction]
"""Reads the prediction of a sample; there is one for each that is scored."""


class Benchmark(Protocol):
    """A data set on disk, how it is asked, and how it is scored. Built from (root, split); reads nothing big before it is asked to.

    One that takes more says so in `arguments`: name to what `click.option` takes.

    Raises DatasetError from `samples` where the data set is not there or not whole.
    """

    suite: str
    """Name on the command line and of the records."""

    splits: tuple[str, ...]
    """The first is the default."""

    protocols: tuple[str, ...]
    """`fixed`: the benchmark's own rules; `original`: what the original's scripts compute (spec 10)."""

    options: Mapping[str, str | float | bool]
    """Of every request: the defaults of the original's script (spec 10)."""

    def samples(self) -> list[Sample]:
        """Every request, in a fixed order."""

    def problems(self) -> list[str]:
        """A line for everything that is missing or unexpected in the data set; looks at every file, opens pictures and videos."""

    def score(self, predictions: Predictions, samples: Sequence[Sample], branches: Sequence[str], out: Path, protocol: str) -> Scores:
        """Compares, and writes what the benchmark's own tools or servers take under `out`.

        Args:
            samples: those that have a prediction.
            branches: `tracked`, `framewise` or both: what the predictions hold; metrics are named "<branch>_<metric>".
        """
