"""What is captured, and in which order; replays themselves take a GPU, where the gate of the export runs every graph twice."""

import pytest
import torch

from ensemble.components import components, propagation
from ensemble.config import FULL
from export.capture import Captured
from export.models import MODULES
from export.runners import capture_sizes

CONTRACTS = components(FULL) | {"propagation": propagation(FULL)}


@pytest.mark.parametrize("component", [*MODULES, "propagation"])
def test_what_is_captured_at_the_start_keeps_the_contract_and_gets_smaller(component):
    contract = CONTRACTS[component]
    sizes = capture_sizes(contract)
    for own in sizes:
        assert all(contract.dims[name].min <= size <= contract.dims[name].max for name, size in own.items())
    assert sizes == sorted(sizes, key=lambda own: [-size for size in own.values()][:3])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_objects_of_every_age_are_captured(count):
    memories = CONTRACTS["propagation"].dims["memories"].max
    captured = [own for own in capture_sizes(CONTRACTS["propagation"]) if own["objects"] == count]
    assert {own["pointers"]: own["memories"] for own in captured} == {age: min(age, memories) for age in range(1, 17)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")
def test_replays_of_every_shape_give_what_the_call_does():
    captured = Captured(lambda x, y: (x @ y, x.sum()))
    for size in (8, 300, 8, 64, 300, 8, 64, 300):  # results of a larger and a smaller shape share their place
        x, y = torch.randn(2, size, size, device="cuda", dtype=torch.float64)
        product, total = captured(x, y)
        torch.testing.assert_close(product, x @ y)
        torch.testing.assert_close(total, x.sum())
