"""`python -m training OUT`: the nano checkpoint from nothing, in stages that go on where they stopped.

segmentation ─► detection ─┐
towers ─► alignment ───────┴─► joint ─► selection ─► checkpoint
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from ensemble.config import NANO
from export.checkpoints import SOURCES, write_checkpoint
from export.seeded import write_tokenizer

from . import detection, joint, language, segmentation, selection, towers
from .batches import Pool
from .curves import draw_curves
from .loop import fit
from .model import Model, load
from .shapes_rvos.language import corpus

MINUTES = {"segmentation": 8.0, "detection": 2.5, "towers": 2.0, "alignment": 8.0, "joint": 6.8, "selection": 0.7}
"""Of each stage on an H100; in this order."""
STAGES: dict[str, Any] = {
    "segmentation": segmentation,
    "detection": detection,
    "towers": towers,
    "alignment": language,
    "joint": joint,
    "selection": selection,
}
FRESH = ("joint", "selection")
"""Stages that see other scenes than those before them, of which the language model knows the answers by heart."""
BEFORE: dict[str, tuple[str, ...]] = {
    "segmentation": (),
    "detection": ("segmentation",),
    "towers": (),
    "alignment": ("towers",),
    "joint": ("segmentation", "detection", "alignment"),
    "selection": ("segmentation", "detection", "joint"),
    "checkpoint": ("segmentation", "detection", "alignment", "joint", "selection"),
}
"""The stages whose files each one starts from; later ones overwrite weights of earlier ones."""


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--stage", "stages", type=click.Choice(list(BEFORE)), multiple=True, help="Only these; default: all, then the checkpoint.")
@click.option("--scale", default=1.0, show_default=True, help="Of the minutes of every stage.")
@click.option("--scenes", default=40000, show_default=True, help="Training scenes to draw.")
@click.option("--clips", type=int, help="Clips in a batch; default: each stage's own.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, stages: tuple[str, ...], scale: float, scenes: int, clips: int | None, seed: int) -> None:
    """Train the nano checkpoint into OUT."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
        torch.cuda.set_device(rank)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    tokenizer = out / "tokenizer"
    if not tokenizer.exists() and rank == 0:
        tokenizer.mkdir(parents=True)
        write_tokenizer(tokenizer, NANO.language.vocab_size, corpus())
    if dist.is_initialized():
        dist.barrier()
    pools: dict[bool, Pool] = {}
    for stage in stages or BEFORE:
        torch.manual_seed(seed)
        model = Model(NANO)
        done = [load(out / f"{before}.safetensors", model) for before in BEFORE[stage]]
        if unfinished := [before for before, progress in zip(BEFORE[stage], done, strict=True) if progress < 1]:
            raise click.ClickException(f"{stage}: {unfinished[0]} is not finished. Run it first.")
        if stage == "checkpoint":
            root = out / "checkpoint"
            write_checkpoint(root, NANO, model.states())
            shutil.copytree(tokenizer, root / SOURCES["sparrow"], dirs_exist_ok=True)  # the one that was trained with
            (root / "log").mkdir(exist_ok=True)
            for curve in STAGES:
                shutil.copy(out / f"{curve}.jsonl", root / "log")
            draw_curves(root / "log", root / "curves.svg")
            click.echo(f"Checkpoint: {root}")
            continue
        model.to(device)
        if (fresh := stage in FRESH) not in pools:
            world = int(os.environ.get("WORLD_SIZE", "1"))
            first = scenes * (fresh + rank)
            pools = {
                fresh: Pool("train", range(first, first + scenes), tokenizer, NANO, device, first, max(1, (os.cpu_count() or 2) // world))
            }
        train(stage, model, pools[fresh], MINUTES[stage] * scale, clips, out)


def train(stage: str, model: Model, pool: Pool, minutes: float, clips: int | None, out: Path) -> None:
    """Runs one stage."""
    module = STAGES[stage]
    sizes = (clips,) if clips else ()
    if stage == "detection" and not (out / "detection.safetensors").exists():
        detection.start(model)
    loss = module.loss(model, pool, *sizes)
    loss, heads = loss if isinstance(loss, tuple) else (loss, ())
    fit(stage, model, module.GRAPHS, loss, minutes, module.LEARNING_RATE, out, heads)


if __name__ == "__main__":
    main()
