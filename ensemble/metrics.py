"""What the tracker counts, as it stands on Triton's /metrics endpoint."""

from __future__ import annotations

from collections import defaultdict
from copy import copy
from dataclasses import dataclass
from typing import Literal

from . import settings


@dataclass(frozen=True)
class Metric:
    """A family of figures.

    Args:
        name: as on /metrics.
        kind: a gauge is set, a counter only grows, a histogram counts values by size.
        doc: meaning and unit.
        label: what tells the figures of the family apart, and
        values: the values that it takes; none where there is one figure.
        buckets: upper bounds of a histogram.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    doc: str
    label: str = ""
    values: tuple[str, ...] = ("",)
    buckets: tuple[float, ...] = ()


def powers_of_two(most: int) -> tuple[float, ...]:
    return tuple(float(2**power) for power in range(most.bit_length()))


SESSIONS = Metric("sparrow_track_sessions", "gauge", "Open sessions.")
OBJECTS = Metric("sparrow_track_objects", "gauge", "Objects that they follow.")
MEMORY = Metric("sparrow_track_memory_bytes", "gauge", "Memory banks of these objects, on the device that holds them.")
CLOSED = Metric(
    "sparrow_track_closed_sessions_total",
    "counter",
    "Closed sessions: by END, or a START that failed; by frames that failed half way; idle for too long; idle, to make room for another.",
    "reason",
    ("ended", "failed", "expired", "evicted"),
)
FRAMES = Metric("sparrow_track_frames_total", "counter", "Frames answered.")
REFUSED = Metric(
    "sparrow_track_refused_total",
    "counter",
    "Requests refused, by the class of their error.",
    "error",
    ("InvalidInput", "UnknownSession", "CapacityExceeded", "Cancelled", "ComponentFailed"),
)
LIMITED = Metric(
    "sparrow_track_limited_total",
    "counter",
    "Of CapacityExceeded: which limit was reached.",
    "limit",
    ("sessions", "session_objects", "memory"),
)
STEP_FRAMES = Metric(
    "sparrow_track_step_frames",
    "histogram",
    "Frames of different sessions, one of each, that are tracked together.",
    buckets=powers_of_two(settings.MAX_FRAME_BATCH),
)
STEP_OBJECTS = Metric(
    "sparrow_track_step_objects",
    "histogram",
    "Objects on these frames.",
    buckets=powers_of_two(settings.MAX_FRAME_BATCH * settings.MAX_OBJECTS),
)
STAGE = Metric(
    "sparrow_track_stage_seconds_total",
    "counter",
    "Time per stage: objects that start, objects that go on (of the device); responses (of the host).",
    "stage",
    ("start", "track", "respond"),
)

TRACK_METRICS = (SESSIONS, OBJECTS, MEMORY, CLOSED, FRAMES, REFUSED, LIMITED, STEP_FRAMES, STEP_OBJECTS, STAGE)


class Metrics:
    """Figures so far: gauges as they are, counters and histograms since they were last taken."""

    def __init__(self) -> None:
        self.gauges: dict[Metric, float] = {}
        self.counts: dict[tuple[Metric, str], float] = defaultdict(float)
        self.observations: dict[Metric, list[float]] = defaultdict(list)

    def set(self, metric: Metric, value: float) -> None:
        """Of a gauge."""
        self.gauges[metric] = value

    def add(self, metric: Metric, value: float, label: str = "") -> None:
        """To a counter; `label` is one of its values."""
        self.counts[metric, label] += value

    def observe(self, metric: Metric, value: float) -> None:
        """In a histogram."""
        self.observations[metric].append(value)

    def take(self) -> Metrics:
        """What came together since this was last called."""
        taken, fresh = copy(self), Metrics()
        self.counts, self.observations = fresh.counts, fresh.observations
        return taken
