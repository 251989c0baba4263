"""What this machine has: `sparrow doctor` without a checkpoint."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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

MPS_CONTROL = "nvidia-cuda-mps-control"
"""Starts the daemon of NVIDIA's MPS, and talks to it."""
MPS_PIPES = "CUDA_MPS_PIPE_DIRECTORY"
"""Names the folder where processes look for the daemon."""


@dataclass(frozen=True)
class Sharing:
    """How the processes of a server share a GPU (ADR 0020).

    Args:
        by: MPS, or time slices, with which kernels of two processes never run at once.
        why: whose MPS it is, or why there is none.
        starts_daemon: whether the server starts the daemon of MPS.
    """

    by: str
    why: str
    starts_daemon: bool = False

    def __str__(self) -> str:
        lost = "" if self.by == "MPS" else ": kernels of two models never run at once, and several sessions get fewer frames"
        return f"GPU shared by {self.by} ({self.why}){lost}"


def gpu_sharing(mps: bool = True) -> Sharing | None:
    """How a server that starts here will share the GPU, with `mps` by MPS where there is one; None where it sees no GPU."""
    if not gpus() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if not mps:
        return Sharing("time slices", "--no-mps")
    if pipes := os.environ.get(MPS_PIPES):
        if os.access(Path(pipes, "control"), os.W_OK):
            return Sharing("MPS", f"the daemon of {MPS_PIPES}={pipes}")
        return Sharing("time slices", f"no daemon at {MPS_PIPES}={pipes}")
    if control := shutil.which(MPS_CONTROL):
        return Sharing("MPS", control, starts_daemon=True)
    return Sharing("time slices", f"{MPS_CONTROL} is not on the PATH; it is a part of NVIDIA's driver")


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


def cxx() -> list[str]:
    """The C++ compiler with its options, as torch chooses it too."""
    return shlex.split(os.environ.get("CXX", "g++"))


def found(need: str) -> str | None:
    """The version of a package, or where a program is; None without."""
    if need == "g++":
        return shutil.which(cxx()[0])
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
    if sharing := gpu_sharing():
        yield str(sharing)
    yield ""
    for purpose, needs in NEEDS.items():
        have = {need: found(need) for need, _ in needs}
        missing = [f"{need} is missing: {how}" for need, how in needs if have[need] is None]
        state = "; ".join(missing) if missing else ", ".join(f"{need} {have[need]}" for need in have)
        yield f"{purpose:<16} {'no ' if missing else 'yes'}  {state}"
