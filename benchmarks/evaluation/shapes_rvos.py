"""Our own moving shapes, written by `python -m training.shapes_rvos`, and what a small model has to get right about them.

ROOT/<split>/videos/<name>.mp4
ROOT/<split>/Annotations/<name>/<frame>.png     palette picture; index: the object's id, 0: none
ROOT/<split>/meta_expressions.json              video to its frames and expressions, as in Ref-DAVIS 2017
ROOT/<split>/questions.json                     video to its questions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sparrow_client._media import MediaError
from tqdm import tqdm

from ensemble.masks import tight_boxes

from .annotations import read_json
from .clips import read_frames
from .davis import Score, region_similarity, score
from .palettes import check_size, read_palettes
from .samples import Clip, DatasetError, Figure, Floats, Masks, Predictions, Row, Sample, Scores

SEG_ALONE = "seg_alone"
"""Kind of a referring question that is asked once more without detection guidance, so that [SEG] alone says what is meant."""

HIDDEN = 0.5
"""Part of what the first frame shows of an object, below which it is hidden."""
OVERLAP = 0.5
"""Least IoU at which a mask or a box counts as an object's."""

RECALL_PROPOSALS = 100


@dataclass(frozen=True)
class Video:
    """A video with its annotations.

    Args:
        name: of its files.
        path: the video.
        annotations: a palette picture per frame.
        samples: the questions about it; kind: referring, description, absent or SEG_ALONE.
        objects: of each question, ids of the annotated objects that it asks for.
    """

    name: str
    path: Path
    annotations: tuple[Path, ...]
    samples: tuple[Sample, ...]
    objects: tuple[tuple[int, ...], ...]

    def annotated(self) -> NDArray[np.uint8]:
        """[T, H, W]: the id of the object that each pixel shows, 0: none; raises DatasetError."""
        return read_palettes(self.annotations)


class ShapesRvos:
    """Moving shapes, which the nano model is trained on: which one is meant, where it goes, and what is not there."""

    suite = "shapes-rvos"
    splits = ("test", "valid", "train")
    protocols = ("fixed",)
    options: Mapping[str, str | float | bool] = {}
    arguments: Mapping[str, Mapping[str, Any]] = {
        "ablations": {"is_flag": True, "help": "Also ask the referring questions without detection guidance."}
    }

    def __init__(self, root: Path, split: str, ablations: bool = False) -> None:
        self.folder, self.ablations = root / split, ablations

    @cached_property
    def videos(self) -> list[Video]:
        """Raises DatasetError where something is missing."""
        names = ("meta_expressions.json", "questions.json")
        expressions, questions = (read_json(self.folder / name) for name in names)
        videos = [self.video(name, entry["frames"], questions.get(name, [])) for name, entry in expressions["videos"].items()]
        files = [path for video in videos for path in (video.path, *video.annotations)]
        missing = [str(path) for path in files if not path.exists()]
        missing += [f"questions about {video.name}" for video in videos if not video.samples]
        if missing or not videos:
            raise DatasetError(
                f"{self.folder}: got {len(videos)} videos with {len(missing)} parts missing (first: {missing[:1]}), "
                "expected a whole data set. Write or copy it again."
            )
        return videos

    def video(self, name: str, frames: Sequence[str], questions: Sequence[Mapping[str, Any]]) -> Video:
        path = self.folder / "videos" / f"{name}.mp4"
        clip = Clip(video=path)
        asked = [(f"{name}/{index}", entry["kind"], entry, {"proposal_debug": True}) for index, entry in enumerate(questions)]
        if self.ablations:
            alone = {"detection_guidance": False}
            asked += [(f"{key}_{SEG_ALONE}", SEG_ALONE, entry, alone) for key, kind, entry, _ in asked if kind == "referring"]
        return Video(
            name,
            path,
            tuple(self.folder / "Annotations" / name / f"{frame}.png" for frame in frames),
            tuple(Sample(key, clip, entry["prompt"], kind, options) for key, kind, entry, options in asked),
            tuple(tuple(entry["objects"]) for _, _, entry, _ in asked),
        )

    def samples(self) -> list[Sample]:
        return [sample for video in self.videos for sample in video.samples]

    def problems(self) -> list[str]:
        try:
            videos = self.videos
        except DatasetError as error:
            return [str(error)]
        found = []
        for video in tqdm(videos, unit="video"):
            try:
                check_size(str(video.path), read_frames(video.samples[0].clip).shape[:3], video.annotated().shape)
            except (DatasetError, MediaError) as error:
                found.append(str(error))
        return found

    def score(self, predictions: Predictions, samples: Sequence[Sample], branches: Sequence[str], out: Path, protocol: str) -> Scores:
        keys = {sample.key for sample in samples}
        rows: list[Row] = []
        covered: list[float] = []
        for video in tqdm(self.videos, unit="video", desc="scores"):
            annotated, proposals = video.annotated(), None
            for sample, objects in zip(video.samples, video.objects, strict=True):
                if sample.key not in keys:
                    continue
                prediction = predictions(sample)
                check_size(f"prediction of {sample.key}", prediction.size, annotated.shape)
                tracks = {
                    branch: np.array([prediction.masks(branch, i) for i in range(prediction.num_objects)]).reshape(-1, *annotated.shape)
                    for branch in branches
                }
                row = {"sample": sample.key, "prompt": sample.prompt, "answer": prediction.answer, "kind": sample.kind}
                rows.append({**row, **measures(sample.kind, tracks, annotated, objects)})
                if sample.kind != SEG_ALONE:
                    proposals = prediction.proposals  # of the first frame: the same whatever is asked
            if proposals is not None:
                covered += [100.0 * hit for hit in covered_objects(proposals, annotated[0])]
        return Scores(rows, self.figures(rows, covered, branches))

    def figures(self, rows: Sequence[Row], covered: Sequence[float], branches: Sequence[str]) -> list[Figure]:
        """Means over the questions of a kind, or over the objects that proposals should cover."""
        kinds = [
            *((f"{branch}_j_and_f", "referring", f"{branch}_j_and_f") for branch in branches),
            ("right_object_pct", "referring", "right_object"),
            ("absent_no_mask_pct", "absent", "no_mask"),
            ("multi_phrase_j_and_f", "description", f"{branches[0]}_j_and_f"),
        ]
        workload = f"{len(self.videos)}_videos"
        figures = [Figure(name, [row[column] for row in rows if row["kind"] == kind], "%", workload) for name, kind, column in kinds]
        figures.append(Figure("proposal_recall100_pct", covered, "%", workload))
        if self.ablations:
            # What says where the object is; on the first frame nothing else is known.
            for name, kind in (("box_and_seg", "referring"), ("seg_alone", SEG_ALONE)):
                values = [row["first_frame_j"] for row in rows if row["kind"] == kind]
                figures.append(Figure("first_frame_j", values, "%", f"{workload}_{name}"))
            # What memory is for: objects that go behind others or out of the frame.
            for name, hidden in (("occluded", 100.0), ("in_sight", 0.0)):
                own = [row for row in rows if row["kind"] == "referring" and row["hidden"] == hidden]
                for branch in branches:
                    figures.append(Figure(f"{branch}_j_and_f", [row[f"{branch}_j_and_f"] for row in own], "%", f"{workload}_{name}"))
        return figures


