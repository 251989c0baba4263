import base64
import csv
import io
import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from pycocotools import mask as coco

from benchmarks.evaluation.compare import compare
from benchmarks.evaluation.report import ranking, write_page
from benchmarks.evaluation.samples import Clip, Prediction, Sample

SIZE = (3, 40, 60)


@pytest.fixture
def samples(tmp_path):
    """Six questions about two videos of grey frames."""
    found = []
    for video in ("cat", "dog"):
        (tmp_path / video).mkdir()
        files = tuple(tmp_path / video / f"{index}.png" for index in range(SIZE[0]))
        for file in files:
            Image.fromarray(np.full((*SIZE[1:], 3), 128, np.uint8)).save(file)
        found += [Sample(f"{video}/{index}", Clip(pictures=files), f"<b>{video}</b> {index}?") for index in range(3)]
    return found


def predict(sample):
    left = np.zeros(SIZE[1:], np.uint8, order="F")
    left[:, :30] = 1
    counts = coco.encode(left)["counts"].decode()
    return Prediction(
        sample.prompt,
        "It is.",
        "tiny",
        ["it"],
        [np.zeros((0, 4), np.float32)],
        np.zeros((0, 4), np.float32),
        SIZE,
        {"tracked": [[counts] * 3]},
    )


def rows_of(samples, values):
    return [
        {"sample": sample.key, "prompt": sample.prompt, "answer": "It is.", "tracked_j_and_f": value}
        for sample, value in zip(samples, values, strict=True)
    ]


def run_of(value, **changed):
    run = {
        "benchmark": "ref-davis17",
        "split": "valid",
        "protocol": "fixed",
        "branches": ["tracked"],
        "options": {"box_prior_max_keep": 1},
        "environment": {"preset": "tiny", "precision": "float32", "date": "today"},
        "questions": 7,
        "failures": {"cow/0": "cow: no such file."},
        "figures": [{"metric": "tracked_j_and_f", "workload": "valid", "value": value, "unit": "%", "n": 6, "spread": 1}],
    }
    return {**run, **changed}


def test_page_holds_figures_failures_and_pictures(samples, tmp_path):
    rows = rows_of(samples, [10.0, 90.0, 50.0, 20.0, 80.0, 60.0])
    write_page(tmp_path / "report.html", run_of(51.7), rows, samples, predict)
    page = (tmp_path / "report.html").read_text()
    assert re.search(r"51\.70 %.*76\.80", page, re.DOTALL)  # the paper's figure stands beside ours
    assert "6 of 7 questions answered" in page
    assert "cow: no such file." in page
    assert "&lt;b&gt;cat&lt;/b&gt; 0?" in page  # what others wrote is text
    assert page.index("cat/0") < page.index("dog/0") < page.index("cat/1")  # the worst first; the best behind them
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)  # it is one file
    images = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert len(images) == 3 * len(samples)  # no answer stands at both ends
    with Image.open(io.BytesIO(base64.b64decode(images[0]))) as picture:
        left, right = picture.getpixel((10, 20)), picture.getpixel((50, 20))
    assert left[0] > left[1] + 40  # the mask's colour
    assert max(right) - min(right) < 10
    assert "<svg" in page


def test_page_of_a_run_without_answers_says_so(tmp_path):
    write_page(tmp_path / "report.html", run_of(0, figures=[], questions=1), [], [], predict)
    page = (tmp_path / "report.html").read_text()
    assert "0 of 1 questions answered" in page
    assert "<svg" not in page


def test_ranking_is_by_the_first_j_and_f_or_the_first_figure():
    assert ranking([{"sample": "a", "answer": "x"}, {"sample": "b", "iou": 1.0, "recall": 2.0}]) == "iou"
    assert ranking([{"sample": "b", "tracked_j": 1.0, "tracked_j_and_f": 2.0, "framewise_j_and_f": 3.0}]) == "tracked_j_and_f"
    assert ranking([]) == ""


def write_run(folder, run, rows):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run))
    with (folder / "report.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(folder)


def test_compare_tells_what_changed(samples, tmp_path):
    one = write_run(tmp_path / "a", run_of(50, failures={}), rows_of(samples, [10.0, 90.0, 50.0, 20.0, 80.0, 60.0]))
    other = run_of(52, failures={}, environment={"preset": "tiny", "precision": "bfloat16", "date": "tomorrow"})
    two = write_run(tmp_path / "b", other, rows_of(samples, [10.0, 90.0, 50.0, 20.0, 95.0, 55.0]))
    result = CliRunner().invoke(compare, [one, two])
    assert result.exit_code == 0, result.output
    assert "precision: float32 -> bfloat16" in result.output
    assert "date" not in result.output
    assert "50.00 ->    52.00  +2.00" in result.output
    assert re.findall(r"([+-][\d.]+) tracked_j_and_f  (\S+):", result.output) == [("+15.0", "dog/1"), ("-5.0", "dog/2")]


@pytest.mark.parametrize(("changed", "message"), [({"split": "valid_u"}, "got split valid_u, expected valid"), ({}, "cannot be read")])
def test_compare_refuses_what_cannot_be_compared(samples, tmp_path, changed, message):
    one = write_run(tmp_path / "a", run_of(50), rows_of(samples, [1.0] * 6))
    two = write_run(tmp_path / "b", run_of(50, **changed), rows_of(samples, [1.0] * 6)) if changed else str(tmp_path / "nothing")
    result = CliRunner().invoke(compare, [one, two])
    assert result.exit_code == 1
    assert message in result.output
