"""Draws latency against concurrency from results/, for every machine that was put under load: `python -m benchmarks.plots`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import RESULTS, latest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTS = RESULTS.parent.parent / "docs" / "load"
PANELS = {
    "answer": ("first_answer_ms", "first_answer_ms_p99"),
    "frame of a session": ("track_frame_ms_p50", "track_frame_ms_p99"),
}
"""Title to the metrics of the line and of the upper end of its band."""


def main() -> None:
    for path in RESULTS.glob("*/serving.jsonl"):
        if lines := under_load(path):
            draw(lines, PLOTS / f"{path.parent.name}.svg")


def under_load(results: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """(pack, concurrency, metric) to the latest figure of the preset that was put under load last."""
    lines = {key: line for key, line in latest(results).items() if "@" in key[0]}
    presets = [line["env"]["preset"] for line in lines.values()]
    split = {(*workload.split("@"), metric): line for (workload, metric), line in lines.items()}
    return {(pack, int(count), metric): line for (pack, count, metric), line in split.items() if line["env"]["preset"] == presets[-1]}


def draw(lines: dict[tuple[str, int, str], dict[str, Any]], path: Path) -> None:
    """Draws the figures of a machine as SVG."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, ScalarFormatter

    plt.rcParams |= {"svg.hashsalt": "sparrow", "svg.fonttype": "none", "font.size": 9}
    panels = {title: metrics for title, metrics in PANELS.items() if any(metric == metrics[0] for _, _, metric in lines)}
    figure, (axes,) = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.2), constrained_layout=True, squeeze=False)
    for axis, (title, metrics) in zip(axes, panels.items(), strict=True):
        for pack in dict.fromkeys(pack for pack, _, metric in lines if metric == metrics[0]):
            draw_pack(axis, lines, pack, *metrics)
        axis.set(title=f"{title}: p50, and up to p99", xlabel="at once", ylabel="ms", xscale="log", yscale="log")
        axis.set_xticks(counts := sorted({count for _, count, _ in lines}), counts)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    env = next(reversed(lines.values()))["env"]
    figure.suptitle(f"{env['preset']}, {env['precision']}, {env['gpu'] or 'CPU'}, git {env['git']}", fontsize=9)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_pack(axis: Axes, lines: dict[tuple[str, int, str], dict[str, Any]], pack: str, p50: str, p99: str) -> None:
    counts = sorted(count for name, count, metric in lines if (name, metric) == (pack, p50))
    low, high = ([lines[pack, count, metric]["value"] for count in counts] for metric in (p50, p99))
    (line,) = axis.plot(counts, low, marker="o", label=pack)
    axis.fill_between(counts, low, high, alpha=0.15, color=line.get_color())


if __name__ == "__main__":
    main()
