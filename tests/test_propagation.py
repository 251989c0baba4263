"""The next frame of objects that go on, as one call: what it computes, and what a GPU launches and copies for it.

A replay itself takes a GPU; here a stand-in of `Captured` runs the call again, and refuses what cannot be captured.
"""

from functools import partial

import numpy as np
import pytest
import torch

from ensemble.components import components, propagation
from ensemble.config import TINY
from ensemble.decoding import Propagation
from ensemble.runner import Host, SequenceRequest
from ensemble.tracker import Tracker
from export import runners
from export.runners import TorchDevice, TorchGraph, open_graphs, warm_up

SAM2, CONTRACTS, CONTRACT = TINY.sam2, components(TINY), propagation(TINY)
PARTS = CONTRACTS["tracker"].parts
ABSENT, PAD = -2, -1
SIZE = (48, 64)


@pytest.fixture(scope="module")
def graphs(tiny):
    torch.set_num_threads(1)  # graphs this small are ten times slower when threads wait for each other on busy cores
    return {name: TorchGraph(tiny.build(name), name) for name in PARTS}


# What it computes -------------------------------------------------------------------------------------------------------


class Levelled:
    """A mask decoder whose scores are of both signs, whatever its weights."""

    def __init__(self, graph):
        self.graph = graph

    def run(self, inputs):
        outputs = self.graph.run(inputs)
        return outputs | {"object_scores": outputs["object_scores"] * np.where(np.arange(len(outputs["object_scores"])) % 2, -1, 1)}


def in_turn(graphs, inputs):
    """The same by three calls, each from host to host."""
    count, frames = len(inputs["object_frame"]), {name: inputs[name] for name in ("frame_embeddings", "object_frame")}
    seen = ("memory_maps", "memory_rows", "object_pointers", "pointer_distances")
    conditioned = graphs["memory_attention"].run({**frames, **{name: inputs[name] for name in seen}})["conditioned_embeddings"]
    decoded = graphs["mask_decoder"].run(
        {
            "image_embeddings": conditioned,
            "high_res_1": inputs["high_res_1"],
            "high_res_0": inputs["high_res_0"],
            "object_embedding": np.arange(count),
            "object_frame": inputs["object_frame"],
            "has_memory": np.ones(count, bool),
            "multimask": np.ones(count, bool),
            "prompt_points": np.zeros((count, 3, 2), np.float32),
            "prompt_labels": np.array([[PAD, PAD, ABSENT]] * count),
            "text_embeddings": np.zeros((count, SAM2.width), np.float32),
            "mask_prompts": np.zeros((count, SAM2.low_res, SAM2.low_res), np.float32),
            "has_mask_prompt": np.zeros(count, bool),
        }
    )
    ungated = {name: decoded[name] for name in ("mask_logits", "object_scores")}
    memory = graphs["memory_encoder"].run({**frames, **ungated, "prompted": np.zeros(count, bool)})
    logits = decoded["mask_logits"].copy()
    logits[decoded["object_scores"] <= 0] = -1024
    return {**decoded, "mask_logits": logits, **memory}


SIZES = {
    "one object": {},
    "one object on its second frame": {"memories": 1, "pointers": 1},
    "four objects of three frames": {"objects": 4, "frames": 3},
    "two objects that are not old": {"objects": 2, "frames": 2, "memories": 5, "pointers": 5},
    "eight objects with all maps and not all pointers": {"objects": 8, "pointers": 11},
}


