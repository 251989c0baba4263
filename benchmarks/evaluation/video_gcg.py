"""VideoGCG: a description of a video whose phrases carry masks, as VideoGLaMM and SPARROW evaluate it.

ROOT is their folder `video_dataset`. What is read of it, one part after the other, each in sorted order (the original takes the latter two
in the order of the directory, which is another on every disk, so its sample numbers name other videos than ours):

burst-ytvis   video_gcg/instruction_data/test.json                          videos with captions, masks as RLE
              burst/frames/val/<file name>, ytvis/vos/train/JPEGImages/<file name>
mevis         mevis_gcg/valid_u/<video>.json                                 {"caption": "A [black dog](1) chases [two cats](2, 3)."}
              mevis/valid_u/{meta_expressions.json,mask_dict.json}           object ids to masks
              mevis/valid_u/JPEGImages/<video>/<frame>.jpg
vidstg        vidstg_gcg/val_captions/<video>.json                           as those of mevis
              vidstg_gcg/val/<video>/frames/<frame>.png
              vidstg_gcg/val/<video>/masks/<object, three digits>/<frame>.png   0 or 255

The training parts, and HC-STVG-GCG, YTVOS-GCG and ANet-GCG, are not read: the original trains on them and does not evaluate them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from pycocotools import mask as coco
from sparrow_client._media import IMAGE_SUFFIXES, read_mask
from tqdm import tqdm

from .annotations import Mask, Size, check_whole, expected_fields, missing, picture_problems, read_json, without_blobs
from .captions import (
    SCORED_CHARACTERS,
    PhraseSimilarity,
    caption_scores,
    clean,
    original_clean,
    original_phrases,
    original_text,
)
from .clips import picture_size
from .samples import Clip, DatasetError, Figure, Floats, Prediction, Predictions, Row, Sample, Scores

PROMPT = (
    "Could you please give me a detailed description of the video? "
    "Please respond with interleaved segmentation masks for the corresponding parts of the answer."
)
OVERLAP = 0.5
"""Least IoU of a phrase's masks that are found."""

LIKENESS = 0.5
"""Least similarity of its words."""

Track = list[dict[str, Any] | None]
"""Masks of an object: COCO's RLE of each frame, None where it shows nothing."""

Similarity = Callable[[str, str], float]

BERT = "SPARROW_BERT"
"""Environment variable that names the folder of bert-base-uncased."""

NO_PHRASE = "has no caption with phrases"

LINKED = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")
"""A phrase of a caption and the ids of what it names."""


@dataclass(frozen=True)
class Entry:
    """A video with its annotated description.

    Args:
        part: of the data set.
        name: of the video.
        frames: all of it.
        caption: with a phrase marked as "<p> phrase </p> [SEG]", as the model is taught to write it.
        phrases: of the caption.
        objects: per phrase the ids of what it names.
        fault: why it cannot be used; empty if it can.
    """

    part: str
    name: str
    frames: tuple[Path, ...] = ()
    caption: str = ""
    phrases: tuple[str, ...] = ()
    objects: tuple[tuple[str, ...], ...] = ()
    fault: str = ""


class Part:
    """One of the data sets that VideoGCG is made of."""

    name: str
    folders: tuple[Path, ...]
    """Of frames."""

    @cached_property
    def entries(self) -> list[Entry]:
        """Raises DatasetError where the annotations are not there."""
        raise NotImplementedError

    def mask_files(self, entry: Entry) -> Iterable[Path]:
        """Files of the annotated masks, where each is a file."""
        return ()

    def tracks(self, entry: Entry, protocol: str) -> list[Track]:
        """The annotated masks of each phrase."""
        raise NotImplementedError


