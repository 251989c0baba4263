"""VidSTG and HC-STVG in their layouts, with videos of ten frames a second; their measures by hand and against oracles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco

from benchmarks.evaluation import grounding
from benchmarks.evaluation.grounding import Grounding, HcStvg, VidStg
from benchmarks.evaluation.samples import DatasetError, Prediction, Sample, Scores

SIDE, SHOWN = 56, 224
"""px of a video, and as it is shown: four times as large."""

Answers = Mapping[str, tuple[str, NDArray[np.bool_] | None]]
"""Key of a sample to the text and the masks of the first object, [T, H, W]."""


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_video(path: Path, count: int, fps: int = 10, side: int = SIDE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = side
        for index in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((side, side, 3), 3 * index % 256, np.uint8), format="rgb24")))
        container.mux(stream.encode())


def vidor(boxes: Mapping[int, Mapping[int, Sequence[float]]], count: int) -> dict[str, Any]:
    """The annotation of a video: frame to object to xyxy."""
    trajectories = [
        [
            {"tid": one, "bbox": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)), "generated": 0, "tracker": "none"}
            for one, box in boxes.get(frame, {}).items()
        ]
        for frame in range(count)
    ]
    return {"video_id": "2401", "frame_count": count, "fps": 10, "width": SIDE, "height": SIDE, "trajectories": trajectories}


def annotation(video: str, tube: tuple[int, int], segment: tuple[int, int], **sentences: list[tuple[str, int]]) -> dict[str, Any]:
    described = {
        name: [{"description": text, "type": "person", "target_id": target} for text, target in sentences.get(name, [])]
        for name in ("questions", "captions")
    }
    return {
        "vid": video,
        "fps": 10,
        "frame_count": 60,
        "width": SIDE,
        "height": SIDE,
        "used_segment": dict(zip(("begin_fid", "end_fid"), segment, strict=True)),
        "temporal_gt": dict(zip(("begin_fid", "end_fid"), tube, strict=True)),
        **described,
    }


BOX = (20, 10, 30, 20)


@pytest.fixture
def vidstg(tmp_path: Path) -> Path:
    """Object 1 stands still at BOX on frames 15 to 44, object 2 elsewhere."""
    root = tmp_path / "video_dataset"
    tube = annotation("2401", (15, 45), (0, 60), questions=[("who is standing?", 1), ("what is it?", 2)], captions=[("a man stands.", 1)])
    other = annotation("7", (0, 10), (0, 10), captions=[("a dog sits.", 2)])
    boxes = {frame: {1: BOX, 2: (0, 0, 8, 8)} for frame in range(60)}
    write(root / "vidstg/vidstg_annotations/test_annotations.json", [tube, other])
    for group, name in (("0054", "2401"), ("1000", "7")):
        write(root / f"vidstg/vidor_annotations/validation/{group}/{name}.json", vidor(boxes, 60))
        write_video(root / f"vidstg/video/{group}/{name}.mp4", 60)
    return root


@pytest.fixture
def hcstvg(tmp_path: Path) -> Path:
    """400 frames in 20 s; the tube is frames 30 to 69 of those that are numbered from 1."""
    root = tmp_path / "video_dataset"
    entry = {
        "img_num": 400,
        "img_size": [SIDE, SIDE],
        "st_frame": 30,
        "st_time": 1.5,
        "ed_time": 3.5,
        "English": "The man stands.",
        "bbox": [[20 + (number >= 50), 10, 10, 10] for number in range(30, 70)],
    }
    write(root / "hcstvg/anno_v2/val_v2.json", {"55_abc.d.mp4": entry, "6_e.mp4": {**entry, "st_frame": 361}})
    for index, question in enumerate(("Who stands?", "Who goes?")):
        write(root / f"hcstvg/qa/{index}.json", {"Q": question, "A": "The man."})
    for name in ("1/55_abc.d.mp4", "2/6_e.mp4"):
        write_video(root / "hcstvg/Video" / name, 400, 20)
    return root


def block(count: int, box: Sequence[float] = BOX, frames: Sequence[int] | None = None) -> NDArray[np.bool_]:
    """[T, SHOWN, SHOWN]: a box, in px of the video, on some frames."""
    masks = np.zeros((count, SHOWN, SHOWN), bool)
    x1, y1, x2, y2 = (round(4 * edge) for edge in box)
    masks[list(range(count) if frames is None else frames), y1:y2, x1:x2] = True
    return masks


def answer(sample: Sample, text: str, masks: NDArray[np.bool_] | None) -> Prediction:
    count = len(sample.clip.indices or ())
    tracks = [] if masks is None else [[coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode() for mask in masks]]
    return Prediction(
        prompt=sample.prompt,
        answer=text,
        preset="tiny",
        phrases=["it"] * len(tracks),
        selected_boxes=[],
        proposals=np.zeros((0, 4), np.float32),
        size=(count, *(sample.clip.size or (0, 0))),
        tracks={"tracked": tracks, "framewise": []},
    )


def scored(benchmark: Grounding, answers: Answers, out: Path, protocol: str, branches: Sequence[str] = ("tracked",)) -> Scores:
    """The given sentences alone are answered."""
    samples = [sample for sample in benchmark.samples() if sample.key in answers]
    return benchmark.score(lambda sample: answer(sample, *answers[sample.key]), samples, branches, out, protocol)


def values(scores: Scores, metric: str, workload: str = "") -> list[float]:
    (figure,) = [figure for figure in scores.figures if (figure.metric, figure.workload) == (metric, workload)]
    return [round(value, 4) for value in figure.samples]


def test_vidstg_asks_questions_and_statements_about_the_tube(vidstg: Path) -> None:
    samples = VidStg(vidstg, "test").samples()

    assert [(sample.key, sample.kind, sample.prompt) for sample in samples] == [
        ("2401/0", "interrogative", "who is standing? Please respond with segmentation masks."),
        ("2401/1", "interrogative", "what is it? Please respond with segmentation masks."),
        ("2401/2", "declarative", "Can you segment a man stands. in this video?"),
        ("7/3", "declarative", "Can you segment a dog sits. in this video?"),
    ]
    assert samples[0].clip.video == vidstg / "vidstg/video/0054/2401.mp4"
    assert [sample.clip.indices for sample in samples] == [(15, 20, 30, 40)] * 3 + [(0,)]
    assert {sample.clip.size for sample in samples} == {(SHOWN, SHOWN)}


def test_a_whole_split_shows_the_segment(vidstg: Path) -> None:
    samples = VidStg(vidstg, "test-whole").samples()

    assert [sample.clip.indices for sample in samples] == [(0, 10, 20, 30, 40, 50)] * 3 + [(0,)]


def test_val_reads_the_training_part_of_vidor(vidstg: Path) -> None:
    for path in (vidstg / "vidstg/vidstg_annotations").iterdir():
        path.rename(path.with_name("val_annotations.json"))
    (vidstg / "vidstg/vidor_annotations/validation").rename(vidstg / "vidstg/vidor_annotations/training")

    assert len(VidStg(vidstg, "val").samples()) == 4


def test_hcstvg_asks_the_stored_questions_and_counts_frames_from_one(hcstvg: Path) -> None:
    benchmark = HcStvg(hcstvg, "val")
    samples = benchmark.samples()

    assert [(sample.key, sample.kind, sample.prompt) for sample in samples] == [
        ("55_abc.d", "interrogative", "Who stands? Please respond with segmentation masks."),
        ("6_e", "interrogative", "Who goes? Please respond with segmentation masks."),
    ]
    assert samples[0].clip.video == hcstvg / "hcstvg/Video/1/55_abc.d.mp4"
    assert [sample.clip.indices for sample in samples] == [(29, 39, 59), (360, 379, 399)], "frames 30, 40 and 60; 361, 380 and 400"
    assert len(HcStvg(hcstvg, "val-whole").samples()[0].clip.indices or ()) == 20


def test_hcstvg_without_questions_asks_the_captions_and_says_so(hcstvg: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hcstvg / "hcstvg/qa/1.json").unlink()
    benchmark = HcStvg(hcstvg, "val")

    assert [sample.kind for sample in benchmark.samples()] == ["interrogative", "declarative"]
    line = f"{hcstvg}/hcstvg/qa: 1 of 2 videos have no question; their captions are asked instead, unlike in the original."
    assert capsys.readouterr().err.splitlines()[0] == line
    assert benchmark.problems() == [line]
    assert HcStvg(hcstvg, "val").samples()[1].prompt == "Can you segment The man stands. in this video?"


@pytest.mark.parametrize("fps", [1, 7, 10, 25, Fraction(30000, 1001)])
def test_sampled_takes_the_first_frame_and_the_first_of_each_second(fps: Fraction | int) -> None:
    for start, end in ((0, 100), (13, 100), (30, 31), (59, 300), (60, 60)):
        new_second = [frame for frame in range(start + 1, end) if int(frame / fps) > int((frame - 1) / fps)]
        expected = [start, *new_second]
        if len(expected) > 40:
            expected = [expected[number * len(expected) // 40] for number in range(40)]

        assert grounding.sampled(start, end, float(fps)) == expected


def test_sampled_thins_out_to_forty() -> None:
    frames = grounding.sampled(0, 1000, 10)

    assert len(frames) == 40 and frames[:5] == [0, 20, 50, 70, 100] and frames[-1] == 970


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((360, 640), (210, 373)),  # 398 would be too long
        ((640, 360), (373, 210)),
        ((1080, 1920), (210, 373)),
        ((480, 640), (224, 298)),
        ((224, 300), (224, 300)),
        ((56, 56), (224, 224)),
        ((100, 1000), (37, 370)),
    ],
)
def test_resized_has_a_short_side_of_224_unless_the_other_gets_longer_than_373(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert grounding.resized(size) == expected


def test_predicted_boxes_end_behind_or_at_the_last_pixel() -> None:
    masks = np.zeros((2, 210, 373), bool)
    masks[0, 21:42, 0:37] = True

    fixed, original = (grounding.predicted_boxes(masks, (360, 640), protocol) for protocol in ("fixed", "original"))

    np.testing.assert_allclose(fixed[0], [0, 36, 37 * 640 / 373, 72])
    np.testing.assert_allclose(original[0], [0, 36, 36 * 640 / 373, 41 * 360 / 210])
    assert np.isnan(fixed[1]).all() and np.isnan(original[1]).all()


def test_box_ious_count_pixels() -> None:
    random = np.random.default_rng(0)
    corners = np.sort(random.integers(0, 12, (2, 50, 2, 2)), 2)  # [2, T, corner, axis]
    corners[:, :, 1] += 1
    boxes, others = corners.reshape(2, 50, 4).astype(float)
    y, x = np.mgrid[:13, :13]
    expected = []
    for pair in zip(boxes, others, strict=True):
        one, other = ((x1 <= x) & (x < x2) & (y1 <= y) & (y < y2) for x1, y1, x2, y2 in pair)
        expected.append((one & other).sum() / (one | other).sum())
    others[7], expected[7] = np.nan, 0

    np.testing.assert_allclose(grounding.box_ious(boxes, others), expected)


@pytest.mark.parametrize(("protocol", "best"), [("fixed", 100.0), ("original", 100 * (39 / 40) ** 2)])
def test_gt_viou_by_hand(vidstg: Path, tmp_path: Path, protocol: str, best: float) -> None:
    half = block(4, (20, 10, 30, 15), [0, 1]) | block(4, frames=[2])  # half, half, all, nothing
    halves = [50, 50] if protocol == "fixed" else [100 * 39 * 19 / 1600] * 2
    answers: Answers = {"2401/0": ("It is [SEG].", block(4)), "2401/2": ("", half), "7/3": ("None.", None)}

    scores = scored(VidStg(vidstg, "test"), answers, tmp_path, protocol)

    mean = (sum(halves) + best) / 4
    unanswered = [0] if protocol == "fixed" else []
    assert values(scores, "tracked_gt_viou", "interrogative") == [pytest.approx(best, abs=1e-3), *unanswered]
    assert values(scores, "tracked_gt_viou", "declarative") == [pytest.approx(mean, abs=1e-3), 0]
    assert values(scores, "tracked_gt_viou")[-1:] == [0] and len(values(scores, "tracked_gt_viou")) == 3 + len(unanswered)
    assert values(scores, "tracked_gt_viou@0.3") == [100, *unanswered, 100, 0]
    assert values(scores, "tracked_gt_viou@0.5", "declarative") == [0, 0]
    assert {figure.metric for figure in scores.figures} == {"tracked_gt_viou", "tracked_gt_viou@0.3", "tracked_gt_viou@0.5"}
    assert [list(row)[:3] for row in scores.rows] == [["sample", "prompt", "answer"]] * 3
    assert scores.rows[1]["tracked_gt_viou"] == pytest.approx(mean)


def test_thresholds_must_be_passed() -> None:
    assert grounding.with_levels({"gt_viou": 0.5, "m_viou": 0.3, "tiou": 1.0}) == {
        "gt_viou": 0.5,
        "gt_viou@0.3": 1,
        "gt_viou@0.5": 0,
        "m_viou": 0.3,
        "viou@0.3": 0,
        "viou@0.5": 0,
        "tiou": 1,
    }


WHOLE_TUBE = [False, False, True, True, True, False]  # frames 20, 30 and 40 of 0, 10, ... 50


@pytest.mark.parametrize(
    ("text", "shown", "fixed", "original"),
    [
        # fixed: frames 2..3 of 2..4. original: spans [2, 3) and [2, 4).
        ("It is [SEG] in frames:(2,3).", range(6), (2 / 3, 2 / 3), (1 / 2, 1 / 2)),
        ("Sure, [SEG] frames:(2,4).", range(6), (1, 1), (1, 1)),
        # 3..5: two of four frames; [3, 4) of [2, 5).
        ("[SEG] frames:(3,5).", range(6), (2 / 4, 2 / 4), (1 / 3, 1 / 3)),
        ("[SEG] frames:(0,5).", range(6), (3 / 6, 3 / 6), (2 / 5, 2 / 5)),
        ("[SEG] frames:(4,4).", range(6), (1 / 3, 1 / 3), (0, 0)),
        ("[SEG] frames:(5,2).", range(6), (0, 0), (0, 0)),
        # No time: in `fixed` that of the masks, in `original` (0, 0).
        ("It is [SEG].", (1, 2, 3), (2 / 4, 2 / 4), (0, 0)),
        # A mask is missing where the answer says there is one.
        ("[SEG] frames:(2,4).", (2, 3), (2 / 3, 1), (1, 1)),
    ],
)
def test_times_by_hand(
    vidstg: Path, tmp_path: Path, text: str, shown: Sequence[int], fixed: tuple[float, float], original: tuple[float, float]
) -> None:
    content = json.loads((path := vidstg / "vidstg/vidstg_annotations/test_annotations.json").read_text())
    content[0]["temporal_gt"] = {"begin_fid": 20, "end_fid": 45}
    write(path, content)
    shrink = (39 / 40) ** 2  # boxes of the original end at their last pixel

    for protocol, (viou, tiou), scale in (("fixed", fixed, 1), ("original", original, shrink)):
        benchmark = VidStg(vidstg, "test-whole")
        assert benchmark.queries[0].in_tube == WHOLE_TUBE
        scores = scored(benchmark, {"2401/2": (text, block(6, frames=shown))}, tmp_path, protocol)
        found = [values(scores, f"tracked_{name}", "declarative" if protocol == "fixed" else "")[0] for name in ("m_viou", "tiou")]
        assert found == [pytest.approx(100 * viou * scale, abs=1e-3), pytest.approx(100 * tiou, abs=1e-3)]


def test_measures_equal_sums_over_frames() -> None:
    """Random tubes, spans and boxes, frame by frame."""
    random = np.random.default_rng(3)
    for _ in range(300):
        count = int(random.integers(2, 12))
        start, end = sorted(random.integers(0, count + 1, 2).tolist())
        first, last = random.integers(0, count + 2, 2).tolist()
        query = grounding.Query("", "", "", Path(), (9, 9), tuple(range(count)), 0, (start, end), ("", ""))
        predicted, annotated = (np.sort(random.random((count, 2, 2)), 1).reshape(count, 4) for _ in range(2))
        predicted[random.random(count) < 0.3] = np.nan
        annotated[[not start <= frame < end for frame in range(count)]] = np.nan
        ious = grounding.box_ious(predicted, annotated)
        text = f"frames:({first},{last})" if random.random() < 0.7 else ""

        fixed = grounding.fixed_measures(query, predicted, annotated, text, True)
        original = grounding.original_measures(query, predicted, annotated, text, True)

        tube = set(range(start, end))
        claimed = set(range(first, last + 1)) & set(range(count)) if text else {t for t in range(count) if predicted[t, 0] >= 0}
        if not tube:
            assert fixed is not None and original is not None and not any([*fixed.values(), *original.values()])
            continue
        assert fixed is not None and original is not None
        assert fixed["gt_viou"] == pytest.approx(sum(ious[t] for t in tube) / len(tube)) == original["gt_viou"]
        assert fixed["m_viou"] == pytest.approx(sum(ious[t] for t in tube & claimed) / len(tube | claimed))
        assert fixed["tiou"] == pytest.approx(len(tube & claimed) / len(tube | claimed))
        begin, stop = (first, last) if text else (0, 0)
        union = [t for t in range(count) if min(start, begin) <= t < max(end - 1, stop)]
        both = [t for t in range(count) if max(start, begin) <= t < min(end - 1, stop)]
        shared = min(end - 1, stop) - max(start, begin)
        assert original["m_viou"] == pytest.approx(sum(ious[t] for t in both) / max(len(union), 1))
        assert original["tiou"] == pytest.approx(shared / (end - 1 - start + stop - begin - shared) if shared > 0 else 0)


def test_hcstvg_boxes_belong_to_the_frames_that_are_shown(hcstvg: Path, tmp_path: Path) -> None:
    moved = block(3, frames=[0, 1]) | block(3, (21, 10, 31, 20), [2])  # frames 30, 40 and 60

    scores = scored(HcStvg(hcstvg, "val"), {"55_abc.d": ("", moved)}, tmp_path, "fixed")

    assert values(scores, "tracked_gt_viou") == [100, 0]
    assert {figure.workload for figure in scores.figures} == {""}, "there is one kind of question"


def test_blobs_do_not_widen_a_box(vidstg: Path, tmp_path: Path) -> None:
    masks = block(4)
    masks[:, 200:204, 200:204] = True  # 16 px

    scores = scored(VidStg(vidstg, "test"), {"2401/2": ("", masks)}, tmp_path, "original")

    assert values(scores, "tracked_gt_viou") == [pytest.approx(100 * (39 / 40) ** 2, abs=1e-3)]


def rebox(root: Path, boxes: Mapping[int, Mapping[int, Sequence[float]]]) -> None:
    write(root / "vidstg/vidor_annotations/validation/0054/2401.json", vidor(boxes, 60))


@pytest.mark.parametrize("bad", [None, (30, 10, 20, 20), (70, 10, 90, 20)])
def test_a_frame_without_a_box_is_left_out_or_fails_the_sample(vidstg: Path, tmp_path: Path, bad: Sequence[float] | None) -> None:
    boxes = {frame: {1: BOX, 2: (0, 0, 8, 8)} for frame in range(60)}
    boxes[30] = {2: (0, 0, 8, 8), **({1: bad} if bad else {})}  # type: ignore[dict-item]
    rebox(vidstg, boxes)
    answers: Answers = {"2401/0": ("", block(4, frames=[0, 1, 2])), "2401/1": ("", None)}

    fixed, original = (scored(VidStg(vidstg, "test"), answers, tmp_path, protocol) for protocol in ("fixed", "original"))

    assert values(fixed, "tracked_gt_viou", "interrogative") == [pytest.approx(200 / 3, abs=1e-3), 0]
    assert values(original, "tracked_gt_viou") == [0]
    assert original.rows[0]["note"] == grounding.NO_BOXES
    assert VidStg(vidstg, "test").problems() == [
        "2401: no box of target 1 on 1 of 4 frames of a tube, the first 30. Fetch its annotations again if they should be there."
    ]


def test_boxes_are_cut_at_the_frame(vidstg: Path, tmp_path: Path) -> None:
    rebox(vidstg, {frame: {1: (-10, 10, 30, 90), 2: (0, 0, 8, 8)} for frame in range(60)})

    scores = scored(VidStg(vidstg, "test"), {"2401/0": ("", block(4, (0, 10, 30, 56)))}, tmp_path, "fixed")

    assert values(scores, "tracked_gt_viou")[0] == 100


def test_score_writes_boxes_in_px_of_the_video(vidstg: Path, tmp_path: Path) -> None:
    answers: Answers = {"2401/0": ("", block(4, frames=[1]))}

    scores = scored(VidStg(vidstg, "test"), answers, tmp_path, "fixed", ["tracked", "framewise"])

    written = {branch: json.loads((tmp_path / f"{branch}_boxes.json").read_text()) for branch in ("tracked", "framewise")}
    annotated = [list(BOX)] * 4
    assert written["tracked"] == {"2401/0": {"frames": [15, 20, 30, 40], "boxes": [None, list(BOX), None, None], "annotated": annotated}}
    assert written["framewise"]["2401/0"]["boxes"] == [None] * 4
    assert values(scores, "tracked_gt_viou")[0] == 25 and values(scores, "framewise_gt_viou")[0] == 0


def test_score_refuses_an_answer_about_other_frames(vidstg: Path, tmp_path: Path) -> None:
    samples = VidStg(vidstg, "test").samples()
    predictions = {samples[0].key: answer(samples[0], "", block(4))}

    with pytest.raises(DatasetError, match=r"2401/0: got an answer about frames \[4, 224, 224\], expected \[6, 224, 224\]"):
        VidStg(vidstg, "test-whole").score(lambda sample: predictions[sample.key], samples[:1], ["tracked"], tmp_path, "fixed")


def test_problems_of_whole_data_sets_are_none(vidstg: Path, hcstvg: Path) -> None:
    assert VidStg(vidstg, "test").problems() == VidStg(vidstg, "test-whole").problems() == []
    assert HcStvg(hcstvg, "val").problems() == HcStvg(hcstvg, "val-whole").problems() == []


def lines(benchmark: Grounding, root: Path) -> list[str]:
    return [line.replace(str(root), "ROOT") for line in benchmark.problems()]


def test_problems_names_what_is_missing(vidstg: Path) -> None:
    (vidstg / "vidstg/video/1000/7.mp4").unlink()
    (vidstg / "vidstg/vidor_annotations/validation/0054/2401.json").unlink()

    assert lines(VidStg(vidstg, "test"), vidstg) == [
        "2 of 2 videos are missing, the first ROOT/vidstg/video/*/2401.mp4. Fetch them.",
        "1 of 2 annotations are missing, the first ROOT/vidstg/vidor_annotations/validation/*/2401.json. Fetch them.",
    ]
    with pytest.raises(DatasetError, match=r"got 3 of 4 files missing, the first .*2401.mp4, expected a whole data set. --check-data"):
        VidStg(vidstg, "test").samples()


def test_problems_names_videos_that_are_cut_off_or_unreadable(vidstg: Path) -> None:
    first, second = (vidstg / "vidstg/video" / name for name in ("0054/2401.mp4", "1000/7.mp4"))
    write_video(first, 30)
    second.write_bytes(second.read_bytes()[:500])

    found = lines(VidStg(vidstg, "test"), vidstg)

    assert found[0] == "ROOT/vidstg/video/0054/2401.mp4: got 30 frames, expected 41 or more as annotated. Fetch it again."
    assert found[1].startswith("ROOT/vidstg/video/1000/7.mp4: not a readable video") and len(found) == 2


def test_problems_names_a_video_of_another_size(vidstg: Path) -> None:
    write_video(vidstg / "vidstg/video/1000/7.mp4", 60, side=64)

    assert lines(VidStg(vidstg, "test"), vidstg) == [
        "ROOT/vidstg/video/1000/7.mp4: got 64x64 px, expected 56x56 as annotated. Fetch it again."
    ]


@pytest.mark.parametrize(
    ("moved", "line"),
    [
        ("vidstg/vidstg_annotations/test_annotations.json", "missing; ROOT/vidstg/vidstg_annotations holds moved."),
        ("vidstg/vidor_annotations/validation", "missing; ROOT/vidstg/vidor_annotations holds moved."),
        ("vidstg/video", "missing; ROOT/vidstg holds moved, vidor_annotations, vidstg_annotations."),
    ],
)
def test_problems_names_folders_of_other_names(vidstg: Path, moved: str, line: str) -> None:
    (vidstg / moved).rename((vidstg / moved).parent / "moved")

    assert lines(VidStg(vidstg, "test"), vidstg) == [f"ROOT/{moved}: {line} Fetch it, or give it this name."]


def test_broken_annotations_are_one_line(vidstg: Path, hcstvg: Path) -> None:
    write(vidstg / "vidstg/vidor_annotations/validation/0054/2401.json", {"video_id": "2401"})
    write(hcstvg / "hcstvg/anno_v2/val_v2.json", {"55_abc.d.mp4": {"img_num": 400}})

    assert lines(VidStg(vidstg, "test"), vidstg) == [
        "ROOT/vidstg/vidor_annotations/validation/0054/2401.json: not the annotations that were expected (KeyError: 'trajectories'). "
        "Fetch it again."
    ]
    assert lines(HcStvg(hcstvg, "val"), hcstvg) == [
        "ROOT/hcstvg/anno_v2/val_v2.json: not the annotations that were expected (KeyError: 'st_frame'). Fetch it again."
    ]


def test_a_tube_that_no_shown_frame_lies_in_counts_as_nothing(vidstg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((path := vidstg / "vidstg/vidstg_annotations/test_annotations.json").read_text())
    content[0]["temporal_gt"] = {"begin_fid": 22, "end_fid": 28}
    write(path, content)
    benchmark = VidStg(vidstg, "test-whole")

    assert benchmark.problems() == []
    for protocol in ("fixed", "original"):
        scores = scored(benchmark, {"2401/0": ("", block(6))}, tmp_path, protocol)
        assert {values(scores, f"tracked_{name}")[0] for name in ("gt_viou", "m_viou", "tiou")} == {0}
    assert "3 of 4 tubes are shorter than the time between two frames and count as 0." in capsys.readouterr().err


def test_a_tube_without_any_box_has_failed(vidstg: Path, tmp_path: Path) -> None:
    rebox(vidstg, {})
    answers: Answers = {"2401/0": ("", block(4))}

    fixed, original = (scored(VidStg(vidstg, "test"), answers, tmp_path, protocol) for protocol in ("fixed", "original"))

    assert fixed.rows[0]["failure"] == original.rows[0]["note"] == grounding.NO_BOXES
    assert len(values(fixed, "tracked_gt_viou")) == 3 and not original.figures
