"""Proves the graphs that `python -m export.proof prepare` wrote with TensorRT 8.6: builds, runs and measures every one of them.

    python3 -m benchmarks.tensorrt86 CASES -o OUT [--case NAME]... -- PYTHON...     PYTHON: the command of an interpreter that has tensorrt

Figures go to the suites `gate` and `component`, as they come; what failed, and why, to summary.txt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from .records import gate_records, machine, record

TENSORRT = "8.6"
AT_ONCE = 8
"""Builds beside each other: each keeps one core busy."""


class Proof:
    """One run over all cases.

    Args:
        folder: of the cases.
        out: for figures and summary.
        python: the words that start the interpreter with tensorrt.
        build_timeout_s: for one plan.
        deadline_s: from now on, after which nothing is started.
    """

    def __init__(self, folder: Path, out: Path, python: Sequence[str], build_timeout_s: float, deadline_s: float) -> None:
        self._folder, self._out, self._python = folder, out, python
        self._build_timeout_s, self._end = build_timeout_s, time.monotonic() + deadline_s
        self._env = {**machine(), "torch": None, "tritonserver": None, "tensorrt": TENSORRT}

    def say(self, line: str) -> None:
        """To whoever looks on, and to the summary."""
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        with (self._out / "summary.txt").open("a") as file:
            file.write(f"{line}\n")

    def build(self, cases: Sequence[str]) -> list[str]:
        """The cases of which a plan was built."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return [case for case, built in zip(cases, pool.map(self._build, cases), strict=True) if built]

    def _build(self, case: str) -> bool:
        left = self._end - time.monotonic()
        if left <= 0:
            self.say(f"{case}: not built, out of time")
            return False
        words = [*self._python, "-m", "export.proof", "build", str(self._folder / case)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=min(left, self._build_timeout_s), check=False)
        except subprocess.TimeoutExpired as error:
            self.say(f"{case}: not built in {error.timeout:.0f} s")
            return False
        if done.returncode:
            self.say(f"{case}: not built (status {done.returncode})\n{done.stderr[-3000:]}")
            return False
        self.say(f"{case}: built in {json.loads(done.stdout.splitlines()[-1])['build_s']} s")
        return True

    def run(self, cases: Sequence[str]) -> None:
        """Figures of the cases, one process for as many as it survives."""
        left = list(cases)
        while left:
            before = len(left)
            words = [*self._python, "-m", "export.proof", "run", *(str(self._folder / case) for case in left)]
            with TemporaryFile("w+") as errors, subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    self.note(json.loads(line))
                    left = left[1:]
                process.wait()
                errors.seek(0)
                reason = errors.read()[-3000:]
            if left:
                self.say(f"{left[0]}: did not run (status {process.returncode}, after {before - len(left)} others)\n{reason}")
                left = left[1:]

    def note(self, result: dict[str, Any]) -> None:
        """Keeps what came out of a case."""
        preset, precision, component = result["case"].split("_", 2)
        env = {**self._env, "engine_kinds": {component: "tensorrt"}, "preset": preset, "precision": precision}
        workload = f"{preset}_tensorrt{TENSORRT}_{precision}"
        figures, latency_ms = result["figures"], result["latency_ms"]
        lines = [record("component", workload, f"{component}.latency_ms", float(np.median(latency_ms)), "ms", latency_ms, env)]
        lines += gate_records(figures, f"{workload}_{component}", env)
        for line in lines:
            with (self._out / f"{line['suite']}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        shown = "  ".join(f"{line['metric'].split('.')[-1]} {line['value']:.6g}" for line in lines)
        self.say(f"{result['case']:<44} {shown}   {result['verdict'] or 'passes the gate'}")


def by_preset(cases: Sequence[str]) -> Iterator[list[str]]:
    """The cases of each size of the model, in order."""
    for preset in dict.fromkeys(case.split("_")[0] for case in cases):
        yield [case for case in cases if case.startswith(f"{preset}_")]


def main() -> None:
    """Builds beside each other, then runs one after the other, size by size."""
    parser = argparse.ArgumentParser(description="Prove prepared graphs with TensorRT 8.6.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("python", nargs="+", help="command of the interpreter with tensorrt")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--case", action="append", help="only this case; repeatable")
    parser.add_argument("--build-timeout-s", type=float, default=240)
    parser.add_argument("--deadline-s", type=float, default=500)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    proof = Proof(given.folder, given.out, given.python, given.build_timeout_s, given.deadline_s)
    for cases in by_preset(given.case or json.loads((given.folder / "cases.json").read_text())):
        proof.run(proof.build(cases))


if __name__ == "__main__":
    main()
