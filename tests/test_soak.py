"""The short form of `make soak`: half a minute of callers that open, track, misbehave and die."""

import pytest

from tests import soak

pytestmark = pytest.mark.serving

SECONDS = 30
LARGEST_GROWTH_MIB = 64
"""From the end of the warm-up to the end. Half a minute is too short for a slope: allocators and thread pools still fill up (20 to 30 MiB
seen); what the sessions of this time would leak if nothing were freed is 0.1 MiB each, and the long form bounds the slope."""


def test_no_mask_is_another_sessions_and_nothing_is_left_when_callers_die(repository, tmp_path):
    report, _ = soak.soak(repository, tmp_path, SECONDS)
    tally = report.tally
    assert not tally.problems, "\n".join(tally.problems[:5])
    assert tally.frames > 100
    assert {"ended", "died without END", "refused for want of room"} <= set(tally.events)
    assert sum(event.startswith("refused: ") for event in tally.events) > 3
    assert report.leftovers == {"sessions": 0, "objects": 0, "memory_bytes": 0}

    assert report.server["frames_total"] >= tally.frames
    assert report.server["expired"] + report.server["evicted"] >= tally.events["died without END"]
    assert report.server["limited_total"] == tally.events["refused for want of room"]
    warm = report.memory.mib[int(soak.WARM_UP * len(report.memory.mib)) :]
    assert warm[-1] - warm[0] < LARGEST_GROWTH_MIB
