"""Writes the files that are derived from the contracts and committed, or checks that they are up to date.

python -m export.generate [--check]
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from pprint import pformat

from ensemble import settings
from ensemble.components import components
from ensemble.config import FULL
from ensemble.graph import PUBLIC, served
from ensemble.options import Options
from ensemble.tensors import TensorSpec

from .runners import Engine
from .to_repository import HEADER, SOURCE, describe, write_configs

ROOT = SOURCE.parent


def stubs() -> str:
    """client/_stubs.py: the inputs and limits of the public components, for a client without `ensemble`."""
    public = [components(FULL)[name] for name in PUBLIC]
    inputs = {model.name: {spec.name: wire_dtype(spec) for spec in model.inputs} for model in public}
    tables = {
        "INPUTS": (inputs, "Model to input to dtype."),
        "OPTIONS: dict[str, dict[str, Any]]": (option_fields(), "Request parameter of sparrow to what it takes."),
        "MAX_FRAMES": (settings.MAX_FRAMES, "Frames of one clip."),
        "MAX_SAMPLED_FRAMES": (settings.MAX_SAMPLED_FRAMES, "Most frames taken from a video file."),
        "VIDEO_SAMPLE_FPS": (settings.VIDEO_SAMPLE_FPS, "Frames per second taken from a video file."),
    }
    body = [f'{name} = {pformat(value, width=120, sort_dicts=False)}\n"""{doc}"""\n' for name, (value, doc) in tables.items()]
    return "\n".join([HEADER + '"""What the public models take."""\n\nfrom typing import Any\n', *body])


def option_fields() -> dict[str, dict[str, object]]:
    """The request parameters of `sparrow`; None where there is no choice or bound."""
    return {entry.name: {"default": entry.default, **entry.metadata} for entry in fields(Options)}


def wire_dtype(spec: TensorSpec) -> str:
    """The dtype as gRPC requests spell it."""
    return spec.triton_dtype.removeprefix("TYPE_").replace("STRING", "BYTES")


def generated() -> dict[Path, str]:
    """Path below the repository's root to content."""
    with tempfile.TemporaryDirectory() as folder:
        write_configs(FULL, Path(folder), Engine())
        configs = {
            Path(SOURCE.name) / model.name / "config.pbtxt": (Path(folder) / model.name / "config.pbtxt").read_text()
            for model in served(components(FULL))
        }
    return {
        **configs,
        Path(SOURCE.name) / "README.md": describe(FULL),
        Path("client/_stubs.py"): stubs(),
    }


def stale() -> list[Path]:
    """The generated files that differ from what the contracts say."""
    return [path for path, content in generated().items() if not (ROOT / path).exists() or (ROOT / path).read_text() != content]


if __name__ == "__main__":
    outdated = stale()
    if "--check" in sys.argv[1:]:
        sys.exit(f"stale: {', '.join(map(str, outdated))}. Run: make generate" if outdated else 0)
    contents = generated()
    for outdated_path in outdated:
        (ROOT / outdated_path).write_text(contents[outdated_path])
