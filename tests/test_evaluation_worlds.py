"""Scenes of shapes-rvos written in the layout of every benchmark: whole for --check-data, and full marks for perfect answers."""

import json
import random
import re
from functools import partial

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from benchmarks.evaluation.grounding import HcStvg, VidStg
from benchmarks.evaluation.mevis import Mevis
from benchmarks.evaluation.palettes import write_palette
from benchmarks.evaluation.ref_davis17 import RefDavis17
from benchmarks.evaluation.ref_ytvos import RefYtvos
from benchmarks.evaluation.samples import Prediction
from benchmarks.evaluation.video_gcg import VideoGcg
from training.shapes_rvos.files import expression_fields, object_ids, render_scene, write_video
from training.shapes_rvos.language import description, referring
from training.shapes_rvos.scene import draw_scene

BRANCH = "tracked"


class World:
    """Two videos: name to scene, frames [T, H, W, 3] and ids [T, H, W]."""

    def __init__(self):
        self.scenes = {f"v{index}": draw_scene("test", index) for index in (3, 5)}
        self.shown = {name: render_scene(scene) for name, scene in self.scenes.items()}
        self.names = [f"{index:05}" for index in range(24)]

    def write_pictures(self, folder, suffix="jpg"):
        for name, (frames, _) in self.shown.items():
            (folder / name).mkdir(parents=True)
            for stem, frame in zip(self.names, frames, strict=True):
                Image.fromarray(frame).save(folder / name / f"{stem}.{suffix}")

    def write_annotations(self, folder):
        for name, (_, ids) in self.shown.items():
            (folder / name).mkdir(parents=True)
            for stem, own in zip(self.names, ids, strict=True):
                write_palette(folder / name / f"{stem}.png", own)

    def expressions(self, name):
        return expression_fields(self.scenes[name], random.Random(name))

    def objects(self, name):
        return sorted(object_ids(self.scenes[name]).values())

    def masks(self, name, object_id):
        """[T, H, W]"""
        return self.shown[name][1] == object_id

    def rles(self, name, object_id):
        return [encoded(mask) if mask.any() else None for mask in self.masks(name, object_id)]

    def boxes(self, name, object_id):
        """Frame to xyxy in px, where the object is in sight."""
        found = {}
        for index, mask in enumerate(self.masks(name, object_id)):
            y, x = np.nonzero(mask)
            if len(x):
                found[index] = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
        return found


@pytest.fixture(scope="module")
def world():
    return World()


def encoded(mask):
    entry = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in entry["size"]], "counts": entry["counts"].decode()}


def write_json(path, fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields))


def write_refer(split, benchmark, world, root):
    """The layout of ReferFormer."""
    world.write_pictures(root / split / "JPEGImages")
    world.write_annotations(root / split / "Annotations")
    videos = {name: {"expressions": world.expressions(name), "frames": world.names} for name in world.scenes}
    write_json(root / "meta_expressions" / split / "meta_expressions.json", {"videos": videos})

    def masks_of(key):
        name = key.split("/")[0]
        return [world.masks(name, int(videos[name]["expressions"][expression(key)]["obj_id"]))]

    return benchmark(root, split), masks_of


def expression(key):
    return key.split("/")[1].split("_")[0]


def write_mevis(world, root):
    world.write_pictures(root / "valid_u" / "JPEGImages")
    videos, masks = {}, {}
    for name in world.scenes:
        annotation = {object_id: len(masks) + index for index, object_id in enumerate(world.objects(name))}
        masks |= {str(annotation[object_id]): world.rles(name, object_id) for object_id in annotation}
        asked = {
            index: {"exp": entry["exp"], "obj_id": [int(entry["obj_id"])], "anno_id": [annotation[int(entry["obj_id"])]]}
            for index, entry in world.expressions(name).items()
        }
        videos[name] = {"expressions": asked, "frames": world.names}
    write_json(root / "valid_u" / "meta_expressions.json", {"videos": videos})
    write_json(root / "valid_u" / "mask_dict.json", masks)
    return Mevis(root, "valid_u"), lambda key: [
        world.masks(key.split("/")[0], videos[key.split("/")[0]]["expressions"][expression(key)]["obj_id"][0])
    ]


def described(world, name):
    """A description and the object ids of its phrases."""
    question = description(world.scenes[name], random.Random(name))
    ids = object_ids(world.scenes[name])
    return question.answer, [ids[actor] for actor in question.objects]


def write_gcg(world, root):
    world.write_pictures(root / "mevis" / "valid_u" / "JPEGImages")
    videos, masks = {}, {}
    for name in world.scenes:
        annotation = {object_id: len(masks) + index for index, object_id in enumerate(world.objects(name))}
        masks |= {str(annotation[object_id]): world.rles(name, object_id) for object_id in annotation}
        asked = {str(object_id): {"exp": "it", "obj_id": [object_id], "anno_id": [annotation[object_id]]} for object_id in annotation}
        videos[name] = {"expressions": asked, "frames": world.names}
        answer, ids = described(world, name)
        phrases = re.split(r"<p> (.*?) </p> \[BOX\] \[SEG\]", answer)  # words, phrase, words, ...
        links = [f"[{phrase}]({object_id})" for phrase, object_id in zip(phrases[1::2], ids, strict=True)]
        caption = "".join(piece for pair in zip(phrases[::2], [*links, ""], strict=True) for piece in pair)
        write_json(root / "mevis_gcg" / "valid_u" / f"{name}.json", {"caption": caption})
    write_json(root / "mevis" / "valid_u" / "meta_expressions.json", {"videos": videos})
    write_json(root / "mevis" / "valid_u" / "mask_dict.json", masks)
    return VideoGcg(root, "mevis"), lambda key: [
        world.masks(key.split("/")[1], object_id) for object_id in described(world, key.split("/")[1])[1]
    ]


