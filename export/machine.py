"""What this machine has: `sparrow doctor` without a checkpoint."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

NEEDS = {
    "serving": (("nvidia-pytriton", "pip install 'sparrow-serving[export]'"),),
    "onnx engines": (("onnxruntime", "pip install 'sparrow-serving[export]'"), ("onnx", "pip install 'sparrow-serving[export]'")),
    "torch engines": (("torch", "pip install torch"),),
    "aoti engines": (("torch", "pip install torch"), ("g++", "install the C++ compiler of your system")),
    "tensorrt engines": (("tensorrt", "export and serve in NVIDIA's container, or pip install tensorrt"),),
    "8 and 4 bits": (("bitsandbytes", "pip install 'sparrow-serving[quantized]'"),),
    "evaluations": (("scipy", "pip install 'sparrow-serving[eval]'"),),
}
"""What one may want to do, to what it needs and how that is got."""


def gpu_names() -> list[str]:
    """The names of the GPUs, as their driver gives them."""
    return [fields[0] for fields in gpus()]


def gpus() -> list[list[str]]:
    """Name, driver, memory and compute capability of each GPU; none without a driver."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return [line.split(", ") for line in done.stdout.splitlines()] if done.returncode == 0 else []


def found(need: str) -> str | None:
    """The version of a package, or where a program is; None without."""
    if need == "g++":
        return shutil.which(need)
    for name in (need, f"{need}-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def describe() -> Iterator[str]:
    """Lines for people: what there is, what it can do, and what is missing."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB, Python {platform.python_version()}"
    own = gpus()
    for name, driver, size, capability in own:
        yield f"{name}, {size}, sm_{capability.replace('.', '')}, driver {driver}"
    if not own:
        yield "no NVIDIA GPU"
    yield ""
    for purpose, needs in NEEDS.items():
        have = {need: found(need) for need, _ in needs}
        missing = [f"{need} is missing: {how}" for need, how in needs if have[need] is None]
        state = "; ".join(missing) if missing else ", ".join(f"{need} {have[need]}" for need in have)
        yield f"{purpose:<16} {'no ' if missing else 'yes'}  {state}"
