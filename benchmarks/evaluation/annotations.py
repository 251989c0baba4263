"""What the benchmarks of captions and boxes share: reading annotations, cleaning masks, and what can be wrong with files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sparrow_client._media import MediaError, first_video, readable, upright

from .samples import DatasetError

MIN_BLOB_PX = 20
"""Least area of a part of a mask that counts (spec 10)."""

Size = tuple[int, int]
"""Height and width."""

Mask = NDArray[np.bool_]


def read_json(path: Path) -> Any:
    """Raises DatasetError where it is missing or broken."""
    if not path.is_file():
        raise DatasetError(missing(path))
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not readable as JSON ({error}), expected annotations. Fetch it again.") from error


@contextmanager
def expected_fields(path: Path) -> Iterator[None]:
    """Raises DatasetError where what was read of a file lacks something."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise DatasetError(f"{path}: not the annotations that were expected ({type(error).__name__}: {error}). Fetch it again.") from error


def missing(path: Path) -> str:
    """A line about a file or folder that is not there, and what is there instead."""
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    names = sorted(entry.name for entry in parent.iterdir())
    held = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{path}: missing; {parent} holds {held or 'nothing'}. Fetch it, or give it this name."


def check_whole(root: Path, files: Iterable[Path]) -> None:
    """Raises DatasetError where files are missing."""
    files = dict.fromkeys(files)
    lost = [path for path in files if not path.is_file()]
    if lost or not files:
        first = f", the first {lost[0]}" if lost else ""
        raise DatasetError(
            f"{root}: got {len(lost)} of {len(files)} files missing{first}, expected a whole data set. "
            "--check-data names what is missing; fetch that."
        )


def picture_problems(name: str, files: Sequence[Path], size: Size | None = None) -> list[str]:
    """At most a line for what is missing, one for what is unreadable, and one for what has another size.

    Args:
        name: what the pictures belong to.
        files: of one video; every one is decoded.
        size: that they should have; None: all the same.
    """
    faults: dict[str, list[Path]] = {}
    for path in files:
        try:
            with Image.open(path) as picture:
                found = (picture.height, picture.width)
                size = size or found
                picture.draft("L", (1, 1))  # a JPEG is read to its end, but decoded at an eighth of its size
                picture.load()
        except FileNotFoundError:
            faults.setdefault("are missing", []).append(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            faults.setdefault("are unreadable", []).append(path)
        else:
            if found != size:
                faults.setdefault(f"are not {size[1]}x{size[0]} px", []).append(path)
    return [f"{name}: {len(own)} of {len(files)} pictures {fault}, the first {own[0]}. Fetch them again." for fault, own in faults.items()]


def video_problem(path: Path, num_frames: int, size: Size) -> str:
    """A line about a video that cannot be read, is shorter than num_frames or has another size; empty if there is nothing to say."""
    try:
        with readable(path), av.open(str(path)) as container:
            stream = first_video(container, path)
            frame = next(container.decode(stream), None)
            if frame is None:
                return f"{path}: no frame can be decoded. Fetch it again."
            found = upright(frame).shape[:2]
            container.seek(0)
            count = sum(1 for packet in container.demux(stream) if packet.size)
    except MediaError as error:
        return str(error)
    if found != size:
        return f"{path}: got {found[1]}x{found[0]} px, expected {size[1]}x{size[0]} as annotated. Fetch it again."
    if count < num_frames:
        return f"{path}: got {count} frames, expected {num_frames} or more as annotated. Fetch it again."
    return ""


def without_blobs(mask: Mask) -> Mask:
    """A mask without its parts of less than MIN_BLOB_PX, neighbours being those to the sides: [H, W] -> [H, W]."""
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=4)
    large = statistics[:, cv2.CC_STAT_AREA] >= MIN_BLOB_PX
    large[0] = False  # what is not in the mask
    cleaned: Mask = large[labels]
    return cleaned