@pytest.mark.parametrize("device", [Host(), TorchDevice()], ids=["host", "torch"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_one_call_equals_three_in_turn(graphs, device, sizes):
    composed, inputs = device.compose(CONTRACT, Propagation(SAM2, device), graphs), CONTRACT.sample(1, **sizes)
    expected = in_turn(graphs, inputs)
    for _ in range(2):
        got = device.hosts(device.run(composed, inputs))
        assert set(got) == {spec.name for spec in CONTRACT.outputs}
        for name, array in got.items():
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_absent_objects_have_no_mask_and_are_remembered_as_decoded(graphs):
    levelled = graphs | {"mask_decoder": Levelled(graphs["mask_decoder"])}
    inputs = CONTRACT.sample(2, objects=4, frames=2)
    expected = in_turn(levelled, inputs)
    got = Host().compose(CONTRACT, Propagation(SAM2, Host()), levelled).run(inputs)
    absent = got["object_scores"] <= 0
    assert 0 < absent.sum() < 4
    assert (got["mask_logits"][absent] == -1024).all()
    assert (got["mask_logits"][~absent] > -1024).all()
    for name, array in got.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_gate_is_the_same_on_every_device():
    rng = np.random.default_rng(0)
    logits, present = rng.standard_normal((4, 3, 3), np.float32), np.array([True, False, True, False])[:, None, None]
    expected = np.where(present, logits, np.float32(-1024))
    device = TorchDevice()
    for got in (Host().where(present, logits, -1024.0), device.host(device.where(device.put(present), device.put(logits), -1024.0))):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected)


# What a GPU does for it -------------------------------------------------------------------------------------------------


class Captured:
    """Runs a call as if it were captured the second time that its inputs have the same shapes.

    `launches` says of each call how many there have been of its shapes: at 0 kernels are readied, at 1 the call is captured, then replayed.
    """

    def __init__(self, call):
        self.call, self.known, self.launches = call, {}, []

    def __call__(self, *tensors):
        shapes = tuple(tensor.shape for tensor in tensors)
        self.launches.append(self.known.get(shapes, 0))
        self.known[shapes] = self.launches[-1] + 1
        OnGpu.capturing = self.known[shapes] > 1
        try:
            with torch.inference_mode():
                return [result.clone() for result in self.call(*tensors)]
        finally:
            OnGpu.capturing = False


class OnGpu(TorchDevice):
    """A CPU that counts what a GPU would be sent and waited for, and refuses a copy that could not be captured."""

    on_gpu, capturing = True, False
    timed = Host.timed

    def __init__(self):
        self.name, self.sent, self.waits = "cpu", [], 0

    def put(self, array):
        if isinstance(array, np.ndarray):
            assert not self.capturing, "a copy from the host cannot be captured"
            self.sent.append((array.dtype.name, array.shape))
        return super().put(array)

    def zeros(self, shape, dtype):
        assert not self.capturing
        return super().zeros(shape, dtype)

    def mark(self):
        def waited():
            self.waits += 1

        return waited


@pytest.fixture
def gpu(graphs, monkeypatch):
    """A device; what is composed from now on is captured on it."""
    for name, value in {"TorchDevice": OnGpu, "Captured": Captured}.items():
        monkeypatch.setattr(runners, name, value)
    return OnGpu()


def request(session_id, frame_idx, num_objects, num_frames=1):
    """The next frames of a session, their features where the frame encoder leaves them; its first starts objects from texts."""
    rng = np.random.default_rng([session_id, frame_idx])
    specs = CONTRACTS["frame_encoder"].outputs
    inputs = {spec.name: torch.from_numpy(rng.standard_normal((num_frames, *spec.shape[1:]), np.float32)) for spec in specs}
    start = {} if frame_idx else {"text_embeddings": rng.standard_normal((num_objects, SAM2.width), np.float32)}
    inputs |= {"frame_size": np.array(SIZE, np.int32), **start}
    return SequenceRequest(session_id, inputs, start=not frame_idx, parameters={"mask_format": "logits"})


def test_frame_of_objects_that_go_on_is_one_launch_two_small_copies_and_one_wait(graphs, gpu):
    tracker, reference = Tracker(TINY, graphs, gpu), Tracker(TINY, graphs, TorchDevice())
    launches = tracker.propagation._captured.launches
    for frame_idx in range(20):
        requests = [request(1, frame_idx, 4)] + ([request(2, frame_idx - 2, 1)] if frame_idx >= 2 else [])
        launches.clear()
        gpu.sent.clear()
        gpu.waits = 0
        for one, other in zip(tracker.step(requests), reference.step(requests), strict=True):
            np.testing.assert_allclose(one["mask_logits"], other["mask_logits"], rtol=0, atol=1e-4)  # float32 summation order
        ages = [(count, min(age, 16)) for count, age in ((4, frame_idx), (1, frame_idx - 2)) if age > 0]
        assert len(launches) == len(ages)
        if frame_idx > 3:  # nobody starts, and what is the same on every frame is there
            assert gpu.sent == [("int64", (count, slots)) for count, age in ages for slots in (min(age, 7), age)]
            assert gpu.waits == len(ages)


def test_frames_of_a_request_are_all_launched_before_the_host_waits_for_the_first(graphs, gpu, monkeypatch):
    tracker = Tracker(TINY, graphs, gpu)
    tracker.step([request(1, 0, 4), request(2, 0, 1)])
    launches, events = tracker.propagation._captured.launches, []
    monkeypatch.setattr(gpu, "mark", lambda: partial(lambda launched: events.append((launched, len(launches))), len(launches)))
    results = tracker.step([request(1, 1, 4, num_frames=4), request(2, 1, 1, num_frames=2)])
    assert [result["frame_idx"].tolist() for result in results] == [[1, 2, 3, 4], [1, 2]]
    assert events == [(launched, 6) for launched in (1, 2, 3, 4, 5, 6)]  # rounds of two calls each, then of one; each waits for its own


def test_no_frame_waits_for_a_capture_after_warming_up(graphs, gpu, monkeypatch):
    monkeypatch.setattr(runners, "torch_device", lambda: "cuda")
    tracker = Tracker(TINY, graphs, gpu)
    warm_up(tracker.propagation, CONTRACT)
    captured = tracker.propagation._captured
    assert sorted(captured.launches) == sorted([0, 1] * len(captured.known))
    captured.launches.clear()
    for session_id, num_objects in ((1, 1), (2, 2), (3, 3), (4, 4)):
        for frame_idx in range(18):
            tracker.step([request(session_id, frame_idx, num_objects)])
            if num_objects == 1 or frame_idx > 15:
                assert not frame_idx or captured.launches[-1] >= 2


def test_graphs_that_are_only_composed_are_not_warmed_up_alone(repository, monkeypatch):
    warmed = []
    monkeypatch.setattr(runners, "warm_up", lambda graph, contract: warmed.append(contract.name))
    graphs = open_graphs({}, repository / "tracker" / "1", PARTS, TINY)
    assert set(graphs) == set(PARTS)
    assert warmed == [part for part in PARTS if part != "memory_attention"]
