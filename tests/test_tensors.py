import math

import numpy as np
import pytest

from ensemble.components import components
from ensemble.config import FULL, TINY
from ensemble.errors import InvalidInput
from ensemble.tensors import Component, Dim, TensorSpec, Tolerance

ROWS = Dim("rows", 1, 2, 4)
COLUMNS = Dim("columns", 0, 3, 5)
PICKER = Component(
    "picker",
    "Takes values at indices.",
    inputs=(
        TensorSpec("values", "float32", (ROWS, COLUMNS, 2), "What is picked from."),
        TensorSpec("flags", "bool", (ROWS,), "One flag a row."),
        TensorSpec("indices", "int64", (COLUMNS,), "Row of each pick.", below=ROWS, above=-1),
        TensorSpec("label", "string", (1,), "UTF-8.", optional=True),
        TensorSpec("level", "int32", (1,), "0..9.", optional=True, below=10),
    ),
    outputs=(TensorSpec("picked", "float32", (COLUMNS, 2), "One row per index."),),
)


@pytest.mark.parametrize("sizes", [(-1, 1, 2), (2, 1, 3), (1, 4, 3), (3, 2, 1)])
def test_dim_is_refused_when_its_sizes_are_out_of_order(sizes):
    with pytest.raises(ValueError, match=r"Dim rows: got .*, expected 0 <= min <= opt <= max"):
        Dim("rows", *sizes)


def test_tensor_spec_is_refused_when_its_dtype_is_unknown():
    with pytest.raises(ValueError, match="values: got dtype 'float64', expected one of bool, uint8"):
        TensorSpec("values", "float64", (1,), "")


def test_tensor_spec_reads_as_shape_and_dtype():
    spec = PICKER.input("values")
    assert str(spec) == "[rows 1..4, columns 0..5, 2] float32"
    assert spec.dims() == [-1, -1, 2]
    assert spec.triton_dtype == "TYPE_FP32"
    assert PICKER.input("label").numpy_dtype == np.dtype(object)


def test_component_finds_its_tensors_and_dims_by_name():
    assert PICKER.output("picked").shape == (COLUMNS, 2)
    assert PICKER.dims["rows"] is ROWS
    assert PICKER.dynamic_axes()["values"] == {0: "rows", 1: "columns"}
    with pytest.raises(KeyError, match=r"picker.picked: no such tensor, expected one of values, flags"):
        PICKER.input("picked")


@pytest.mark.parametrize("size", ["min", "opt", "max"])
@pytest.mark.parametrize("contract", [*components(TINY).values(), PICKER], ids=lambda contract: contract.name)
def test_sample_satisfies_the_contract_at_every_size(contract, size):
    dims = {dim.name: dim for spec in contract.inputs for dim in spec.shape if isinstance(dim, Dim)}
    # Caches and frames at their largest are gigabytes; 64 of each is as good.
    sizes = {name: min(getattr(dim, size), max(dim.min, 64)) for name, dim in dims.items()}
    arrays = contract.sample(seed=1, **sizes)
    contract.check_inputs(arrays)
    shapes = {spec.name: tuple(sizes[dim.name] if isinstance(dim, Dim) else dim for dim in spec.shape) for spec in contract.inputs}
    assert {name: array.shape for name, array in arrays.items()} == shapes
    assert list(arrays) == [spec.name for spec in contract.inputs]


def test_sample_is_the_same_for_the_same_seed_only():
    first, again, other = PICKER.sample(0), PICKER.sample(0), PICKER.sample(1)
    assert first["values"].shape == (2, 3, 2)  # opt
    np.testing.assert_array_equal(first["values"], again["values"])
    assert not np.array_equal(first["values"], other["values"])


def test_sample_integers_reach_both_bounds_and_no_further():
    indices = np.concatenate([PICKER.sample(seed, rows=3, columns=5)["indices"] for seed in range(50)])
    assert set(indices.tolist()) == {-1, 0, 1, 2}


def broken(**changes):
    """A valid request with some tensors replaced; None leaves one out."""
    return {name: array for name, array in {**PICKER.sample(0), **changes}.items() if array is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": None}, r"picker.values: got nothing, expected \[rows 1..4, columns 0..5, 2\] float32. Add it"),
        (
            {"extra": np.zeros(1)},
            r"picker: got an input 'extra', expected only flags, indices, label, level, values. Leave it out",
        ),
        (
            {"values": np.zeros((2, 3, 2))},
            r"picker.values: got \[2, 3, 2\] float64, expected \[.*\] float32. What is picked from",
        ),
        ({"values": np.zeros((2, 3), np.float32)}, r"picker.values: got \[2, 3\] float32, expected \[.*, 2\] float32"),
        ({"values": np.zeros((2, 3, 1), np.float32)}, r"picker.values: got \[2, 3, 1\] float32, expected \[.*, 2\] float32"),
        ({"values": np.zeros((5, 3, 2), np.float32)}, r"picker.values: got \[5, 3, 2\] float32, .* Keep rows within 1..4"),
        ({"values": np.zeros((0, 3, 2), np.float32)}, r"picker.values: got \[0, 3, 2\] float32, .* Keep rows within 1..4"),
        (
            {"flags": np.zeros(3, bool)},
            r"picker.flags: got \[3\] bool, expected rows = 2 as in values. Send the same number of rows",
        ),
        ({"indices": np.array([0, 1, 2])}, r"picker.indices: got values 0..2, expected -1..1. Row of each pick"),
        ({"indices": np.array([0, 1, -2])}, r"picker.indices: got values -2..1, expected -1..1"),
        ({"level": np.array([10], np.int32)}, r"picker.level: got values 10..10, expected 0..9"),
        ({"label": np.array(["text"])}, r"picker.label: got \[1\] <U4, expected \[1\] string"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_check_inputs_names_the_tensor_what_was_got_and_what_was_expected_when_the_contract_is_broken(changes, message):
    PICKER.check_inputs(broken())
    with pytest.raises(InvalidInput, match=message):
        PICKER.check_inputs(broken(**changes))


def test_check_inputs_takes_empty_tensors_and_missing_optional_ones():
    PICKER.check_inputs(
        broken(label=None, level=None, values=np.zeros((1, 0, 2), np.float32), flags=np.ones(1, bool), indices=np.zeros(0, int))
    )


def test_every_shared_dim_has_one_range_within_a_component():
    for contract in components(FULL).values():
        dims = [size for spec in (*contract.inputs, *contract.outputs) for size in spec.shape if isinstance(size, Dim)]
        assert len({dim.name for dim in dims}) == len(set(dims)), contract.name


def test_tolerance_error_is_the_largest_difference_relative_to_large_values_only():
    tolerance = Tolerance(1e-4, "float32 summation order")
    assert tolerance.error(np.array([0.25, 0.5]), np.array([0.25, 0.75])) == 0.25
    assert tolerance.error(np.array([9.0, -20.0]), np.array([10.0, -20.0])) == 0.05
    assert tolerance.error(np.array([True, False]), np.array([True, True])) == 1
    assert tolerance.error(np.zeros((0, 3)), np.zeros((0, 3))) == 0


@pytest.mark.parametrize("got", [np.zeros(3), np.zeros((2, 1)), np.array([0, np.nan]), np.array([0, np.inf])])
def test_tolerance_error_is_infinite_when_shapes_differ_or_values_are_not_finite(got):
    assert Tolerance(1e-4, "").error(got, np.zeros(2)) == math.inf
