"""MeViS and Refer-YouTube-VOS: their layouts, what is asked, the pictures and the zip that their servers take, and J&F."""

import itertools
import json
import zipfile

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from benchmarks.evaluation import davis
from benchmarks.evaluation.mevis import Mevis
from benchmarks.evaluation.ref_ytvos import RefYtvos
from benchmarks.evaluation.samples import DatasetError
from tests.test_evaluation_ref_davis17 import SIZE, figures, ids_of, prediction_of, square, write_annotations, write_pictures

FRAMES = 3
MOVING = np.stack([[square(left + frame) for frame in range(FRAMES)] for left in (2, 24)])
"""[O, T, H, W]: two squares."""

NOTHING = np.zeros((FRAMES, *SIZE), bool)
MEANT = {"a": {"0": [0], "1": [0, 1], "2": []}, "b": {"0": [1]}}
"""Video to expression to the objects that it means."""


def write_json(path, fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields))


def encoded(mask):
    entry = coco.encode(np.asfortranarray(mask))
    return {"size": [int(side) for side in entry["size"]], "counts": entry["counts"].decode()}


def write_mevis(root, split="valid_u"):
    """Annotation ids count through all videos; the second object of b is not there on its second frame."""
    videos, masks = {}, {}
    for name, expressions in MEANT.items():
        write_pictures(root / split / "JPEGImages" / name, [ids_of(*MOVING[:, frame]) for frame in range(FRAMES)])
        first = len(masks)
        for index, track in enumerate(MOVING):
            masks[str(first + index)] = [encoded(mask) if (name, index, frame) != ("b", 1, 1) else None for frame, mask in enumerate(track)]
        asked = {
            key: {"exp": f"The  thing\tMOVING {key} in {name} ", "obj_id": meant, "anno_id": [first + index for index in meant]}
            for key, meant in expressions.items()
        }
        videos[name] = {"expressions": asked, "frames": [f"{frame:05}" for frame in range(FRAMES)]}
    write_json(root / split / "meta_expressions.json", {"videos": videos})
    write_json(root / split / "mask_dict.json", masks)


def write_ytvos(root, split="valid"):
    """Every fifth frame; a video of the test split is among those of valid."""
    names = ("a", "b", "tested")[: 3 if split == "valid" else 2]
    videos = {
        name: {
            "expressions": {key: {"exp": f"thing {key} in {name}"} | ({"obj_id": "2"} if split == "train" else {}) for key in "01"},
            "frames": [f"{5 * frame:05}" for frame in range(FRAMES)],
        }
        for name in names
    }
    frames = [ids_of(*MOVING[:, frame]) for frame in range(FRAMES)]
    for name in names:
        write_pictures(root / split / "JPEGImages" / name, frames, step=5)
        if split == "train":
            write_annotations(root / split / "Annotations" / name, frames, step=5)
    write_json(root / "meta_expressions" / split / "meta_expressions.json", {"videos": videos})
    write_json(root / "meta_expressions" / "test" / "meta_expressions.json", {"videos": {"tested": videos["a"]}})


def score(benchmark, found, out, branches=("tracked",), keys=None):
    """Answers each sample with `found(key)`, branch to [O, T, H, W]."""
    samples = [sample for sample in benchmark.samples() if keys is None or sample.key in keys]
    return benchmark.score(lambda sample: prediction_of(sample, found(sample.key)), samples, branches, out, "fixed")


def truth(key):
    """What an expression of MeViS means, [T, H, W]."""
    video, expression = key.split("/")
    masks = np.any([NOTHING, *MOVING[MEANT[video][expression]]], axis=0)
    if video == "b":
        masks[1] = False
    return masks


# What is asked


def test_mevis_asks_about_whole_videos(tmp_path):
    write_mevis(tmp_path)
    samples = Mevis(tmp_path, "valid_u").samples()
    assert [sample.key for sample in samples] == ["a/0", "a/1", "a/2", "b/0"]
    assert samples[0].prompt == "What is the thing moving 0 in a in this video? Please respond with segmentation masks."
    assert samples[3].clip.pictures == tuple(tmp_path / "valid_u" / "JPEGImages" / "b" / f"{frame:05}.jpg" for frame in range(FRAMES))
    assert Mevis.options == {"box_prior_max_keep": 1, "max_new_tokens": 512}


