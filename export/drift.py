"""Where an engine drifts: the first layer whose output torch itself gets wrong in the engine's precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble.components import components
from ensemble.tensors import Array, Arrays

from .gate import LEAST_COSINE, cosine, run_module, seeded_inputs
from .runners import TorchPlace, as_stored

if TYPE_CHECKING:
    from torch import nn

    from .models.layers import Graph as Module


def locate_drift(module: Module, component: str, precision: str, real: Sequence[Arrays] = ()) -> str:
    """Says which layer is the first to drift, or that none does.

    Args:
        module: in float32; its copy in the precision runs as eager torch would.
        component: its name.
        precision: of the engine that did not pass.
        real: inputs that pictures lead to; as the gate, seeded ones are run before. Outputs of all layers are kept for one of them.
    """
    fine = f"Torch in {precision} is fine at every layer: the drift is the engine's own."
    if precision == "float32":
        return fine
    contract = components(module.config)[component]
    place = TorchPlace(as_stored(module, component, precision), precision)
    for inputs in (*seeded_inputs(contract), *real):
        with outputs_of(module) as expected:
            run_module(module, contract, inputs)
        with outputs_of(place.module) as got, place.inference():
            place.module(*(place.device.put(inputs[spec.name]) for spec in contract.inputs))
        for (layer, ours), (_, theirs) in zip(got, expected, strict=True):
            figure = cosine(ours, theirs)
            if not figure >= LEAST_COSINE[precision]:
                return f"The first layer that drifts when torch runs in {precision} is {layer}, cosine {figure:.4g}."
    return fine


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[tuple[str, Array]]]:
    """Yields what the layers of a module return while it runs, in order of execution: dotted name, and floats on the host."""
    import torch

    from .models.layers import several

    outputs: list[tuple[str, Array]] = []

    def keep(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, results: Any) -> None:
            floats = (result for result in several(results) if isinstance(result, torch.Tensor) and result.is_floating_point())
            outputs.extend((name, np.array(result.float().cpu())) for result in floats)

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in module.named_modules() if name]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
