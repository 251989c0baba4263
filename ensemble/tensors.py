"""The four types that contracts are made of: `Dim`, `TensorSpec`, `Tolerance` and `Component`.

Shape letters used in comments everywhere: T frames, O objects, P proposals, S tokens, C channels, M memories, H W rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidInput

Array = NDArray[Any]
Arrays = dict[str, Array]

TRITON_DTYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "string": "TYPE_STRING",
}
"""Contract dtype to Triton's. `string` tensors hold bytes objects in NumPy."""


@dataclass(frozen=True)
class Dim:
    """A named, ranged axis; the same name means the same size everywhere in one call.

    Args:
        name: what is counted, in the plural.
        min: least size; 0 where an empty tensor is meaningful.
        opt: the size engines are tuned for.
        max: largest size.
    """

    name: str
    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max:
            raise ValueError(f"Dim {self.name}: got {self.min}, {self.opt}, {self.max}, expected 0 <= min <= opt <= max.")

    def __str__(self) -> str:
        return f"{self.name} {self.min}..{self.max}"


Size = int | Dim


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a component.

    Args:
        name: the same in torch, ONNX, config.pbtxt and the client.
        dtype: a key of `TRITON_DTYPES`.
        shape: fixed sizes and `Dim`s.
        doc: meaning, units and range, in one sentence.
        optional: may be left out of a request.
        below: for integer tensors, the exclusive upper bound of its values (a `Dim` stands for its size in the call).
        above: for integer tensors, the inclusive lower bound of its values.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    doc: str
    optional: bool = False
    below: Size | None = None
    above: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in TRITON_DTYPES:
            raise ValueError(f"{self.name}: got dtype {self.dtype!r}, expected one of {', '.join(TRITON_DTYPES)}.")

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.shape))}] {self.dtype}"

    @property
    def triton_dtype(self) -> str:
        return TRITON_DTYPES[self.dtype]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(object if self.dtype == "string" else self.dtype)

    def dims(self) -> list[int]:
        """The shape as config.pbtxt writes it: -1 where the size varies."""
        return [-1 if isinstance(size, Dim) else size for size in self.shape]


@dataclass(frozen=True)
class Tolerance:
    """How far an engine may be from the torch module in float32.

    Args:
        max_error: largest |engine - torch| allowed, divided by max(1, max |torch|).
        reason: why this much and not less.
    """

    max_error: float
    reason: str

    def error(self, got: Array, expected: Array) -> float:
        """The figure that `max_error` bounds; infinity when shapes differ or a value is not finite."""
        if got.shape != expected.shape:
            return math.inf
        if not expected.size:
            return 0.0
        difference = np.abs(got.astype(np.float64) - expected.astype(np.float64)).max()
        return float(difference / max(1.0, np.abs(expected).max())) if np.isfinite(difference) else math.inf


Serving = Literal["graph", "native_graph", "frames", "sequence", "stream", "ensemble", "function"]
"""How a component is served.

`graph`         one exported graph inside the process of every model that names it in `parts` (ADR 0013)
`native_graph`  one exported graph that Triton's own backend runs: its leading Dim is filled from several requests by the dynamic batcher
`frames`        Python around one graph: frames of several requests, of any size, go through it together
`sequence`      state between the requests of one correlation id; steps of several sequences are batched
`stream`        decoupled: many responses to one request
`ensemble`      a pipeline that Triton itself runs
`function`      Python without a graph or state
"""


