"""What is captured, and in which order; replays themselves take a GPU, where the gate of the export runs every graph twice."""

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ensemble.components import components, propagation
from ensemble.config import FULL
from export.capture import Captured, begin_early
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


class Driver(SimpleNamespace):
    """The part of NVIDIA's driver that knows a graph: its nodes are names of kernels, or None for a copy; its edges have a type each."""

    CUgraph = int
    CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC = 1
    CUgraphEdgeData = SimpleNamespace
    CUgraphDependencyType = SimpleNamespace(CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC=SimpleNamespace(value=1))
    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_KERNEL="kernel")

    def __init__(self, edges):
        self.edges = dict.fromkeys(edges, 0)
        self.status = SimpleNamespace(value=0, name="CUDA_SUCCESS")

    def cuGraphGetEdges(self, graph, count=0):
        sources, targets = zip(*list(self.edges)[:count], strict=True) if count else ((), ())
        return self.status, sources, targets, [], len(self.edges)

    def cuGraphNodeGetType(self, node):
        return self.status, "kernel" if node else "copy"

    def cuGraphKernelNodeGetParams(self, node):
        own = int(node.endswith("_own"))  # those of the runtime's own modules have a handle of another kind
        return self.status, SimpleNamespace(func=own and Handle(node), kern=node)

    def cuFuncGetName(self, handle):
        return self.status, handle.name.encode()

    def cuKernelGetName(self, handle):
        return self.status, handle.encode()

    def cuGraphRemoveDependencies(self, graph, sources, targets, data, count):
        del self.edges[sources[0], targets[0]]
        return (self.status,)

    def cuGraphAddDependencies(self, graph, sources, targets, data, count):
        self.edges[sources[0], targets[0]] = data[0].type, data[0].from_port
        return (self.status,)


class Handle(int):
    """Of a kernel of a module that was loaded."""

    def __new__(cls, name):
        handle = super().__new__(cls, 1)
        handle.name = name
        return handle


@pytest.fixture
def driver(monkeypatch):
    nodes = [None, "_rows_early_0_own", "gemm", "_ring_early_0_own", "_join_early_1_own", "add"]
    driver, bindings = Driver(pairwise(nodes)), ModuleType("cuda.bindings")
    bindings.driver = driver
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    return driver


def test_kernels_that_wait_by_themselves_begin_early_behind_kernels(driver):
    begin_early(0)
    assert driver.edges == {
        (None, "_rows_early_0_own"): 0,  # a copy says nothing before it has ended
        ("_rows_early_0_own", "gemm"): 0,
        ("gemm", "_ring_early_0_own"): (1, 1),
        ("_ring_early_0_own", "_join_early_1_own"): (1, 1),
        ("_join_early_1_own", "add"): 0,
    }


def test_driver_that_refuses_is_an_error(driver):
    driver.status = SimpleNamespace(value=1, name="CUDA_ERROR_INVALID_VALUE")
    with pytest.raises(RuntimeError, match="CUDA graph: got CUDA_ERROR_INVALID_VALUE from the driver, expected CUDA_SUCCESS"):
        begin_early(0)