def test_ytvos_leaves_out_videos_of_the_test_split(tmp_path):
    write_ytvos(tmp_path)
    benchmark = RefYtvos(tmp_path, "valid")
    samples = benchmark.samples()
    assert [sample.key for sample in samples] == ["a/0", "a/1", "b/0", "b/1"]
    assert samples[0].prompt == "What is thing 0 in a in this video? Please respond with segmentation masks."
    assert [path.name for path in samples[0].clip.pictures] == ["00000.jpg", "00005.jpg", "00010.jpg"]
    assert benchmark.problems() == []
    (tmp_path / "meta_expressions" / "test" / "meta_expressions.json").unlink()
    assert len(RefYtvos(tmp_path, "valid").samples()) == 6


# Figures and files


def test_mevis_takes_the_union_of_all_objects_that_are_meant(tmp_path):
    write_mevis(tmp_path)
    scores = score(Mevis(tmp_path, "valid_u"), lambda key: {"tracked": truth(key)[None]}, tmp_path / "out")
    assert figures(scores) == {("tracked_j_and_f", ""): 100, ("tracked_j", ""): 100, ("tracked_f", ""): 100}
    assert [row["sample"] for row in scores.rows] == ["a/0", "a/1", "a/2", "b/0"]
    assert not any("failure" in row for row in scores.rows)


def test_figures_are_means_over_expressions_of_the_first_object_alone(tmp_path):
    """a/0 is answered with half of it, a/1 with one of two objects, a/2 with something that nobody means, b/0 with no object."""
    write_mevis(tmp_path)
    half = MOVING[0] & (np.arange(SIZE[0]) < 14)[:, None]
    answers = {"a/0": [half, MOVING[0]], "a/1": [MOVING[1]], "a/2": [MOVING[0]], "b/0": []}
    tracks = {key: np.array(own, bool).reshape(-1, FRAMES, *SIZE) for key, own in answers.items()}

    scores = score(
        Mevis(tmp_path, "valid_u"),
        lambda key: {"tracked": tracks[key], "framewise": truth(key)[None]},
        tmp_path / "out",
        ["tracked", "framewise"],
    )
    js = [0.5, 0.5, 0, 1 / 3]  # on one of its frames the object of b/0 is not there
    fs = [davis.boundary_measure(half, MOVING[0]).mean(), davis.boundary_measure(MOVING[1], MOVING.any(0)).mean(), 0, 1 / 3]
    assert [row["tracked_j"] for row in scores.rows] == pytest.approx([100 * j for j in js])
    assert [row["tracked_f"] for row in scores.rows] == pytest.approx([100 * f for f in fs])
    assert figures(scores)["tracked_j_and_f", ""] == pytest.approx(100 * (np.mean(js) + np.mean(fs)) / 2)
    assert figures(scores)["framewise_j_and_f", ""] == 100


@pytest.mark.parametrize(
    ("write", "kind", "split", "prefix"), [(write_mevis, Mevis, "valid", ""), (write_ytvos, RefYtvos, "valid", "Annotations/")]
)
def test_split_without_annotations_gives_what_its_server_takes(tmp_path, write, kind, split, prefix):
    write(tmp_path, split)
    (tmp_path / split / "mask_dict.json").unlink(missing_ok=True)
    benchmark = kind(tmp_path, split)
    assert benchmark.problems() == []
    scores = score(benchmark, lambda key: {"tracked": MOVING[::-1], "framewise": MOVING[:0]}, tmp_path / "out", ["tracked", "framewise"])
    assert [len(figure.samples) for figure in scores.figures] == [0] * 6
    assert [row["sample"] for row in scores.rows] == [sample.key for sample in benchmark.samples()]
    names = [f"{prefix}{sample.key}/{path.stem}.png" for sample in benchmark.samples() for path in sample.clip.pictures]
    for branch, masks in (("tracked", MOVING[1]), ("framewise", NOTHING)):
        with zipfile.ZipFile(tmp_path / "out" / f"{branch}.zip") as archive:
            assert sorted(archive.namelist()) == sorted(names)
            assert archive.read(names[0]) == (tmp_path / "out" / branch / names[0]).read_bytes()
        for name, mask in zip(names, itertools.cycle(masks)):
            with Image.open(tmp_path / "out" / branch / name) as picture:
                assert picture.mode == "L"
                np.testing.assert_array_equal(np.asarray(picture), mask * np.uint8(255))


def test_zip_is_written_only_for_a_whole_run(tmp_path):
    write_mevis(tmp_path)
    benchmark = Mevis(tmp_path, "valid_u")
    score(benchmark, lambda key: {"tracked": truth(key)[None]}, tmp_path / "out")
    score(benchmark, lambda key: {"tracked": truth(key)[None]}, tmp_path / "out", keys={"a/0"})
    assert not (tmp_path / "out" / "tracked.zip").exists() and (tmp_path / "out" / "tracked" / "a" / "0" / "00000.png").exists()


