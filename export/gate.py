"""The gate: an engine is kept only if it computes what the torch module computes in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

import numpy as np

from ensemble.components import components
from ensemble.runner import Graph
from ensemble.tensors import Array, Arrays, Component

from .manifest import Gate
from .runners import torch_device

if TYPE_CHECKING:
    from .models.layers import Graph as Module

LEAST_COSINE = {"float16": 0.999, "bfloat16": 0.99}
"""Of every output in half precision; errors of single values say little there: ulps (2^-10, 2^-7) add up, and queries change ranks."""
LEAST_MATCHED = 0.8
"""Boxes of a ranked component that an engine in half precision must find, wherever in the order, as a part of those that torch in float32
still finds when weights and inputs are rounded: where scores are nearly the same, as with random weights, rounding changes the ranks.
"""
SAME_BOX = 0.5
"""IoU from which a box is found."""
LEAST_MASK_IOU = {"float32": 0.999, "float16": 0.99, "bfloat16": 0.95}
"""Of every object's mask on real frames. Eager torch has 1.0 with the nano checkpoint in either half precision; with random weights, whose
logits are all near 0, 0.996 in float16 and 0.981 in bfloat16 (tried by hand).
"""
LARGE = 64 << 20
"""Bytes of inputs beyond which only the least sizes are run: the caches of a language model take minutes on a CPU."""

MASKS = "mask_logits"
"""Output whose positive values are objects."""
DECODE_STEP = {"sequences": 2, "slots": 64}
"""One token each of two answers, where a component has a cache."""


class GateError(Exception):
    """An engine does not compute what it should."""


def pass_gate(graph: Graph, module: Module, component: str, precision: str, real: Sequence[Arrays] = ()) -> Gate:
    """Runs both on seeded inputs, of the usual sizes and of the least ones, and on real ones.

    Args:
        graph: the engine.
        module: in float32.
        component: their name.
        precision: of the engine.
        real: inputs that pictures lead to (`export.real_inputs`).
    Returns:
        output to its worst figures.
    Raises:
        GateError: names the output that is furthest from what it should be.
    """
    contract = components(module.config)[component]
    rounded = round_weights(module, precision) if contract.ranked and precision != "float32" else None
    figures: Gate = {}
    stable: Gate = {}
    for is_real, inputs in (*((False, seeded) for seeded in seeded_inputs(contract)), *((True, given) for given in real)):
        expected = run_module(module, contract, inputs)
        for _ in range(2 if torch_device() == "cuda" else 1):  # there the second call is captured
            note(figures, contract, graph.run(inputs), expected, is_real)
        if rounded:
            as_kept = {name: as_if(array, precision) for name, array in inputs.items()}
            note(stable, contract, run_module(rounded, contract, as_kept), expected, is_real)
    judge(contract, figures, stable, precision)
    return figures


def seeded_inputs(contract: Component) -> Iterator[Arrays]:
    """Of the usual sizes, of the least ones, and where there is a cache of a decode step and of a prompt that fills it."""
    usual, smallest = ({name: getattr(size, which) for name, size in contract.dims.items()} for which in ("opt", "min"))
    inputs = contract.sample(0, **usual)
    if usual != smallest and sum(array.nbytes for array in inputs.values()) <= LARGE:
        yield inputs
    yield contract.sample(1, **smallest)
    if smallest.keys() >= DECODE_STEP.keys():
        yield contract.sample(2, **{**smallest, **DECODE_STEP})
        slots = DECODE_STEP["slots"]
        yield {**contract.sample(3, **{**smallest, "tokens": slots, "slots": slots}), "positions": np.arange(slots)[None]}


def judge(contract: Component, figures: Gate, stable: Gate, precision: str) -> None:
    """Raises GateError where an engine's figures are not good enough.

    Args:
        contract: of the component.
        figures: of the engine against torch in float32.
        stable: of torch with rounded weights and inputs, of a ranked component in half precision.
        precision: of the engine.
    """
    for name, own in sorted(figures.items(), key=lambda item: -item[1]["error"]):
        for figure, passed, bound in demands(contract, own, stable.get(name, {}), precision):
            if not passed:
                raise GateError(
                    f"{contract.name}.{name} in {precision}: got {figure} {own.get(figure, 0):.4g} against torch in float32, expected "
                    f"{bound}. The engine was not kept: choose another precision or engine kind."
                )


def demands(contract: Component, own: dict[str, float], stable: dict[str, float], precision: str) -> Iterator[tuple[str, bool, str]]:
    """What an output has to satisfy: figure, whether it does, and the bound in words; arguments as of `judge`."""
    if precision == "float32":
        yield "error", own["error"] <= contract.tolerance.max_error, f"at most {contract.tolerance.max_error:g}"
    elif contract.ranked:
        least = LEAST_MATCHED * stable.get("matched", 0.0)
        yield "matched", own.get("matched", 0.0) >= least, f"at least {least:.2g}"
    else:
        yield "cosine", own["cosine"] >= LEAST_COSINE[precision], f"at least {LEAST_COSINE[precision]:g}"
    if "mask_iou" in own:
        yield "mask_iou", own["mask_iou"] >= LEAST_MASK_IOU[precision], f"at least {LEAST_MASK_IOU[precision]:g}"


def note(figures: Gate, contract: Component, got: Arrays, expected: Arrays, is_real: bool = False) -> None:
    """Keeps the worst figures of every output."""
    for name, array in got.items():
        own, known = measure(contract, array, expected[name]), figures.setdefault(name, {})
        if is_real and name == MASKS:
            own["mask_iou"] = mask_iou(array, expected[name])
        for key, value in own.items():
            known[key] = (max if "error" in key else min)(value, known.get(key, value))


def round_weights(module: Module, precision: str) -> Module:
    """A copy that computes in float32 with the weights of a precision."""
    import torch

    rounded = deepcopy(module)
    for parameter in rounded.parameters():
        parameter.data = parameter.to(getattr(torch, precision)).float()
    return rounded


def as_if(array: Array, precision: str) -> Array:
    """Floats as if they were kept in a precision."""
    import torch

    kept = torch.from_numpy(array)
    return kept.to(getattr(torch, precision)).float().numpy() if kept.is_floating_point() else array


def run_module(module: Module, contract: Component, inputs: Arrays) -> Arrays:
    """What torch computes in float32: on the GPU where four times the weights fit, since a large tower takes minutes on a CPU."""
    import torch

    from .models.layers import several

    size = sum(parameter.nbytes for parameter in module.parameters())
    device = "cuda" if torch.cuda.is_available() and 4 * size < torch.cuda.mem_get_info()[0] else "cpu"
    module.to(device)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        outputs = several(module(*(torch.from_numpy(inputs[spec.name]).to(device) for spec in contract.inputs)))
    return {spec.name: tensor.cpu().numpy() for spec, tensor in zip(contract.outputs, outputs, strict=True)}


def measure(contract: Component, got: Array, expected: Array) -> dict[str, float]:
    """`error` as the contract's tolerance bounds it, the cosine of both, the 99th percentile of the difference by the same measure; of
    boxes of a ranked component the share that is `matched`.
    """
    error = contract.tolerance.error(got, expected)
    figures = {"error": error, "cosine": cosine(got, expected), "p99_error": error}
    if got.shape != expected.shape or not expected.size:
        return figures
    figures["p99_error"] = float(np.percentile(abs(got.astype(np.float64) - expected), 99) / max(1.0, abs(expected).max()))
    return figures | ({"matched": matched(got, expected)} if contract.ranked and got.shape[1:] == (4,) else {})


def cosine(got: Array, expected: Array) -> float:
    """Of two arrays as vectors; 0 where shapes differ."""
    if got.shape != expected.shape:
        return 0.0
    ours, theirs = (array.astype(np.float64).ravel() for array in (got, expected))
    norms = np.linalg.norm(ours) * np.linalg.norm(theirs)
    return float(ours @ theirs / norms) if norms else float(np.array_equal(ours, theirs))


def matched(got: Array, expected: Array) -> float:
    """Share of the boxes [Q, 4] xyxy `expected` of which one of `got` is the same."""
    a, b = expected[:, None], got[None]
    overlap = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (a, b)]
    return float((overlap >= SAME_BOX * (areas[0] + areas[1] - overlap)).any(1).mean())


def mask_iou(got: Array, expected: Array) -> float:
    """Of the object whose masks overlap least: [O, L, L] logits, in which more than 0 is the object."""
    if got.shape != expected.shape:
        return 0.0
    ours, theirs = got > 0, expected > 0
    shared, either = (op(ours, theirs).sum((1, 2)) for op in (np.logical_and, np.logical_or))
    return float(np.where(either, shared / np.maximum(either, 1), 1).min())
