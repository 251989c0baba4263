"""Many tracking sessions that open, track, misbehave and die on a real server, and what must hold however long it runs.

    python -m tests.soak REPOSITORY [--minutes 10]       (make soak)

Every caller tracks an object of its own colour, and what comes back is compared with the logits that its session got alone before: a
mask of another session would be nearer to that one's. A third of the sessions die without END. Requests that must be refused are sent in
between, and each has to come back with its status. Callers use plain unary requests, so that the status codes are Triton's own.
"""

from __future__ import annotations

import random
import re
import shutil
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import tritonclient.grpc as triton
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from benchmarks.records import append, environment, record
from ensemble import metrics, settings
from ensemble.tracker import Limits
from export.serve import Ports, Server

CALLERS, FRAMES = 32, 24
HEIGHT, WIDTH = 60, 80
LIMITS = Limits(max_sessions=24, max_memory_mib=3, session_idle_s=12, evictable_idle_s=6)
"""So few sessions and so little memory (for 26 objects) that callers are refused, so short times that dead sessions are freed while it
runs, and longer than a live caller waits for a frame on two busy cores."""
SAME = 2e-2
"""Largest difference of a logit from that of the session alone. Objects share calls with others: float32 summation order, which decides
roundings of memories to bfloat16. The logits of two callers differ by more than 1."""
WARM_UP = 0.3
"""Of the time: allocators and threads settle."""
MAX_GROWTH_MIB_PER_MIN = 1.0
"""Bound on the slope of the server's memory. A leak of one session's memory (0.1 MiB) in ten would show as 4 MiB a minute."""


@dataclass(frozen=True)
class Caller:
    """Somebody with a video of an object in a colour of its own.

    Args:
        index: which.
        frames: [FRAMES, H, W, 3] uint8.
        prompts: inputs that start the objects.
    """

    index: int
    frames: np.ndarray
    prompts: dict[str, np.ndarray]


def draw_caller(index: int) -> Caller:
    rng = np.random.default_rng(index)
    colour, background = rng.integers(0, 256, 3), rng.integers(0, 256, (HEIGHT, WIDTH, 3))
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    frames = []
    for progress in np.linspace(0.2, 0.7, FRAMES):
        frame = background // 2 + 60
        frame[(x - WIDTH * progress) ** 2 + (y - HEIGHT * 0.5) ** 2 < (HEIGHT * 0.2) ** 2] = colour
        frames.append(frame.astype(np.uint8))
    box = np.array([[0.07, 0.3, 0.33, 0.7]], np.float32)
    point, mask = np.array([[0.2, 0.5]], np.float32), np.zeros((1, HEIGHT, WIDTH), bool)
    mask[0, 18:42, 6:26] = True
    one, two = np.array([1], np.int32), np.array([2], np.int32)
    kinds = [
        {"boxes": box, "box_objects": one},
        {"points": point, "point_labels": one, "point_objects": one},
        {"masks": mask, "mask_objects": one},
        {"boxes": box, "box_objects": one, "points": 1 - point, "point_labels": one, "point_objects": two},
    ]
    return Caller(index, np.stack(frames), kinds[index % len(kinds)])


