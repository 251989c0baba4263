"""`sparrow bench`: suite `serving`, what an application sees through gRPC, request after request on one connection."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from sparrow_client import Prompt, SparrowClient, SparrowClientError
from tqdm import tqdm

from . import components
from .records import GpuMemory, append, environment, record

HEIGHT, WIDTH = 480, 854
CLIP_FRAMES, TRACK_FRAMES, WARM_UP = 16, 100, 10
OBJECTS = (1, 3)
SESSIONS = 4
"""Open at once, behind an answer, while GPU memory is counted; perf_analyzer's packs say how fast several are."""
PROMPT = "Please segment the red square in this video."
EVALUATED_FRAMES, EVALUATED_HEIGHT, EVALUATED_WIDTH, IN_FLIGHT = 24, 240, 320, 4
"""Clips of shapes-rvos, and questions under way at once, as `sparrow eval` asks them: what an evaluation could reach."""


@click.command()
@click.argument("repository", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--server", default="localhost:8001", envvar="SPARROW_SERVER", show_default=True, show_envvar=True, help="host:port.")
@click.option("--repeats", default=5, show_default=True, help="Clips to ask about.")
def bench(repository: Path | None, server: str, repeats: int) -> None:
    """Measure a running server, or without one every graph of REPOSITORY, and append the figures to benchmarks/results/."""
    if repository:
        components.measure(repository)
        return
    clip = moving_square(CLIP_FRAMES)
    try:
        with SparrowClient(server) as client, GpuMemory() as memory:
            preset = client.segment(clip, PROMPT).summary.fields["preset"]  # and the first answer, which warms up
            answers = [ask(client, clip) for _ in tqdm(range(repeats), desc="clips")]
            tracked = {count: track(client, count) for count in OBJECTS}
            with GpuMemory() as of_sessions, ThreadPoolExecutor(SESSIONS) as pool:
                list(pool.map(partial(track, client), [1] * SESSIONS))
            rates = ask_together(client, repeats)
    except SparrowClientError as error:
        raise click.ClickException(str(error)) from error
    env = environment(server, preset)
    size = f"{HEIGHT}x{WIDTH}"
    lines = [record("serving", f"clip_{CLIP_FRAMES}f_{size}", "first_answer_ms", np.median(answers), "ms", answers, env)]
    if ready_s := os.environ.get("SPARROW_READY_S"):
        lines.append(record("serving", preset, "ready_s", float(ready_s), "s", [float(ready_s)], env))
    for workload, used in ((f"{preset}_{SESSIONS}_sessions", of_sessions), (preset, memory)):
        if used.samples:
            lines.append(record("serving", workload, "gpu_memory_gb", max(used.samples), "GB", used.samples, env))
    for count, samples in tracked.items():
        lines += track_lines("serving", f"track_{count}obj_{size}", samples, env)
    workload = f"clips_{EVALUATED_FRAMES}f_{EVALUATED_HEIGHT}x{EVALUATED_WIDTH}_{IN_FLIGHT}_in_flight"
    lines.append(record("serving", workload, "frames_per_s", np.median(rates), "1/s", rates, env))
    path = append(lines)
    for line in lines:
        click.echo(f"{line['workload']:<24} {line['metric']:<20} {line['value']:>9.1f} {line['unit']}")
    click.echo(f"Added to {path}")


def track_lines(suite: str, workload: str, samples: Sequence[float], env: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The figures of tracked frames that took so many milliseconds each."""
    for metric, percentile in (("track_frame_ms_p50", 50), ("track_frame_ms_p99", 99)):
        yield record(suite, workload, metric, np.percentile(samples, percentile), "ms", samples, env)
    yield record(suite, workload, "frames_per_s", 1000 / np.mean(samples), "1/s", [1000 / sample for sample in samples], env)


def moving_square(num_frames: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """[T, H, W, 3]: a red square that moves over noise; the same every time."""
    frames = np.random.default_rng(0).integers(90, 110, (num_frames, height, width, 3), np.uint8)
    side = height // 3
    for index, frame in enumerate(frames):
        left = side // 2 + width // 2 * index // num_frames
        frame[side : 2 * side, left : left + side] = 214, 40, 40
    return frames


def ask(client: SparrowClient, clip: NDArray[np.uint8]) -> float:
    """Milliseconds until the masks of all frames are there; the answer has to have some."""
    start = time.perf_counter()
    answer = client.segment(clip, PROMPT)
    elapsed = 1000 * (time.perf_counter() - start)
    if len(answer.frames) != len(clip):
        raise click.ClickException(
            f"{PROMPT!r}: got masks for {len(answer.frames)} of {len(clip)} frames. Use a checkpoint that answers it."
        )
    return elapsed


def ask_together(client: SparrowClient, repeats: int) -> list[float]:
    """Frames per second of each round of questions that are under way at once, masks of both branches."""
    clip = moving_square(EVALUATED_FRAMES, EVALUATED_HEIGHT, EVALUATED_WIDTH)
    rates = []
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for _ in tqdm(range(repeats), desc="clips in flight"):
            start = time.perf_counter()
            for future in [pool.submit(client.segment, clip, PROMPT, branch="both", proposal_debug=True) for _ in range(2 * IN_FLIGHT)]:
                future.result()
            rates.append(2 * IN_FLIGHT * len(clip) / (time.perf_counter() - start))
    return rates


def first_box(index: int) -> list[float]:
    """x1, y1, x2, y2 in 0..1 that start an object."""
    return [0.1 + 0.1 * index, 0.3, 0.3 + 0.1 * index, 0.6]


def track(client: SparrowClient, num_objects: int) -> list[float]:
    """Milliseconds of each frame of a session with so many objects, behind the warm-up."""
    frames = moving_square(CLIP_FRAMES)
    prompts = [Prompt(index, boxes=first_box(index)) for index in range(num_objects)]
    elapsed = []
    with client.track(prompts, in_flight=0) as session:
        for index in tqdm(range(WARM_UP + TRACK_FRAMES), desc=f"{num_objects} objects"):
            start = time.perf_counter()
            session.push(frames[index % len(frames)])
            elapsed.append(1000 * (time.perf_counter() - start))
    return elapsed[WARM_UP:]
