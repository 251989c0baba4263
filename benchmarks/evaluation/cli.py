"""`sparrow eval BENCHMARK`: asks a server the questions of a data set, scores the answers and keeps the figures."""

from __future__ import annotations

import csv
import json
import resource
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import Any

import click
import numpy as np
from sparrow_client import SparrowClient
from sparrow_client._media import MediaError
from sparrow_client._stubs import OPTIONS
from sparrow_client.cli import server_option, timeout_option

from ..records import append, environment, record
from .asking import BRANCHES, Asking, OtherRun, Reader, ServerGone
from .compare import compare
from .report import write_page
from .samples import Benchmark, DatasetError, Figure, Row, Sample

BENCHMARKS = {
    "ref-davis17": "ref_davis17:RefDavis17",
    "mevis": "mevis:Mevis",
    "ref-ytvos": "ref_ytvos:RefYtvos",
    "video-gcg": "video_gcg:VideoGcg",
    "vidstg": "grounding:VidStg",
    "hc-stvg": "grounding:HcStvg",
    "shapes-rvos": "shapes_rvos:ShapesRvos",
}
"""Name to module of this package and class in it, which is imported when it is asked for."""

OURS = ("branch", "modality", "mask_format")
"""Request parameters that the command sets itself."""

Option = str | float | bool


class Benchmarks(click.Group):
    """A command for each benchmark, beside those that are added to it."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [*BENCHMARKS, *super().list_commands(context)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return benchmark_command(name) if name in BENCHMARKS else super().get_command(context, name)


@click.group("eval", cls=Benchmarks)
def evaluate() -> None:
    """Ask a running server the questions of a benchmark and compare its masks with the annotated ones."""


evaluate.add_command(compare)


def benchmark_command(name: str) -> click.Command:
    """`sparrow eval NAME`; its help is the first paragraph of what the class says of itself."""
    module, class_name = BENCHMARKS[name].split(":")
    kind: Any = getattr(import_module(f".{module}", __package__), class_name)
    arguments: Mapping[str, Mapping[str, Any]] = getattr(kind, "arguments", {})

    def run(data: Path, split: str, check_data: bool, out: Path | None, protocol: str, **asking: Any) -> None:
        own = {name: asking.pop(name) for name in arguments}
        try:
            benchmark = kind(data, split, **own)
            if check_data:
                return check(benchmark, data)
            if not out:
                raise click.UsageError("got no folder for the results, expected one. Add -o OUT.")
            evaluate_benchmark(benchmark, split, out, protocol, **asking)
        except (DatasetError, MediaError, OtherRun) as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:  # e.g. the disk is full
            raise click.ClickException(f"{error.filename or out}: {error.strerror or error}. The answers so far are kept.") from error

    options = [
        click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder of the data set."),
        click.option("--split", type=click.Choice(kind.splits), default=kind.splits[0], show_default=True, help="Part of it."),
        click.option("--check-data", is_flag=True, help="Look at every file of the data set, say what is missing or unexpected, and stop."),
        click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for answers, figures and report."),
        server_option,
        timeout_option,
        click.option("--in-flight", type=click.IntRange(1), default=4, show_default=True, help="Questions under way at once."),
        click.option("--branch", type=click.Choice(["both", *BRANCHES]), default="both", show_default=True, help="Whose masks to score."),
        click.option(
            "--option", "changed", multiple=True, metavar="NAME=VALUE", callback=parse_options, help="A request parameter of the model."
        ),
        click.option(
            "--protocol",
            type=click.Choice(kind.protocols),
            default=kind.protocols[0],
            show_default=True,
            help="fixed: the benchmark's own rules; original: what the scripts of the original compute (docs/evaluation.md).",
        ),
    ]
    options += [click.option(f"--{name}", **fields) for name, fields in arguments.items()]
    for option in reversed(options):
        run = option(run)
    about, *_ = cleandoc(kind.__doc__).split("\n\n")
    return click.command(name, help=f"{about}\n\n{RESUMES}")(run)


RESUMES = """OUT keeps every answer, so the same command goes on where it was stopped, and asks again only what failed: use a new OUT for
another checkpoint."""


def parse_options(context: click.Context, parameter: click.Parameter, given: Sequence[str]) -> dict[str, Option]:
    """NAME=VALUE to request parameters of the type that the server takes."""
    options: dict[str, Option] = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in OPTIONS or name in OURS:
            raise click.BadParameter(f"got {name!r}, expected one of {', '.join(sorted(OPTIONS.keys() - set(OURS)))}.")
        kind = type(OPTIONS[name]["default"])
        options[name] = click.types.convert_type(kind).convert(value, parameter, context)
    return options


def check(benchmark: Benchmark, data: Path) -> None:
    """`--check-data`: a line for each problem."""
    problems = benchmark.problems()
    for problem in problems:
        click.echo(problem)
    if problems:
        got = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise click.ClickException(f"{data}: got {got}, expected none. Mend or get again what is named above.")
    click.echo(f"{data}: whole; {len(benchmark.samples())} questions to ask.")


def evaluate_benchmark(
    benchmark: Benchmark,
    split: str,
    out: Path,
    protocol: str,
    server: str,
    timeout_s: float,
    in_flight: int,
    branch: str,
    changed: Mapping[str, Option],
) -> None:
    """Asks, scores, writes OUT/report.csv and OUT/run.json, and adds to benchmarks/results/ unless something failed."""
    samples = benchmark.samples()
    options = {**benchmark.options, **changed, "branch": branch}
    with SparrowClient(server, timeout_s=timeout_s) as client:
        if not client.is_ready():
            raise click.ClickException(f"{server}: got no answer, expected a server that is ready. Is `sparrow serve` running there?")
        env = environment(server, "")
        check_same_run(out, {"benchmark": benchmark.suite, "split": split, **options, **{key: env[key] for key in SERVER}})
        try:
            start, asking = time.monotonic(), Asking(client, out, options, in_flight)
            failures = asking.ask_all(samples)
            cost = cost_of(f"{len(samples)}_questions", asking.frames, time.monotonic() - start)
        except (ServerGone, OSError, KeyboardInterrupt) as error:
            why = f"{error.strerror}." if isinstance(error, OSError) else str(error) or "Stopped."
            raise click.ClickException(f"{why} The answers so far are in {out}, and the same command goes on.") from error
    click.echo(f"{len(samples) - len(failures)} of {len(samples)} answers are in {out}.")

    branches = BRANCHES if branch == "both" else (branch,)
    reader = Reader(out)
    scores = benchmark.score(reader, [sample for sample in samples if sample.key not in failures], branches, out, protocol)
    failures |= {row["sample"]: row["failure"] for row in scores.rows if row.get("failure")}
    write_report(out / "report.csv", samples, scores.rows, failures)
    env["preset"] = "+".join(sorted(reader.presets))
    prefix = split if protocol == benchmark.protocols[0] else f"{split}_{protocol}"
    lines = [figure_record(benchmark.suite, prefix, figure, env) for figure in (*scores.figures, *cost) if len(figure.samples)]
    run = {
        "benchmark": benchmark.suite,
        "split": split,
        "protocol": protocol,
        "branches": branches,
        "options": options,
        "environment": env,
        "questions": len(samples),
        "failures": failures,
        "figures": [{key: line[key] for key in ("metric", "workload", "value", "unit", "n", "spread")} for line in lines],
    }
    (out / "run.json").write_text(json.dumps(run, indent=2))
    write_page(out / "report.html", run, scores.rows, samples, reader)
    for line in lines:
        click.echo(f"{line['workload']:<32} {line['metric']:<24} {line['value']:>7.2f} {line['unit']}  n {line['n']}")
    click.echo(f"Report: {out / 'report.html'}, report.csv, run.json")
    if failures:
        for key, reason in failures.items():
            click.echo(f"Failed: {key}: {reason}", err=True)
        raise click.ClickException(
            f"{len(failures)} of {len(samples)} questions failed, so no figure was added to benchmarks/results. "
            "The same command asks them again."
        )
    if lines:
        click.echo(f"Added to {append(lines)}")


def cost_of(workload: str, frames: int, seconds: float) -> list[Figure]:
    """What asking took, with the most memory that this process has had; nothing where all answers were there."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = [Figure("frames_per_s", [frames / seconds], "1/s", workload), Figure("client_memory_mib", [peak], "MiB", workload)]
    return figures if frames else []


