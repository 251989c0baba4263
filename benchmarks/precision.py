"""What half precision and quantisation cost in accuracy: `python -m benchmarks.precision CHECKPOINT --data FOLDER -o OUT`.

Each variant is exported, served and asked the questions of shapes-rvos, and set against float32 in ONNX Runtime. The figures go to
the suite `gate`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
from sparrow_client import SparrowClient

from .evaluation.asking import Asking, Reader
from .evaluation.samples import Prediction
from .evaluation.shapes_rvos import ShapesRvos
from .records import append, environment, record

VARIANTS = {
    "onnx_float32": ("--engine", "onnx"),
    "torch_float16": ("--engine", "torch", "--precision", "float16"),
    "torch_bfloat16": ("--engine", "torch", "--precision", "bfloat16"),
    "onnx_float32_8bit": ("--engine", "onnx", "--quantization", "8bit"),
    "onnx_float32_4bit": ("--engine", "onnx", "--quantization", "4bit"),
}
"""Name to options of `sparrow export`; the first one is what the others are set against."""
BRANCH = "tracked"
ANY_PORT = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of shapes-rvos.")
@click.option("--split", default="valid", show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for all that is made; the same one goes on.")
@click.option("--ask", metavar="VARIANT", envvar="SPARROW_ASK", hidden=True, help="Only ask the server in SPARROW_SERVER.")
@click.option("--server", envvar="SPARROW_SERVER", hidden=True)
def main(checkpoint: Path, data: Path, split: str, out: Path, ask: str | None, server: str) -> None:
    """Measure what each variant of CHECKPOINT loses."""
    benchmark = ShapesRvos(data, split)
    if ask:
        return answer(benchmark, server, out / ask)
    for name, options in VARIANTS.items():
        if not (out / name / "environment.json").exists():
            repository = out / "repositories" / name
            subprocess.run(["sparrow", "export", checkpoint, "-o", repository, *options], check=True)
            again = [sys.executable, "-m", "benchmarks.precision", *sys.argv[1:], "--ask", name]
            subprocess.run(["sparrow", "serve", *ANY_PORT, repository, "--", *again], check=True)
    base, *others = VARIANTS
    for name in others:
        compare(benchmark, out / base, out / name, name)


def answer(benchmark: ShapesRvos, server: str, out: Path) -> None:
    """Asks a variant everything; keeps its answers, and what it ran on."""
    samples = benchmark.samples()
    with SparrowClient(server, timeout_s=300) as client:
        failures = Asking(client, out, {**benchmark.options, "branch": BRANCH}, in_flight=2).ask_all(samples)
    if failures:
        raise click.ClickException(f"{len(failures)} of {len(samples)} questions failed, for example: {next(iter(failures.values()))}")
    reader = Reader(out)
    preset = reader(samples[0]).preset
    (out / "environment.json").write_text(json.dumps(environment(server, preset)))


def compare(benchmark: ShapesRvos, base: Path, run: Path, name: str) -> None:
    """Records the J&F that a variant has lost, and the IoU of its masks with those of the base."""
    samples, readers = benchmark.samples(), [Reader(folder) for folder in (base, run)]
    kept, now = (
        [row[f"{BRANCH}_j_and_f"] for row in benchmark.score(reader, samples, (BRANCH,), base, "fixed").rows if row["kind"] == "referring"]
        for reader in readers
    )
    lost = [before - after for before, after in zip(kept, now, strict=True)]
    overlaps = [iou for sample in samples for iou in mask_ious(*(reader(sample) for reader in readers))]
    env = json.loads((run / "environment.json").read_text())
    workload = f"{env['preset']}_{name}"
    figures = (("j_and_f_lost", lost, "%"), ("mask_iou", overlaps, "ratio"))
    lines = [record("gate", workload, metric, float(np.mean(values)), unit, values, env) for metric, values, unit in figures]
    for line in lines:
        click.echo(f"{workload:<28} {line['metric']:<14} {line['value']:.4f} {line['unit']}  n {line['n']}")
    append(lines)


def mask_ious(base: Prediction, other: Prediction) -> list[float]:
    """IoU of the masks of every frame, by the place of their object in the answer; 1 where both are empty."""
    ious: list[float] = []
    for index in range(max(base.num_objects, other.num_objects)):
        ours, theirs = base.masks(BRANCH, index), other.masks(BRANCH, index)
        union = (ours | theirs).sum((1, 2))
        ious += np.where(union, (ours & theirs).sum((1, 2)) / np.maximum(union, 1), 1.0).tolist()
    return ious


if __name__ == "__main__":
    main()
