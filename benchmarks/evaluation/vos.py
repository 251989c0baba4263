"""What the benchmarks of referring expressions share: videos as folders of pictures, an expression in each request, masks as pictures."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .annotations import check_whole, missing, picture_problems, read_json
from .davis import boundary_measure, region_similarity
from .palettes import check_size
from .samples import Clip, DatasetError, Figure, Masks, Prediction, Predictions, Row, Sample, Scores

PROMPT = "What is {} in this video? Please respond with segmentation masks."
OPTIONS: Mapping[str, str | float | bool] = {"box_prior_max_keep": 1, "max_new_tokens": 512}
"""The original's evaluation scripts (spec 10)."""

MEASURES = ("j_and_f", "j", "f")

WORKERS = min(16, os.cpu_count() or 1)
"""Expressions that are scored, or videos that are looked at, at once."""


@dataclass(frozen=True)
class Video:
    """A folder of pictures and what it is asked about.

    Args:
        name: of the folder.
        frames: stems of the pictures, in their order.
        pictures: their files.
        expressions: id to "exp", the words, and what the data set says of the object that they mean.
    """

    name: str
    frames: tuple[str, ...]
    pictures: tuple[Path, ...]
    expressions: Mapping[str, Mapping[str, Any]]


def read_videos(meta: Path, pictures: Path) -> list[Video]:
    """The videos of a meta_expressions.json, whose pictures are in `pictures`/<video>/; raises DatasetError where it is not one."""
    try:
        return [
            Video(
                name,
                tuple(entry["frames"]),
                tuple(pictures / name / f"{frame}.jpg" for frame in entry["frames"]),
                {index: {**expression, "exp": str(expression["exp"])} for index, expression in entry["expressions"].items()},
            )
            for name, entry in read_json(meta)["videos"].items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{meta}: no expressions of videos ({error!r}), expected the file of that name. Fetch it again.") from error


def video_problems(videos: Sequence[Video], folder: Path, named: Sequence[str], more: Callable[[Video], list[str]]) -> list[str]:
    """A line for each thing that is missing or unexpected.

    Args:
        videos: all that are asked about.
        folder: of their pictures.
        named: folders that may be there.
        more: what else there is to say of a video whose pictures are whole.
    """

    def problems(video: Video) -> list[str]:
        if not video.pictures or not video.expressions:
            return [
                f"{video.name}: got {len(video.pictures)} frames and {len(video.expressions)} expressions. Fetch the expressions again."
            ]
        if not video.pictures[0].parent.is_dir():
            return [missing(video.pictures[0].parent)]
        mute = [index for index, expression in video.expressions.items() if not expression["exp"].strip()]
        found = [f"{video.name}: expression {index} has no words. Fetch the expressions again." for index in mute]
        found += picture_problems(video.name, video.pictures)
        return found or more(video)

    if not folder.is_dir():
        return [missing(folder)]
    with ThreadPoolExecutor(WORKERS) as pool:
        found = [line for lines in tqdm(pool.map(problems, videos), total=len(videos), unit="video") for line in lines]
    others = sorted({path.name for path in folder.iterdir() if path.is_dir()} - set(named))
    if others:
        found.append(f"{folder}: got {len(others)} videos without expressions, the first {others[0]}. Fetch the expressions of this split.")
    return found


class WholeVideos:
    """A benchmark that shows a whole video with each expression and takes one object: prediction and annotation are masks, nothing else.

    OUT/<branch>/<archive>/<video>/<expression>/<frame>.png     L, 0 or 255
    OUT/<branch>.zip                                            what OUT/<branch>/ holds, for the benchmark's server; only of a whole run
    """

    suite: str
    protocols = ("fixed",)
    options = OPTIONS

    archive = ""
    """Folder in the zip that the videos are in."""

    def __init__(self, root: Path, split: str) -> None:
        self.root, self.split, self.folder = root, split, root / split

    @property
    def meta(self) -> Path:
        """The file of the expressions."""
        raise NotImplementedError

    @cached_property
    def videos(self) -> list[Video]:
        return read_videos(self.meta, self.folder / "JPEGImages")

    @cached_property
    def truth_files(self) -> list[Path]:
        """Those that hold the annotations; none where the split has none."""
        raise NotImplementedError

    def truth(self, video: Video, expression: str) -> Callable[[int], Masks]:
        """What gives the annotated mask, [H, W], of a frame; raises DatasetError where there is none, or it does not fit the pictures."""
        raise NotImplementedError

    def samples(self) -> list[Sample]:
        check_whole(self.folder, [*self.truth_files, *(path for video in self.videos for path in video.pictures)])
        return [
            Sample(f"{video.name}/{index}", Clip(video.pictures), PROMPT.format(" ".join(expression["exp"].lower().split())))
            for video in self.videos
            for index, expression in video.expressions.items()
        ]

    def problems(self) -> list[str]:
        try:
            return video_problems(self.videos, self.folder / "JPEGImages", self.named(), self.truth_problems)
        except DatasetError as error:
            return [str(error)]

    def named(self) -> list[str]:
        """Videos that may have a folder."""
        return [video.name for video in self.videos]

    def truth_problems(self, video: Video) -> list[str]:
        """A line for each expression whose annotations are missing, or do not fit its pictures."""
        found = []
        for index in video.expressions if self.truth_files else ():
            try:
                self.truth(video, index)
            except DatasetError as error:
                found.append(str(error))
        return found

    def score(self, predictions: Predictions, samples: Sequence[Sample], branches: Sequence[str], out: Path, protocol: str) -> Scores:
        videos = {video.name: video for video in self.videos}

        def row(sample: Sample) -> Row:
            name, _, expression = sample.key.rpartition("/")
            video, prediction = videos[name], predictions(sample)
            row: Row = {"sample": sample.key, "prompt": sample.prompt, "answer": prediction.answer, "video": name}
            truth = None
            if self.truth_files:
                try:
                    truth = self.truth(video, expression)
                    check_size(f"prediction of {sample.key}", prediction.size, (len(video.frames), *truth(0).shape))
                except DatasetError as error:
                    truth, row["failure"] = None, str(error)
            for branch in branches:
                folder = out / branch / self.archive / name / expression
                row |= {
                    f"{branch}_{key}": value for key, value in write_and_measure(prediction, branch, folder, video.frames, truth).items()
                }
            return row

        with ThreadPoolExecutor(WORKERS) as pool:
            rows = list(tqdm(pool.map(row, samples), total=len(samples), unit="expression", desc="scores"))
        whole = len(samples) == sum(len(video.expressions) for video in self.videos)
        for branch in branches:
            archive = out / f"{branch}.zip"
            archive.unlink(missing_ok=True)
            if whole:
                write_zip(archive, out / branch)
        names = [f"{branch}_{measure}" for branch in branches for measure in MEASURES]
        return Scores(rows, [Figure(name, [row[name] for row in rows if name in row]) for name in names])


def write_and_measure(
    prediction: Prediction, branch: str, folder: Path, frames: Sequence[str], truth: Callable[[int], Masks] | None
) -> dict[str, float]:
    """Writes the masks of the first object, one after the other, and returns their J&F, J and F in percent; nothing without a truth."""
    folder.mkdir(parents=True, exist_ok=True)
    measured = []
    for index, frame in enumerate(frames):
        mask = prediction.mask(branch, 0, index)
        Image.fromarray(mask.view(np.uint8) * 255).save(folder / f"{frame}.png", compress_level=1)
        if truth:
            own = truth(index)
            measured.append([float(measure(mask[None], own[None])[0]) for measure in (region_similarity, boundary_measure)])
    if not measured:
        return {}
    j, f = 100 * np.mean(measured, 0)
    return dict(zip(MEASURES, (float(j + f) / 2, float(j), float(f)), strict=True))


def write_zip(path: Path, folder: Path) -> None:
    """What the folder holds; pictures are packed already."""
    unfinished = path.with_name(f"{path.name}.part")
    try:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted(folder.rglob("*.png")):
                archive.write(file, file.relative_to(folder))
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