SERVER = ("tritonserver", "engine_kinds", "precision")
"""Parts of the environment that answers depend on."""


def check_same_run(out: Path, asked: Mapping[str, Any]) -> None:
    """Raises OtherRun where the folder holds answers to other questions, or of a server that was set up in another way."""
    path = out / "asked.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asked, indent=2))
        return
    earlier = json.loads(path.read_text())
    for key in earlier.keys() | asked.keys():
        if earlier.get(key) != asked.get(key):
            raise OtherRun(f"{out}: got answers of a run with {key} {earlier.get(key)}, not {asked.get(key)}. Choose another folder.")


def figure_record(suite: str, prefix: str, figure: Figure, env: dict[str, Any]) -> dict[str, Any]:
    workload = "_".join(filter(None, (prefix, figure.workload)))
    return record(suite, workload, figure.metric, np.mean(figure.samples), figure.unit, figure.samples, env)


def write_report(path: Path, samples: Sequence[Sample], rows: Sequence[Row], failures: Mapping[str, str]) -> None:
    """A line per question; those that failed say why."""
    scored = {row["sample"]: row for row in rows}
    failed = {sample.key: {"sample": sample.key, "prompt": sample.prompt, "failure": failures.get(sample.key, "")} for sample in samples}
    lines = [{**failed[sample.key], **scored.get(sample.key, {})} for sample in samples]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for line in lines:
            writer.writerow({name: round(value, 3) if isinstance(value, float) else value for name, value in line.items()})
