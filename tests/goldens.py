"""The golden packs: what the original computes, read from the folder named by SPARROW_GOLDENS (default ../shared/goldens)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sparrow_client.segment import read_boxes

from export.checkpoints import Checkpoint

ROOT = Path(os.environ.get("SPARROW_GOLDENS", Path(__file__).parents[2] / "shared" / "goldens"))
PACKS = sorted(path.parent.name for path in ROOT.glob("*/ckpt"))


@dataclass(frozen=True)
class Case:
    """One request of a pack with everything the original computed for it."""

    pack: str
    name: str

    @property
    def folder(self) -> Path:
        return ROOT / self.pack / "cases" / self.name

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "case.json").read_text())  # type: ignore[no-any-return]

    @cached_property
    def expected(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "expected.npz") as arrays:
            return dict(arrays)

    @cached_property
    def frames(self) -> np.ndarray:
        """[T, H, W, 3] uint8."""
        files = sorted((ROOT / self.pack / self.meta["frames"]).glob("*.png"))
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])

    @property
    def options(self) -> dict[str, Any]:
        """The flags of the original's command line as request parameters of `sparrow`."""
        flags = self.meta["flags"]
        return {
            "modality": self.meta["type"],
            "branch": "tracked" if flags["use_sam2_video_branch"] else "framewise",
            "video_init": flags["video_init"] or "text_then_boxes",
            "max_new_tokens": flags["max_new_tokens"],
            "target_placeholders": flags["use_tsf_token"],
            "target_tokens": flags["tsf_k"],
            "target_kmeans_steps": flags["tsf_kmeans_iters"],
            "detection_guidance": flags["use_detection_guidance"],
            "proposal_topk": flags["proposal_topk"],
            "coco_score_power": flags["proposal_score_power"][0],
            "sa1b_score_power": flags["proposal_score_power"][1],
            "selection_threshold": flags["proposal_score_threshold"],
            "roi_helper": flags["use_roi_helper"],
            "roi_fusion_gamma": flags["roi_fusion_init"],
            "box_prior_filter": flags["use_box_prior_filter"],
            "box_prior_min_score": flags["box_prior_min_score"],
            "box_prior_max_keep": flags["box_prior_max_keep"],
        }

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The tensors of the request."""
        inputs = {"frames": self.frames, "prompt": np.array([self.meta["prompt"].encode()], object)}
        if not self.meta["flags"]["use_tsf_token"]:  # without it the original drops the crops
            return inputs
        if crop := self.meta["flags"].get("tsf_crop_path"):
            inputs["target_crop"] = np.asarray(Image.open(self._file(crop)).convert("RGB"))
        elif boxes := self.meta["flags"].get("tsf_boxes_txt"):
            inputs["target_boxes"] = read_boxes(self._file(boxes))
        return inputs

    def _file(self, name: str) -> Path:
        """A file that a flag names, below the case's folder or the pack's."""
        return next(path for path in (self.folder / name, ROOT / self.pack / name) if path.exists())

    @property
    def is_video(self) -> bool:
        return bool(self.meta["type"] == "video")

    @cached_property
    def proposer_image(self) -> np.ndarray:
        """[448, 448, 3] uint8: exactly what the original's proposer received."""
        return np.asarray(Image.open(self.folder / "proposer_input_448.png").convert("RGB"))

    def __str__(self) -> str:
        return f"{self.pack}-{self.name}"


CASES = [Case(pack, path.name) for pack in PACKS for path in sorted((ROOT / pack / "cases").iterdir())]

_checkpoints: dict[str, Checkpoint] = {}


def checkpoint(pack: str) -> Checkpoint:
    """The checkpoint of a pack, opened once."""
    if pack not in _checkpoints:
        _checkpoints[pack] = Checkpoint(ROOT / pack / "ckpt")
    return _checkpoints[pack]


def parametrize_cases(condition: Any = lambda case: True) -> pytest.MarkDecorator:
    """Runs a test on every golden case that satisfies `condition`; skipped with one clear line where there are no packs."""
    cases = [case for case in CASES if condition(case)]
    if not cases:
        reason = f"no golden case of this kind in {ROOT}" if CASES else f"no golden packs in {ROOT}; name their folder in SPARROW_GOLDENS"
        return pytest.mark.skip(reason)
    return pytest.mark.parametrize("case", cases, ids=str)
