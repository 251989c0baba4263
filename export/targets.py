"""Which engines suit a GPU: one file per target in targets/, chosen by name or by the GPU of this machine."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from .machine import gpu_names
from .runners import Engine

FOLDER = Path(__file__).parent / "targets"
AUTO, CPU = "auto", "cpu"


class TargetError(Exception):
    """There is no such target; the message lists those that there are."""


@dataclass(frozen=True)
class Target:
    """How graphs run on some GPUs.

    Args:
        name: of its file.
        about: the first lines of the file: what it gives.
        gpus: words of the names that their driver gives them; none for a machine without a GPU.
        engine: of every graph, with those of other kinds.
        tried: on what it has run; empty where it has not.
    """

    name: str
    about: str
    gpus: tuple[str, ...]
    engine: Engine
    tried: str

    def suits(self, gpu: str) -> bool:
        """Whether a GPU's name holds the words of one of its own, whole: "L4" is no "L40S"."""
        return any(re.search(rf"\b{re.escape(word)}\b", gpu) for word in self.gpus)


def read_target(path: Path) -> Target:
    """A target from its file; raises TargetError where it is none."""
    try:
        text = path.read_text()
        fields = tomllib.loads(text)
        about = " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#") and "sparrow export" not in line)
        return Target(path.stem, about, tuple(fields.pop("gpus")), tried=fields.pop("tried"), engine=Engine(**fields))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise TargetError(
            f"{path}: got {error}, expected gpus, engine_kind, precision, quantization, tried and perhaps [components]. {known()}"
        ) from error


def targets() -> dict[str, Target]:
    """Those that come with this package, by name."""
    return {path.stem: read_target(path) for path in sorted(FOLDER.glob("*.toml"))}


def ran_on(target: Target) -> str:
    """What one may expect of it."""
    return f"It has run on: {target.tried}." if target.tried else "It has not been tried: the gate of the export is what there is."


def known() -> str:
    names = ", ".join(path.stem for path in sorted(FOLDER.glob("*.toml")))
    return f"Choose one with --target: {names}, or a file like those in {FOLDER}."


def find_target(wanted: str) -> Target:
    """A target by name or file, or that of this machine's first GPU for "auto".

    Raises:
        TargetError: there is none; the message lists those that there are.
    """
    if wanted.endswith(".toml"):
        return read_target(Path(wanted))
    own = targets()
    if wanted == AUTO:
        gpu, *_ = (*gpu_names(), "")
        if not gpu:
            return own[CPU]
        for target in own.values():
            if target.suits(gpu):
                return target
        raise TargetError(f"target auto: got the GPU {gpu!r}, which no target names. {known()}")
    if wanted not in own:
        raise TargetError(f"target: got {wanted!r}. {known()}")
    return own[wanted]
