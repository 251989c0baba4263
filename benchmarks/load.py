"""`make bench-serving`: suite `serving`, many callers at once, by NVIDIA's perf_analyzer: `python -m benchmarks.load [--server host:port]`.

The workload of its figures is <pack>@<concurrency>.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from sparrow_client import SparrowClient, SparrowClientError
from sparrow_client._wire import SPARROW, SPARROW_TRACK

from .packs import PACKS, Pack, PackError, input_data, read_pack
from .perf_analyzer import Latency, Load, PerfAnalyzerError, measure
from .records import RESULTS, append, environment, figure, latest, record
from .serving import PROMPT, moving_square

METRICS = {SPARROW: ("first_answer_ms", "first_answer_ms_p99"), SPARROW_TRACK: ("track_frame_ms_p50", "track_frame_ms_p99")}
"""Public model to its metrics: half of the requests take no longer than the first, and 99 of 100 no longer than the second."""

ACCURACY = ("tracked_j_and_f", "framewise_j_and_f", "right_object_pct", "absent_no_mask_pct")
"""Metrics of shapes-rvos that are printed beside the speed."""


@click.command()
@click.option("--server", default="localhost:8001", envvar="SPARROW_SERVER", show_default=True, show_envvar=True, help="host:port.")
@click.option(
    "--pack", "names", multiple=True, metavar="NAME|FILE", help="One of benchmarks/packs, or a file like them; repeatable. [default: all]"
)
@click.option(
    "--work", type=click.Path(path_type=Path), default="build/bench-serving", show_default=True, help="Folder for what is sent and written."
)
def main(server: str, names: Sequence[str], work: Path) -> None:
    """Measure a running server under load and append the figures to benchmarks/results/."""
    try:
        packs = [read_pack(PACKS / f"{name}.toml" if (PACKS / f"{name}.toml").exists() else Path(name)) for name in names or every_pack()]
        preset = check(server, packs)
        env = environment(server, preset)
        for pack in packs:
            path = append(list(measure_pack(pack, server, env, work)))
    except (PackError, PerfAnalyzerError, SparrowClientError) as error:
        raise click.ClickException(str(error)) from error
    for line in accuracy(preset):
        show(line)
    click.echo(f"Added to {path}")


def every_pack() -> list[str]:
    return sorted(path.stem for path in PACKS.glob("*.toml"))


def check(server: str, packs: Sequence[Pack]) -> str:
    """Asks every question once, so that what is measured is what a pack says that it is; the preset of the server's model."""
    with SparrowClient(server) as client:
        preset: str = client.segment(moving_square(1), PROMPT).summary.fields["preset"]
        for pack in packs:
            if pack.model == SPARROW:
                (step,) = pack.steps()
                answer = client.segment(None, pack.prompt, encoded_frames=list(step["encoded_frames"]), **pack.parameters)
                if len(answer.frames) != (expected := pack.frames if pack.masks else 0):
                    raise PackError(
                        f"{pack.name}: the answer {answer.text!r} has masks for {len(answer.frames)} frames, expected {expected}. "
                        "Use a checkpoint that answers as the pack says, or name other packs with --pack."
                    )
    return preset


def measure_pack(pack: Pack, server: str, env: dict[str, Any], work: Path) -> Iterator[dict[str, Any]]:
    """The figures of a pack, which are printed as they come."""
    work.mkdir(parents=True, exist_ok=True)
    data = work / f"{pack.name}.json"
    data.write_text(json.dumps(input_data(pack.steps())))
    for shared_memory in pack.shared_memory:
        if shared_memory == "cuda" and not env["gpu"]:
            continue
        for concurrency in pack.concurrency:
            load = Load(concurrency, shared_memory)
            for line in figures(pack, load, measure(pack, load, server, data), env):
                show(line)
                yield line


def show(line: dict[str, Any]) -> None:
    click.echo(f"{line['workload']:<28} {line['metric']:<22} {line['value']:>9.1f} {line['unit']}")


def figures(pack: Pack, load: Load, took: Latency, env: dict[str, Any]) -> list[dict[str, Any]]:
    """A run as figures. Of most requests perf_analyzer keeps percentiles alone, so that these have no spread."""
    name = pack.name if load.shared_memory == "none" else f"{pack.name}_{load.shared_memory}"
    workload = f"{name}@{load.concurrency}"
    # Its own throughput counts the time until it notices that it is done, up to a second.
    frames_per_s = 1000 * load.concurrency * pack.frames_per_request / took.mean
    p50, p99 = METRICS.get(pack.model, ("frame_ms_p50", "frame_ms_p99"))
    lines = [
        figure("serving", workload, metric, value, unit, pack.requests, None, env)
        for metric, value, unit in ((p50, took.p50, "ms"), (p99, took.p99, "ms"), ("frames_per_s", frames_per_s, "1/s"))
    ]
    if took.first:
        lines.append(record("serving", workload, "first_text_ms", np.median(took.first), "ms", took.first, env))
    return lines


def accuracy(preset: str) -> list[dict[str, Any]]:
    """The latest figures of shapes-rvos that a preset has, on whatever machine."""
    found = [
        line
        for path in RESULTS.glob("*/shapes-rvos.jsonl")
        for (_, metric), line in latest(path).items()
        if line["env"]["preset"] == preset and metric in ACCURACY
    ]
    newest = max((line["env"]["date"] for line in found), default=None)
    return [line for line in found if line["env"]["date"] == newest]


if __name__ == "__main__":
    main()