class Refused(Exception):
    """A request came back with an error.

    Args:
        status: gRPC status code.
        message: text.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


def infer(client: triton.InferenceServerClient, session: int, frame: np.ndarray, start=False, end=False, parameters=None, **tensors):
    """One request of `sparrow_track`; the outputs by name."""
    inputs = []
    for name, array in {"frame": frame, **tensors}.items():
        tensor = triton.InferInput(name, (1, *array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array[None])
        inputs.append(tensor)
    options = {"sequence_id": session, "sequence_start": start, "sequence_end": end, "client_timeout": 60}
    try:
        result = client.infer("sparrow_track", inputs, parameters={"mask_format": "logits", **(parameters or {})}, **options)
    except InferenceServerException as error:
        raise Refused(str(error.status()).removeprefix("StatusCode."), str(error.message())) from error
    return {output.name: result.as_numpy(output.name)[0] for output in result.get_response().outputs}


NOTHING = np.zeros((0, 0, 3), np.uint8)
BAD = {
    "frame of another size": (lambda caller: {"frame": caller.frames[0][:-8]}, "INVALID_ARGUMENT", "got a frame of 52x80 px"),
    "frame again": (lambda caller: {"parameters": {"frame_idx": 0}}, "INVALID_ARGUMENT", "Send every frame once and in order"),
    "start again": (lambda caller: {"start": True, **caller.prompts}, "INVALID_ARGUMENT", "got START, but session"),
    "NaN": (lambda caller: {"text_embeddings": np.full((1, 64), np.nan, np.float32)}, "INVALID_ARGUMENT", "not finite"),
    "box outside": (
        lambda caller: {"boxes": np.array([[2, 2, 3, 3]], np.float32), "box_objects": np.array([9], np.int32)},
        "INVALID_ARGUMENT",
        "outside the frame",
    ),
    "unknown object": (lambda caller: {"removed_objects": np.array([9], np.int32)}, "INVALID_ARGUMENT", "got 9, expected one of"),
}
"""What a caller may send in the middle of its session: changed arguments, the status and words that they have to come back with."""


@dataclass
class Tally:
    """What happened; `problems` must stay empty."""

    frames: int = 0
    largest_difference: float = 0.0
    events: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Soak:
    """Callers against a server.

    Args:
        url: of its gRPC endpoint.
        seed: of what callers do.
    """

    def __init__(self, url: str, seed: int = 0) -> None:
        self._url, self._seed = url, seed
        self.callers = [draw_caller(index) for index in range(CALLERS)]
        self.tally, self._lock = Tally(), threading.Lock()
        with triton.InferenceServerClient(url) as client:
            self._expected = [self._alone(client, caller) for caller in self.callers]
        # [FRAMES, CALLERS, L, L]: of each caller's first object
        self._first = np.stack([np.stack([frame[0] for frame in own]) for own in self._expected], 1)
        # On frame 0 a drawn mask is its own answer, whoever's video it is.
        apart = min(np.abs(frame[a] - frame[b]).max() for frame in self._first[1:] for a in range(CALLERS) for b in range(a))
        assert apart > 10 * SAME, f"two callers get logits within {apart:.3f} of each other"

    def _alone(self, client: triton.InferenceServerClient, caller: Caller) -> list[np.ndarray]:
        """[N, L, L] logits of each frame, while nobody else is there."""
        last = FRAMES - 1
        answers = [
            infer(client, 1, frame, index == 0, index == last, **({} if index else caller.prompts))
            for index, frame in enumerate(caller.frames)
        ]
        return [answer["mask_logits"] for answer in answers]

    def run(self, seconds: float) -> Tally:
        """Keeps all callers busy for so long."""
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(CALLERS) as pool:
            for future in [pool.submit(self._call, caller, until) for caller in self.callers]:
                future.result()
        return self.tally

    def _call(self, caller: Caller, until: float) -> None:
        rng = random.Random(f"{self._seed} {caller.index}")
        with triton.InferenceServerClient(self._url) as client:
            while time.monotonic() < until and not self.tally.problems:
                session = rng.getrandbits(62) + 1
                try:
                    self._follow(client, caller, session, rng, until)
                except Refused as refused:
                    limits = r"all \d+ are in use|MiB of memory hold"
                    if refused.status == "UNAVAILABLE" and re.search(limits, refused.message):
                        self._count("refused for want of room")
                        time.sleep(rng.uniform(0.1, 0.5))
                    else:
                        self._problem(f"caller {caller.index}: {refused}")
                except Exception as error:
                    self._problem(f"caller {caller.index}: {type(error).__name__}: {error}")

    def _follow(self, client: triton.InferenceServerClient, caller: Caller, session: int, rng: random.Random, until: float) -> None:
        """One session, from START to an end of one kind or another."""
        send = partial(infer, client, session)
        self._check(caller, 0, send(caller.frames[0], start=True, **caller.prompts))
        dies_at = rng.choice([FRAMES, FRAMES, rng.randint(1, FRAMES)])
        for index in range(1, FRAMES):
            if index == dies_at or time.monotonic() > until:
                self._count("died without END")
                return
            if rng.random() < 0.1:
                self._misbehave(send, caller, rng.choice(list(BAD)), index)
            self._check(caller, index, send(caller.frames[index], parameters={"frame_idx": index}))
        send(NOTHING, end=True)
        self._count("ended")
        self._expect(partial(send, caller.frames[0]), "a frame after END", {"INVALID_ARGUMENT"}, "must specify the START flag")

    def _misbehave(self, send, caller: Caller, name: str, index: int) -> None:
        change, status, words = BAD[name]
        self._expect(lambda: send(**{"frame": caller.frames[index], **change(caller)}), name, {status}, words)

    def _expect(self, request, name: str, statuses: set[str], words: str) -> None:
        """Counts a refusal that is due, or notes that it is another or none."""
        try:
            request()
        except Refused as refused:
            if refused.status in statuses and words in refused.message:
                self._count(f"refused: {name}")
            else:
                self._problem(f"{name}: {refused}")
        else:
            self._problem(f"{name}: answered")

    def _check(self, caller: Caller, index: int, answer: dict[str, np.ndarray]) -> None:
        """Whether a mask is the caller's own."""
        logits, expected = answer["mask_logits"], self._expected[caller.index][index]
        difference = np.abs(logits - expected).max() if logits.shape == expected.shape else np.inf
        nearest = int(np.abs(self._first[index] - logits[0]).mean((1, 2)).argmin())
        with self._lock:
            self.tally.frames += 1
            self.tally.largest_difference = max(self.tally.largest_difference, float(difference))
        if index and nearest != caller.index:
            self._problem(f"caller {caller.index}, frame {index}: the mask is that of caller {nearest}")
        elif difference > SAME:
            self._problem(f"caller {caller.index}, frame {index}: logits differ by {difference:.4f} from the session alone")

    def _count(self, event: str) -> None:
        with self._lock:
            self.tally.events[event] += 1

    def _problem(self, words: str) -> None:
        with self._lock:
            self.tally.problems.append(words)


