"""Every component in this process, straight from a checkpoint: what the server's answers are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensemble.features import FrameFeatures
from ensemble.frames import HostPreprocessor
from ensemble.generation import Decoder, LanguageModel
from ensemble.pipeline import Pipeline
from ensemble.runner import Device, Graph, Host, LocalRunner
from ensemble.tokenizer import Tokenizer
from ensemble.tracker import Tracker

from .checkpoints import Checkpoint
from .runners import GraphDecoder, OnnxGraph, TorchDecoder, TorchDevice, TorchGraph
from .to_onnx import onnx_from_torch


def torch_pipeline(checkpoint: Checkpoint) -> Pipeline:
    """The component `sparrow` over torch modules in eager mode."""
    graphs = {name: TorchGraph(checkpoint.build(name), name) for name in checkpoint.components if name != "language_decoder"}
    decoder: Any = checkpoint.build("language_decoder")
    return pipeline(checkpoint, graphs, TorchDecoder(decoder, graphs["token_embedder"], graphs["prompt_projector"]), TorchDevice())


def onnx_pipeline(checkpoint: Checkpoint, folder: Path) -> Pipeline:
    """The component `sparrow` over ONNX graphs, which are exported to `folder` where they are not there yet."""
    for name in checkpoint.components:
        if not (folder / f"{name}.onnx").exists():
            onnx_from_torch(checkpoint.build(name), name, folder / f"{name}.onnx")
    graphs = {name: OnnxGraph(folder / f"{name}.onnx") for name in checkpoint.components}
    decoder = GraphDecoder(graphs["language_decoder"], graphs["token_embedder"], graphs["prompt_projector"], checkpoint.config)
    return pipeline(checkpoint, graphs, decoder, Host())


def pipeline(checkpoint: Checkpoint, graphs: Mapping[str, Graph], decoder: Decoder, device: Device) -> Pipeline:
    """The component `sparrow` over any graphs, those of the tracker on their device."""
    preprocessor = HostPreprocessor(checkpoint.config)
    runner = LocalRunner({**graphs, "frame_features": FrameFeatures(preprocessor, graphs["frame_encoder"], device)})
    runner.stateful["language_model"] = LanguageModel(checkpoint.config, decoder)
    runner.stateful["tracker"] = Tracker(checkpoint.config, graphs, device)
    return Pipeline(checkpoint.config, Tokenizer(checkpoint.path("sparrow")), runner, preprocessor)
