"""Refer-YouTube-VOS.

The layout of ReferFormer (github.com/wjn922/ReferFormer, docs/data.md), which the original reads too:

ROOT/meta_expressions/<split>/meta_expressions.json     {"videos": {video: {"frames": [...], "expressions": {id: {"exp", "obj_id"}}}}}
ROOT/<split>/JPEGImages/<video>/<frame>.jpg             every fifth frame
ROOT/train/Annotations/<video>/<frame>.png              palette picture; index: obj_id. The masks of valid and test are on the server,
                                                        and so their expressions name no object
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from .annotations import picture_problems, read_json
from .clips import picture_size
from .palettes import read_palettes
from .samples import DatasetError, Masks
from .vos import Video, WholeVideos, read_videos


class RefYtvos(WholeVideos):
    """Refer-YouTube-VOS: a whole video with each expression; pictures for the server, and J&F where there are annotations."""

    suite = "ref-ytvos"
    splits = ("valid", "test", "train")
    archive = "Annotations"

    @property
    def meta(self) -> Path:
        return self.root / "meta_expressions" / self.split / "meta_expressions.json"

    @cached_property
    def videos(self) -> list[Video]:
        """Without those of the test split, which the published expressions of valid hold as well: 202 of 507 are left."""
        videos, test = super().videos, self.root / "meta_expressions" / "test" / "meta_expressions.json"
        others = read_json(test)["videos"] if self.split == "valid" and test.exists() else {}
        return [video for video in videos if video.name not in others]

    def named(self) -> list[str]:
        return [video.name for video in read_videos(self.meta, self.folder)]

    def annotations(self, video: Video) -> list[Path]:
        return [self.folder / "Annotations" / video.name / f"{frame}.png" for frame in video.frames]

    @cached_property
    def truth_files(self) -> list[Path]:
        named = all("obj_id" in expression for video in self.videos for expression in video.expressions.values())
        if not named or not (self.folder / "Annotations").is_dir():
            return []
        return [path for video in self.videos for path in self.annotations(video)]

    def truth_problems(self, video: Video) -> list[str]:
        pictures = picture_problems(f"{video.name}: annotations", self.annotations(video)) if self.truth_files else []
        return pictures or super().truth_problems(video)

    def truth(self, video: Video, expression: str) -> Callable[[int], Masks]:
        ids, object_id = read_palettes(self.annotations(video)), int(video.expressions[expression]["obj_id"])
        size = picture_size(video.pictures[0])
        if ids.shape[1:] != size:
            got = list(ids.shape[1:])
            raise DatasetError(f"{video.name}: got annotations of {got} px, expected {list(size)} as the pictures. Fetch the video again.")
        if not (ids == object_id).any():
            raise DatasetError(f"{video.name}: expression {expression} means object {object_id}, which no annotation shows.")
        return lambda frame: ids[frame] == object_id
