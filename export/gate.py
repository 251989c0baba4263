"""The gate: an engine is kept only if it computes what the torch module computes in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ensemble.components import components
from ensemble.runner import Graph
from ensemble.tensors import Array, Arrays, Component, Dim

from .manifest import Gate

if TYPE_CHECKING:
    from .models.layers import Graph as Module

LEAST_COSINE = {"float16": 0.999, "bfloat16": 0.99}
"""Of every output in half precision; errors of single values say little there: ulps (2^-10, 2^-7) add up, and queries change ranks."""
LEAST_MATCHED = 0.9
"""Share of a ranked component's boxes that in half precision must be found among the engine's, wherever in the order."""
SAME_BOX = 0.5
"""IoU from which a box is found."""
LARGE = 64 << 20
"""Bytes of inputs beyond which only the least sizes are run: the caches of a language model take minutes on a CPU."""


class GateError(Exception):
    """An engine does not compute what it should."""


def pass_gate(graph: Graph, module: Module, component: str, precision: str) -> Gate:
    """Runs both on seeded inputs, of the usual sizes and of the least ones.

    Args:
        graph: the engine.
        module: in float32.
        component: their name.
        precision: of the engine.
    Returns:
        output to its worst figures.
    Raises:
        GateError: names the output that is furthest from what it should be.
    """
    contract = components(module.config)[component]
    figures: Gate = {}
    for seed, sizes in enumerate(({}, least_sizes(contract))):
        inputs = contract.sample(seed, **sizes)
        if not sizes and sum(array.nbytes for array in inputs.values()) > LARGE:
            continue
        expected = run_module(module, contract, inputs)
        for name, got in graph.run(inputs).items():
            own = measure(contract, got, expected[name])
            known = figures.setdefault(name, own)
            figures[name] = {key: (max if "error" in key else min)(value, known[key]) for key, value in own.items()}
    for name, own in sorted(figures.items(), key=lambda item: -item[1]["error"]):
        if precision == "float32":
            figure, passed, bound = "error", own["error"] <= contract.tolerance.max_error, f"at most {contract.tolerance.max_error:g}"
        elif contract.ranked:
            figure, passed, bound = "matched", own.get("matched", 1.0) >= LEAST_MATCHED, f"at least {LEAST_MATCHED:g}"
        else:
            figure, passed, bound = "cosine", own["cosine"] >= LEAST_COSINE[precision], f"at least {LEAST_COSINE[precision]:g}"
        if not passed:
            raise GateError(
                f"{component}.{name} in {precision}: got {figure} {own[figure]:.4g} against torch in float32, expected {bound}. "
                "The engine was not kept: choose another precision or engine kind."
            )
    return figures


def least_sizes(contract: Component) -> dict[str, int]:
    """The smallest value of every dynamic size."""
    return {size.name: size.min for spec in contract.inputs for size in spec.shape if isinstance(size, Dim)}


def run_module(module: Module, contract: Component, inputs: Arrays) -> Arrays:
    """What torch computes, where the module is."""
    import torch

    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(inputs[spec.name]) for spec in contract.inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {spec.name: tensor.numpy() for spec, tensor in zip(contract.outputs, outputs, strict=True)}


def measure(contract: Component, got: Array, expected: Array) -> dict[str, float]:
    """`error` as the contract's tolerance bounds it, the cosine of both, the 99th percentile of the difference by the same measure; of
    boxes of a ranked component the share that is `matched`.
    """
    error = contract.tolerance.error(got, expected)
    if got.shape != expected.shape or not expected.size:
        return {"error": error, "cosine": float(got.shape == expected.shape), "p99_error": error}
    ours, theirs = (array.astype(np.float64).ravel() for array in (got, expected))
    norms = np.linalg.norm(ours) * np.linalg.norm(theirs)
    cosine = float(ours @ theirs / norms) if norms else float(np.array_equal(ours, theirs))
    figures = {"error": error, "cosine": cosine, "p99_error": float(np.percentile(abs(ours - theirs), 99) / max(1.0, abs(theirs).max()))}
    return figures | ({"matched": matched(got, expected)} if contract.ranked and got.shape[1:] == (4,) else {})


def matched(got: Array, expected: Array) -> float:
    """Share of the boxes [Q, 4] xyxy `expected` of which one of `got` is the same."""
    a, b = expected[:, None], got[None]
    overlap = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (a, b)]
    return float((overlap >= SAME_BOX * (areas[0] + areas[1] - overlap)).any(1).mean())
