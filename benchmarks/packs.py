"""What perf_analyzer sends: packs/<name>.toml says it in a few lines, and the requests are made from that when they are needed."""

from __future__ import annotations

import base64
import io
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sparrow_client._wire import SPARROW, Tensors, content

from .serving import HEIGHT, WIDTH, moving_square

PACKS = Path(__file__).parent / "packs"


class PackError(Exception):
    """A file is no pack; the message says why and what to do."""


@dataclass(frozen=True)
class Pack:
    """Requests of one kind, and how many of them to send at once.

    Args:
        name: of its file.
        model: what they are sent to.
        frames: frames of a clip, or of a session; each is of the size that `sparrow bench` uses.
        concurrency: clips, or sessions, under way at once; measured one after the other.
        requests: to measure, for each concurrency.
        prompt: the question, of `sparrow`.
        masks: whether the answer has to have them.
        boxes: objects of a session, xyxy, normalised.
        parameters: of every request: text, bool or int.
        shared_memory: how tensors travel, measured one after the other: none, system, cuda.
    """

    name: str
    model: str
    frames: int
    concurrency: list[int]
    requests: int
    prompt: str = ""
    masks: bool = False
    boxes: list[list[float]] = field(default_factory=list)
    parameters: dict[str, str | bool | int] = field(default_factory=dict)
    shared_memory: list[str] = field(default_factory=lambda: ["none"])

    @property
    def frames_per_request(self) -> int:
        return self.frames if self.model == SPARROW else 1

    def steps(self) -> list[Tensors]:
        """The inputs of each request, of a session in their order."""
        frames = moving_square(self.frames, HEIGHT, WIDTH)
        if self.model == SPARROW:
            return [
                {"prompt": np.array([self.prompt.encode()], object), "encoded_frames": np.array([jpeg(frame) for frame in frames], object)}
            ]
        steps = [{"frame": frame} for frame in frames]
        if self.boxes:
            steps[0] |= {"boxes": np.array(self.boxes, np.float32), "box_objects": np.arange(len(self.boxes), dtype=np.int32)}
        return steps


def read_pack(path: Path) -> Pack:
    """A pack from its file; raises PackError."""
    try:
        return Pack(path.stem, **tomllib.loads(path.read_text()))
    except (OSError, TypeError, tomllib.TOMLDecodeError) as error:
        raise PackError(f"{path}: not a pack ({error}). Write it like those in {PACKS}.") from error


def jpeg(frame: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG")
    return file.getvalue()


def input_data(steps: Sequence[Tensors]) -> dict[str, Any]:
    """Requests as perf_analyzer reads them from JSON: a list of streams, each with its steps; a session is a stream."""
    return {"data": [[{name: tensor(array) for name, array in step.items()} for step in steps]]}


def tensor(array: NDArray[Any]) -> Mapping[str, Any]:
    return {"content": {"b64": base64.b64encode(content(array)).decode()}, "shape": list(array.shape)}
