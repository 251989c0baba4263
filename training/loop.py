"""The loop of every stage: a cosine schedule over minutes, curves, a file to go on from, gradients shared by several GPUs."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .model import Model, load, save

WARM_UP = 0.04
"""Part of a stage in which the learning rate rises."""
SAVE_EVERY_S = 60
LOG_EVERY_S = 5
AGREE_EVERY = 5
"""Steps between two looks at the clock: processes that agree on the time wait for each other and for their GPUs."""
MAX_NORM = 1.0
WEIGHT_DECAY = 0.05

Loss = Callable[[int, float], dict[str, Tensor]]
"""Step and progress to the terms of its loss; those without gradients are logged only, or have been added to those of the parameters."""


def rate(progress: float) -> float:
    """Part of the peak learning rate."""
    return min(progress / WARM_UP, 1.0) * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))


def fit(
    stage: str,
    model: Model,
    graphs: Sequence[str],
    loss: Loss,
    minutes: float,
    learning_rate: float,
    out: Path,
    heads: Sequence[nn.Parameter] = (),
) -> None:
    """Trains some graphs for so many minutes.

    Args:
        stage: names the files <stage>.safetensors and <stage>.jsonl in `out`; where the first is there, training goes on from it.
        graphs: what is trained; the rest keeps its weights.
        loss: of one step.
        learning_rate: at its peak.
        heads: what else is trained, and thrown away.
    """
    path, curve = out / f"{stage}.safetensors", out / f"{stage}.jsonl"
    done = load(path, model) if path.exists() else 0.0
    model.requires_grad_(False)
    parameters = [*model.parameters_of(graphs), *heads]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=parameters[0].is_cuda)
    first, start = int(os.environ.get("RANK", "0")) == 0, time.monotonic()
    saved = logged = start
    shown = 0
    step, progress, sums, counts = 0, done, dict[str, Tensor](), Counter[str]()
    while True:
        if step % AGREE_EVERY == 0:
            progress = together(done + (time.monotonic() - start) / 60 / minutes, parameters[0])
            if progress >= 1:
                break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate(progress) * min((progress - done) / WARM_UP + 0.1, 1.0)
        terms = loss(step, progress)
        if waiting := [term for term in terms.values() if term.requires_grad]:  # the others' gradients are there already
            torch.stack(waiting).sum().backward()
        share_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, now = step + 1, time.monotonic()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.detach()
            counts[name] += 1
        if first and (now - logged > LOG_EVERY_S or step == 1):
            line = {"step": step, "progress": round(progress, 4), "steps_per_s": round((step - shown) / (now - logged), 2)}
            line |= {name.removeprefix("_"): round(float(total) / counts[name], 5) for name, total in sums.items()}
            sums, counts, shown, logged = {}, Counter[str](), step, now
            out.mkdir(parents=True, exist_ok=True)
            with curve.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(stage, line, flush=True)  # noqa: T201 (what the user watches)
        if first and now - saved > SAVE_EVERY_S:
            save(path, model, graphs, progress)
            saved = now
    if first:
        save(path, model, graphs, 1.0)


def together(progress: float, like: Tensor) -> float:
    """The progress that all processes agree on: the first one's."""
    if not dist.is_initialized():
        return progress
    shared = torch.tensor(progress, device=like.device, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


def share_gradients(parameters: Sequence[Tensor]) -> None:
    """Replaces gradients by their mean over all processes; a parameter that one of them did not use counts as zero there."""
    if not dist.is_initialized():
        return
    flat = torch.cat([(torch.zeros_like(one) if one.grad is None else one.grad).flatten() for one in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for one, gradient in zip(parameters, flat.split([one.numel() for one in parameters]), strict=True):
        one.grad = gradient.view_as(one)
