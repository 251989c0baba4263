"""Ref-DAVIS 2017: four expressions for each object of DAVIS 2017, two annotators having seen the first frame or the whole video.

The layout of ReferFormer (github.com/wjn922/ReferFormer, docs/data.md), which the original reads too:

ROOT/meta_expressions/<split>/meta_expressions.json     {"videos": {video: {"frames": [...], "expressions": {id: {"exp", "obj_id"}}}}}
                                                        expression 4 o + a is annotator a's of object o
ROOT/<split>/JPEGImages/<video>/<frame>.jpg             480p
ROOT/DAVIS/Annotations_unsupervised/480p/<video>/<frame>.png, or what ReferFormer's conversion makes of it,
ROOT/<split>/Annotations/<video>/<frame>.png            palette picture; index: the object's id, 0: none, 255: void
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from .annotations import check_whole, picture_problems
from .clips import picture_size
from .davis import boundary_measure, region_similarity, statistics
from .palettes import VOID, check_size, read_palettes, write_palette
from .samples import Clip, DatasetError, Figure, Floats, Predictions, Row, Sample, Scores
from .vos import MEASURES, OPTIONS, PROMPT, Video, read_videos, video_problems

ANNOTATORS = ("Davis17_annot1", "Davis17_annot1_full_video", "Davis17_annot2", "Davis17_annot2_full_video")
"""Folders of their results, in the order of their expressions (spec 10)."""

CLIP_FRAMES = 64
"""Consecutive frames of a request; clips know nothing of each other (spec 10)."""

SETS = {"valid": "val", "train": "train"}
"""Split to the toolkit's name of it, which its tables carry."""

Ids = NDArray[np.uint8]
"""[T, H, W]: the object that each pixel shows."""


@dataclass(frozen=True)
class Track:
    """How an object of an annotator was found.

    Args:
        name: of the object, as the toolkit's tables have it.
        object_id: of the predicted object that was taken for it.
        j, f: [T], 0..1.
    """

    name: str
    object_id: int
    j: Floats
    f: Floats


