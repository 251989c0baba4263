"""VideoGCG in its layout, two videos of BURST and YouTube-VIS, one of MeViS, one of VidSTG; its measures against oracles and by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco

from benchmarks.evaluation import captions, video_gcg
from benchmarks.evaluation.annotations import without_blobs
from benchmarks.evaluation.samples import DatasetError, Prediction, Sample, Scores
from benchmarks.evaluation.video_gcg import BurstYtvis, Entry, Mevis, Texts, VideoGcg, VidStgGcg

FRAMES, HEIGHT, WIDTH = 3, 40, 48
PROMPT = (
    "Could you please give me a detailed description of the video? "
    "Please respond with interleaved segmentation masks for the corresponding parts of the answer."
)


def block(top: int, left: int, height: int = 10, width: int = 10, frames: Sequence[int] = range(FRAMES)) -> NDArray[np.bool_]:
    """[T, H, W]: a rectangle on some frames."""
    masks = np.zeros((FRAMES, HEIGHT, WIDTH), bool)
    masks[list(frames), top : top + height, left : left + width] = True
    return masks


LEFT, RIGHT, BOTTOM = block(0, 0), block(0, 20), block(25, 0, frames=[1, 2])


def rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    encoded = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def runs(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Uncompressed RLE: lengths of runs down the columns, beginning with zeros."""
    flat = np.concatenate([[False], mask.T.ravel(), [not mask.T.ravel()[-1]]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    return {"size": list(mask.shape), "counts": np.diff([0, *ends]).tolist()}


def segmentations(masks: NDArray[np.bool_], form: Any = rle) -> list[Any]:
    return [form(mask) if mask.any() else None for mask in masks]


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(shade).integers(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder `video_dataset`."""
    root = tmp_path / "video_dataset"
    caption = "A dog chases two cats ."
    videos = [
        described("yt19", "0043f0", [1, 4, 4], [11, 12, 13], caption),
        described("burst", "YFCC100M/v_1", [1], [14], "One man walks."),
    ]
    videos[1]["metadata"] = {"dataset": videos[1].pop("dataset_split")}
    masks = {11: segmentations(LEFT), 12: segmentations(RIGHT, runs), 13: segmentations(BOTTOM), 14: segmentations(RIGHT)}
    annotations = [{"id": key, "video_id": 0, "segmentations": own} for key, own in masks.items()]
    write(root / "video_gcg/instruction_data/test.json", {"videos": videos, "annotations": annotations})
    for index in range(FRAMES):
        picture(root / f"ytvis/vos/train/JPEGImages/0043f0/{index:05d}.jpg", index)
        picture(root / f"burst/frames/val/YFCC100M/v_1/{index:05d}.jpg", index)
        picture(root / f"mevis/valid_u/JPEGImages/abc/{index:05d}.jpg", index)
        picture(root / f"vidstg_gcg/val/2401/frames/{7 * index:06d}.png", index)
        for one, own in ((3, LEFT), (12, BOTTOM)):
            path = root / f"vidstg_gcg/val/2401/masks/{one:03d}/{7 * index:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(own[index].astype(np.uint8) * 255).save(path)
    expressions = {"0": {"exp": "Dog", "obj_id": [0], "anno_id": [70]}, "1": {"exp": "all", "obj_id": [0, 1], "anno_id": [70, 71]}}
    write(root / "mevis/valid_u/meta_expressions.json", {"videos": {"abc": {"expressions": expressions, "frames": frame_names()}}})
    write(root / "mevis/valid_u/mask_dict.json", {"70": segmentations(LEFT), "71": segmentations(BOTTOM)})
    write(root / "mevis_gcg/valid_u/abc.json", {"caption": "A [black dog](0) meets [two others](0, 1)."})
    write(root / "vidstg_gcg/val_captions/2401.json", {"caption": "there is an [adult](3) beside [two children](12, 3)"})
    return root


def described(split: str, folder: str, positions: list[int], ids: list[int], caption: str) -> dict[str, Any]:
    return {
        "dataset_split": split,
        "file_names": [f"{folder}/{name}.jpg" for name in frame_names()],
        "height": HEIGHT,
        "width": WIDTH,
        "length": FRAMES,
        "dense_cap": {"v_id2o_id": {}, "token_pos": positions, "mask_id": ids, "caption": caption},
    }


def frame_names() -> list[str]:
    return [f"{index:05d}" for index in range(FRAMES)]


def answer(sample: Sample, text: str, masks: Sequence[NDArray[np.bool_]], phrases: Sequence[str]) -> Prediction:
    """Both branches have the same masks."""
    counts = [[rle(mask)["counts"] for mask in own] for own in masks]
    return Prediction(
        prompt=sample.prompt,
        answer=text,
        preset="tiny",
        phrases=list(phrases),
        selected_boxes=[np.zeros((0, 4), np.float32)] * len(phrases),
        proposals=np.zeros((0, 4), np.float32),
        size=(FRAMES, HEIGHT, WIDTH),
        tracks={"tracked": counts, "framewise": counts},
    )


def scored(benchmark: VideoGcg, answers: Mapping[str, tuple[str, Sequence[Any], Sequence[str]]], out: Path, protocol: str) -> Scores:
    """The given videos alone are answered."""
    samples = [sample for sample in benchmark.samples() if sample.key in answers]
    return benchmark.score(lambda sample: answer(sample, *answers[sample.key]), samples, ["tracked"], out, protocol)


def values(scores: Scores, metric: str, workload: str = "") -> list[float]:
    (figure,) = [figure for figure in scores.figures if (figure.metric, figure.workload) == (metric, workload)]
    return [round(value, 6) for value in figure.samples]


@pytest.fixture(autouse=True)
def scored_captions(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """References and captions that were scored; METEOR takes 8 s."""
    given: list[Sequence[str]] = []

    def scores(references: Sequence[str], captions: Sequence[str]) -> dict[str, list[float]]:
        given[:] = [references, captions]
        return {"cider": [10.0] * len(captions), "bleu_4": [5.0]}

    monkeypatch.setattr(video_gcg, "caption_scores", scores)
    return given


def same_words(one: str, other: str) -> float:
    """Stands for BERT."""
    return float(one == other)


ANSWER = "A <p> dog </p> [BOX] [SEG] chases <p> cats </p> [BOX] [SEG].<|end|>"
KEY = "burst-ytvis/000000"


def test_samples_are_every_part_in_sorted_order_with_all_frames(root: Path) -> None:
    samples = VideoGcg(root, "all").samples()

    assert [sample.key for sample in samples] == ["burst-ytvis/000000", "burst-ytvis/000001", "mevis/abc", "vidstg/2401"]
    assert {sample.prompt for sample in samples} == {PROMPT}
    assert [sample.clip.pictures[-1].relative_to(root).as_posix() for sample in samples] == [
        "ytvis/vos/train/JPEGImages/0043f0/00002.jpg",
        "burst/frames/val/YFCC100M/v_1/00002.jpg",
        "mevis/valid_u/JPEGImages/abc/00002.jpg",
        "vidstg_gcg/val/2401/frames/000014.png",
    ]
    assert {len(sample.clip.pictures) for sample in samples} == {FRAMES}


def test_a_split_is_one_part_and_needs_no_other(root: Path) -> None:
    (root / "video_gcg/instruction_data/test.json").unlink()

    assert [sample.key for sample in VideoGcg(root, "mevis").samples()] == ["mevis/abc"]


def test_videos_come_in_sorted_order_whatever_the_directory_says(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "a"):
        write(root / f"vidstg_gcg/val_captions/{name}.json", {"caption": "there is an [adult](3)"})
        (root / "vidstg_gcg/val" / name).symlink_to(root / "vidstg_gcg/val/2401")
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter(sorted(glob(path, pattern), reverse=True)))

    assert [sample.key for sample in VideoGcg(root, "vidstg").samples()] == ["vidstg/2401", "vidstg/a", "vidstg/b"]


@pytest.mark.parametrize(
    ("kind", "index", "caption", "phrases", "masks"),
    [
        (BurstYtvis, 0, "A <p> dog </p> [SEG] chases two <p> cats </p> [SEG] .", ("dog", "cats"), (LEFT, RIGHT | BOTTOM)),
        (BurstYtvis, 1, "One <p> man </p> [SEG] walks.", ("man",), (RIGHT,)),
        (
            Mevis,
            0,
            "A <p> black dog </p> [SEG] meets <p> two others </p> [SEG].",
            ("black dog", "two others"),
            (LEFT, LEFT | BOTTOM),
        ),
        (
            VidStgGcg,
            0,
            "there is an <p> adult </p> [SEG] beside <p> two children </p> [SEG]",
            ("adult", "two children"),
            (LEFT, LEFT | BOTTOM),
        ),
    ],
)
def test_phrases_and_masks_are_the_annotated_ones(
    root: Path, kind: type, index: int, caption: str, phrases: tuple[str, ...], masks: tuple[NDArray[np.bool_], ...]
) -> None:
    part = kind(root)
    entry = part.entries[index]

    assert (entry.caption, entry.phrases, entry.fault) == (caption, phrases, "")
    for track, expected in zip(part.tracks(entry, "fixed"), masks, strict=True):
        np.testing.assert_array_equal([coco.decode(mask) if mask else np.zeros((HEIGHT, WIDTH)) for mask in track], expected)


def test_original_takes_the_first_of_several_objects_of_vidstg(root: Path) -> None:
    part = VidStgGcg(root)

    tracks = part.tracks(part.entries[0], "original")

    np.testing.assert_array_equal([coco.decode(mask) for mask in tracks[1] if mask], BOTTOM[1:])


def test_without_blobs_keeps_parts_of_20_px_that_touch_side_by_side() -> None:
    scipy = pytest.importorskip("scipy.ndimage")
    masks = np.random.default_rng(0).random((6, 30, 50)) < np.linspace(0.3, 0.65, 6)[:, None, None]
    expected = np.zeros_like(masks)
    for mask, kept in zip(masks, expected, strict=True):
        labels, count = scipy.label(mask)
        for label in range(1, count + 1):
            kept |= (labels == label) & ((labels == label).sum() >= 20)

    cleaned = np.stack([without_blobs(mask) for mask in masks])

    assert (cleaned.sum((1, 2)) < masks.sum((1, 2))).all() and cleaned[-1].any()
    np.testing.assert_array_equal(cleaned, expected)
    diagonal = np.zeros((10, 10), bool)
    diagonal[:2, :5] = diagonal[2:4, 5:] = True  # 10 px each, corner to corner
    assert not without_blobs(diagonal).any()


def test_track_iou_is_that_of_the_volumes() -> None:
    random = np.random.default_rng(1)
    for density in (0.0, 0.01, 0.3, 0.7):
        one, other = random.random((2, 5, 12, 9)) < density
        one[2] = other[3] = False
        union = (one | other).sum()
        expected = (one & other).sum() / union if union else 1.0

        assert video_gcg.track_iou(video_gcg.encoded(one), video_gcg.encoded(other)) == pytest.approx(expected, abs=1e-12)


def test_mean_iou_by_hand() -> None:
    table = np.array([[0.9, 0.6, 0.0], [0.8, 0.0, 0.0]])  # 2 phrases, 3 masks: 0.9 goes first, and leaves 0 for the second phrase

    assert video_gcg.original_mean_iou(table) == pytest.approx(0.9)
    assert video_gcg.mean_iou(table) == pytest.approx(0.9 / 3)
    assert video_gcg.mean_iou(table[:, :1]) == pytest.approx(0.9 / 2)
    assert [video_gcg.mean_iou(np.zeros(shape)) for shape in ((2, 0), (0, 2), (0, 0))] == [0, 0, 1]
    assert [video_gcg.original_mean_iou(np.zeros(shape)) for shape in ((2, 0), (2, 3))] == [0, 0]


def test_mean_iou_equals_a_search_over_all_pairs() -> None:
    random = np.random.default_rng(2)
    for _ in range(200):
        table = random.random(random.integers(1, 6, 2)) * (random.random() < 0.9)
        table[random.random(table.shape) < 0.4] = 0
        rows, columns, chosen = set[int](), set[int](), []
        for value, row, column in sorted(((table[i], *i) for i in np.ndindex(*table.shape)), reverse=True):
            if value > 0 and row not in rows and column not in columns:
                chosen.append(value)
                rows.add(row)
                columns.add(column)

        assert video_gcg.mean_iou(table) == pytest.approx(sum(chosen) / max(table.shape))
        assert video_gcg.original_mean_iou(table) == pytest.approx(sum(chosen) / len(chosen) if chosen else 0)


def test_recall_by_hand() -> None:
    table = np.array([[0.9, 0.0], [0.0, 0.6]])

    def count(found: Any, named: list[str]) -> int:
        return found(table, ["dog", "cat"], named, same_words)  # type: ignore[no-any-return]

    assert count(video_gcg.found, ["dog", "cat"]) == count(video_gcg.original_found, ["dog", "cat"]) == 2
    assert count(video_gcg.found, ["bird", "cat"]) == 1
    assert count(video_gcg.original_found, ["bird", "cat"]) == 0, "the best pair is named otherwise: the search ends"
    assert count(video_gcg.original_found, ["dog", "bird"]) == 1
    with pytest.raises(IndexError):
        count(video_gcg.original_found, ["dog"])
    assert video_gcg.original_found(table * 0.5, ["dog", "cat"], [], same_words) == 0, "0.45 is too little to look for a phrase"
    assert video_gcg.found(np.array([[0.8, 0.7], [0.6, 0.0]]), ["dog", "dog"], ["dog", "dog"], same_words) == 1


def test_texts_are_the_answer_alone_or_with_the_template() -> None:
    prediction = answer(Sample("", None, PROMPT), ANSWER, [LEFT, RIGHT], ["dog", "cats"])  # type: ignore[arg-type]
    entry = Entry("mevis", "abc", caption="A <p> dog </p> [SEG] runs.")

    fixed, original = (Texts.of(entry, prediction, protocol) for protocol in ("fixed", "original"))

    assert fixed == Texts(ANSWER, "A dog chases cats .", "A dog runs.", ("dog", "cats"))
    assert original.caption == f"You are a helpful AI assistant. {PROMPT} A dog [BOX] chases cats [BOX] ."
    assert original.answer.startswith("<|system|> You are") and original.answer.endswith(ANSWER)
    assert (original.reference, original.phrases) == ("A dog runs.", ("dog", "cats"))
    assert captions.original_clean(captions.original_text("", "one\ntwo  three")).endswith("onetwo three"), "as the original cuts lines"


@pytest.mark.parametrize(
    ("protocol", "miou", "recall"),
    [
        ("fixed", [100 / 2, 0, 0, 0], [100, 0] + 5 * [0]),  # the phrase without a mask counts, and so do the videos without an answer
        ("original", [100, 0, 0, 0], [100, 0]),  # of those without an answer the phrases are forgotten
    ],
)
def test_score_counts_what_was_missed(root: Path, tmp_path: Path, protocol: str, miou: list[float], recall: list[float]) -> None:
    benchmark = VideoGcg(root, "all")
    benchmark.alike = same_words  # type: ignore[assignment]

    scores = scored(benchmark, {KEY: ("A <p> dog </p> [SEG].", [LEFT], ["dog"])}, tmp_path, protocol)

    assert values(scores, "tracked_miou") == miou
    assert values(scores, "tracked_recall") == recall
    assert values(scores, "tracked_miou", "burst-ytvis") == miou[:2]
    assert values(scores, "tracked_miou", "vidstg") == [0]
    (row,) = scores.rows
    assert list(row)[:3] == ["sample", "prompt", "answer"]
    assert (row["sample"], row["tracked_miou"], row["tracked_found"]) == (KEY, miou[0], "1 of 2")


def test_score_where_the_original_stumbles_over_a_mask_without_a_phrase(root: Path, tmp_path: Path) -> None:
    benchmark = VideoGcg(root, "burst-ytvis")
    benchmark.alike = same_words  # type: ignore[assignment]
    answers = {KEY: ("A <p> dog </p> [SEG] and [SEG].", [LEFT, RIGHT | BOTTOM], ["dog", "and"])}

    original, fixed = (scored(benchmark, answers, tmp_path, protocol) for protocol in ("original", "fixed"))

    assert values(original, "tracked_miou") == [100, 0, 0], "its own, one for having stumbled, one without an answer"
    assert values(original, "tracked_recall") == [0, 0, 0, 0]
    assert values(fixed, "tracked_recall") == [100, 0, 0]
    assert values(fixed, "cider") == [10, 10] and values(fixed, "bleu_4") == [5]
    benchmark.alike = None
    without = scored(benchmark, answers, tmp_path, "original")
    assert values(without, "tracked_miou") == [100, 0], "without BERT it does not look for phrases, and does not stumble"
    assert not [figure for figure in without.figures if "recall" in figure.metric]


def test_captions_that_are_scored(root: Path, tmp_path: Path, scored_captions: list[Sequence[str]]) -> None:
    benchmark = VideoGcg(root, "burst-ytvis")
    answers = {KEY: (ANSWER + 500 * " word", [LEFT, RIGHT], ["dog", "cats"])}

    scored(benchmark, answers, tmp_path, "fixed")
    assert scored_captions == [["A dog chases two cats .", "One man walks."], ["A dog chases cats ." + 500 * " word", ""]]

    scored(benchmark, answers, tmp_path, "original")
    assert scored_captions[0] == ["A dog chases two cats .", ""], "of a video without an answer the original loses both"
    assert [len(text) for text in scored_captions[1]] == [2000, 0]

    benchmark.alike = same_words  # type: ignore[assignment]
    scored(benchmark, {KEY: ("A [SEG].", [LEFT], [""])}, tmp_path, "original")
    assert scored_captions == [["A dog chases two cats .", ""], ["", ""]], "it stumbled"


def test_original_pairs_phrases_with_masks_in_the_order_of_folder_names() -> None:
    tracks = [video_gcg.encoded(block(index, 0, 1, 20)) for index in range(11)]
    names = tuple(f"object {index}" for index in range(11))
    entry = Entry("mevis", "abc", phrases=names, objects=(("0",),) * 11)

    def outcome(protocol: str, masks: list[video_gcg.Track], *named: str) -> video_gcg.Outcome:
        return video_gcg.compare(entry, tracks, masks, Texts("", "", "", named), same_words, protocol)

    for protocol in ("fixed", "original"):
        assert outcome(protocol, tracks, *names).hits == (1,) * 11, "annotated ones and those of the answer are in the same order"
    for name, protocol, count in (("object 10", "fixed", 1), ("object 10", "original", 0), ("object 2", "original", 1)):
        hits = outcome(protocol, tracks[10:], name).hits
        assert sum(hits) == count, "folder gt_masks_10 is the third, so that it gets the third phrase"


def test_blobs_do_not_count(root: Path, tmp_path: Path) -> None:
    masks = LEFT.copy()
    masks[:, 30:34, 30:34] = True  # 16 px

    scores = scored(VideoGcg(root, "mevis"), {"mevis/abc": ("", [masks], ["dog"])}, tmp_path, "original")

    assert values(scores, "tracked_miou") == [100]


@pytest.mark.parametrize("protocol", ["fixed", "original"])
def test_score_writes_what_the_original_reads_again(root: Path, tmp_path: Path, protocol: str) -> None:
    benchmark = VideoGcg(root, "all")
    answers = {sample.key: (ANSWER, [LEFT, BOTTOM], ["dog", "cats"]) for sample in benchmark.samples()}
    (tmp_path / "tracked/video_gcg/000002/pred_masks_7").mkdir(parents=True)  # of an earlier answer

    scored(benchmark, answers, tmp_path, protocol)

    folder = tmp_path / "tracked/video_gcg/000002"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("gt_masks_0", "gt_masks_1", "img_frames", "pred_masks_0", "pred_masks_1", "res.json"),
    ]
    for name, masks in (("gt_masks_1", LEFT | BOTTOM), ("pred_masks_1", BOTTOM)):
        written = [np.asarray(Image.open(folder / name / f"mask_{index}.png")) for index in range(FRAMES)]
        np.testing.assert_array_equal(written, masks * np.uint8(255))
    assert Image.open(folder / "img_frames/frame_2.jpg").size == (WIDTH, HEIGHT)
    result = json.loads((folder / "res.json").read_text())
    assert result["gt_text"] == "A <p> black dog </p> [SEG] meets <p> two others </p> [SEG]."
    assert result["gt_text_cleaned"] == "A black dog meets two others ."
    assert (result["gt_phrases"], result["pred_phrases"]) == (["black dog", "two others"], ["dog", "cats"])
    assert result["pred_text_cleaned"].startswith("A dog chases" if protocol == "fixed" else "You are a helpful AI assistant. Could")
    assert set(result) == {"gt_text", "gt_text_cleaned", "gt_phrases", "pred_text", "pred_text_cleaned", "pred_phrases"}


def test_both_branches_have_figures(root: Path, tmp_path: Path) -> None:
    benchmark = VideoGcg(root, "mevis")
    (sample,) = benchmark.samples()

    scores = benchmark.score(lambda sample: answer(sample, "", [LEFT], ["dog"]), [sample], ["tracked", "framewise"], tmp_path, "fixed")

    assert values(scores, "framewise_miou") == values(scores, "tracked_miou") == [50]
    assert (tmp_path / "framewise/video_gcg/000000/res.json").exists()


def test_score_refuses_an_answer_about_other_frames(root: Path, tmp_path: Path) -> None:
    write(root / "mevis/valid_u/mask_dict.json", {key: segmentations(LEFT[:, :-1]) for key in ("70", "71")})

    with pytest.raises(DatasetError, match=r"mevis/abc: got annotated masks \[3, 39, 48\], expected \[3, 40, 48\]"):
        scored(VideoGcg(root, "mevis"), {"mevis/abc": ("", [LEFT], ["dog"])}, tmp_path, "fixed")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A random BERT in the layout of bert-base-uncased."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "cat", "black", "white", "two"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    config = transformers.BertConfig(vocab_size=10, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    transformers.set_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_phrase_similarity_is_the_cosine_of_mean_states(bert: Path) -> None:
    import torch
    from transformers import BertModel

    model = BertModel.from_pretrained(bert).eval()
    ids = {"black dog": [2, 7, 5, 3], "cat": [2, 6, 3]}
    with torch.no_grad():
        means = [model(torch.tensor([own])).last_hidden_state[0].mean(0) for own in ids.values()]
    expected = float(torch.cosine_similarity(*means, dim=0))

    alike = captions.PhraseSimilarity(bert)

    assert alike("Black dog", "cat") == pytest.approx(expected, abs=1e-5)
    assert alike("cat", "cat") == pytest.approx(1, abs=1e-6)
    assert expected < 0.99


def test_bert_is_named_by_the_argument_or_the_environment(root: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert VideoGcg(root, "mevis", bert).alike is not None
    monkeypatch.setenv("SPARROW_BERT", str(bert))
    benchmark = VideoGcg(root, "mevis")
    assert values(scored(benchmark, {"mevis/abc": ("", [LEFT], ["black dog"])}, tmp_path, "fixed"), "tracked_recall") == [100, 0]
    with pytest.raises(DatasetError, match=r"nowhere: got no config.json, expected the folder of bert-base-uncased. Check --bert"):
        VideoGcg(root, "mevis", Path("nowhere"))
    (bert / "config.json").write_text("{}")
    with pytest.raises(DatasetError, match="not a model that transformers reads"):
        captions.PhraseSimilarity(bert)("dog", "cat")


def test_without_bert_the_run_says_that_recall_is_left_out(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SPARROW_BERT", raising=False)

    scores = scored(VideoGcg(root, "mevis"), {"mevis/abc": ("", [LEFT], ["dog"])}, tmp_path, "fixed")

    assert "Recall is left out: it compares phrases by BERT. Give its folder with --bert or $SPARROW_BERT." in capsys.readouterr().err
    assert "tracked_recall" not in {figure.metric for figure in scores.figures}


REFERENCES = ("a man rides a red bike on the street", "two dogs run in the park", "a cat sleeps on a sofa")


def test_caption_scores_without_the_library_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)

    assert captions.caption_scores(["a"], ["a"]) == {}
    assert "pycocoevalcap is not installed. pip install pycocoevalcap" in capsys.readouterr().err


def test_caption_scores_without_java_are_all_but_meteor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr("shutil.which", lambda name: None)

    scores = captions.caption_scores(REFERENCES, [REFERENCES[0], "Two dogs swim.", ""])

    assert "METEOR is left out" in capsys.readouterr().err
    assert set(scores) == {"cider", "rouge_l", "bleu_4"}
    assert scores["rouge_l"][0] == pytest.approx(100)
    # Longest common part "two dogs": 2 of 3 and 2 of 6 words, beta 1.2.
    assert scores["rouge_l"][1] == pytest.approx(100 * 2.44 * (2 / 3) * (2 / 6) / (2 / 6 + 1.44 * 2 / 3))
    assert scores["cider"][0] == pytest.approx(1000)
    assert scores["cider"][2] == 0
    assert [len(own) for own in scores.values()] == [3, 3, 1]
    assert captions.caption_scores(REFERENCES, REFERENCES)["bleu_4"] == [pytest.approx(100, abs=1e-3)]


def test_words_are_split_as_the_tokenizer_of_the_library_does(java: None) -> None:
    texts = [
        "A man's dog can't run; it doesn't (really) move - well-dressed people, don't they?",
        "You are a helpful AI assistant. A dog [BOX] \"quoted\" cannot... 3.5 m & 50% I'm they're we've red/white",
        "",
        "there is an adult, in black  pants: he moves!",
        "",
    ]

    assert captions.split_all(texts) == [captions.split(text) for text in texts]


def test_meteor_is_that_of_the_library(java: None) -> None:
    scores = captions.caption_scores(REFERENCES, ["A man is riding a bike.", "Two dogs run in the park.", ""])

    assert scores["meteor"] == [pytest.approx(29.17, abs=0.01)]
    assert scores["cider"][1] == pytest.approx(1000)


@pytest.fixture
def java() -> None:
    pytest.importorskip("pycocoevalcap")
    if not captions.shutil.which("java"):
        pytest.skip("no java")


def test_problems_of_a_whole_data_set_are_none(root: Path) -> None:
    assert VideoGcg(root, "all").problems() == []


def lines(root: Path, split: str) -> list[str]:
    return [line.replace(str(root), "ROOT") for line in VideoGcg(root, split).problems()]


def test_problems_names_missing_and_broken_frames(root: Path) -> None:
    folder = root / "ytvis/vos/train/JPEGImages/0043f0"
    (folder / "00000.jpg").unlink()
    (folder / "00001.jpg").write_bytes((folder / "00001.jpg").read_bytes()[:-400])
    Image.new("RGB", (20, 20)).save(root / "burst/frames/val/YFCC100M/v_1/00002.jpg")
    (root / "vidstg_gcg/val/2401/masks/012/000007.png").write_bytes(b"")

    who = f"{KEY}: 1 of 3 pictures"
    assert lines(root, "all") == [
        f"{who} are missing, the first ROOT/ytvis/vos/train/JPEGImages/0043f0/00000.jpg. Fetch them again.",
        f"{who} are unreadable, the first ROOT/ytvis/vos/train/JPEGImages/0043f0/00001.jpg. Fetch them again.",
        "burst-ytvis/000001: 1 of 3 pictures are not 48x40 px, the first ROOT/burst/frames/val/YFCC100M/v_1/00002.jpg. Fetch them again.",
        "vidstg/2401, masks: 1 of 6 pictures are unreadable, the first ROOT/vidstg_gcg/val/2401/masks/012/000007.png. Fetch them again.",
    ]
    with pytest.raises(DatasetError, match=r"got 1 of 18 files missing, the first .*0043f0/00000.jpg, expected a whole data set"):
        VideoGcg(root, "all").samples()


def test_problems_names_folders_of_other_names(root: Path) -> None:
    (root / "mevis").rename(root / "MeViS")
    (root / "burst/frames/val").rename(root / "burst/frames/validation")
    (root / "vidstg_gcg/val_captions").rename(root / "vidstg_gcg/captions")

    held = "ROOT holds MeViS, burst, mevis_gcg, video_gcg, vidstg_gcg, ytvis. Fetch it, or give it this name."
    assert lines(root, "all") == [
        "ROOT/burst/frames/val: missing; ROOT/burst/frames holds validation. Fetch it, or give it this name.",
        f"ROOT/mevis/valid_u/meta_expressions.json: missing; {held}",
        "ROOT/vidstg_gcg/val_captions: missing; ROOT/vidstg_gcg holds captions, val. Fetch it, or give it this name.",
    ]
    with pytest.raises(DatasetError, match=r"mevis/valid_u/meta_expressions.json: missing"):
        VideoGcg(root, "mevis").samples()


def change(path: Path, **fields: Any) -> None:
    """Of the first video of BURST and YouTube-VIS."""
    content = json.loads(path.read_text())
    content["videos"][0]["dense_cap"].update(fields)
    write(path, content)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"caption": None, "token_pos": None, "mask_id": None}, "has no caption with phrases"),
        ({"mask_id": [11, 12, 99]}, "has 0 masks of object 99, expected one for each of its 3 frames"),
        ({"token_pos": [1, 4, 9]}, "names a mask at word 9 of a caption of 6 words"),
        ({"token_pos": [-1, 4, 4]}, "names a mask at word -1 of a caption of 6 words"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_left_out_and_named(
    root: Path, fields: dict[str, Any], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(root / "video_gcg/instruction_data/test.json", **fields)
    benchmark = VideoGcg(root, "burst-ytvis")

    assert [sample.key for sample in benchmark.samples()] == ["burst-ytvis/000001"]
    assert f"1 videos cannot be used and are left out: {KEY} {fault}. --check-data names all." in capsys.readouterr().err
    assert benchmark.problems() == [f"{KEY}: {fault}. It is left out; fetch its annotations again if they should be there."]


@pytest.mark.parametrize(
    ("caption", "fault"),
    [
        ("A dog.", "has no caption with phrases"),
        ("A [dog](7).", "has 0 masks of object 7, expected one for each of its 3 frames"),
        ("A [dog](none).", "links a phrase to no object"),
    ],
)
def test_a_caption_that_cannot_be_used_is_named(root: Path, caption: str, fault: str) -> None:
    write(root / "mevis_gcg/valid_u/abc.json", {"caption": caption})
    write(root / "mevis_gcg/valid_u/other.json", {"caption": "A [dog](0)."})

    end = "It is left out; fetch its annotations again if they should be there."
    assert lines(root, "mevis") == [
        f"mevis/abc: {fault}. {end}",
        f"mevis/other: is not in ROOT/mevis/valid_u/meta_expressions.json. {end}",
    ]


def test_problems_names_masks_that_do_not_fit(root: Path) -> None:
    write(root / "mevis/valid_u/mask_dict.json", {"70": segmentations(LEFT[:, :-1]), "71": [None] * FRAMES})
    write(root / "mevis_gcg/valid_u/abc.json", {"caption": "A [dog](0) and a [cat](1)."})

    assert lines(root, "mevis") == [
        "mevis/abc: 'dog' has masks of 48x39 px, frames are 48x40. Fetch both again.",
        "mevis/abc: 'cat' has no mask on any frame. Fetch its annotations again.",
    ]


def test_broken_annotations_are_one_line(root: Path) -> None:
    (root / "video_gcg/instruction_data/test.json").write_text('{"videos": [')
    write(root / "mevis/valid_u/meta_expressions.json", {"clips": {}})

    assert [line.partition(" (")[0] for line in lines(root, "all")] == [
        "ROOT/video_gcg/instruction_data/test.json: not readable as JSON",
        "ROOT/mevis_gcg/valid_u: not the annotations that were expected",
    ]
