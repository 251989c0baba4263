"""MeViS: expressions of motion, several of which mean more than one object.

The layout of its README (github.com/henghuiding/MeViS), which the original reads too:

ROOT/<split>/JPEGImages/<video>/<frame>.jpg
ROOT/<split>/meta_expressions.json      {"videos": {video: {"frames": [...], "expressions": {id: {"exp", "anno_id": [...]}}}}}
ROOT/<split>/mask_dict.json             annotation id to COCO RLE, or null, per frame; valid_u only: the masks of valid are on its server
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from .annotations import read_json
from .clips import picture_size
from .samples import DatasetError, Masks
from .vos import Video, WholeVideos


class Mevis(WholeVideos):
    """MeViS: a whole video with each expression of motion; J&F of valid_u, and for the server's sake the pictures of valid."""

    suite = "mevis"
    splits = ("valid_u", "valid")

    @property
    def meta(self) -> Path:
        return self.folder / "meta_expressions.json"

    @cached_property
    def truth_files(self) -> list[Path]:
        return [self.folder / "mask_dict.json"] if self.split == "valid_u" else []

    @cached_property
    def tracks(self) -> dict[str, list[dict[str, Any] | None]]:
        tracks: dict[str, list[dict[str, Any] | None]] = read_json(self.folder / "mask_dict.json")
        return tracks

    def problems(self) -> list[str]:
        try:
            if self.truth_files:
                self.tracks  # noqa: B018
            return super().problems()
        except DatasetError as error:
            self.truth_files = []
            return [str(error), *super().problems()]

    def truth(self, video: Video, expression: str) -> Callable[[int], Masks]:
        """The union of all objects that are meant; nothing where an expression means none."""
        what, size = f"{video.name}: expression {expression}", picture_size(video.pictures[0])
        meant = video.expressions[expression].get("anno_id")
        if meant is None:
            raise DatasetError(f"{what} names no annotation (anno_id). Fetch meta_expressions.json again.")
        tracks = [self.tracks.get(str(index), []) for index in meant]
        for index, track in zip(meant, tracks, strict=True):
            if len(track) != len(video.frames):
                got = f"{len(track)} masks for {len(video.frames)} frames"
                raise DatasetError(f"{what}: got {got} as annotation {index} of mask_dict.json. Fetch that file again.")
            others = [entry["size"] for entry in track if entry and tuple(entry["size"]) != size]
            if others:
                raise DatasetError(f"{what}: got masks of {others[0]} px, expected {list(size)} as the pictures. Fetch the video again.")

        def mask(frame: int) -> Masks:
            entries = [entry for track in tracks if (entry := track[frame])]
            return np.asarray(np.any([np.zeros(size, bool), *(coco.decode(entry) for entry in entries)], axis=0))

        return mask
