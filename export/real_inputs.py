"""What the graphs are given while three frames of a clip are answered and tracked: the gate runs engines on that, too."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ensemble import frames as preprocess
from ensemble import settings
from ensemble.components import components
from ensemble.config import ModelConfig
from ensemble.runner import LocalRunner, open_session
from ensemble.selection import rank
from ensemble.tensors import Array, Arrays
from ensemble.tracker import Tracker

from .gate import run_module
from .models import empty_module
from .runners import torch_device

if TYPE_CHECKING:
    from .checkpoints import Checkpoint

PICTURES = sorted((Path(__file__).parent / "pictures").glob("*.jpg"))
"""Frames 0, 4 and 8 of docs/demo/clip.mp4."""
BOX = (0.14, 0.58, 0.41, 0.78)
"""Around an object on the first, xyxy, normalised."""
DRAWN = np.s_[150:220, 134:208]
"""Rows and columns of another one."""
SMALL = 256 << 20
"""Bytes of the frame encoder's weights up to which a CPU computes features; a larger one takes it too long."""


def real_inputs(checkpoint: Checkpoint, component: str) -> list[Arrays]:
    """The inputs of a component, call by call; none for the language model's graphs, nor where they take too long to compute.

    Args:
        checkpoint: computes what lies before the component, in float32.
        component: its name.
    """
    pictures = of_pictures(checkpoint.config)
    if component in pictures:
        return [pictures[component]]
    if component not in ("proposal_selector", *components(checkpoint.config)["tracker"].parts):
        return []
    weights = empty_module("frame_encoder", checkpoint.config).parameters()
    if torch_device() == "cpu" and sum(weight.nbytes for weight in weights) > SMALL:
        return []
    return of_features(checkpoint)[component]


def read_pictures() -> Array:
    """[3, H, W, 3] uint8 RGB."""
    return preprocess.decode_frames([path.read_bytes() for path in PICTURES], "pictures")


def of_pictures(config: ModelConfig) -> dict[str, Arrays]:
    """The inputs of what sees the pictures themselves."""
    frames = read_pictures()
    seen = frames[preprocess.encoder_indices(len(frames), config.num_frames)]
    context = np.stack([preprocess.context_frame(frame, config) for frame in seen])
    grounding = preprocess.grounding_frame(frames[0], config)
    return {
        "vision_encoder": {
            "video_frames": np.stack([preprocess.video_frame(frame, config) for frame in seen]),
            "context_frames": context,
        },
        "image_encoder": {"context_frames": context[:1]},
        "proposal_detector": {"proposal_image": preprocess.proposal_frame(preprocess.proposal_image(grounding, config))},
        "frame_encoder": encoder_inputs(frames[0], config),
    }


def encoder_inputs(frame: Array, config: ModelConfig) -> Arrays:
    """The inputs of frame_encoder for one frame [H, W, 3] uint8 RGB."""
    return {name: array[None] for name, array in preprocess.encoder_frame(frame, config).items()}


class Recorded:
    """A component in float32 that keeps what it is given.

    Args:
        checkpoint: its weights.
        component: its name.
    """

    def __init__(self, checkpoint: Checkpoint, component: str) -> None:
        self._module, self._contract = checkpoint.build(component), components(checkpoint.config)[component]
        self.given: list[Arrays] = []

    def run(self, inputs: Arrays) -> Arrays:
        self.given.append(inputs)
        return run_module(self._module, self._contract, inputs)


@lru_cache(maxsize=1)
def of_features(checkpoint: Checkpoint) -> dict[str, list[Arrays]]:
    """The inputs of what sees features of the pictures; computed once by each exporting process."""
    config, frames = checkpoint.config, read_pictures()
    guided = "proposal_selector" in checkpoint.components
    parts = ("frame_encoder", *components(config)["tracker"].parts, *(("proposal_detector", "proposal_selector") if guided else ()))
    graphs = {part: Recorded(checkpoint, part) for part in parts}
    runner = LocalRunner(graphs)
    runner.stateful["tracker"] = Tracker(config, graphs)
    size = frames.shape[1:3]
    drawn = np.zeros((1, *size), bool)
    drawn[0][DRAWN] = True
    start = {
        "boxes": np.array([BOX], np.float32),
        "box_objects": np.array([0], np.int32),
        "masks": drawn,
        "mask_objects": np.array([1], np.int32),
    }
    encoded = [runner.run("frame_encoder", encoder_inputs(frame, config)) for frame in frames]
    with open_session(runner, "tracker") as session:
        for features in encoded:
            session.step({**features, "frame_size": np.array(size, np.int32), **({} if session.started else start)})
    if guided:
        detected = runner.run("proposal_detector", of_pictures(config)["proposal_detector"])
        proposals = rank(detected, settings.PROPOSAL_TOPK, settings.COCO_SCORE_POWER, settings.SA1B_SCORE_POWER)
        spoken = {"prompt_embeddings": components(config)["proposal_selector"].sample(seed=0)["prompt_embeddings"]}
        runner.run("proposal_selector", {**spoken, **proposals, **encoded[0]})
    return {part: graphs[part].given for part in parts}