class BurstYtvis(Part):
    """Videos of BURST and YouTube-VIS 2019, described in one file."""

    name = "burst-ytvis"

    def __init__(self, root: Path) -> None:
        self.path = root / "video_gcg" / "instruction_data" / "test.json"
        self.folders = self.burst, self.ytvis = root / "burst" / "frames" / "val", root / "ytvis" / "vos" / "train" / "JPEGImages"

    @cached_property
    def _content(self) -> Mapping[str, Any]:
        content: Mapping[str, Any] = read_json(self.path)
        return content

    @cached_property
    def _segmentations(self) -> dict[str, list[Any]]:
        return {str(annotation["id"]): annotation["segmentations"] for annotation in self._content["annotations"]}

    @cached_property
    def entries(self) -> list[Entry]:
        with expected_fields(self.path):
            return [self._entry(f"{index:06d}", video) for index, video in enumerate(self._content["videos"])]

    def _entry(self, name: str, video: Mapping[str, Any]) -> Entry:
        split = (video.get("metadata") or {}).get("dataset") or video.get("dataset_split")
        frames = tuple((self.ytvis if split == "yt19" else self.burst) / file for file in video["file_names"])
        described = video.get("dense_cap") or {}
        words = (described.get("caption") or "").split(" ")
        objects = defaultdict(list)  # position of a word to ids
        for position, one in zip(described.get("token_pos") or (), described.get("mask_id") or (), strict=False):
            objects[position].append(str(one))
        marked = [f"<p> {word} </p> [SEG]" if position in objects else word for position, word in enumerate(words)]
        outside = sorted(position for position in objects if not 0 <= position < len(words))
        ids = {position: tuple(objects[position]) for position in sorted(objects) if position not in outside}
        entry = Entry(self.name, name, frames, " ".join(marked), tuple(words[position].strip() for position in ids), tuple(ids.values()))
        if outside:
            return replace(entry, fault=f"names a mask at word {outside[0]} of a caption of {len(words)} words")
        return replace(entry, fault=fault_of(entry, self._segmentations))

    def tracks(self, entry: Entry, protocol: str) -> list[Track]:
        return [united([self._segmentations[one] for one in ids]) for ids in entry.objects]


class LinkedPart(Part):
    """A part whose captions are files of their own and link their phrases to ids.

    Args:
        captions: folder of them.
    """

    def __init__(self, captions: Path) -> None:
        self.captions = captions

    @cached_property
    def entries(self) -> list[Entry]:
        if not self.captions.is_dir():
            raise DatasetError(missing(self.captions))
        with expected_fields(self.captions):
            return [self._entry(path) for path in sorted(self.captions.glob("*.json"))]

    def _entry(self, path: Path) -> Entry:
        caption = read_json(path)["caption"] or ""
        links = LINKED.findall(caption)
        entry = Entry(
            self.name,
            path.stem,
            self.frames(path.stem),
            LINKED.sub(r"<p> \1 </p> [SEG]", caption),
            tuple(phrase.strip() for phrase, _ in links),
            tuple(tuple(re.findall(r"\d+", ids)) for _, ids in links),
        )
        fault = "links a phrase to no object" if not all(entry.objects) else self.fault(entry)
        return replace(entry, fault=fault)

    def frames(self, video: str) -> tuple[Path, ...]:
        raise NotImplementedError

    def fault(self, entry: Entry) -> str:
        raise NotImplementedError


class Mevis(LinkedPart):
    """Videos of MeViS."""

    name = "mevis"

    def __init__(self, root: Path) -> None:
        super().__init__(root / "mevis_gcg" / "valid_u")
        self.folder = root / "mevis" / "valid_u"
        self.folders = (self.folder / "JPEGImages",)

    @cached_property
    def _videos(self) -> Mapping[str, Any]:
        videos: Mapping[str, Any] = read_json(self.folder / "meta_expressions.json")["videos"]
        return videos

    @cached_property
    def _segmentations(self) -> Mapping[str, list[Any]]:
        segmentations: Mapping[str, list[Any]] = read_json(self.folder / "mask_dict.json")
        return segmentations

    def frames(self, video: str) -> tuple[Path, ...]:
        names = sorted(self._videos.get(video, {}).get("frames", []))
        return tuple(self.folder / "JPEGImages" / video / f"{name}.jpg" for name in names)

    def _own_segmentations(self, video: str) -> dict[str, list[Any]]:
        """Of each object that an expression about the video is about."""
        expressions = self._videos[video]["expressions"].values()
        masks = {str(one): str(mask) for entry in expressions for one, mask in zip(entry["obj_id"], entry["anno_id"], strict=False)}
        return {one: self._segmentations.get(mask, []) for one, mask in masks.items()}

    def fault(self, entry: Entry) -> str:
        if entry.name not in self._videos:
            return f"is not in {self.folder / 'meta_expressions.json'}"
        return fault_of(entry, self._own_segmentations(entry.name))

    def tracks(self, entry: Entry, protocol: str) -> list[Track]:
        own = self._own_segmentations(entry.name)
        return [united([own[one] for one in ids]) for ids in entry.objects]