class RefDavis17:
    """Ref-DAVIS 2017: four expressions per object, videos in clips of 64 frames; J&F per annotator and their mean.

    OUT/<branch>/<split>/<annotator>/<video>/<frame>.png                    palette picture; index: the object's id
    OUT/<branch>/<split>/<annotator>/global_results-val.csv                 of --protocol original; global_results-fixed-val.csv
    OUT/<branch>/<split>/<annotator>/per-sequence_results-val.csv           of --protocol fixed, and so on
    """

    suite = "ref-davis17"
    splits = ("valid", "train")
    protocols = ("fixed", "original")
    options = OPTIONS

    def __init__(self, root: Path, split: str) -> None:
        self.root, self.split, self.folder = root, split, root / split

    @cached_property
    def videos(self) -> list[Video]:
        """Raises DatasetError where expressions are missing, or are not four for each object."""
        meta = self.root / "meta_expressions" / self.split / "meta_expressions.json"
        videos = read_videos(meta, self.folder / "JPEGImages")
        for video in videos:
            ids = [str(expression.get("obj_id")) for expression in video.expressions.values()]
            if len(ids) % len(ANNOTATORS) or any(len({*own}) > 1 for own in zip(*[iter(ids)] * len(ANNOTATORS), strict=True)):
                raise DatasetError(f"{meta}: {video.name}: got expressions of objects {ids}, expected four of each. Convert it again.")
        return videos

    @cached_property
    def annotations(self) -> Path:
        """Their folder."""
        unpacked = self.root / "DAVIS" / "Annotations_unsupervised" / "480p"
        return unpacked if unpacked.is_dir() else self.folder / "Annotations"

    def annotation_files(self, video: Video) -> list[Path]:
        return [self.annotations / video.name / f"{frame}.png" for frame in video.frames]

    def samples(self) -> list[Sample]:
        check_whole(self.root, [path for video in self.videos for path in (*video.pictures, *self.annotation_files(video))])
        return [sample for video in self.videos for index in video.expressions for sample in self.clips(video, index)]

    def clips(self, video: Video, expression: str) -> list[Sample]:
        """An expression's samples, one after the other."""
        prompt = PROMPT.format(video.expressions[expression]["exp"].lower())
        starts = range(0, len(video.frames), CLIP_FRAMES)
        return [Sample(f"{video.name}/{expression}_{i:05}", Clip(video.pictures[i : i + CLIP_FRAMES]), prompt) for i in starts]

    def problems(self) -> list[str]:
        try:
            return video_problems(self.videos, self.folder / "JPEGImages", [video.name for video in self.videos], self.annotation_problems)
        except DatasetError as error:
            return [str(error)]

    def annotation_problems(self, video: Video) -> list[str]:
        found = picture_problems(f"{video.name}: annotations", self.annotation_files(video), picture_size(video.pictures[0]))
        if found:
            return found
        try:
            shown = {*np.unique(read_palettes(self.annotation_files(video))).tolist()}
        except DatasetError as error:
            return [str(error)]
        meant = {int(expression["obj_id"]) for expression in video.expressions.values()}
        return [f"{video.name}: expressions mean object {index}, which no annotation shows." for index in sorted(meant - shown)]

    def asked(self, video: Video) -> dict[str, dict[int, list[Sample]]]:
        """Annotator to the objects to the samples that ask for them, one after the other."""
        asked: dict[str, dict[int, list[Sample]]] = {annotator: {} for annotator in ANNOTATORS}
        for position, (index, expression) in enumerate(video.expressions.items()):
            asked[ANNOTATORS[position % len(ANNOTATORS)]][int(expression["obj_id"])] = self.clips(video, index)
        return asked

    def score(self, predictions: Predictions, samples: Sequence[Sample], branches: Sequence[str], out: Path, protocol: str) -> Scores:
        rows: dict[str, Row] = {
            sample.key: {"sample": sample.key, "prompt": sample.prompt, "answer": predictions(sample).answer} for sample in samples
        }
        tracks: dict[tuple[str, str], list[Track]] = {(branch, annotator): [] for branch in branches for annotator in ANNOTATORS}
        for video in tqdm(self.videos, unit="video", desc="scores"):
            annotated = read_palettes(self.annotation_files(video))
            for annotator, objects in self.asked(video).items():
                clips = [(object_id, sample) for object_id, own in objects.items() for sample in own]
                if not all(sample.key in rows for _, sample in clips):
                    continue  # what failed may have hidden the others: the video has no figure
                for object_id, sample in clips:
                    rows[sample.key] |= {"video": video.name, "annotator": annotator, "object": object_id}
                    if not (annotated == object_id).any():
                        rows[sample.key]["failure"] = f"{video.name}: no annotation shows object {object_id}."
                for branch in branches:
                    found = labels(objects, predictions, branch, annotated.shape)
                    write_frames(out / branch / self.split / annotator / video.name, video.frames, found)
                    for track in PROTOCOLS[protocol](video.name, found, annotated, list(objects)):
                        tracks[branch, annotator].append(track)
                        for index, sample in enumerate(objects.get(track.object_id, ())):
                            clip = slice(index * CLIP_FRAMES, (index + 1) * CLIP_FRAMES)
                            j, f = 100 * float(track.j[clip].mean()), 100 * float(track.f[clip].mean())
                            measured = zip(MEASURES, ((j + f) / 2, j, f), strict=True)
                            rows[sample.key] |= {f"{branch}_{measure}": value for measure, value in measured}
        name = SETS[self.split] if protocol == "original" else f"{protocol}-{SETS[self.split]}"
        for (branch, annotator), own in tracks.items():
            write_tables(out / branch / self.split / annotator, name, own)
        return Scores(list(rows.values()), [figure for branch in branches for figure in figures(branch, tracks)])


def labels(objects: Mapping[int, Sequence[Sample]], predictions: Predictions, branch: str, size: tuple[int, ...]) -> Ids:
    """What an annotator's expressions found, as one picture per frame: where masks overlap, the first object is taken (spec 10).

    Args:
        objects: to the samples that ask for them, whose frames follow each other.
        predictions, branch: say which masks.
        size: T, H, W of the annotations.
    """
    found = np.zeros(size, np.uint8)
    for object_id, clips in list(objects.items())[::-1]:
        answers = [predictions(sample) for sample in clips]
        got = (sum(answer.size[0] for answer in answers), *answers[0].size[1:])
        check_size(f"predictions of {clips[0].key} and on", got, size)
        found[np.concatenate([answer.masks(branch, 0) for answer in answers])] = object_id
    return found


