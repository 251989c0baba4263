"""Every component in this process, straight from a checkpoint: what the server's answers are compared with."""

from __future__ import annotations

from typing import Any

from ensemble.generation import LanguageModel
from ensemble.pipeline import Pipeline
from ensemble.runner import LocalRunner
from ensemble.tokenizer import Tokenizer
from ensemble.tracker import Tracker

from .checkpoints import Checkpoint
from .models import MODULES
from .runners import TorchDecoder, TorchGraph


def local_runner(checkpoint: Checkpoint) -> LocalRunner:
    """All components as torch modules in eager mode."""
    graphs = {name: TorchGraph(checkpoint.build(name), name) for name in MODULES if name != "language_decoder"}
    runner = LocalRunner(graphs)
    decoder: Any = checkpoint.build("language_decoder")
    runner.stateful["language_model"] = LanguageModel(
        checkpoint.config, TorchDecoder(decoder, graphs["token_embedder"], graphs["prompt_projector"])
    )
    runner.stateful["tracker"] = Tracker(checkpoint.config, runner)
    return runner


def local_pipeline(checkpoint: Checkpoint) -> Pipeline:
    """The component `sparrow` in this process."""
    return Pipeline(checkpoint.config, Tokenizer(checkpoint.path("sparrow")), local_runner(checkpoint))