class VidStgGcg(LinkedPart):
    """Videos of VidSTG; where a phrase names several objects, `original` takes the first alone."""

    name = "vidstg"

    def __init__(self, root: Path) -> None:
        super().__init__(root / "vidstg_gcg" / "val_captions")
        self.folder = root / "vidstg_gcg" / "val"
        self.folders = (self.folder,)

    def frames(self, video: str) -> tuple[Path, ...]:
        folder = self.folder / video / "frames"
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
        return tuple(found) or (folder / "000000.png",)  # so that it counts as missing

    def fault(self, entry: Entry) -> str:
        return "" if entry.phrases else NO_PHRASE

    def _masks_of(self, entry: Entry, one: str) -> list[Path]:
        return [self.folder / entry.name / "masks" / one.zfill(3) / path.name for path in entry.frames]

    def mask_files(self, entry: Entry) -> Iterable[Path]:
        return (path for ids in entry.objects for one in ids for path in self._masks_of(entry, one))

    def tracks(self, entry: Entry, protocol: str) -> list[Track]:
        taken = 1 if protocol == "original" else None
        return [united([encoded(map(read_mask, self._masks_of(entry, one))) for one in ids[:taken]]) for ids in entry.objects]


PARTS = {part.name: part for part in (BurstYtvis, Mevis, VidStgGcg)}


def fault_of(entry: Entry, segmentations: Mapping[str, Sequence[Any]]) -> str:
    """Why an entry cannot be used whose phrases name these masks."""
    if not entry.phrases:
        return NO_PHRASE
    for one in (one for ids in entry.objects for one in ids):
        if len(segmentations.get(one, ())) != len(entry.frames):
            return f"has {len(segmentations.get(one, ()))} masks of object {one}, expected one for each of its {len(entry.frames)} frames"
    return ""


