"""NVIDIA's perf_analyzer: where it is, how it is called, and what it has measured."""

from __future__ import annotations

import csv
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparrow_client._wire import SPARROW, SPARROW_TRACK

from .packs import Pack

ROOT = Path(__file__).parent.parent
PLACES = (Path(sys.executable).parent, ROOT / "build" / "perf_analyzer")
"""Where it may be when it is not on the PATH: with an older tritonclient of this environment, or where our script puts it."""
TIMEOUT_S = 1800
WARM_UP = 2
"""Requests for each of those under way at once that are sent first and not measured."""
TYPES = {bool: "bool", int: "int", str: "string"}
"""How a type of a request parameter is named on its command line."""


class PerfAnalyzerError(Exception):
    """It is missing, or a request failed; the message says what to do, or what the server said."""


@dataclass(frozen=True)
class Load:
    """How a pack is sent.

    Args:
        concurrency: clips, or sessions, under way at once.
        shared_memory: none, system or cuda.
    """

    concurrency: int
    shared_memory: str = "none"


@dataclass(frozen=True)
class Latency:
    """What a run took, in milliseconds.

    Args:
        mean, p50, p99: from a request to its last response.
        first: from every request to its first response, where several come.
    """

    mean: float
    p50: float
    p99: float
    first: list[float]


def find() -> str:
    """Its path; raises PerfAnalyzerError where there is none."""
    found = shutil.which("perf_analyzer") or next((path for place in PLACES if (path := shutil.which("perf_analyzer", path=place))), None)
    if found is None:
        raise PerfAnalyzerError(
            "perf_analyzer: not found on the PATH. Get it: benchmarks/perf_analyzer.sh build/perf_analyzer; NVIDIA's SDK image has it."
        )
    return found


def measure(pack: Pack, load: Load, url: str, data: Path) -> Latency:
    """Sends a pack's requests, behind some that are not measured.

    Args:
        pack: what to send.
        load: how.
        url: host:port of the server's gRPC endpoint.
        data: its requests (`input_data`); what perf_analyzer writes goes beside it.
    Raises:
        PerfAnalyzerError: a request failed, or perf_analyzer did.
    """
    report, profile = data.with_suffix(".csv"), data.with_suffix(".profile.json")
    words = [find(), *arguments(pack, load, url, data)]
    run([*words, f"--request-count={WARM_UP * load.concurrency}"])
    words += [f"--request-count={pack.requests}", "--verbose-csv", "-f", str(report)]
    if pack.model == SPARROW:  # it writes all that was sent as text as well, which is too much of raw frames
        profile.unlink(missing_ok=True)  # it refuses to write another
        words.append(f"--profile-export-file={profile}")
    run(words)
    return latency(report.read_text(), profile.read_bytes() if pack.model == SPARROW else b"", pack.requests)


def arguments(pack: Pack, load: Load, url: str, data: Path) -> list[str]:
    """What every call of a pack has in common."""
    words = ["-m", pack.model, "-u", url, "-i", "grpc", "--async", "--streaming", f"--input-data={data}"]
    words += [f"--concurrency-range={load.concurrency}", f"--shared-memory={load.shared_memory}"]
    words += [f"--request-parameter={name}:{str(value).lower()}:{TYPES[type(value)]}" for name, value in pack.parameters.items()]
    if pack.model == SPARROW_TRACK:  # under ids of their own: a run that failed leaves sessions open
        words += [f"--sequence-length={pack.frames}", "--sequence-length-variation=0", f"--sequence-id-range={1 + secrets.randbits(30)}"]
    return words


def run(words: Sequence[str]) -> None:
    """Calls it; raises PerfAnalyzerError unless every request succeeded."""
    try:
        process = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise PerfAnalyzerError(f"perf_analyzer: not done after {TIMEOUT_S} s. See the server's log, or lower `requests`.") from error
    if process.returncode:
        lines = [line.strip() for line in process.stdout.splitlines() if "error" in line.lower()] or process.stdout.splitlines()[-1:]
        raise PerfAnalyzerError(
            f"perf_analyzer: ended with {process.returncode}: {'; '.join(lines)}. It was called so: {shlex.join(words)}"
        )


def latency(report: str, profile: bytes, requests: int) -> Latency:
    """What a run wrote: its CSV, and the profile of its requests, of which only the times are read, since its tensors are not always JSON.

    A profile can break off: older versions write an output that a response lacks as whatever is in memory, and stop at a NaN. It is left
    out then, since the requests that came first do not stand for all.
    """
    (row,) = csv.DictReader(report.splitlines())
    mean, p50, p99 = (float(row[f"{name} latency"]) / 1000 for name in ("Avg", "p50", "p99"))
    times = re.findall(rb'"timestamp":(\d+),.*?"response_timestamps":\[(\d+)', profile, re.DOTALL)
    return Latency(mean, p50, p99, [(int(first) - int(sent)) / 1e6 for sent, first in times] if len(times) >= requests else [])