def test_ytvos_is_scored_where_there_are_annotations(tmp_path):
    write_ytvos(tmp_path, "train")
    benchmark = RefYtvos(tmp_path, "train")
    assert benchmark.problems() == []
    scores = score(benchmark, lambda key: {"tracked": MOVING[[int(key[-1])]]}, tmp_path / "out")
    assert [row["tracked_j"] for row in scores.rows] == [0, 100, 0, 100]
    assert figures(scores)["tracked_j_and_f", ""] == 50


# Data sets that are not whole


def change(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda split: change(split / "mask_dict.json", lambda masks: masks.pop("3")),
            "b: expression 0: got 0 masks for 3 frames as annotation 3",
        ),
        (
            lambda split: change(split / "mask_dict.json", lambda masks: masks["3"].pop()),
            "b: expression 0: got 2 masks for 3 frames as annotation 3",
        ),
        (
            lambda split: change(split / "mask_dict.json", lambda masks: masks["3"][0].update(size=[20, 60])),
            "b: expression 0: got masks of [20, 60] px, expected [30, 40] as the pictures.",
        ),
        (
            lambda split: change(split / "meta_expressions.json", lambda meta: meta["videos"]["b"]["expressions"]["0"].pop("anno_id")),
            "b: expression 0 names no annotation (anno_id).",
        ),
    ],
)
def test_expression_without_masks_has_no_figure_and_is_a_problem(tmp_path, damage, says):
    write_mevis(tmp_path)
    damage(tmp_path / "valid_u")
    benchmark = Mevis(tmp_path, "valid_u")
    (problem,) = benchmark.problems()
    assert says in problem
    scores = score(benchmark, lambda key: {"tracked": truth(key)[None]}, tmp_path / "out")
    assert [says in row.get("failure", "") for row in scores.rows] == [False, False, False, True]
    assert [len(figure.samples) for figure in scores.figures] == [3, 3, 3]


def test_prediction_of_another_size_has_no_figure(tmp_path):
    write_mevis(tmp_path)
    scores = score(Mevis(tmp_path, "valid_u"), lambda key: {"tracked": truth(key)[None, :, :20]}, tmp_path / "out")
    assert scores.rows[0]["failure"].startswith("prediction of a/0: got frames [3, 20, 40], expected [3, 30, 40] as annotated.")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda split: (split / "mask_dict.json").unlink(), "mask_dict.json: missing; "),
        (lambda split: (split / "mask_dict.json").write_text("{"), "mask_dict.json: not readable as JSON"),
        (lambda split: (split / "meta_expressions.json").write_text("[]"), "meta_expressions.json: no expressions of videos (TypeError("),
        (lambda split: (split / "JPEGImages").rename(split / "Images"), "JPEGImages: missing; "),
        (lambda split: (split / "JPEGImages" / "b" / "00001.jpg").unlink(), "b: 1 of 3 pictures are missing, the first "),
    ],
)
def test_check_data_says_what_is_missing(tmp_path, damage, says):
    write_mevis(tmp_path)
    damage(tmp_path / "valid_u")
    (problem,) = Mevis(tmp_path, "valid_u").problems()
    assert says in problem


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda root: (root / "train/Annotations/b/00005.png").unlink(), "b: annotations: 1 of 3 pictures are missing, the first "),
        (
            lambda root: change(
                root / "meta_expressions/train/meta_expressions.json",
                lambda meta: meta["videos"]["b"]["expressions"]["1"].update(obj_id="7"),
            ),
            "b: expression 1 means object 7, which no annotation shows.",
        ),
        (
            lambda root: [Image.new("P", (10, 10)).save(path) for path in (root / "train/Annotations/b").iterdir()],
            "b: got annotations of [10, 10] px, expected [30, 40] as the pictures.",
        ),
    ],
)
def test_check_data_looks_at_annotations_of_ytvos(tmp_path, damage, says):
    write_ytvos(tmp_path, "train")
    damage(tmp_path)
    assert says in RefYtvos(tmp_path, "train").problems()[0]


def test_half_a_data_set_is_not_asked_about(tmp_path):
    write_mevis(tmp_path)
    (tmp_path / "valid_u" / "mask_dict.json").unlink()
    with pytest.raises(DatasetError, match=r"got 1 of 7 files missing, the first .*mask_dict.json"):
        Mevis(tmp_path, "valid_u").samples()