def measures(kind: str, tracks: Mapping[str, Masks], annotated: NDArray[np.uint8], objects: Sequence[int]) -> Row:
    """What report.csv says of an answer.

    Args:
        kind: of question; decides what there is to measure.
        tracks: branch to [O, T, H, W]; the first branch says if the right object was found.
        annotated: [T, H, W] object ids.
        objects: ids of those that are asked for.
    """
    if kind == "absent":
        return {"no_mask": 100.0 * (not any(map(len, tracks.values())))}
    wanted = annotated == np.array(objects)[:, None, None, None]  # [A, T, H, W]
    if kind == "description":
        return percentages({branch: matched_score(own, wanted) for branch, own in tracks.items()})
    named = {branch: own[0] if len(own) else np.zeros_like(wanted[0]) for branch, own in tracks.items()}
    first_frame = next(iter(named.values()))[0]
    return {
        **percentages({branch: score(masks, wanted[0]) for branch, masks in named.items()}),
        "first_frame_j": 100 * float(region_similarity(first_frame[None], wanted[0, :1])[0]),
        "right_object": 100.0 * is_right_object(first_frame, annotated[0], objects[0]),
        "hidden": 100.0 * is_hidden(wanted[0]),
    }


def is_hidden(shown: Masks) -> bool:
    """Whether less than HIDDEN of what the first frame shows of an object is in sight on some frame; `shown` [T, H, W]."""
    areas = shown.sum((1, 2))
    return bool(areas.min() < HIDDEN * areas[0])


def percentages(scores: Mapping[str, Score]) -> Row:
    """J, F and J&F of each branch."""
    return {f"{branch}_{name}": 100 * getattr(own, name) for branch, own in scores.items() for name in ("j", "f", "j_and_f")}


def matched_score(tracks: Masks, wanted: Masks) -> Score:
    """Means over the wanted objects, [A, T, H, W], each with the track, of [P, T, H, W], that suits all best; 0 without one."""
    scores = [[score(track, masks) for masks in wanted] for track in tracks]
    table = np.array([[entry.j_and_f for entry in row] for row in scores]).reshape(len(tracks), len(wanted))
    chosen = [scores[track][object_] for track, object_ in zip(*linear_sum_assignment(table, maximize=True), strict=True)]
    return Score(sum(entry.j for entry in chosen) / len(wanted), sum(entry.f for entry in chosen) / len(wanted))


def is_right_object(mask: NDArray[np.bool_], annotated: NDArray[np.uint8], object_id: int) -> bool:
    """Whether a mask covers this object, and no other one as well: [H, W] and [H, W] ids."""
    ids = np.unique(annotated[annotated > 0])
    ious = region_similarity(mask[None], annotated == ids[:, None, None])  # [O]
    own, others = ious[ids == object_id], ious[ids != object_id]
    return bool((own >= OVERLAP).any() and (others < own).all())


def covered_objects(proposals: NDArray[np.float32], annotated: NDArray[np.uint8]) -> list[bool]:
    """Whether the box of each object on a frame is among its proposals: [P, 4] xyxy, normalised, best first; [H, W] ids."""
    height, width = annotated.shape
    ids = np.unique(annotated[annotated > 0])
    boxes = tight_boxes(annotated == ids[:, None, None]) / np.array([width, height, width, height])  # [O, 4]
    best = box_ious(boxes, proposals[:RECALL_PROPOSALS]).max(1, initial=0)
    return [bool(iou >= OVERLAP) for iou in best]


def box_ious(boxes: Floats, others: NDArray[np.floating[Any]]) -> Floats:
    """[O, 4] and [P, 4] xyxy -> [O, P]."""
    one, two = boxes[:, None], others[None]
    overlap = np.maximum(np.minimum(one[..., 2:], two[..., 2:]) - np.maximum(one[..., :2], two[..., :2]), 0).prod(2)
    area_one, area_two = ((own[..., 2:] - own[..., :2]).prod(2) for own in (one, two))
    ious: Floats = overlap / (area_one + area_two - overlap)
    return ious
