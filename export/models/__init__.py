"""The model, one file per component: an `nn.Module` whose `forward` takes and returns the tensors of its contract, in order.

Every class is built from a `ModelConfig` and says in `keys` where its weights lie in the original checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from ensemble.config import ModelConfig

    from .layers import Graph

MODULES = {
    "vision_encoder": "vision_encoder:VisionEncoder",
    "image_encoder": "vision_encoder:ImageEncoder",
    "token_embedder": "language_model:TokenEmbedder",
    "language_decoder": "language_model:LanguageDecoder",
    "prompt_projector": "language_model:PromptProjector",
    "proposal_detector": "proposal_detector:ProposalDetector",
    "proposal_selector": "proposal_selector:ProposalSelector",
    "frame_encoder": "frame_encoder:FrameEncoder",
    "mask_downsampler": "mask_downsampler:MaskDownsampler",
    "memory_attention": "memory_attention:MemoryAttention",
    "mask_decoder": "mask_decoder:MaskDecoder",
    "memory_encoder": "memory_encoder:MemoryEncoder",
}
"""Component to file and class, in dataflow order; imported when asked for."""


def graph_class(component: str) -> type[Graph]:
    """The class of a component; raises KeyError that lists the components."""
    if component not in MODULES:
        raise KeyError(f"{component}: no such graph, expected one of {', '.join(MODULES)}.")
    file, name = MODULES[component].split(":")
    return cast("type[Graph]", getattr(importlib.import_module(f".{file}", __name__), name))


def empty_module(component: str, config: ModelConfig) -> Graph:
    """The component's module with weights that are not initialised: a full-size model would take minutes for random ones."""
    from torch.overrides import TorchFunctionMode

    class SkipInit(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if getattr(func, "__module__", None) == "torch.nn.init":
                return args[0] if args else kwargs["tensor"]
            return func(*args, **(kwargs or {}))

    with SkipInit():
        return graph_class(component)(config)