class ServerMemory:
    """Samples of what a process and its children hold, in MiB, while the context is open.

    Args:
        pid: of the process.
        every_s: time between samples.
    """

    def __init__(self, pid: int, every_s: float) -> None:
        self._pid, self._every_s = pid, every_s
        self.times: list[float] = []
        self.mib: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> ServerMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        start = time.monotonic()
        while not self._done.wait(self._every_s):
            self.times.append(time.monotonic() - start)
            self.mib.append(sum(resident_mib(pid) for pid in family(self._pid)))

    def growth_mib_per_min(self) -> float:
        """Slope of the memory behind the warm-up."""
        first = int(WARM_UP * len(self.times))
        return float(60 * np.polyfit(self.times[first:], self.mib[first:], 1)[0])


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        children = task / "children"
        found += [one for child in children.read_text().split() for one in family(int(child))]
    return found


def resident_mib(pid: int) -> float:
    """Resident memory, shared memory divided among those who share it; without pages of files, whose share falls and rises with what
    else runs on the machine.
    """
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB", rollup, re.MULTILINE)) / 1024


def metric(url: str, name: str) -> float:
    """The sum of a family's figures on a /metrics endpoint."""
    with urllib.request.urlopen(f"http://{url}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.partition(" ")[0].startswith(name))


@dataclass
class Report:
    """What a soak found.

    Args:
        tally: what callers saw.
        seconds: how long they were at work.
        memory: of the server while they were.
        leftovers: sessions, objects and bytes that the tracker holds once every session should have expired.
        server: events that it counted itself.
    """

    tally: Tally
    seconds: float
    memory: ServerMemory
    leftovers: dict[str, float]
    server: dict[str, float]


def soak(repository: Path, folder: Path, seconds: float) -> tuple[Report, dict[str, Any]]:
    """Runs callers against a server on a copy of a repository with small limits; the report and the environment for records."""
    copy = folder / "repository"
    shutil.copytree(repository, copy)
    path = copy / "tracker" / "config.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    for name, value in vars(LIMITS).items():
        config.parameters[name].string_value = str(value)
    path.write_text(text_format.MessageToString(config))
    with Server(copy, Ports(0, 0, 0)) as server:
        callers = Soak(server.url)
        endpoint = f"localhost:{server.ports.metrics}"
        with ServerMemory(server._process.pid, every_s=min(5, seconds / 40)) as memory:
            tally = callers.run(seconds)
        time.sleep(LIMITS.session_idle_s + 3 * settings.SWEEP_S)
        names = ("sessions", "objects", "memory_bytes", "frames_total", "closed_sessions_total", "refused_total", "limited_total")
        figures = {name: metric(endpoint, f"sparrow_track_{name}") for name in names}
        counted = {
            reason: metric(endpoint, f'sparrow_track_closed_sessions_total{{reason="{reason}"}}') for reason in metrics.CLOSED.values
        }
        leftovers = {name: figures.pop(name) for name in names[:3]}
        return Report(tally, seconds, memory, leftovers, figures | counted), environment(server.url, "tiny")


@click.command()
@click.argument("repository", type=click.Path(path_type=Path))
@click.option("--minutes", default=10.0, show_default=True)
def main(repository: Path, minutes: float) -> None:
    """Soak a server on REPOSITORY, print what happened and keep the figures; fails where something must not have happened."""
    with tempfile.TemporaryDirectory() as folder:
        report, env = soak(repository, Path(folder), 60 * minutes)
    tally, memory = report.tally, report.memory
    for event, count in sorted(tally.events.items()):
        click.echo(f"{count:>8}  {event}")
    click.echo(f"server: {report.server}, left over: {report.leftovers}")
    workload = f"{CALLERS}_callers_{minutes:g}_min"
    growth = memory.growth_mib_per_min()
    figures = {
        ("frames", tally.frames, "frames"),
        ("frames_per_s", tally.frames / report.seconds, "1/s"),
        ("wrong_masks", len(tally.problems), "masks or refusals"),
        ("largest_logit_difference", tally.largest_difference, "logit"),
        ("memory_growth_mib_per_min", growth, "MiB/min"),
        ("memory_mib", memory.mib[-1], "MiB"),
    }
    lines = [record("soak", workload, name, value, unit, [value], env) for name, value, unit in sorted(figures)]
    for line in lines:
        click.echo(f"{line['metric']:<28} {line['value']:>12.3f} {line['unit']}")
    click.echo(f"Added to {append(lines)}")
    failures = [*tally.problems, *(f"{name} left over: {value:g}" for name, value in report.leftovers.items() if value)]
    if growth > MAX_GROWTH_MIB_PER_MIN:
        failures.append(f"the server's memory grew by {growth:.2f} MiB a minute, expected at most {MAX_GROWTH_MIB_PER_MIN}")
    if failures:
        raise click.ClickException("\n".join(failures))


if __name__ == "__main__":
    main()
