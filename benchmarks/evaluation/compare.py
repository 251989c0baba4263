"""`sparrow eval compare`: two runs of a benchmark side by side, figure by figure, and the questions on which they differ most."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import click

from .report import ranking
from .samples import Row

ALIKE = ("benchmark", "split", "protocol")
"""What two runs must have in common for their figures to be comparable."""
SHOWN = 10
"""Questions that are named."""


@click.command()
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
def compare(run_a: Path, run_b: Path) -> None:
    """Set RUN_B against RUN_A: two folders that `sparrow eval` wrote with -o, of two checkpoints, precisions or branches."""
    first, second = read_run(run_a), read_run(run_b)
    for name in ALIKE:
        if first[name] != second[name]:
            raise click.ClickException(
                f"{run_b}: got {name} {second[name]}, expected {first[name]} as in {run_a}. Compare runs of one kind."
            )
    for name in sorted(first["options"].keys() | second["options"].keys()):
        old, new = first["options"].get(name), second["options"].get(name)
        if old != new:
            click.echo(f"{name}: {old} -> {new}")
    for name, old in first["environment"].items():
        if name != "date" and old != second["environment"].get(name):
            click.echo(f"{name}: {old} -> {second['environment'].get(name)}")
    for run, failures in ((run_a, first["failures"]), (run_b, second["failures"])):
        if failures:
            click.echo(f"{run}: {len(failures)} questions failed: its figures are those of the others, or count them as nothing found.")
    old_figures, new_figures = (figures(run) for run in (first, second))
    for key in dict.fromkeys((*old_figures, *new_figures)):
        click.echo(f"{key[0]:<28} {key[1]:<28} " + line(old_figures.get(key), new_figures.get(key)))
    for change, column, row, other in changes(read_rows(run_a), read_rows(run_b)):
        click.echo(f"{change:+7.1f} {column}  {row['sample']}: {row['prompt']} | {row['answer']} -> {other['answer']}")


def read_run(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        run: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{path}: cannot be read ({error}). Name a folder that `sparrow eval` has finished.") from error
    return run


def read_rows(folder: Path) -> dict[str, Row]:
    """Sample to its line of report.csv; figures as numbers."""
    with (folder / "report.csv").open(newline="") as file:
        return {row["sample"]: {name: number(name, text) for name, text in row.items()} for row in csv.DictReader(file)}


def number(name: str, text: str) -> str | float | None:
    """A cell: what is not words is a figure, or empty."""
    if name in ("sample", "prompt", "answer", "failure"):
        return text
    try:
        return float(text)
    except ValueError:
        return text or None


def figures(run: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(entry["workload"], entry["metric"]): entry["value"] for entry in run["figures"]}


def line(old: float | None, new: float | None) -> str:
    shown = [f"{value:8.2f}" if value is not None else f"{'-':>8}" for value in (old, new)]
    return " -> ".join(shown) + (f"  {new - old:+.2f}" if old is not None and new is not None else "")


def changes(old: dict[str, Row], new: dict[str, Row]) -> list[tuple[float, str, Row, Row]]:
    """The questions whose ranked figure moved most: its change, its name, and both rows."""
    column = ranking(list(old.values()))
    both = [
        (new[key][column] - row[column], column, row, new[key])
        for key, row in old.items()
        if key in new and isinstance(row.get(column), float) and isinstance(new[key].get(column), float)
    ]
    moved = sorted((entry for entry in both if entry[0]), key=lambda entry: -abs(entry[0]))
    return moved[:SHOWN]