class VideoGcg:
    """Descriptions of videos whose phrases carry masks: masks, phrases and captions (VideoGCG of VideoGLaMM and SPARROW)."""

    suite = "video-gcg"
    splits = ("all", *PARTS)
    protocols = ("fixed", "original")
    options: Mapping[str, str | float | bool] = {"box_prior_max_keep": 1, "max_new_tokens": 512}
    arguments: Mapping[str, Mapping[str, Any]] = {
        "bert": {
            "type": click.Path(path_type=Path, exists=True, file_okay=False),
            "envvar": BERT,
            "show_envvar": True,
            "help": "Folder of bert-base-uncased, by which phrases are compared; without it there is no recall.",
        }
    }

    def __init__(self, root: Path, split: str, bert: Path | None = None) -> None:
        """`bert`: folder of bert-base-uncased, by which phrases are compared; None: $SPARROW_BERT; without either there is no recall."""
        self.root, self.split = root, split
        self.parts: dict[str, Part] = {name: kind(root) for name, kind in PARTS.items() if split in ("all", name)}
        folder = bert or (Path(os.environ[BERT]) if os.environ.get(BERT) else None)
        self.alike = PhraseSimilarity(folder) if folder else None

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Key to what can be used."""
        return {f"{entry.part}/{entry.name}": entry for part in self.parts.values() for entry in part.entries if not entry.fault}

    def samples(self) -> list[Sample]:
        left_out = [entry for part in self.parts.values() for entry in part.entries if entry.fault]
        check_whole(self.root, (path for entry in self.entries.values() for path in (*entry.frames, *self._part(entry).mask_files(entry))))
        if left_out:
            first = f"{left_out[0].part}/{left_out[0].name} {left_out[0].fault}"
            click.echo(f"{len(left_out)} videos cannot be used and are left out: {first}. --check-data names all.", err=True)
        return [Sample(key, Clip(entry.frames), PROMPT, "description") for key, entry in self.entries.items()]

    def _part(self, entry: Entry) -> Part:
        return self.parts[entry.part]

    def problems(self) -> list[str]:
        lines = []
        for part in self.parts.values():
            try:
                entries = part.entries
            except DatasetError as error:
                lines.append(str(error))
                continue
            lines += [missing(folder) for folder in part.folders if not folder.is_dir()]
            if not entries:
                lines.append(f"{part.name}: got no video, expected some. Fetch the data set again.")
            elif all(folder.is_dir() for folder in part.folders):
                lines += [line for entry in tqdm(entries, unit="video", desc=part.name) for line in self._problems(part, entry)]
        return lines

    def _problems(self, part: Part, entry: Entry) -> list[str]:
        who = f"{entry.part}/{entry.name}"
        if entry.fault:
            return [f"{who}: {entry.fault}. It is left out; fetch its annotations again if they should be there."]
        lines = picture_problems(who, entry.frames)
        files = list(dict.fromkeys(part.mask_files(entry)))
        lines += picture_problems(f"{who}, masks", files)
        if lines:
            return lines
        size = picture_size(entry.frames[0])
        for phrase, track in zip(entry.phrases, part.tracks(entry, "fixed"), strict=True):
            sizes = {tuple(mask["size"]) for mask in track if mask}
            if not sizes:
                lines.append(f"{who}: {phrase!r} has no mask on any frame. Fetch its annotations again.")
            elif sizes != {size}:
                height, width = next(iter(sizes - {size}))
                lines.append(f"{who}: {phrase!r} has masks of {width}x{height} px, frames are {size[1]}x{size[0]}. Fetch both again.")
        return lines

    def score(self, predictions: Predictions, samples: Sequence[Sample], branches: Sequence[str], out: Path, protocol: str) -> Scores:
        """Writes <branch>/video_gcg/<number of the sample>/ as the original does: res.json, img_frames/, gt_masks_<n>/ and pred_masks_<n>/;
        frames are links. A video without a prediction counts as one without masks.
        """
        answered = {sample.key: sample for sample in samples}
        rows, outcomes, captions, references = [], defaultdict(list), [], []
        for number, (key, entry) in enumerate(tqdm(self.entries.items(), unit="video", desc="scores")):
            if key not in answered:
                for branch in branches:
                    outcomes[branch].append(unanswered(entry, protocol))
                captions.append("")
                references.append("" if protocol == "original" else clean(entry.caption))
                continue
            prediction = predictions(answered[key])
            texts = Texts.of(entry, prediction, protocol)
            annotated = self._part(entry).tracks(entry, protocol)
            check_sizes(key, annotated, prediction)
            row: Row = {"sample": key, "prompt": prediction.prompt, "answer": prediction.answer, "kind": "description"}
            for branch in branches:
                predicted = [predicted_track(prediction, branch, index) for index in range(prediction.num_objects)]
                outcome = compare(entry, annotated, predicted, texts, self.alike, protocol)
                outcomes[branch].append(outcome)
                row[f"{branch}_miou"] = 100 * outcome.mious[0]
                row[f"{branch}_found"] = f"{sum(outcome.hits):.0f} of {len(entry.phrases)}" if self.alike else ""
                folder = out / branch / "video_gcg" / f"{number:06d}"
                write_result(folder, entry, texts, {"gt": annotated, "pred": predicted}, prediction.size[1:])
            emptied = any(outcomes[branch][-1].broken for branch in branches)
            captions.append("" if emptied else texts.caption)
            references.append(texts.reference)
            rows.append(row)
        if not self.alike:
            click.echo(f"Recall is left out: it compares phrases by BERT. Give its folder with --bert or ${BERT}.", err=True)
        cut = SCORED_CHARACTERS if protocol == "original" else None
        scores = caption_scores([text[:cut] for text in references], [text[:cut] for text in captions])
        figures = [figure for branch in branches for figure in self._figures(branch, outcomes[branch])]
        return Scores(rows, [*figures, *(Figure(name, values) for name, values in scores.items())])

    def _figures(self, branch: str, outcomes: Sequence[Outcome]) -> list[Figure]:
        """Of all videos and, where there are several, of each part."""
        figures = []
        for part in ("", *(self.parts if len(self.parts) > 1 else ())):
            own = [outcome for outcome in outcomes if part in ("", outcome.part)]
            figures.append(Figure(f"{branch}_miou", [100 * value for outcome in own for value in outcome.mious], workload=part))
            if self.alike:
                figures.append(Figure(f"{branch}_recall", [100 * hit for outcome in own for hit in outcome.hits], workload=part))
        return [figure for figure in figures if len(figure.samples)]


@dataclass(frozen=True)
class Outcome:
    """What an answer comes to.

    Args:
        part: of the data set.
        mious: one value, 0..1; where the original's script stumbles, a second one that it adds, 0.
        hits: per annotated phrase 1 if it is found, else 0; where it stumbles, each phrase twice, none of them found.
        broken: whether it stumbles; it then takes the caption for empty, too.
    """

    part: str
    mious: tuple[float, ...]
    hits: tuple[float, ...]
    broken: bool = False


@dataclass(frozen=True)
class Texts:
    """What is compared and kept of two texts.

    Args:
        answer: what counts as the answer's text.
        caption, reference: the words of the answer and of the annotated description.
        phrases: of the answer; in `fixed` one per mask, in `original` those it marks, in their order.
    """

    answer: str
    caption: str
    reference: str
    phrases: tuple[str, ...]

    @classmethod
    def of(cls, entry: Entry, prediction: Prediction, protocol: str) -> Texts:
        if protocol == "fixed":
            return cls(prediction.answer, clean(prediction.answer), clean(entry.caption), tuple(prediction.phrases))
        text = original_text(prediction.prompt, prediction.answer)
        return cls(text, original_clean(text), original_clean(entry.caption), tuple(original_phrases(text)))


def unanswered(entry: Entry, protocol: str) -> Outcome:
    """Of a video without a prediction; the original forgets its phrases."""
    return Outcome(entry.part, (0.0,), () if protocol == "original" else (0.0,) * len(entry.phrases))


def compare(entry: Entry, annotated: list[Track], predicted: list[Track], texts: Texts, alike: Similarity | None, protocol: str) -> Outcome:
    """Masks and phrases of an answer with the annotated ones."""
    if protocol == "fixed":
        table = iou_table(annotated, predicted)
        hits = found(table, entry.phrases, texts.phrases, alike) if alike else 0
        return Outcome(entry.part, (mean_iou(table),), (1.0,) * hits + (0.0,) * (len(annotated) - hits))
    # The original reads the masks from folders in the order of their names as text: 10 comes before 2.
    annotated, predicted = ([own[index] for index in sorted(range(len(own)), key=str)] for own in (annotated, predicted))
    table = iou_table(annotated, predicted)
    miou = original_mean_iou(table)
    try:
        hits = original_found(table, entry.phrases, texts.phrases, alike) if alike else 0
    except IndexError:
        return Outcome(entry.part, (miou, 0.0), (0.0,) * (2 * len(entry.phrases)), broken=True)
    return Outcome(entry.part, (miou,), (1.0,) * hits + (0.0,) * (len(entry.phrases) - hits))


def iou_table(annotated: Sequence[Track], predicted: Sequence[Track]) -> Floats:
    """[G, P]: IoU over space and time, 1 where both show nothing."""
    return np.array([[track_iou(one, other) for other in predicted] for one in annotated]).reshape(len(annotated), len(predicted))


def track_iou(one: Track, other: Track) -> float:
    intersection = union = 0
    for mine, theirs in zip(one, other, strict=True):
        shown = [mask for mask in (mine, theirs) if mask]
        if len(shown) == 2:
            intersection += int(coco.area(coco.merge(shown, intersect=True)))
        if shown:
            union += int(coco.area(coco.merge(shown)))
    return intersection / union if union else 1.0


def best_pairs(table: Floats) -> list[tuple[int, int]]:
    """The pair that overlaps most, then the best one of the rest, and so on while any overlaps."""
    left, pairs = table.copy(), []
    while left.size and left.max() > 0:
        row, column = divmod(int(left.argmax()), left.shape[1])
        pairs.append((row, column))
        left[row], left[:, column] = 0, 0
    return pairs


def mean_iou(table: Floats) -> float:
    """Over annotated phrases and masks paired off, [G, P]; what is left without a partner counts as 0."""
    if not max(table.shape):
        return 1.0
    return float(sum(table[pair] for pair in best_pairs(table)) / max(table.shape))


def original_mean_iou(table: Floats) -> float:
    """Over the pairs alone: what was missed or made up does not count."""
    pairs = best_pairs(table)
    return float(sum(table[pair] for pair in pairs) / len(pairs)) if pairs else 0.0


def found(table: Floats, phrases: Sequence[str], named: Sequence[str], alike: Similarity) -> int:
    """Annotated phrases, of [G, P] IoUs, that have a mask of their own which overlaps and is named alike."""
    fits = np.zeros_like(table)
    for row, column in np.argwhere(table >= OVERLAP):
        fits[row, column] = alike(phrases[row], named[column]) >= LIKENESS
    return len(best_pairs(table * fits))


def original_found(table: Floats, phrases: Sequence[str], named: Sequence[str], alike: Similarity) -> int:
    """The same, but the search ends with the first pair that overlaps too little or is named otherwise.

    Raises:
        IndexError: a mask overlaps for which there is no phrase.
    """
    count = 0
    for row, column in best_pairs(table):
        if table[row, column] < OVERLAP or alike(phrases[row], named[column]) < LIKENESS:
            break
        count += 1
    return count


def united(segmentations: Sequence[Sequence[Any]]) -> Track:
    """What any of several objects shows, of their RLEs per frame, compressed or not."""
    return [union_of([compressed(mask) for mask in masks if mask]) for masks in zip(*segmentations, strict=True)]


def union_of(masks: list[Any]) -> dict[str, Any] | None:
    merged: dict[str, Any] | None = coco.merge(masks) if masks else None
    return merged if merged and coco.area(merged) else None


def compressed(mask: dict[str, Any]) -> Any:
    return coco.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask


def encoded(masks: Iterable[Mask]) -> Track:
    """T of [H, W]"""
    return [coco.encode(np.asfortranarray(mask, np.uint8)) if mask.any() else None for mask in masks]


def predicted_track(prediction: Prediction, branch: str, index: int) -> Track:
    """The masks of an object of the answer, without blobs; one is unpacked at a time."""
    return encoded(without_blobs(prediction.mask(branch, index, frame)) for frame in range(prediction.size[0]))


def check_sizes(key: str, annotated: Sequence[Track], prediction: Prediction) -> None:
    """Raises DatasetError where the annotated masks are of other frames than those of the answer."""
    num_frames, height, width = prediction.size
    for track in annotated:
        for got in [[len(track), *mask["size"]] for mask in track if mask] or [[len(track), height, width]]:
            if got != [num_frames, height, width]:
                raise DatasetError(
                    f"{key}: got annotated masks {got}, expected {[num_frames, height, width]} as the frames of the answer. "
                    "--check-data names what does not fit; fetch frames and annotations again."
                )


def write_result(folder: Path, entry: Entry, texts: Texts, tracks: Mapping[str, Sequence[Track]], size: Size) -> None:
    """What the original's scripts keep of a video, and read again."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "img_frames").mkdir(parents=True)
    for index, path in enumerate(entry.frames):
        (folder / "img_frames" / f"frame_{index}.jpg").symlink_to(path.resolve())
    for name, own in tracks.items():
        for number, track in enumerate(own):
            (folder / f"{name}_masks_{number}").mkdir()
            for index, mask in enumerate(track):
                shown = coco.decode(mask) * 255 if mask else np.zeros(size, np.uint8)
                Image.fromarray(shown).save(folder / f"{name}_masks_{number}" / f"mask_{index}.png", compress_level=1)
    fields = {
        "gt_text": entry.caption,
        "gt_text_cleaned": texts.reference,
        "gt_phrases": entry.phrases,
        "pred_text": texts.answer,
        "pred_text_cleaned": texts.caption,
        "pred_phrases": texts.phrases,
    }
    (folder / "res.json").write_text(json.dumps(fields))