@dataclass(frozen=True)
class Component:
    """A step of the system with its tensors; Triton serves all but the `graph` ones under the same name.

    Args:
        name: lower_snake_case, the same everywhere.
        doc: what it computes, in one sentence.
        inputs, outputs: its tensors.
        serving: how it is served.
        calls: the Triton models that it calls while it works.
        parts: the graphs that it runs in its own process.
        tolerance: engine against torch, float32; graphs only.
        ranked: the outputs' rows are the best of many, in an order that near ties change in half precision.
    """

    name: str
    doc: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    serving: Serving = "graph"
    calls: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    tolerance: Tolerance = Tolerance(1e-4, "float32 summation order")
    ranked: bool = False

    @property
    def is_graph(self) -> bool:
        return self.serving in ("graph", "native_graph")

    def input(self, name: str) -> TensorSpec:
        return self._find(self.inputs, name)

    def output(self, name: str) -> TensorSpec:
        return self._find(self.outputs, name)

    def _find(self, specs: tuple[TensorSpec, ...], name: str) -> TensorSpec:
        for spec in specs:
            if spec.name == name:
                return spec
        raise KeyError(f"{self.name}.{name}: no such tensor, expected one of {', '.join(spec.name for spec in specs)}.")

    @property
    def dims(self) -> dict[str, Dim]:
        """The sizes of the inputs that vary, by name."""
        return {size.name: size for spec in self.inputs for size in spec.shape if isinstance(size, Dim)}

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Input name to {axis: Dim name}, as exporters want it."""
        return {spec.name: {axis: size.name for axis, size in enumerate(spec.shape) if isinstance(size, Dim)} for spec in self.inputs}

    def sample(self, seed: int, **sizes: int) -> Arrays:
        """Seeded inputs that satisfy the contract, for export, parity, warm-up and benchmarks.

        Args:
            seed: the same seed gives the same arrays.
            sizes: size of each `Dim` by name; `opt` where not given.
        Returns:
            Input name to array: standard normal floats, boxes in and around the frame, integers within their bounds, booleans.
        """
        rng = np.random.default_rng(seed)
        bound = {name: sizes.get(name, size.opt) for name, size in self.dims.items()}
        arrays: Arrays = {}
        for spec in self.inputs:
            shape = tuple(bound[size.name] if isinstance(size, Dim) else size for size in spec.shape)
            if spec.dtype == "string":
                arrays[spec.name] = np.full(shape, b"sample", dtype=object)
            elif spec.dtype == "bool":
                arrays[spec.name] = rng.random(shape) < 0.5
            elif spec.dtype.startswith(("int", "uint")):
                high = bound[spec.below.name] if isinstance(spec.below, Dim) else spec.below or 256
                arrays[spec.name] = rng.integers(spec.above, high, shape).astype(spec.dtype)
            elif spec.name.endswith("boxes"):
                corners = np.sort(rng.uniform(-0.2, 1.2, (*shape[:-1], 2, 2)), axis=-2)  # proposals may leave the frame
                arrays[spec.name] = corners.reshape(shape).astype(spec.dtype)
            else:
                arrays[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        return arrays

    def check_inputs(self, arrays: Mapping[str, Array]) -> None:
        """Raises `InvalidInput` that names the first tensor whose presence, dtype, shape or values break the contract."""
        known = {spec.name for spec in self.inputs}
        for name in arrays:
            if name not in known:
                raise InvalidInput(f"{self.name}: got an input {name!r}, expected only {', '.join(sorted(known))}. Leave it out.")
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self.inputs:
            if spec.name in arrays:
                self._check_shape(spec, arrays[spec.name], sizes)
            elif not spec.optional:
                raise InvalidInput(f"{self.name}.{spec.name}: got nothing, expected {spec}. Add it to the request.")
        for spec in self.inputs:
            if spec.below is not None and spec.name in arrays and arrays[spec.name].size:
                values = arrays[spec.name]
                high = sizes[spec.below.name][0] if isinstance(spec.below, Dim) else spec.below
                if values.min() < spec.above or values.max() >= high:
                    got, expected = f"{values.min()}..{values.max()}", f"{spec.above}..{high - 1}"
                    raise InvalidInput(f"{self.name}.{spec.name}: got values {got}, expected {expected}. {spec.doc}")

    def _check_shape(self, spec: TensorSpec, array: Array, sizes: dict[str, tuple[int, str]]) -> None:
        def mismatch(expected: object, advice: str) -> InvalidInput:
            got = f"{list(array.shape)} {'string' if array.dtype == object else array.dtype}"
            return InvalidInput(f"{self.name}.{spec.name}: got {got}, expected {expected}. {advice}")

        fixed = [isinstance(size, Dim) or size == got for size, got in zip(spec.shape, array.shape, strict=False)]
        if kind_of(array) != spec.numpy_dtype or array.ndim != len(spec.shape) or not all(fixed):
            raise mismatch(spec, spec.doc)
        for size, got in zip(spec.shape, array.shape, strict=True):
            if not isinstance(size, Dim):
                continue
            if not size.min <= got <= size.max:
                raise mismatch(spec, f"Keep {size.name} within {size.min}..{size.max}.")
            bound, by = sizes.setdefault(size.name, (got, spec.name))
            if bound != got:
                raise mismatch(f"{size.name} = {bound} as in {by}", f"Send the same number of {size.name} in both.")


def kind_of(array: Any) -> np.dtype[Any]:
    """The dtype of an array, or of a tensor on a GPU in NumPy's words."""
    return array.dtype if isinstance(array, np.ndarray) else np.dtype(str(array.dtype).removeprefix("torch."))
