"""Ref-DAVIS 2017 as the original asks it, and its figures: equal to the official toolkit's, and worked out by hand."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sparrow_client._results import rle

from benchmarks.evaluation import ref_davis17
from benchmarks.evaluation.palettes import PALETTE, write_palette
from benchmarks.evaluation.ref_davis17 import ANNOTATORS, RefDavis17
from benchmarks.evaluation.samples import DatasetError, Prediction
from tests import davis_cases

TOOLKIT = json.loads((Path(__file__).parent / "data" / "davis_toolkit.json").read_text())
SIZE = (30, 40)


def square(left, size=SIZE):
    """[H, W]"""
    mask = np.zeros(size, bool)
    mask[8:20, left : left + 12] = True
    return mask


def ids_of(*masks):
    """[H, W]: the first mask is object 1."""
    return np.max([mask.astype(np.uint8) * index for index, mask in enumerate(masks, 1)], axis=0)


def write_pictures(folder, frames, step=1):
    """JPEG files that differ."""
    folder.mkdir(parents=True)
    for index, frame in enumerate(frames):
        Image.fromarray(frame % 255 * 40 + index, "L").save(folder / f"{index * step:05}.jpg")


def write_annotations(folder, frames, step=1):
    folder.mkdir(parents=True)
    for index, frame in enumerate(frames):
        write_palette(folder / f"{index * step:05}.png", frame)


def write_data(root, videos, num_objects=None, annotations="valid/Annotations"):
    """The layout, from video to annotated ids, [T, H, W]; the pictures are the annotations."""
    meta = {}
    for name, annotated in videos.items():
        write_pictures(root / "valid" / "JPEGImages" / name, annotated)
        write_annotations(root / annotations / name, annotated)
        count = (num_objects or {}).get(name, int(annotated[annotated < 255].max()))
        asked = [(index, annotator) for index in range(1, count + 1) for annotator in range(4)]
        expressions = {
            str(i): {"exp": f"The  {index}. in {name} {annotator}", "obj_id": str(index)} for i, (index, annotator) in enumerate(asked)
        }
        meta[name] = {"expressions": expressions, "frames": [f"{frame:05}" for frame in range(len(annotated))]}
    folder = root / "meta_expressions" / "valid"
    folder.mkdir(parents=True)
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": meta}))


def prediction_of(sample, tracks):
    """Of branch to masks, [O, T, H, W]."""
    packed = {branch: [[rle(mask)["counts"] for mask in track] for track in masks] for branch, masks in tracks.items()}
    masks = next(iter(tracks.values()))
    return Prediction(sample.prompt, "It is [SEG].", "tiny", ["it"] * len(masks), [], np.zeros((0, 4), np.float32), masks.shape[1:], packed)


def predictions_of(benchmark, found):
    """Every expression is answered with `found(video, annotator, object)`, [T, H, W], in both branches; one more object is ignored."""
    answers = {}
    for video in benchmark.videos:
        for position, objects in enumerate(benchmark.asked(video).values()):
            for index, samples in objects.items():
                masks, start = found(video.name, position, index), 0
                for sample in samples:
                    clip = masks[start : start + len(sample.clip.pictures)]
                    answers[sample.key] = prediction_of(sample, {"tracked": np.stack([clip, ~clip])})
                    start += len(clip)
    return lambda sample: answers[sample.key]


def score(benchmark, found, out, protocol="fixed", samples=None):
    samples = benchmark.samples() if samples is None else samples
    return benchmark.score(predictions_of(benchmark, found), samples, ["tracked"], out, protocol)


def figures(scores):
    return {(figure.metric, figure.workload): np.mean(figure.samples) for figure in scores.figures}


def table(path):
    with path.open() as file:
        return list(csv.reader(file))


@pytest.fixture
def cases(tmp_path, monkeypatch):
    """The videos that the toolkit scored, shown four frames at a time."""
    assert davis_cases.checksum() == TOOLKIT["checksum"]
    monkeypatch.setattr(ref_davis17, "CLIP_FRAMES", 4)
    videos = {name: davis_cases.video(name, 0)[0] for name in davis_cases.NAMES}
    counts = {name: max(3, int(annotated[annotated < 255].max())) for name, annotated in videos.items()}
    write_data(tmp_path / "data", videos, counts, "DAVIS/Annotations_unsupervised/480p")
    return RefDavis17(tmp_path / "data", "valid")


def found_in_cases(name, annotator, index):
    return davis_cases.video(name, annotator)[1] == index


def test_original_protocol_equals_the_toolkit(cases, tmp_path):
    scores = score(cases, found_in_cases, tmp_path / "out", "original")
    for annotator, expected in zip(ANNOTATORS, TOOLKIT["unsupervised"], strict=True):
        folder = tmp_path / "out" / "tracked" / "valid" / annotator
        names, row = table(folder / "global_results-val.csv")
        assert names == ["J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay"]
        assert [float(value) for value in row] == pytest.approx(expected["global"], abs=6e-7)
        names, *rows = table(folder / "per-sequence_results-val.csv")
        assert names == ["Sequence", "J-Mean", "F-Mean"]
        assert {name: [float(j), float(f)] for name, j, f in rows} == {
            name: pytest.approx(own, abs=6e-7) for name, own in expected["objects"].items()
        }
        workload = annotator.removeprefix("Davis17_")
        assert figures(scores)["tracked_j_and_f", workload] == pytest.approx(100 * expected["global"][0], abs=1e-6)
    means = np.mean([own["global"] for own in TOOLKIT["unsupervised"]], 0)
    got = [figures(scores)[f"tracked_{measure}", ""] for measure in ("j_and_f", "j", "f")]
    assert got == pytest.approx(100 * means[[0, 1, 4]], abs=1e-6)


def test_fixed_protocol_equals_the_toolkits_measures_by_id(cases, tmp_path):
    scores = score(cases, found_in_cases, tmp_path / "out")
    for annotator, expected in zip(ANNOTATORS, TOOLKIT["by_id"], strict=True):
        _, *rows = table(tmp_path / "out" / "tracked" / "valid" / annotator / "per-sequence_results-fixed-val.csv")
        assert {name: [float(j), float(f)] for name, j, f in rows} == {
            f"{name}_{index}": pytest.approx(own, abs=6e-7) for name, objects in expected.items() for index, own in objects.items()
        }
    values = [own for annotator in TOOLKIT["by_id"] for objects in annotator.values() for own in objects.values()]
    got = [figures(scores)[f"tracked_{measure}", ""] for measure in ("j_and_f", "j", "f")]
    assert got == pytest.approx([100 * np.mean(values), *(100 * np.mean(values, 0))], abs=1e-6)
    asked_in_vain = {row["sample"].split("_")[0] for row in scores.rows if "failure" in row}
    assert {"extra/8", "full/4", "large/8"} <= asked_in_vain
    assert next(row["failure"] for row in scores.rows if row["sample"] == "extra/8_00000") == "extra: no annotation shows object 3."


def test_expressions_are_asked_clip_by_clip(tmp_path):
    write_data(tmp_path, {"a": np.tile(ids_of(square(4)), (130, 1, 1)), "b": np.tile(ids_of(square(4), square(20)), (64, 1, 1))})
    benchmark = RefDavis17(tmp_path, "valid")
    samples = benchmark.samples()
    clips = [(f"a/{expression}_{start:05}", count) for expression in range(4) for start, count in ((0, 64), (64, 64), (128, 2))]
    clips += [(f"b/{expression}_00000", 64) for expression in range(8)]
    assert [(sample.key, len(sample.clip.pictures)) for sample in samples] == clips
    assert samples[1].prompt == "What is the  1. in a 0 in this video? Please respond with segmentation masks."
    assert samples[1].clip.pictures[0] == tmp_path / "valid" / "JPEGImages" / "a" / "00064.jpg"
    assert benchmark.options == {"box_prior_max_keep": 1, "max_new_tokens": 512}
    assert [list(objects) for objects in benchmark.asked(benchmark.videos[1]).values()] == [[1, 2]] * 4
    assert [own[0].key for own in benchmark.asked(benchmark.videos[1])["Davis17_annot2"].values()] == ["b/2_00000", "b/6_00000"]


def test_masks_become_pictures_of_the_toolkit_and_overlaps_the_first_objects(tmp_path):
    write_data(tmp_path, {"a": np.tile(ids_of(square(4), square(20)), (3, 1, 1))})
    benchmark = RefDavis17(tmp_path, "valid")
    score(benchmark, lambda name, annotator, index: np.tile(square({1: 4, 2: 10}[index] + annotator), (3, 1, 1)), tmp_path / "out")
    for annotator, name in enumerate(ANNOTATORS):
        folder = tmp_path / "out" / "tracked" / "valid" / name / "a"
        assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "00001.png", "00002.png"]
        with Image.open(folder / "00002.png") as picture:
            assert picture.mode == "P" and bytes(picture.getpalette())[:12] == PALETTE[:12] == bytes(
                [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
            )
            first = square(4 + annotator)
            np.testing.assert_array_equal(np.asarray(picture), first + 2 * (square(10 + annotator) & ~first))


def test_swapped_objects_count_only_in_the_original(tmp_path):
    annotated = np.tile(ids_of(square(2), square(24)), (4, 1, 1))
    write_data(tmp_path, {"a": annotated})
    benchmark = RefDavis17(tmp_path, "valid")

    def found(name, annotator, index):
        return annotated == (3 - index if annotator == 1 else index)

    fixed, original = (score(benchmark, found, tmp_path / "out", protocol) for protocol in ("fixed", "original"))
    workloads = [name.removeprefix("Davis17_") for name in ANNOTATORS]
    assert [figures(fixed)["tracked_j_and_f", workload] for workload in workloads] == [100, 0, 100, 100]
    assert figures(fixed)["tracked_j_and_f", ""] == 75 and figures(original)["tracked_j_and_f", ""] == 100
    swapped = [row for row in fixed.rows if row["annotator"] == ANNOTATORS[1]]
    assert [(row["object"], row["tracked_j"], row["tracked_j_and_f"]) for row in swapped] == [(1, 0, 0), (2, 0, 0)]
    folder = tmp_path / "out" / "tracked" / "valid" / ANNOTATORS[1]
    assert table(folder / "global_results-fixed-val.csv")[1] == ["0.000000"] * 7
    assert table(folder / "global_results-val.csv")[1][:2] == ["1.000000"] * 2


def test_object_that_nobody_asks_for_counts_only_in_the_original(tmp_path):
    annotated = np.tile(ids_of(square(2), square(24)), (4, 1, 1))
    write_data(tmp_path, {"a": annotated}, {"a": 1})
    benchmark = RefDavis17(tmp_path, "valid")
    fixed, original = (
        score(benchmark, lambda name, annotator, index: annotated == index, tmp_path / "out", protocol)
        for protocol in ("fixed", "original")
    )
    assert figures(fixed)["tracked_j_and_f", ""] == 100 and figures(original)["tracked_j_and_f", ""] == 50


def test_void_pixels_and_the_first_and_last_frame_as_worked_out_by_hand(tmp_path):
    """J of the frames: 0, as the object is there but not found; 1, as what is too much is void; 96 of 144 pixels; 1, as both are empty."""
    annotated = np.stack([square(4), square(4), square(4), np.zeros(SIZE, bool)]).astype(np.uint8)
    annotated[1, 8:20, 16:20] = 255
    write_data(tmp_path, {"a": annotated})
    found = np.stack([np.zeros(SIZE, bool), square(4) | square(8), square(4) & ~square(12), np.zeros(SIZE, bool)])
    scores = score(RefDavis17(tmp_path, "valid"), lambda *asked: found, tmp_path / "out")
    assert figures(scores)["tracked_j", ""] == pytest.approx(100 * (0 + 1 + 96 / 144 + 1) / 4)


def test_video_without_all_its_answers_has_no_figure(tmp_path):
    frames = np.tile(ids_of(square(4)), (3, 1, 1))
    write_data(tmp_path, {"a": frames, "b": frames})
    benchmark = RefDavis17(tmp_path, "valid")
    samples = [sample for sample in benchmark.samples() if sample.key != "a/1_00000"]
    scores = score(benchmark, lambda *asked: frames == 1, tmp_path / "out", samples=samples)
    assert [len(figure.samples) for figure in scores.figures if figure.workload] == [2, 1, 2, 2]
    assert [row["sample"] for row in scores.rows] == [sample.key for sample in samples]
    assert not (tmp_path / "out" / "tracked" / "valid" / ANNOTATORS[1] / "a").exists()


def test_masks_of_another_size_are_refused(tmp_path):
    frames = np.tile(ids_of(square(4)), (3, 1, 1))
    write_data(tmp_path, {"a": frames})
    with pytest.raises(DatasetError, match=r"predictions of a/0_00000 and on: got frames \[3, 60, 40\], expected \[3, 30, 40\]"):
        score(RefDavis17(tmp_path, "valid"), lambda *asked: np.zeros((3, 60, 40), bool), tmp_path / "out")


# Data sets that are not whole


@pytest.fixture
def whole(tmp_path):
    frames = np.tile(ids_of(square(4)), (3, 1, 1))
    write_data(tmp_path, {"a": frames, "bear": frames})
    return tmp_path


def test_whole_data_set_has_no_problem(whole):
    assert RefDavis17(whole, "valid").problems() == []


def rewrite(root, change):
    path = root / "meta_expressions" / "valid" / "meta_expressions.json"
    fields = json.loads(path.read_text())
    change(fields["videos"])
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda root: (root / "valid/JPEGImages/bear").rename(root / "valid/JPEGImages/bears"), "bear: missing; "),
        (lambda root: (root / "valid/JPEGImages/bear/00001.jpg").unlink(), "bear: 1 of 3 pictures are missing, the first "),
        (
            lambda root: (root / "valid/JPEGImages/a/00002.jpg").write_bytes(b"\xff\xd8\xff"),
            "a: 1 of 3 pictures are unreadable, the first ",
        ),
        (lambda root: (root / "valid/Annotations/a/00002.png").unlink(), "a: annotations: 1 of 3 pictures are missing, the first "),
        (
            lambda root: Image.new("P", (10, 10)).save(root / "valid/Annotations/a/00001.png"),
            "a: annotations: 1 of 3 pictures are not 40x30 px, the first ",
        ),
        (lambda root: Image.new("RGB", (40, 30)).save(root / "valid/Annotations/a/00001.png"), "00001.png: got a picture of mode RGB"),
        (lambda root: rewrite(root, lambda videos: videos.pop("a")), "got 1 videos without expressions, the first a."),
        (lambda root: rewrite(root, lambda videos: videos["a"]["expressions"].pop("3")), "a: got expressions of objects ['1', '1', '1'], "),
        (
            lambda root: rewrite(root, lambda videos: [e.update(obj_id="3") for e in videos["a"]["expressions"].values()]),
            "a: expressions mean object 3, which no annotation shows.",
        ),
        (lambda root: rewrite(root, lambda videos: videos["a"]["expressions"]["2"].update(exp=" ")), "a: expression 2 has no words."),
        (lambda root: rewrite(root, lambda videos: videos["a"].pop("frames")), "no expressions of videos (KeyError('frames'))"),
        (lambda root: (root / "meta_expressions").rename(root / "expressions"), "meta_expressions.json: missing; "),
    ],
)
def test_check_data_says_what_is_wrong(whole, damage, says):
    damage(whole)
    problems = RefDavis17(whole, "valid").problems()
    assert says in problems[0]
    assert len(problems) <= 2  # a folder of another name is missed, and is one too many
    assert all("\n" not in line for line in problems)


def test_half_a_data_set_is_not_asked_about(whole):
    (whole / "valid" / "JPEGImages" / "bear" / "00001.jpg").unlink()
    with pytest.raises(DatasetError, match=r"got 1 of 12 files missing, the first .*bear/00001.jpg, expected a whole data set."):
        RefDavis17(whole, "valid").samples()
