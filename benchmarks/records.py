"""One measured figure is one JSON line under results/<gpu or cpu>/<suite>.jsonl; tables are rendered from these lines."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def record(
    suite: str, workload: str, metric: str, value: float | np.floating[Any], unit: str, samples: Sequence[float], env: dict[str, Any]
) -> dict[str, Any]:
    """A figure with the samples that it was computed from."""
    low, high = np.percentile(samples, [25, 75])
    return figure(suite, workload, metric, value, unit, len(samples), float(f"{high - low:.6g}"), env)


def figure(
    suite: str, workload: str, metric: str, value: float | np.floating[Any], unit: str, n: int, spread: float | None, env: dict[str, Any]
) -> dict[str, Any]:
    """A figure of `n` samples; `spread` is their interquartile range, in its unit, where it is known."""
    return {
        "suite": suite,
        "workload": workload,
        "metric": metric,
        "value": float(f"{value:.6g}"),
        "unit": unit,
        "n": n,
        "spread": spread,
        "env": env,
    }


def gate_records(figures: Mapping[str, Mapping[str, float]], workload: str, env: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the export has measured of each output of an engine, by the worst of them."""
    for metric, worst in (("cosine", min), ("p99_error", max), ("matched", min), ("mask_iou", min)):
        if values := [own[metric] for own in figures.values() if metric in own]:
            yield record("gate", workload, metric, worst(values), "ratio", values, env)


def append(records: Sequence[dict[str, Any]]) -> Path:
    """Adds figures of one suite and machine to their file and returns it."""
    path = suite_path(records[0]["suite"], records[0]["env"]["gpu"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in records)
    return path


def suite_path(suite: str, gpu: str | None) -> Path:
    """The file of a suite's figures on a GPU, or the CPU."""
    return RESULTS / (gpu or "cpu").lower().replace(" ", "-") / f"{suite}.jsonl"


def latest(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(workload, metric) to its last figure."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(line["workload"], line["metric"]): line for line in lines}


def environment(url: str, preset: str) -> dict[str, Any]:
    """What a figure depends on: this machine, and the server at `url` with its engine kinds and the preset of its model.

    How the server's processes share a GPU is known where `sparrow serve` runs this.
    """
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(url) as client:
        models = [model["name"] for model in client.get_model_repository_index(as_json=True)["models"]]
        parameters = {name: client.get_model_config(name, as_json=True)["config"].get("parameters", {}) for name in models}
        server = client.get_server_metadata(as_json=True)["version"]
    return {
        **machine(),
        "tritonserver": server,
        "gpu_sharing": os.environ.get("SPARROW_GPU_SHARING"),
        "engine_kinds": {  # of models, and of single graphs in them: "tracker", "tracker.mask_decoder"
            key.replace("engine_kind", name): value["string_value"]
            for name, fields in parameters.items()
            for key, value in fields.items()
            if key.startswith("engine_kind")
        },
        "preset": preset,
        "precision": parameters["tracker"]["precision"]["string_value"],
    }


def machine() -> dict[str, Any]:
    """What any figure depends on: the GPU, its driver, torch, and the code, today."""
    gpu, driver, *_ = (*nvidia_smi("name,driver_version"), None, None)
    return {
        "gpu": gpu,
        "driver": driver,
        "torch": installed("torch"),
        "git": command("git", "-C", str(RESULTS), "describe", "--always", "--dirty"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def nvidia_smi(fields: str) -> list[str]:
    """What it says of the first GPU; nothing where there is none."""
    line = command("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    return line.split(", ") if line else []


class GpuMemory:
    """The most that the first GPU has in use, in GB, while the context is open; looked at twice a second."""

    def __enter__(self) -> GpuMemory:
        self.samples: list[float] = []
        self._done = Event()
        self._thread = Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.5):
            self.samples += [float(mib) * 2**20 / 1e9 for mib in nvidia_smi("memory.used")]


def command(*words: str) -> str:
    """The first line that a command prints; empty where it is missing or fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip().split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return ""


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
