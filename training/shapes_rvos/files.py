"""Scenes as a data set in the layout of Ref-DAVIS 2017.

FOLDER/videos/<name>.mp4                    H.264
FOLDER/Annotations/<name>/<frame>.png       palette picture; index: the object's id, 0: none
FOLDER/meta_expressions.json                four expressions per object, an object's one after the other
FOLDER/questions.json                       video to its questions, each with the answer that a perfect model gives
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.evaluation.palettes import write_palette

from .language import LOOKS, absent, description, expressions, referring
from .render import pack, render
from .scene import Scene, draw_scene
from .visibility import visible_on_first_frame

FPS = 8
CRF = "12"
"""Quality of the videos: edges stay sharp."""
ANNOTATORS = 4
"""Expressions per object, as many as Ref-DAVIS has."""


def write_split(folder: Path, split: str, count: int) -> None:
    """The first videos of a split, with all that is asked about them.

    Args:
        folder: that takes the files.
        split: one of SPLITS.
        count: how many videos.
    """
    for name in ("videos", "Annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    meta, questions = {}, {}
    for index in tqdm(range(count), unit="video", desc=split):
        scene, name, rng = draw_scene(split, index), f"{split}_{index:05}", random.Random(f"{split} {index}")
        frames, annotations = render_scene(scene)
        write_video(folder / "videos" / f"{name}.mp4", frames)
        write_annotations(folder / "Annotations" / name, annotations)
        meta[name] = {"expressions": expression_fields(scene, rng), "frames": [frame_name(i) for i in range(len(frames))]}
        questions[name] = question_fields(scene, rng)
    write_json(folder / "meta_expressions.json", {"videos": meta})
    write_json(folder / "questions.json", questions)


def object_ids(scene: Scene) -> dict[int, int]:
    """Actor to object id; only those that are visible on the first frame are objects."""
    return {actor: position + 1 for position, actor in enumerate(visible_on_first_frame(scene))}


def render_scene(scene: Scene) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Frames [T, H, W, 3] RGB and annotations [T, H, W] of object ids."""
    times = torch.linspace(0, 1, scene.num_frames)[None]
    frames, masks = render(pack([scene]), times, scene.size)
    annotations = torch.zeros(masks[0, :, 0].shape, dtype=torch.uint8)
    for actor, object_id in object_ids(scene).items():
        annotations[masks[0, :, actor]] = object_id
    return frames[0].permute(0, 2, 3, 1).round().byte().numpy(), annotations.numpy()


def write_video(path: Path, frames: NDArray[np.uint8]) -> None:
    """[T, H, W, 3] RGB, of even height and width."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": CRF})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_annotations(folder: Path, annotations: NDArray[np.uint8]) -> None:
    """[T, H, W] of object ids as a picture per frame."""
    folder.mkdir(exist_ok=True)
    for i, annotation in enumerate(annotations):
        write_palette(folder / f"{frame_name(i)}.png", annotation)


def frame_name(index: int) -> str:
    return f"{index:05}"


def expression_fields(scene: Scene, rng: random.Random) -> dict[str, dict[str, str]]:
    """Index, an object's position times ANNOTATORS plus an annotator's, to expression and object; repeated where there are too few."""
    entries = [
        {"exp": text, "obj_id": str(object_id)}
        for actor, object_id in object_ids(scene).items()
        for text in islice(cycle(expressions(scene, actor, rng)), ANNOTATORS)
    ]
    return {str(index): entry for index, entry in enumerate(entries)}


def question_fields(scene: Scene, rng: random.Random) -> list[dict[str, Any]]:
    """A question about each object, one about all of them, and one about what is not there; `distractors`: objects easily mistaken."""
    ids = object_ids(scene)
    questions = [*(referring(scene, actor, rng) for actor in ids), description(scene, rng), absent(scene, rng)]
    return [
        {
            "kind": question.kind,
            "prompt": question.prompt,
            "answer": question.answer,
            "objects": [ids[actor] for actor in question.objects],
            "distractors": [ids[actor] for actor in distractors(scene, question.objects, ids)] if question.kind == "referring" else [],
        }
        for question in questions
    ]


def distractors(scene: Scene, objects: Sequence[int], others: Iterable[int]) -> list[int]:
    """The other actors that look like these but for at most one attribute."""
    return [
        other
        for other in others
        if other not in objects
        and any(sum(getattr(scene.actors[i], name) != getattr(scene.actors[other], name) for name in LOOKS) <= 1 for i in objects)
    ]


def write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1) + "\n")