def fixed_tracks(name: str, found: Ids, annotated: Ids, objects: Sequence[int]) -> list[Track]:
    """The benchmark's own rule: every object that is asked for, its own masks, all frames; void pixels do not count."""
    counts = annotated != VOID
    tracks = []
    for object_id in objects:
        mask, truth = (found == object_id) & counts, annotated == object_id
        if truth.any():
            tracks.append(Track(f"{name}_{object_id}", object_id, region_similarity(mask, truth), boundary_measure(mask, truth)))
    return tracks


def matched_tracks(name: str, found: Ids, annotated: Ids, objects: Sequence[int]) -> list[Track]:
    """What the original computes, the toolkit's unsupervised task: every object that the first frame is annotated with, and the masks that
    suit all of them best, whichever expression they answer. Names count the matched masks, not the objects.
    """
    counts = annotated != VOID
    num_truths = int(annotated[0][counts[0]].max(initial=0))
    masks = [(found == index) & counts for index in range(1, max(int(found.max()), num_truths) + 1)]  # P of [T, H, W]
    truths = [annotated == index for index in range(1, num_truths + 1)]  # O of [T, H, W]
    shape = len(masks), len(truths), len(found)
    j, f = (
        np.array([[measure(mask, truth) for truth in truths] for mask in masks]).reshape(shape)
        for measure in (region_similarity, boundary_measure)
    )
    chosen = linear_sum_assignment((j.mean(2) + f.mean(2)) / 2, maximize=True)
    return [
        Track(f"{name}_{position}", int(row) + 1, j[row, column], f[row, column])
        for position, (row, column) in enumerate(zip(*chosen, strict=True), 1)
    ]


PROTOCOLS = {"fixed": fixed_tracks, "original": matched_tracks}


def figures(branch: str, tracks: Mapping[tuple[str, str], Sequence[Track]]) -> list[Figure]:
    """Of all annotators, who have as many objects each, and J&F of every one."""
    values = {
        annotator: np.array([[100 * track.j.mean(), 100 * track.f.mean()] for track in tracks[branch, annotator]]).reshape(-1, 2)
        for annotator in ANNOTATORS
    }
    together = np.concatenate(list(values.values()))  # [objects of all annotators, J and F]
    of_all = [together.mean(1), *together.T]
    return [
        *(Figure(f"{branch}_{measure}", own.tolist()) for measure, own in zip(MEASURES, of_all, strict=True)),
        *(
            Figure(f"{branch}_j_and_f", own.mean(1).tolist(), workload=annotator.removeprefix("Davis17_"))
            for annotator, own in values.items()
        ),
    ]


def write_frames(folder: Path, frames: Sequence[str], found: Ids) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for frame, ids in zip(frames, found, strict=True):
        write_palette(folder / f"{frame}.png", ids)


def write_tables(folder: Path, name: str, tracks: Sequence[Track]) -> None:
    """The two tables of the toolkit, with more digits.

    Args:
        folder: of an annotator.
        name: of the set.
        tracks: of all videos.
    """
    if not tracks:
        return
    measured = [(track.name, statistics(track.j), statistics(track.f)) for track in tracks]
    columns = [np.mean([(own.mean, own.recall, own.decay) for own in column], 0) for column in list(zip(*measured, strict=True))[1:]]
    summary = [(columns[0][0] + columns[1][0]) / 2, *columns[0], *columns[1]]
    write_table(folder / f"global_results-{name}.csv", GLOBAL, [summary])
    write_table(folder / f"per-sequence_results-{name}.csv", PER_SEQUENCE, [(track, j.mean, f.mean) for track, j, f in measured])


GLOBAL = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")
PER_SEQUENCE = ("Sequence", "J-Mean", "F-Mean")


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *([f"{value:.6f}" if isinstance(value, float) else value for value in row] for row in rows)])
