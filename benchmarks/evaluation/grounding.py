"""VidSTG and HC-STVG: where a video shows what a sentence says, as a box per frame.

ROOT is the folder `video_dataset` of VideoGLaMM and SPARROW. What is read of it are the public annotations, not what their scripts make of
them (processed/):

VidSTG    vidstg/vidstg_annotations/{test,val}_annotations.json   sentences, with a segment and in it a tube (Guaranteer/VidSTG-Dataset)
          vidstg/vidor_annotations/<part>/<group>/<video>.json    boxes of VidOR; its part "validation" is test, "training" holds val
          vidstg/video/<group>/<video>.mp4                        of VidOR
HC-STVG   hcstvg/anno_v2/val_v2.json                              sentences and tubes, version 2
          hcstvg/Video/<group>/<video>.mp4                        20 s each
          hcstvg/qa/<number in val_v2.json>.json                  {"Q": question, "A": answer}, made for PG-Video-LLaVA

A split `...-whole` shows the whole segment instead of the annotated tube, and also asks how well the answer says when it is.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from .annotations import Size, check_whole, expected_fields, missing, read_json, video_problem, without_blobs
from .samples import Clip, DatasetError, Figure, Floats, Masks, Prediction, Predictions, Row, Sample, Scores

SAMPLE_FPS = 1
MAX_FRAMES = 40
SHORT_SIDE, LONG_SIDE = 224, 373
"""px that frames are resized to: the shorter side, unless the longer one comes out longer than this."""

THRESHOLDS = (0.3, 0.5)
HC_STVG_S = 20
"""Length of each video."""

WHOLE = "-whole"
SPAN = re.compile(r"frames:\((\d+),(\d+)\)")
"""How the model is taught to say when, in numbers of the frames that it was shown."""

QUESTION = "{} Please respond with segmentation masks."
STATEMENT = "Can you segment {} in this video?"

NO_BOXES = "The frames that are shown lack boxes, so it is not scored; --check-data names them. Fetch the annotations again."

Measures = dict[str, float]
"""Metric to 0..1."""

Boxes = Mapping[int, Sequence[float]]
"""Number of a frame to xyxy in px."""


@dataclass(frozen=True)
class Query:
    """A sentence about a video.

    Args:
        key: of its sample.
        kind: interrogative or declarative.
        prompt: as it is sent.
        video: file.
        size: of its frames.
        frames: numbers of those that are shown, as the annotations count; ascending.
        first: number of the video's first frame.
        tube: numbers of the first frame that is annotated and of the one behind the last.
        target: what the boxes are found by.
    """

    key: str
    kind: str
    prompt: str
    video: Path
    size: Size
    frames: tuple[int, ...]
    first: int
    tube: tuple[int, int]
    target: tuple[str, str]

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(max(frame - self.first, 0) for frame in self.frames)

    @property
    def in_tube(self) -> list[bool]:
        """Per frame that is shown."""
        return [self.tube[0] <= frame < self.tube[1] for frame in self.frames]


class Grounding:
    """What both data sets share."""

    suite: str
    splits: tuple[str, ...]
    protocols = ("fixed", "original")
    options: Mapping[str, str | float | bool] = {"box_prior_max_keep": 1, "max_new_tokens": 512}

    videos: Path
    """Folder of the videos."""

    def __init__(self, root: Path, split: str) -> None:
        self.root, self.name, self.whole = root, split.removesuffix(WHOLE), split.endswith(WHOLE)

    @cached_property
    def queries(self) -> list[Query]:
        """Raises DatasetError where the annotations are not there."""
        raise NotImplementedError

    def files(self) -> Iterable[Path]:
        """Annotations beside those that `queries` reads."""
        return ()

    def boxes(self, query: Query) -> Boxes:
        raise NotImplementedError

    def notes(self) -> list[str]:
        """Lines about what is not as in the original."""
        return []

    @cached_property
    def by_video(self) -> dict[Path, list[Query]]:
        by_video = defaultdict(list)
        for query in self.queries:
            by_video[query.video].append(query)
        return by_video

    def samples(self) -> list[Sample]:
        check_whole(self.root, [*self.by_video, *self.files()])
        for note in self.notes():
            click.echo(note, err=True)
        unseen = sum(not any(query.in_tube) for query in self.queries)
        if unseen:
            click.echo(f"{unseen} of {len(self.queries)} tubes are shorter than the time between two frames and count as 0.", err=True)
        return [
            Sample(query.key, Clip(video=query.video, indices=query.indices, size=resized(query.size)), query.prompt, query.kind)
            for query in self.queries
        ]

    def problems(self) -> list[str]:
        try:
            if not self.queries:
                return [f"{self.root}: got no sentence, expected some. Fetch the annotations again."]
        except DatasetError as error:
            return [str(error)]
        if not self.videos.is_dir():
            return [missing(self.videos)]
        lines = [*self.notes(), *missing_files("videos", self.by_video), *missing_files("annotations", dict.fromkeys(self.files()))]
        for video, queries in tqdm(self.by_video.items(), unit="video"):
            if video.is_file():
                lines.append(video_problem(video, max(query.indices[-1] for query in queries) + 1, queries[0].size))
            lines += dict.fromkeys(map(self.missing_boxes, queries))
        return [line for line in lines if line]

    def missing_boxes(self, query: Query) -> str:
        """A line about frames of the tube that are shown and have no box; empty if there are none."""
        try:
            annotated = annotated_boxes(query, self.boxes(query))
        except DatasetError as error:
            return str(error) if Path(query.target[0]).is_file() else ""  # missing ones have a line already
        bare = [frame for frame, inside, box in zip(query.frames, query.in_tube, annotated, strict=True) if inside and np.isnan(box[0])]
        if not bare:
            return ""
        return (
            f"{query.video.stem}: no box of target {query.target[1]} on {len(bare)} of {sum(query.in_tube)} frames of a tube, the first "
            f"{bare[0]}. Fetch its annotations again if they should be there."
        )

    def score(self, predictions: Predictions, samples: Sequence[Sample], branches: Sequence[str], out: Path, protocol: str) -> Scores:
        """Writes <branch>_boxes.json: per sample its frames, the boxes of the answer and the annotated ones, in px of the video.

        A sentence without a prediction counts as 0 in `fixed`, and does not count in `original`.
        """
        answered = {sample.key: sample for sample in samples}
        rows: list[Row] = []
        measured = defaultdict(list)  # branch to kinds and measures
        written: dict[str, Row] = {branch: {} for branch in branches}
        queries = [query for own in self.by_video.values() for query in own]  # so that boxes are read once a video
        for query in tqdm(queries, unit="sentence", desc="scores"):
            if query.key not in answered:
                if protocol == "fixed":
                    for branch in branches:
                        measured[branch].append((query.kind, nothing(self.whole)))
                continue
            prediction = predictions(answered[query.key])
            check_frames(query, prediction)
            annotated = annotated_boxes(query, self.boxes(query))
            row: Row = {"sample": query.key, "prompt": query.prompt, "answer": prediction.answer, "kind": query.kind}
            for branch in branches:
                masks = np.stack([without_blobs(mask) for mask in prediction.masks(branch, 0)])
                predicted = predicted_boxes(masks, query.size, protocol)
                measure = fixed_measures if protocol == "fixed" else original_measures
                measures = measure(query, predicted, annotated, prediction.answer, self.whole)
                if measures is None:
                    row["failure" if protocol == "fixed" else "note"] = NO_BOXES
                else:
                    measured[branch].append((query.kind, measures))
                    row |= {f"{branch}_{name}": 100 * value for name, value in measures.items()}
                written[branch][query.key] = {
                    "frames": query.frames,
                    "boxes": listed(predicted),
                    "annotated": listed(annotated),
                }
            rows.append(row)
        for branch, boxes in written.items():
            (out / f"{branch}_boxes.json").write_text(json.dumps(boxes))
        return Scores(rows, [figure for branch in branches for figure in figures(branch, measured[branch])])


class VidStg(Grounding):
    """Sentences and questions about who or what does something in a video of VidOR (VidSTG)."""

    suite = "vidstg"
    splits = ("test", "val", f"test{WHOLE}", f"val{WHOLE}")

    def __init__(self, root: Path, split: str) -> None:
        super().__init__(root, split)
        folder = root / "vidstg"
        self.videos = folder / "video"
        self.sentences = folder / "vidstg_annotations" / f"{self.name}_annotations.json"
        self.vidor = folder / "vidor_annotations" / ("validation" if self.name == "test" else "training")
        self._read = lru_cache(1)(read_json)

    @cached_property
    def queries(self) -> list[Query]:
        annotations = read_json(self.sentences)
        if not self.vidor.is_dir():
            raise DatasetError(missing(self.vidor))
        groups = {path.stem: path.parent.name for path in self.vidor.glob("*/*.json")}
        queries: list[Query] = []
        with expected_fields(self.sentences):
            for annotation in annotations:
                queries += self._queries(annotation, groups.get(annotation["vid"], "*"), len(queries))
        return queries

    def _queries(self, annotation: Mapping[str, Any], group: str, count: int) -> list[Query]:
        """Its questions, then its statements; numbers go on behind those of earlier annotations."""
        start, end = (annotation["temporal_gt"][name] for name in ("begin_fid", "end_fid"))
        shown = annotation["used_segment" if self.whole else "temporal_gt"]
        asked = [("interrogative", QUESTION, entry) for entry in annotation["questions"]]
        asked += [("declarative", STATEMENT, entry) for entry in annotation["captions"]]
        frames = tuple(sampled(shown["begin_fid"], shown["end_fid"], annotation["fps"]))
        name = annotation["vid"]
        return [
            Query(
                f"{name}/{number}",
                kind,
                form.format(entry["description"]),
                self.videos / group / f"{name}.mp4",
                (annotation["height"], annotation["width"]),
                frames,
                0,
                (start, end),
                (str(self.vidor / group / f"{name}.json"), str(entry["target_id"])),
            )
            for number, (kind, form, entry) in enumerate(asked, count)
        ]

    def files(self) -> Iterable[Path]:
        return (Path(query.target[0]) for query in self.queries)

    def boxes(self, query: Query) -> Boxes:
        path, target = query.target
        content = self._read(Path(path))
        with expected_fields(Path(path)):
            return {
                number: [box["bbox"][side] for side in ("xmin", "ymin", "xmax", "ymax")]
                for number, boxes in enumerate(content["trajectories"])
                for box in boxes
                if str(box["tid"]) == target
            }


class HcStvg(Grounding):
    """What a person in a scene of a film does (HC-STVG, version 2)."""

    suite = "hc-stvg"
    splits = ("val", f"val{WHOLE}")

    def __init__(self, root: Path, split: str) -> None:
        super().__init__(root, split)
        folder = root / "hcstvg"
        self.videos, self.qa = folder / "Video", folder / "qa"
        self.sentences = folder / "anno_v2" / f"{self.name}_v2.json"

    @cached_property
    def _annotations(self) -> Mapping[str, Any]:
        annotations: Mapping[str, Any] = read_json(self.sentences)
        return annotations

    @cached_property
    def queries(self) -> list[Query]:
        files = {path.stem: path for path in sorted(self.videos.glob("*/*"))}
        with expected_fields(self.sentences):
            return [
                self._query(index, name, annotation, files.get(Path(name).stem, self.videos / "*" / name))
                for index, (name, annotation) in enumerate(self._annotations.items())
            ]

    def notes(self) -> list[str]:
        stated = sum(query.kind == "declarative" for query in self.queries)
        where = f"{self.qa}:" if self.qa.is_dir() else missing(self.qa)
        line = f"{where} {stated} of {len(self.queries)} videos have no question; their captions are asked instead, unlike in the original."
        return [line] if stated else []

    def _query(self, index: int, name: str, annotation: Mapping[str, Any], video: Path) -> Query:
        start, count = annotation["st_frame"], annotation["img_num"]
        end = start + len(annotation["bbox"])
        frames = sampled(0, count - 1, count / HC_STVG_S) if self.whole else sampled(start, end, count / HC_STVG_S)
        question = self._question(index)
        height, width = annotation["img_size"]
        return Query(
            f"{Path(name).stem}",
            "interrogative" if question else "declarative",
            QUESTION.format(question) if question else STATEMENT.format(annotation["English"]),
            video,
            (height, width),
            tuple(frames),
            1,
            (start, end),
            (str(self.sentences), name),
        )

    def _question(self, index: int) -> str:
        path = self.qa / f"{index}.json"
        if not path.is_file():
            return ""
        with expected_fields(path):
            content = read_json(path)
            return str(content["Q"]) if content["A"] else ""

    def boxes(self, query: Query) -> Boxes:
        with expected_fields(self.sentences):
            return {
                number: (x, y, x + width, y + height)
                for number, (x, y, width, height) in enumerate(self._annotations[query.target[1]]["bbox"], query.tube[0])
            }


def sampled(start: int, end: int, fps: float) -> list[int]:
    """Numbers of the frames to show: the first one, then the first of each second of the video; at most MAX_FRAMES, evenly thinned out."""
    numbers = np.arange(start, max(end, start + 1))
    seconds = (numbers * (SAMPLE_FPS / fps)).astype(int)
    frames = numbers[np.diff(seconds, prepend=-1) > 0]
    if len(frames) > MAX_FRAMES:
        frames = frames[np.arange(MAX_FRAMES) * len(frames) // MAX_FRAMES]
    return [int(frame) for frame in frames]


def resized(size: Size) -> Size:
    """What frames are resized to, the lengths cut to whole pixels."""
    short, long = min(size), max(size)
    side = SHORT_SIDE if long / short * SHORT_SIDE <= LONG_SIDE else round(LONG_SIDE * short / long)
    height, width = size
    return (int(side * height / width), side) if width < height else (side, int(side * width / height))


def annotated_boxes(query: Query, boxes: Boxes) -> Floats:
    """[T, 4] xyxy in px, within the frame; nan where the frame is not in the tube, or has no box or an empty one."""
    height, width = query.size
    annotated = np.full((len(query.frames), 4), np.nan)
    for index, (frame, inside) in enumerate(zip(query.frames, query.in_tube, strict=True)):
        if inside and frame in boxes:
            x1, y1, x2, y2 = np.clip(boxes[frame], 0, [width, height, width, height])
            if x1 < x2 and y1 < y2:
                annotated[index] = x1, y1, x2, y2
    return annotated


def predicted_boxes(masks: Masks, size: Size, protocol: str) -> Floats:
    """Tight boxes of masks, in px of the video; nan where there is no mask.

    Args:
        masks: [T, h, w] at the size that was shown.
        size: of the video's frames.
        protocol: `fixed` ends a box behind its last pixel, so that a mask as large as a box has its area; `original` ends it at that pixel.
    Returns:
        [T, 4] xyxy.
    """
    boxes = np.full((len(masks), 4), np.nan)
    end = 1 if protocol == "fixed" else 0
    for mask, box in zip(masks, boxes, strict=True):
        y, x = np.nonzero(mask)
        if len(x):
            box[:] = x.min(), y.min(), x.max() + end, y.max() + end
    (height, width), (shown_height, shown_width) = size, masks.shape[1:]
    scaled: Floats = boxes * np.array([width / shown_width, height / shown_height] * 2)
    return scaled


def box_ious(boxes: Floats, others: Floats) -> Floats:
    """IoU of each box with its counterpart, 0 where either is not there: two [T, 4] xyxy -> [T]."""
    overlap = np.maximum(np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2]), 0).prod(1)
    areas = [(own[:, 2:] - own[:, :2]).prod(1) for own in (boxes, others)]
    ious: Floats = np.nan_to_num(overlap / (areas[0] + areas[1] - overlap))
    return ious


def nothing(whole: bool) -> Measures:
    """Of a sentence that got no answer."""
    return with_levels({"gt_viou": 0.0, **({"m_viou": 0.0, "tiou": 0.0} if whole else {})})


def with_levels(measures: Measures) -> Measures:
    """And whether each vIoU is above the thresholds."""
    levels = {
        f"{name.removeprefix('m_')}@{threshold}": float(value > threshold)
        for name, value in measures.items()
        if name != "tiou"
        for threshold in THRESHOLDS
    }
    return {**measures, **levels}


def fixed_measures(query: Query, predicted: Floats, annotated: Floats, answer: str, whole: bool) -> Measures | None:
    """By the definition of the benchmarks, over the frames that are shown: both ends of a span belong to it, and an answer that does not
    say when says it with its masks.

    Args:
        predicted, annotated: [T, 4] boxes.
    Returns:
        None where the frames of the tube have no box at all; zeros where none of the frames that are shown is in the tube.
    """
    tube = ~np.isnan(annotated[:, 0])  # [T]
    if not tube.any():
        return None if any(query.in_tube) else nothing(whole)
    ious = box_ious(predicted, annotated)
    if not whole:
        return with_levels({"gt_viou": float(ious[tube].mean())})
    said = SPAN.search(answer)
    numbers = np.arange(len(tube))
    claimed = (int(said[1]) <= numbers) & (numbers <= int(said[2])) if said else ~np.isnan(predicted[:, 0])
    both, either = tube & claimed, (tube | claimed).sum()
    return with_levels(
        {"gt_viou": float(ious[tube].mean()), "m_viou": float(ious[both].sum() / either), "tiou": float(both.sum() / either)}
    )


def original_measures(query: Query, predicted: Floats, annotated: Floats, answer: str, whole: bool) -> Measures | None:
    """As the original's script computes: spans end before their last frame, and an answer that does not say when says (0, 0).

    Args:
        predicted, annotated: [T, 4] boxes.
    Returns:
        None where the script fails, which then skips the sample: a frame of the tube has no box.
    """
    inside = np.flatnonzero(query.in_tube)
    if np.isnan(annotated[inside]).any():
        return None
    ious = box_ious(predicted, annotated)
    measures = {"gt_viou": float(ious[inside].mean()) if len(inside) else 0.0}
    if whole:
        said = SPAN.search(answer)
        first, last = (int(said[1]), int(said[2])) if said else (0, 0)
        start, end = (int(inside[0]), int(inside[-1])) if len(inside) else (-100, -100)
        shared, spans = max(min(end, last) - max(start, first), 0), (end - start) + (last - first)
        numbers = np.arange(len(ious))
        both = (max(start, first) <= numbers) & (numbers < min(end, last))
        either = (min(start, first) <= numbers) & (numbers < max(end, last))
        measures["m_viou"] = float(ious[both].sum() / max(either.sum(), 1))
        measures["tiou"] = shared / (spans - shared) if shared else 0.0
    return with_levels(measures)


def figures(branch: str, measured: Sequence[tuple[str, Measures]]) -> list[Figure]:
    """Of all sentences and, where there are several, of each kind."""
    kinds = list(dict.fromkeys(kind for kind, _ in measured))
    return [
        Figure(f"{branch}_{name}", [100 * measures[name] for own, measures in measured if kind in ("", own)], workload=kind)
        for kind in ("", *(kinds if len(kinds) > 1 else ()))
        for name in (measured[0][1] if measured else ())
    ]


def missing_files(what: str, files: Iterable[Path]) -> list[str]:
    files = list(files)
    lost = [path for path in files if not path.is_file()]
    return [f"{len(lost)} of {len(files)} {what} are missing, the first {lost[0]}. Fetch them."] if lost else []


def check_frames(query: Query, prediction: Prediction) -> None:
    """Raises DatasetError where an answer is about other frames than those that are annotated."""
    expected = (len(query.frames), *resized(query.size))
    if prediction.size != expected:
        raise DatasetError(
            f"{query.key}: got an answer about frames {list(prediction.size)}, expected {list(expected)}. "
            "The data set changed since it was asked: choose another folder."
        )


def listed(boxes: Floats) -> list[list[float] | None]:
    return [None if np.isnan(box[0]) else [round(float(side), 2) for side in box] for box in boxes]
