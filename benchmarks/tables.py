"""Renders the tables of the documents from results/: `python -m benchmarks.tables [--check]`.

A table stands between `<!-- results: cpu/serving -->` and `<!-- end -->`. Patterns behind the name, as in `cpu/serving *@1 *@8`, leave
only the workloads that match one of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .records import RESULTS, latest

ROOT = RESULTS.parent.parent
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "training" / "nano" / "README.md",
    ROOT / "docs" / "load.md",
    *sorted((ROOT / "docs" / "parity").glob("*.md")),
)
SHOWN = ("gpu", "driver", "torch", "tritonserver", "gpu_sharing", "preset", "precision", "sam2", "transformers", "git", "date")
"""What a table says of the machine and the server that it was measured on."""


def table(results: Path, workloads: Sequence[str]) -> str:
    """A Markdown table of the latest figures of the preset that was measured last, and what they were measured on."""
    lines = {key: line for key, line in latest(results).items() if any(fnmatchcase(key[0], pattern) for pattern in workloads)}
    preset = next(reversed(lines.values()))["env"]["preset"]
    lines = {key: line for key, line in lines.items() if line["env"]["preset"] == preset}
    rows = [
        f"| {workload} | {metric} | {line['value']:.4g} {line['unit']} | {line['n']} | {spread(line)} |"
        for (workload, metric), line in lines.items()
    ]
    env = next(reversed(lines.values()))["env"]
    measured = ", ".join(f"{key} {env[key]}" for key in SHOWN if env.get(key))
    return "\n".join(["| workload | metric | value | n | interquartile range |", "|---|---|---|---|---|", *rows, "", f"On {measured}."])


def spread(line: dict[str, Any]) -> str:
    return "" if line["spread"] is None else f"{line['spread']:.4g}"


def render(text: str) -> str:
    """`text` with every table rendered anew."""

    def replace(match: re.Match[str]) -> str:
        name, *workloads = match[2].split()
        return f"{match[1]}\n{table(RESULTS / f'{name}.jsonl', workloads or ['*'])}\n<!-- end -->"

    return re.sub(r"(<!-- results: ([^>]+) -->).*?<!-- end -->", replace, text, flags=re.DOTALL)


def main(check: bool) -> int:
    """Writes the documents, or says which are not up to date; the exit status."""
    stale = [path for path in DOCUMENTS if path.read_text() != render(path.read_text())]
    for path in stale:
        if check:
            sys.stderr.write(f"{path.relative_to(ROOT)}: its tables differ from benchmarks/results. Run: make generate\n")
        else:
            path.write_text(render(path.read_text()))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