def longest(world, name):
    """The object that is in sight from the first frame on for longest, and how long."""
    runs = {object_id: next((i for i in range(24) if i not in world.boxes(name, object_id)), 24) for object_id in world.objects(name)}
    return max(runs.items(), key=lambda entry: entry[1])


def write_vidstg(world, root):
    annotations = []
    for name, scene in world.scenes.items():
        height, width = scene.size
        object_id, count = longest(world, name)
        actor = next(actor for actor, own in object_ids(scene).items() if own == object_id)
        question = referring(scene, actor, random.Random(name)).prompt
        annotations.append(
            {
                "vid": name,
                "fps": 8,
                "frame_count": 24,
                "width": width,
                "height": height,
                "used_segment": {"begin_fid": 0, "end_fid": 24},
                "temporal_gt": {"begin_fid": 0, "end_fid": count},
                "questions": [{"description": question, "type": "shape", "target_id": object_id}],
                "captions": [],
            }
        )
        corners = ("xmin", "ymin", "xmax", "ymax")
        boxes = {own: world.boxes(name, own) for own in world.objects(name)}
        trajectories = [
            [
                {"tid": own, "bbox": dict(zip(corners, boxes[own][index], strict=True)), "generated": 0, "tracker": "none"}
                for own in boxes
                if index in boxes[own]
            ]
            for index in range(24)
        ]
        video = {"video_id": name, "frame_count": 24, "fps": 8, "width": width, "height": height, "trajectories": trajectories}
        write_json(root / "vidstg" / "vidor_annotations" / "validation" / "0" / f"{name}.json", video)
        path = root / "vidstg" / "video" / "0" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, world.shown[name][0])
    write_json(root / "vidstg" / "vidstg_annotations" / "test_annotations.json", annotations)
    return VidStg(root, "test"), lambda key: [world.masks(key.split("/")[0], longest(world, key.split("/")[0])[0])]


def write_hcstvg(world, root):
    annotations = {}
    for name, scene in world.scenes.items():
        object_id, count = longest(world, name)
        boxes = world.boxes(name, object_id)
        annotations[f"{name}.mp4"] = {
            "img_num": 24,
            "img_size": list(scene.size),
            "st_frame": 1,
            "st_time": 0,
            "ed_time": 20,
            "English": "The shape moves.",
            "bbox": [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in (boxes[index] for index in range(count))],
        }
        path = root / "hcstvg" / "Video" / "1" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, world.shown[name][0])
        write_json(root / "hcstvg" / "qa" / f"{len(annotations) - 1}.json", {"Q": "Which shape moves?", "A": "That one."})
    write_json(root / "hcstvg" / "anno_v2" / "val_v2.json", annotations)
    return HcStvg(root, "val"), lambda key: [world.masks(key.split("/")[0], longest(world, key.split("/")[0])[0])]


def perfect(sample, masks, names):
    """The answer with these masks, [T, H, W] of the whole video each, at the frames and the size that were shown."""
    clip = sample.clip
    chosen = list(clip.indices) if clip.indices is not None else [names.index(path.stem) for path in clip.pictures]
    shown = [track[chosen] for track in masks]
    if clip.size:
        shown = [
            np.stack([cv2.resize(mask.view(np.uint8), clip.size[::-1], interpolation=cv2.INTER_NEAREST) for mask in track])
            for track in shown
        ]
    tracks = [[encoded(mask)["counts"] for mask in track] for track in shown]
    phrases = ["the shape"] * len(tracks)
    return Prediction(
        sample.prompt,
        "It is.",
        "nano",
        phrases,
        [np.zeros((0, 4), np.float32)] * len(tracks),
        np.zeros((0, 4), np.float32),
        shown[0].shape,
        {BRANCH: tracks},
    )


@pytest.mark.parametrize(
    ("write", "metric", "least"),
    [
        (partial(write_refer, "valid", RefDavis17), "j_and_f", 100),
        (write_mevis, "j_and_f", 100),
        (partial(write_refer, "train", RefYtvos), "j_and_f", 100),
        (write_gcg, "miou", 97),  # crumbs of less than 20 px do not count
        (write_vidstg, "gt_viou", 90),  # boxes in whole pixels of a smaller frame
        (write_hcstvg, "gt_viou", 90),
    ],
    ids=["ref-davis17", "mevis", "ref-ytvos", "video-gcg", "vidstg", "hc-stvg"],
)
def test_perfect_answers_about_shapes_get_full_marks(world, tmp_path, write, metric, least):
    benchmark, masks_of = write(world, tmp_path / "data")
    assert benchmark.problems() == []
    samples = benchmark.samples()
    assert len(samples) >= 2
    (tmp_path / "out").mkdir()
    answers = {sample.key: perfect(sample, masks_of(sample.key), world.names) for sample in samples}
    scores = benchmark.score(lambda sample: answers[sample.key], samples, [BRANCH], tmp_path / "out", "fixed")
    found = {(figure.metric, figure.workload): np.mean(figure.samples) for figure in scores.figures}
    assert least <= found[f"{BRANCH}_{metric}", ""] <= 100
    assert not any(row.get("failure") for row in scores.rows)
