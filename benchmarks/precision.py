"""What half precision and quantisation cost in accuracy: `python -m benchmarks.precision CHECKPOINT --data FOLDER -o OUT`.

Each variant is exported, served and asked the questions of shapes-rvos, and set against float32 in ONNX Runtime. The figures go to the
suite `gate`.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import click
import numpy as np

from .evaluation.asking import Reader
from .evaluation.samples import Prediction
from .evaluation.shapes_rvos import ShapesRvos
from .records import append, record

VARIANTS = {
    "onnx_float32": ("--engine", "onnx"),
    "torch_float16": ("--engine", "torch", "--precision", "float16"),
    "torch_bfloat16": ("--engine", "torch", "--precision", "bfloat16"),
    "onnx_float32_8bit": ("--engine", "onnx", "--quantization", "8bit"),
    "onnx_float32_4bit": ("--engine", "onnx", "--quantization", "4bit"),
}
"""Name to options of `sparrow export`; the first one is what the others are set against."""
BRANCH = "tracked"


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of shapes-rvos.")
@click.option("--split", default="valid", show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for all that is made.")
def main(checkpoint: Path, data: Path, split: str, out: Path) -> None:
    """Measure what each variant of CHECKPOINT loses."""
    benchmark = ShapesRvos(data, split)
    for name, options in VARIANTS.items():
        if not (out / name / "run.json").exists():
            answer(checkpoint, options, data, split, out / "repositories" / name, out / name)
        if name != "onnx_float32":
            compare(benchmark, out / "onnx_float32", out / name, name)


def answer(checkpoint: Path, options: tuple[str, ...], data: Path, split: str, repository: Path, out: Path) -> None:
    """Exports a variant and asks it everything."""
    subprocess.run(["sparrow", "export", checkpoint, "-o", repository, *options], check=True)
    serving: list[str | Path] = ["sparrow", "serve", "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", repository]
    asking: list[str | Path] = ["sparrow", "eval", "shapes-rvos", "--data", data, "--split", split, "--branch", BRANCH, "-o", out]
    subprocess.run([*serving, "--", *asking], check=True)


def compare(benchmark: ShapesRvos, base: Path, run: Path, name: str) -> None:
    """Records the J&F that a run has lost, and the IoU of its masks with those of the base."""
    first, second = (json.loads((folder / "run.json").read_text()) for folder in (base, run))
    lost = [
        entry["value"] - other["value"]
        for entry, other in zip(first["figures"], second["figures"], strict=True)
        if entry["metric"] == f"{BRANCH}_j_and_f"
    ]
    readers = Reader(base), Reader(run)
    overlaps = [iou for sample in benchmark.samples() for iou in mask_ious(*(reader(sample) for reader in readers))]
    env = second["environment"]
    workload = f"{env['preset']}_{name}"
    figures = (("j_and_f_lost", lost, "%"), ("mask_iou", overlaps, "ratio"))
    lines = [record("gate", workload, metric, float(np.mean(values)), unit, values, env) for metric, values, unit in figures]
    for line in lines:
        click.echo(f"{workload:<28} {line['metric']:<14} {line['value']:.4f} {line['unit']}  n {line['n']}")
    append(lines)


def mask_ious(base: Prediction, other: Prediction) -> list[float]:
    """IoU of the masks of every frame, by the place of their object in the answer; 1 where both are empty."""
    ious = []
    for index in range(max(base.num_objects, other.num_objects)):
        ours, theirs = base.masks(BRANCH, index), other.masks(BRANCH, index)
        union = (ours | theirs).sum((1, 2))
        ious += np.where(union, (ours & theirs).sum((1, 2)) / np.maximum(union, 1), 1.0).tolist()
    return ious


if __name__ == "__main__":
    main()
