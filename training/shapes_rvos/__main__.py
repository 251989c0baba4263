"""Writes a split of shapes-rvos.

python -m training.shapes_rvos OUT --split test --videos 40
"""

from __future__ import annotations

from pathlib import Path

import click

from .files import write_split
from .scene import SPLITS


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--split", type=click.Choice(list(SPLITS)), default="test", show_default=True)
@click.option("--videos", type=click.IntRange(1), default=40, show_default=True, help="How many.")
def main(out: Path, split: str, videos: int) -> None:
    """Write the first videos of a split, their annotations and questions to OUT/<split>/; the same ones every time."""
    write_split(out / split, split, videos)


if __name__ == "__main__":
    main()
