"""The reference is `SlowTrack`: one object at a time, every frame kept, written from spec 7.3 to 7.5 against the same graphs.

With the torch graphs of the tiny checkpoint the two agree as sessions are batched. Their random weights hardly care about prompts
and memories, though, so what the graphs are given is proved on smooth stand-ins in which every input shows.
tests/test_official_predictor.py compares with the official predictor.
"""

import gc
import random
import weakref
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from ensemble import metrics, settings
from ensemble.components import components
from ensemble.config import TINY
from ensemble.errors import Cancelled, CapacityExceeded, ComponentFailed, InvalidInput, UnknownSession
from ensemble.frames import HostPreprocessor, session_frame
from ensemble.masks import resize
from ensemble.memory import bank_bytes
from ensemble.runner import CLOSING, Host, SequenceRequest
from ensemble.sessions import SessionStore
from ensemble.tracker import Limits, Tracker, buckets
from export.runners import OnnxGraph, TorchDevice, TorchGraph

SAM2, CONTRACTS = TINY.sam2, components(TINY)
PARTS = CONTRACTS["tracker"].parts
SIZE = (48, 64)
ABSENT, PAD, TOP_LEFT, BOTTOM_RIGHT, TEXT = -2, -1, 2, 3, 4
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 summation order in batches of other sizes
BFLOAT16 = {"rtol": 2**-7, "atol": 1e-3}  # memories are rounded to bfloat16, where float32 noise may flip the last bit


class Checked:
    """A graph that accepts only what its contract allows, and fails while it has an error; its last inputs are kept."""

    def __init__(self, graph, contract):
        self.graph, self.contract, self.error, self.calls = graph, contract, None, []

    def run(self, inputs):
        if self.error:
            raise self.error
        self.contract.check_inputs(inputs)
        self.calls.append(inputs)
        return self.graph.run(inputs)


class SmoothAttention:
    """Adds the maps and pointers, each weighted by its temporal row or its distance."""

    def run(self, inputs):
        rows, distances = inputs["memory_rows"], inputs["pointer_distances"]
        weights = (1 / (rows + 2.0))[:, :, None, None, None]
        maps = (weights * inputs["memory_maps"]).sum(1)
        weights = (1 / (distances + 2.0))[:, :, None]
        pointers = (weights * inputs["object_pointers"]).sum(1)
        past = np.tile(maps, (1, SAM2.width // SAM2.memory_width, 1, 1)) + pointers[:, :, None, None]
        return {"conditioned_embeddings": np.float32(np.tanh(inputs["frame_embeddings"][inputs["object_frame"]] + past))}


class SmoothDecoder:
    """Logits beyond the clamp of mask prompts, scores of both signs."""

    def run(self, inputs):
        frame, labels = inputs["object_frame"], inputs["prompt_labels"]
        order = np.arange(1, labels.shape[1] + 1)
        shown = np.sin(order * (labels + inputs["prompt_points"] @ [0.01, 0.02]))
        hint = np.where(labels == ABSENT, 0, shown).sum(1)
        hint += (labels == TEXT).sum(1) * inputs["text_embeddings"][:, 0] + inputs["multimask"]
        embedding = inputs["image_embeddings"][inputs["object_embedding"]].mean(1) + 0.3 * ~inputs["has_memory"][:, None, None]
        logits = embedding.repeat(4, 1).repeat(4, 2) + inputs["high_res_1"][frame].mean(1).repeat(2, 1).repeat(2, 2)
        logits = logits + inputs["high_res_0"][frame].mean(1) + hint[:, None, None] / 4
        logits += inputs["has_mask_prompt"][:, None, None] * inputs["mask_prompts"] / 100
        scores = np.sin(3 * hint + 20 * embedding.mean((1, 2)))
        pointers = np.where(scores[:, None] > 0, np.cos(hint[:, None] * np.arange(SAM2.width)), -1)
        outputs = {
            "mask_logits": 100 * np.tanh(logits),
            "predicted_iou": 1 / (1 + np.exp(hint)),
            "object_scores": scores,
            "object_pointers": pointers,
        }
        return {name: np.float32(array) for name, array in outputs.items()}


class SmoothDownsampler:
    def run(self, inputs):
        return {"mask_prompts": np.float32(20 * inputs["masks"][:, ::4, ::4] - 3)}


class SmoothEncoder:
    def run(self, inputs):
        present = (inputs["object_scores"] > 0)[:, None, None]
        logits = np.where(inputs["prompted"][:, None, None], inputs["mask_logits"], -inputs["mask_logits"])
        logits = np.where(present, logits, -100)[:, None, ::4, ::4]
        maps = inputs["frame_embeddings"][inputs["object_frame"]][:, : SAM2.memory_width] + logits / 100
        maps += (inputs["object_scores"] > 0)[:, None, None, None]
        return {"memory_maps": np.float32(np.tanh(maps))}


@pytest.fixture
def graphs():
    stand_ins = (SmoothDownsampler(), SmoothAttention(), SmoothDecoder(), SmoothEncoder())
    return {name: Checked(graph, CONTRACTS[name]) for name, graph in zip(PARTS, stand_ins, strict=True)}


@pytest.fixture(scope="module")
def torch_graphs(tiny):
    torch.set_num_threads(1)  # graphs this small are ten times slower when threads wait for each other on busy cores
    return {name: TorchGraph(tiny.build(name), name) for name in PARTS}


@pytest.fixture
def tracker(graphs):
    return Tracker(TINY, graphs)


def random_array(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def features(*seeds):
    """frame_encoder's outputs for a frame per seed."""
    outputs = enumerate(CONTRACTS["frame_encoder"].outputs)
    return {spec.name: np.stack([random_array(*spec.shape[1:], seed=[seed, index]) for seed in seeds]) for index, spec in outputs}


def request(session_id, seeds, objects=None, start=False, end=False, **parameters):
    """The next frame of a session, or several, with the prompts of `objects`."""
    inputs = {**features(*np.atleast_1d(seeds)), "frame_size": np.array(SIZE, np.int32), **(objects or {})}
    return SequenceRequest(session_id, inputs, start=start, end=end, parameters=parameters)


def start(session_id, seed, objects, **more):
    return request(session_id, seed, objects, start=True, **more)


def text(num_objects, seed=0):
    return {"text_embeddings": random_array(num_objects, SAM2.width, seed=[7, seed])}


def boxes(*owners, seed=0):
    """One box per owner; a few stick out of the frame."""
    first = np.random.default_rng([8, seed]).uniform(-0.1, 0.5, (len(owners), 2))
    corners = np.concatenate([first, first + np.random.default_rng([9, seed]).uniform(0.2, 0.7, (len(owners), 2))], 1)
    return {"boxes": corners.astype(np.float32), "box_objects": np.array(owners, np.int32)}


def points(*owners, seed=0):
    """One point per owner, those on the object and beside it in turn."""
    labels = [1 - owners[:index].count(owner) % 2 for index, owner in enumerate(owners)]
    return {
        "points": np.random.default_rng([10, seed]).random((len(owners), 2), np.float32),
        "point_labels": np.array(labels, np.int32),
        "point_objects": np.array(owners, np.int32),
    }


def drawn(*owners, seed=0):
    """A rectangular mask per owner."""
    masks = np.zeros((len(owners), *SIZE), bool)
    for mask, (top, left) in zip(masks, np.random.default_rng([11, seed]).integers(0, 30, (len(owners), 2)), strict=True):
        mask[top : top + 13, left : left + 21] = True
    return {"masks": masks, "mask_objects": np.array(owners, np.int32)}


OBJECTS = {
    "text": text(2, seed=1),
    "one text": text(1, seed=2),
    "text with an id": text(1, seed=2) | {"text_objects": np.array([70], np.int32)},
    "box": boxes(0, seed=3),
    "a box each": boxes(0, 1, 2, seed=4),
    "several boxes, out of order": boxes(1, 0, 1, 1, 0, seed=5),
    "text and box": text(1, seed=6) | boxes(0, seed=6),
    "text and several boxes": text(2, seed=7) | boxes(1, 0, 1, 0, 1, seed=7),
    "text for two, box for one": text(2, seed=8) | boxes(1, seed=8),
    "text for one, boxes for three": text(1, seed=9) | boxes(2, 0, 1, 2, seed=9),
    "point": points(3, seed=10),
    "several points": points(3, 3, 5, 3, seed=11),
    "as many points as there may be": boxes(1, seed=12) | points(*[1] * settings.MAX_POINTS, seed=12),
    "box and points": boxes(4, seed=13) | points(4, 4, seed=13),
    "text, boxes and a point": text(1, seed=14) | boxes(0, 0, seed=14) | points(0, seed=14),
    "mask": drawn(-8, seed=15),
    "everything": text(1, seed=16) | boxes(2, 1, seed=16) | points(1, 3, 3, seed=16) | drawn(4, 5, seed=16),
}
"""Every way to say what to track."""


class SlowTrack:
    """One object, frame by frame."""

    def __init__(self, graphs, text_embedding=None, own_boxes=(), own_points=(), mask=None):
        self._graphs, self._text, self._boxes, self._points, self._mask = graphs, text_embedding, own_boxes, own_points, mask
        self.maps, self.pointers = [], []

    def next(self, frame):
        """The decoded tensors of one frame."""
        decoded = self._continue(frame) if self.maps else self._condition(frame)
        (memory,) = self._graphs["memory_encoder"].run(
            {
                "frame_embeddings": frame["frame_embeddings"],
                "object_frame": np.zeros(1, np.int64),
                "mask_logits": decoded["mask_logits"],
                "prompted": np.array([not self.maps]),
                "object_scores": decoded["object_scores"],
            }
        )["memory_maps"]
        self.maps.append(memory)
        self.pointers.append(decoded["object_pointers"][0])
        return decoded

    def _condition(self, frame):
        if self._mask is not None:
            return self._draw(frame)
        decoded = None
        if self._text is not None:
            decoded = self._decode(frame, [PAD, PAD, TEXT], multimask=True, text=self._text)
        for index, box in enumerate(self._boxes):
            labels, corners = [TOP_LEFT, BOTTOM_RIGHT], list(np.clip(box, 0, 1).reshape(2, 2))
            if index == len(self._boxes) - 1:
                labels, corners = labels + [label for label, _ in self._points], corners + [point for _, point in self._points]
            decoded = self._decode(frame, [*labels, PAD], multimask=False, places=corners, mask=self._so_far(decoded))
        if self._points and not len(self._boxes):
            labels, places = zip(*self._points, strict=True)
            decoded = self._decode(frame, [*labels, PAD], multimask=len(labels) == 1, places=places, mask=self._so_far(decoded))
        return decoded

    def _so_far(self, decoded):
        return None if decoded is None else np.clip(decoded["mask_logits"][0], -32, 32)

    def _draw(self, frame):
        """add_new_mask and _use_mask_as_output of the official predictor."""

        def scaled(x, side):
            return torch.nn.functional.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)

        mask = scaled(torch.from_numpy(self._mask)[None, None].float(), SAM2.image_size) >= 0.5
        prompt = self._graphs["mask_downsampler"].run({"masks": mask[0].float().numpy()})["mask_prompts"][0]
        decoded = self._decode(frame, [PAD, PAD], multimask=False, mask=prompt, conditioned=frame["frame_embeddings"])
        logits = scaled(mask.float() * 20 - 10, SAM2.low_res)[0].numpy()
        ten, one = np.array([10], np.float32), np.array([1], np.float32)
        return {**decoded, "mask_logits": logits, "object_scores": ten, "predicted_iou": one}

    def _continue(self, frame):
        now = len(self.maps)
        recent = range(max(1, now - 6), now)
        pointers = [0, *range(max(1, now - 15), now)]
        conditioned = self._graphs["memory_attention"].run(
            {
                "frame_embeddings": frame["frame_embeddings"],
                "object_frame": np.zeros(1, np.int64),
                "memory_maps": np.stack([self.maps[index] for index in (0, *recent)])[None],
                "memory_rows": np.array([[6, *(now - index - 1 for index in recent)]]),
                "object_pointers": np.stack([self.pointers[index] for index in pointers])[None],
                "pointer_distances": np.array([[now - index for index in pointers]]),
            }
        )["conditioned_embeddings"]
        return self._decode(frame, [PAD, PAD], multimask=True, conditioned=conditioned)

    def _decode(self, frame, labels, multimask, text=None, places=(), mask=None, conditioned=None):
        positions = np.zeros((1, len(labels), 2), np.float32)
        positions[0, : len(places)] = np.reshape(places, (-1, 2)) * SAM2.image_size
        decoded = self._graphs["mask_decoder"].run(
            {
                **{name: frame[name] for name in ("high_res_1", "high_res_0")},
                "image_embeddings": frame["frame_embeddings"] if conditioned is None else conditioned,
                "object_embedding": np.zeros(1, np.int64),
                "object_frame": np.zeros(1, np.int64),
                "has_memory": np.array([conditioned is not None]),
                "multimask": np.array([multimask]),
                "prompt_points": positions,
                "prompt_labels": np.array([labels]),
                "text_embeddings": np.zeros((1, SAM2.width), np.float32) if text is None else text[None],
                "mask_prompts": np.zeros((1, SAM2.low_res, SAM2.low_res), np.float32) if mask is None else mask[None],
                "has_mask_prompt": np.array([mask is not None]),
            }
        )
        if decoded["object_scores"][0] <= 0:
            decoded["mask_logits"] = np.full_like(decoded["mask_logits"], -1024)
        return decoded


def slow_tracks(graphs, objects):
    """Object id to its reference, in the order in which the tracker has them: by kind of prompt, then by row."""
    texts = objects.get("text_embeddings", ())
    named = objects.get("text_objects", np.arange(len(texts)))
    owners = [objects.get(name, ()) for name in ("box_objects", "point_objects", "mask_objects")]
    ids = dict.fromkeys(int(id) for group in (named, *owners) for id in group)

    def own(name, group, id):
        return [row for row, owner in zip(objects.get(name, ()), group, strict=True) if owner == id]

    labelled = list(zip(objects.get("point_labels", ()), objects.get("points", ()), strict=True))
    return {
        id: SlowTrack(
            graphs,
            next(iter(own("text_embeddings", named, id)), None),
            own("boxes", owners[0], id),
            [pair for pair, owner in zip(labelled, owners[1], strict=True) if owner == id],
            next(iter(own("masks", owners[2], id)), None),
        )
        for id in ids
    }


def unpack(result):
    """[N, H, W] bool of a response in the format rle."""
    masks = [coco.decode({"size": SIZE, "counts": counts}).astype(bool) for counts in result["mask_rle"]]
    return np.stack(masks) if masks else np.zeros((0, *SIZE), bool)


def check_response(result, tracks, frame):
    """A response against the references of its objects, which see the frame too."""
    if isinstance(result, Exception):
        raise result
    assert result["object_ids"].tolist() == list(tracks)
    decoded = [track.next(frame) for track in tracks.values()]
    expected = {name: np.concatenate([one[name] for one in decoded]) for name in decoded[0]}
    np.testing.assert_allclose(result["predicted_iou"], expected["predicted_iou"], **CLOSE)
    np.testing.assert_allclose(result["object_scores"], expected["object_scores"], **CLOSE)
    logits = resize(expected["mask_logits"], *SIZE)
    got = unpack(result)
    clear = abs(logits) > 1e-2  # at a logit of zero, float32 noise decides
    np.testing.assert_array_equal(got[clear], logits[clear] > 0)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(result["visible"], got.any((1, 2)) & (expected["object_scores"] > 0))


def check_banks(tracker, session_id, tracks):
    """What a session keeps against the history of its objects."""
    banks = tracker.sessions.get(session_id).banks
    assert list(banks) == list(tracks)
    for id, track in tracks.items():
        bank = banks[id]
        maps = dict(zip(bank.rows.tolist(), tracker._device.host(bank.maps), strict=True))
        pointers = zip(bank.pointer_distances.tolist(), tracker._device.host(bank.pointers), strict=True)
        check_memory(maps, dict(pointers), track)


def check_memory(maps, pointers, track):
    """Maps by temporal row, and pointers by distance, against the history of an object."""
    expected = {6: track.maps[0]} | {ago: memory for ago, memory in enumerate(reversed(track.maps[1:])) if ago < 6}
    assert set(maps) == set(expected)
    for row, memory in expected.items():
        np.testing.assert_allclose(maps[row], memory, **BFLOAT16)
    now = len(track.pointers)
    expected = {now: track.pointers[0]} | {ago: track.pointers[now - ago] for ago in range(1, min(now, 16))}
    assert set(pointers) == set(expected)
    for ago, pointer in expected.items():
        np.testing.assert_allclose(pointers[ago], pointer, **CLOSE)


# Masks and memories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objects", OBJECTS.values(), ids=OBJECTS)
def test_one_session_equals_the_reference(tracker, graphs, objects):
    tracks = slow_tracks(graphs, objects)
    for frame_idx in range(4):
        (result,) = tracker.step([request(1, frame_idx, None if frame_idx else objects, start=not frame_idx)])
        check_response(result, tracks, features(frame_idx))
        assert result["frame_idx"].tolist() == [frame_idx]
    check_banks(tracker, 1, tracks)


def test_long_session_equals_the_reference_when_both_rings_have_turned(tracker, graphs):
    tracks = slow_tracks(graphs, OBJECTS["everything"])
    for frame_idx in range(20):
        (result,) = tracker.step([request(1, frame_idx, None if frame_idx else OBJECTS["everything"], start=not frame_idx)])
        check_response(result, tracks, features(frame_idx))
    check_banks(tracker, 1, tracks)


class OnGpu(Host):
    on_gpu = True


def test_calls_on_a_gpu_have_the_shape_of_their_objects_alone_and_give_the_same(tracker, graphs):
    sessions = {1: text(2), 2: boxes(0), 3: text(1)}
    captured = Tracker(TINY, graphs, OnGpu())
    for frame_idx in range(3):
        requests = [
            request(session, 10 * session + frame_idx, None if frame_idx else objects, start=not frame_idx)
            for session, objects in sessions.items()
        ]
        expected = tracker.step(requests)
        graphs["mask_decoder"].calls.clear()
        for one, other in zip(captured.step(requests), expected, strict=True):
            for name, array in other.items():
                np.testing.assert_array_equal(one[name], array)
        shapes = {(len(call["high_res_0"]), len(call["object_frame"])) for call in graphs["mask_decoder"].calls}
        assert all(frames == objects for frames, objects in shapes)


def test_memories_are_given_with_their_rows_and_distances_to_the_objects_of_each_frame(tracker, graphs):
    sessions = {1: (19, text(2)), 2: (16, boxes(0)), 3: (20, boxes(0, 1, 0)), 4: (4, text(1))}  # age, objects
    tracks = {session: slow_tracks(graphs, objects) for session, (_, objects) in sessions.items()}
    for session, (age, objects) in sessions.items():
        for frame_idx in range(age):
            tracker.step([request(session, frame_idx, None if frame_idx else objects, start=not frame_idx)])
            for track in tracks[session].values():
                track.next(features(frame_idx))
    order = [3, 2, 1, 4]
    graphs["memory_attention"].calls.clear()
    tracker.step([request(session, 50 + session) for session in order])

    given = [(call, index) for call in graphs["memory_attention"].calls for index in range(len(call["object_frame"]))]
    # Sessions 1 to 3 have full banks and share calls of 4 and 1 objects; session 4 has 4 memories.
    expected = [(frame, track) for frame, session in enumerate(order) for track in tracks[session].values()]
    assert [len(call["object_frame"]) for call in graphs["memory_attention"].calls] == [4, 1, 1]
    for (call, index), (frame, track) in zip(given, expected, strict=True):
        assert call["object_frame"][index] == frame
        np.testing.assert_array_equal(call["frame_embeddings"][frame], features(50 + order[frame])["frame_embeddings"][0])
        maps = {int(row): call["memory_maps"][index, slot] for slot, row in enumerate(call["memory_rows"][index])}
        ages = enumerate(call["pointer_distances"][index])
        check_memory(maps, {int(ago): call["object_pointers"][index, slot] for slot, ago in ages}, track)


def check_interleaved(graphs, rng, device):
    """Sessions that take turns in random groups, against each object alone."""
    tracker = Tracker(TINY, graphs, device)
    sessions = dict(enumerate(rng.sample(list(OBJECTS.values()), 16), start=1))
    tracks = {session: slow_tracks(graphs, objects) for session, objects in sessions.items()}
    seen = dict.fromkeys(sessions, 0)
    while min(seen.values()) < 3:
        chosen = rng.sample(sorted(sessions), rng.randint(1, settings.MAX_FRAME_BATCH))
        seeds = {session: 100 * session + seen[session] for session in chosen}
        requests = [
            request(session, seeds[session], None if seen[session] else sessions[session], start=not seen[session]) for session in chosen
        ]
        for session, result in zip(chosen, tracker.step(requests), strict=True):
            check_response(result, tracks[session], features(seeds[session]))
            check_banks(tracker, session, tracks[session])
            seen[session] += 1


@pytest.mark.parametrize("seed", range(5))
def test_interleaved_sessions_equal_each_object_alone(graphs, seed):
    check_interleaved(graphs, random.Random(seed), Host())


@pytest.mark.parametrize("device", [Host(), TorchDevice()], ids=["host", "torch"])
def test_interleaved_sessions_equal_each_object_alone_on_torch_graphs(torch_graphs, device):
    check_interleaved(torch_graphs, random.Random(0), device)


@pytest.mark.parametrize("seed", range(3))
def test_logits_do_not_depend_on_who_shares_the_step(repository, seed):
    graphs = {name: OnnxGraph(repository / "tracker" / "1" / f"{name}.onnx") for name in PARTS}
    rng, sessions = random.Random(seed), dict(enumerate(random.Random(seed).sample(list(OBJECTS.values()), 16)))

    def frame(session, frame_idx):
        objects = None if frame_idx else sessions[session]
        return request(session, 100 * session + frame_idx, objects, start=not frame_idx, mask_format="logits")

    alone, together = Tracker(TINY, graphs), Tracker(TINY, graphs)
    expected = {session: [alone.step([frame(session, frame_idx)])[0] for frame_idx in range(9)] for session in sessions}
    seen = dict.fromkeys(sessions, 0)
    while waiting := [session for session, count in seen.items() if count < 9]:
        chosen = rng.sample(waiting, rng.randint(1, min(len(waiting), settings.MAX_FRAME_BATCH)))
        results = together.step([frame(session, seen[session]) for session in chosen])
        for session, result in zip(chosen, results, strict=True):
            np.testing.assert_allclose(result["mask_logits"], expected[session][seen[session]]["mask_logits"], rtol=0, atol=1e-4)
            seen[session] += 1


def test_objects_are_both_present_and_absent_in_these_tests(tracker):
    scores = np.concatenate([tracker.step([start(seed, seed, text(8, seed=seed))])[0]["object_scores"] for seed in range(3)])
    assert (scores > 0.1).any()
    assert (scores < -0.1).any()


def test_calls_hold_objects_in_few_sizes(tracker, graphs):
    expected = {1: [1], 3: [3], 7: [4, 3], 16: [16], 21: [16, 4, 1], 40: [16, 16, 8]}
    assert {count: list(map(len, buckets(list(range(count))))) for count in expected} == expected
    for frame_idx in range(2):
        tracker.step([request(session, frame_idx, None if frame_idx else text(7), start=not frame_idx) for session in range(3)])
    sizes = {name: [len(call["object_frame"]) for call in graphs[name].calls] for name in PARTS[1:]}
    assert sizes == {"memory_attention": [16, 4, 1], "mask_decoder": [16, 4, 1] * 2, "memory_encoder": [16, 4, 1] * 2}


def test_prompts_come_in_few_lengths(tracker, graphs):
    tracker.step([start(1, 0, OBJECTS["everything"] | points(*[9] * 5))])
    tracker.step([request(1, 1)])
    assert {call["prompt_labels"].shape[1] for call in graphs["mask_decoder"].calls} == {3, 16}


# Several frames in a request ------------------------------------------------------------------------------------------------


def together(results):
    """One response of those to frames that were sent one by one."""
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


def assert_equal(result, expected):
    if isinstance(result, Exception):
        raise result
    assert set(result) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(result[name], array)


def check_frames_together(graphs, device, sizes):
    """Frames in requests of these sizes, against one by one; objects start, leave and start anew on frames 0 and 4."""
    edits = {0: OBJECTS["everything"], 4: boxes(7, 2, seed=2) | {"removed_objects": np.array([1], np.int32)}}
    alone, several = Tracker(TINY, graphs, device), Tracker(TINY, graphs, device)
    first = 0
    for size in sizes:
        frames = range(first, first + size)
        options = {"start": not first, "mask_format": ("rle", "bits", "logits")[first % 3]}
        expected = [alone.step([request(1, frames[0], edits.get(first), **options)])[0]]
        options["start"] = False
        expected += [alone.step([request(1, frame, **options)])[0] for frame in frames[1:]]
        (result,) = several.step([request(1, frames, edits.get(first), **options | {"start": not first}, frame_idx=first)])
        assert_equal(result, together(expected))
        first += size
    assert result["frame_idx"].tolist() == list(frames)


@pytest.mark.parametrize("sizes", [(4, 4, 2), (3, 1, 3), (1, 3, 1, 4, 4, 4, 4)])
def test_frames_of_one_request_equal_those_sent_one_by_one(graphs, sizes):
    check_frames_together(graphs, Host(), sizes)


@pytest.mark.parametrize("device", [Host(), TorchDevice()], ids=["host", "torch"])
def test_frames_of_one_request_equal_those_sent_one_by_one_on_torch_graphs(torch_graphs, device):
    check_frames_together(torch_graphs, device, (3, 1, 4))


@pytest.mark.parametrize("device", [Host(), TorchDevice()], ids=["host", "torch"])
def test_sessions_with_different_numbers_of_frames_share_rounds(torch_graphs, device):
    sessions = {1: (4, text(2)), 2: (1, boxes(0)), 3: (2, drawn(4) | boxes(5, 6)), 4: (4, points(1))}
    alone, several = Tracker(TINY, torch_graphs, device), Tracker(TINY, torch_graphs, device)
    for step in range(2):
        seeds = {session: [100 * session + 10 * step + index for index in range(size)] for session, (size, _) in sessions.items()}
        objects = {session: own if step == 0 else boxes(50 + session, seed=session) for session, (_, own) in sessions.items()}
        expected = {session: [] for session in sessions}
        for index in range(4):
            going = [session for session, own in seeds.items() if index < len(own)]
            turn = [
                request(session, seeds[session][index], None if index else objects[session], start=not step + index) for session in going
            ]
            for session, result in zip(going, alone.step(turn), strict=True):
                expected[session].append(result)
        requests = [request(session, own, objects[session], start=not step) for session, own in seeds.items()]
        for session, result in zip(sessions, several.step(requests), strict=True):
            assert_equal(result, together(expected[session]))
    assert several.metrics.observations == alone.metrics.observations
    assert several.metrics.counts[metrics.FRAMES, ""] == alone.metrics.counts[metrics.FRAMES, ""] == 2 * (4 + 1 + 2 + 4)


def test_next_frame_that_is_due_is_the_one_behind_those_of_the_request(tracker):
    tracker.step([start(1, [0, 1, 2], text(1))])
    with pytest.raises(InvalidInput, match="tracker: got frame 1, expected frame 3"):
        raise tracker.step([request(1, [3, 4], frame_idx=1)])[0]
    (last,) = tracker.step([request(1, [3, 4], frame_idx=3, end=True)])
    assert last["frame_idx"].tolist() == [3, 4]
    assert len(tracker.sessions) == 0


def test_frames_without_objects_are_counted_and_answered(tracker):
    tracker.step([start(1, 0, boxes(4))])
    (result,) = tracker.step([request(1, [1, 2], {"removed_objects": np.array([4], np.int32)}, mask_format="bits")])
    assert (result["frame_idx"].tolist(), result["object_ids"].tolist()) == ([1, 2], [])


@pytest.mark.parametrize("part", ["memory_attention", "mask_decoder", "memory_encoder"])
def test_sessions_of_a_step_that_fails_half_way_are_closed(tracker, graphs, part):
    tracks = slow_tracks(graphs, text(1))
    check_response(tracker.step([start(1, 0, text(1))])[0], tracks, features(0))
    tracker.step([start(session, 0, text(1)) for session in (2, 3)])
    run, calls = graphs[part].run, count(1)

    def fail_at_second(inputs):
        if next(calls) == 2:
            raise RuntimeError("out of memory")
        return run(inputs)

    graphs[part].run = fail_at_second
    results = tracker.step([request(2, [1, 2, 3]), request(3, 1, end=True), request(1, 1, frame_idx=9)])
    assert [type(result) for result in results] == [ComponentFailed, ComponentFailed, InvalidInput]
    with pytest.raises(UnknownSession, match="session 2 is not open: it was closed when its frames failed half way"):
        raise tracker.step([request(2, 2)])[0]
    assert tracker.metrics.counts[metrics.CLOSED, "failed"] == 2
    assert tracker.metrics.gauges[metrics.OBJECTS] == 1
    check_response(tracker.step([request(1, 1, frame_idx=1)])[0], tracks, features(1))  # its request was refused
    check_banks(tracker, 1, tracks)


# Edits ------------------------------------------------------------------------------------------------------------------


def test_objects_join_leave_and_start_anew_while_others_go_on(tracker, graphs):
    tracks = slow_tracks(graphs, boxes(5, 6, seed=1))
    check_response(tracker.step([start(1, 0, boxes(5, 6, seed=1))])[0], tracks, features(0))
    check_response(tracker.step([request(1, 1)])[0], tracks, features(1))

    joining = points(7, seed=2) | drawn(8, seed=2)
    tracks |= slow_tracks(graphs, joining)
    check_response(tracker.step([request(1, 2, joining)])[0], tracks, features(2))
    check_response(tracker.step([request(1, 3)])[0], tracks, features(3))

    del tracks[6]
    (result,) = tracker.step([request(1, 4, {"removed_objects": np.array([6], np.int32)})])
    check_response(result, tracks, features(4))

    tracks |= slow_tracks(graphs, boxes(7, seed=3))  # at its old place in the response
    check_response(tracker.step([request(1, 5, boxes(7, seed=3))])[0], tracks, features(5))
    for frame_idx in range(6, 16):
        check_response(tracker.step([request(1, frame_idx)])[0], tracks, features(frame_idx))
    check_banks(tracker, 1, tracks)
    assert list(tracks) == [5, 7, 8]


def test_reset_forgets_the_objects_and_starts_those_of_the_request(tracker, graphs):
    tracker.step([start(1, 0, text(3))])
    (result,) = tracker.step([request(1, 1, reset=True)])
    assert (result["object_ids"].tolist(), result["frame_idx"].tolist()) == ([], [1])
    tracks = slow_tracks(graphs, boxes(1, 0))
    check_response(tracker.step([request(1, 2, boxes(1, 0), reset=True)])[0], tracks, features(2))
    check_response(tracker.step([request(1, 3)])[0], tracks, features(3))
    check_banks(tracker, 1, tracks)


def test_session_goes_on_without_objects_until_one_joins(tracker, graphs):
    tracker.step([start(1, 0, boxes(4))])
    (result,) = tracker.step([request(1, 1, {"removed_objects": np.array([4], np.int32)})])
    assert len(result["object_ids"]) == 0
    assert tracker.step([request(1, 2)])[0]["frame_idx"].tolist() == [2]
    tracks = slow_tracks(graphs, points(4))
    check_response(tracker.step([request(1, 3, points(4))])[0], tracks, features(3))


def test_refused_edit_leaves_the_session_as_it_was(tracker, graphs):
    tracks = slow_tracks(graphs, boxes(1, 2))
    check_response(tracker.step([start(1, 0, boxes(1, 2))])[0], tracks, features(0))
    for edit in (
        {"removed_objects": np.array([1, 3], np.int32)},
        boxes(4) | {"removed_objects": np.array([1, 4], np.int32)},
        drawn(1, seed=1) | boxes(1),
        boxes(3, 4) | text(1) | {"text_embeddings": np.full((1, SAM2.width), np.inf, np.float32)},
    ):
        with pytest.raises(InvalidInput):
            raise tracker.step([request(1, 9, edit)])[0]
    check_response(tracker.step([request(1, 1, frame_idx=1)])[0], tracks, features(1))
    check_banks(tracker, 1, tracks)


# Responses --------------------------------------------------------------------------------------------------------------


def test_masks_come_in_the_format_and_size_that_each_request_asks_for(tracker):
    first, second, third = start(1, 0, text(2)), start(2, 0, text(2), mask_format="bits"), start(3, 0, text(2), mask_format="logits")
    second.inputs["frame_size"] = np.array([33, 21], np.int32)
    rle, bits, logits = tracker.step([first, second, third])
    assert unpack(rle).shape == (2, *SIZE)
    assert bits["mask_bits"].shape == (2, (33 * 21 + 7) // 8)
    assert logits["mask_logits"].shape == (2, SAM2.low_res, SAM2.low_res)
    assert [len(result["mask_rle"]) for result in (rle, bits, logits)] == [2, 0, 0]


def test_results_satisfy_the_contract(tracker):
    closed = SequenceRequest(1, CLOSING["tracker"], end=True, parameters={"mask_format": "bits"})
    for one in (start(1, 0, OBJECTS["everything"]), request(1, 1, mask_format="bits"), request(1, [2, 3], mask_format="logits"), closed):
        (result,) = tracker.step([one])
        assert set(result) == {spec.name for spec in CONTRACTS["tracker"].outputs}
        for spec in CONTRACTS["tracker"].outputs:
            assert (result[spec.name].dtype, result[spec.name].ndim) == (spec.numpy_dtype, len(spec.shape)), spec.name


# Bad requests -----------------------------------------------------------------------------------------------------------


def changed(one, **inputs):
    """A request with other inputs; None leaves one out."""
    return replace(one, inputs={name: array for name, array in {**one.inputs, **inputs}.items() if array is not None})


ONE_BOX = np.array([[0.1, 0.1, 0.5, 0.5]], np.float32)
BAD_REQUESTS = {
    "no objects": (start(9, 0, {}), InvalidInput, "tracker: got no objects with START, expected text_embeddings, boxes, points or masks"),
    "empty objects": (start(9, 0, text(0)), InvalidInput, "tracker: got no objects with START"),
    "not open": (request(9, 0), UnknownSession, "tracker: session 9 is not open"),
    "started twice": (start(1, 0, text(1)), InvalidInput, "tracker: got START, but session 1 is open"),
    "too many objects": (start(9, 0, text(17)), CapacityExceeded, "tracker: got 17 objects for session 9, expected at most 16"),
    "too many objects by and by": (
        request(1, 0, boxes(*range(10, 26))),
        CapacityExceeded,
        "tracker: got 17 objects for session 1, expected at most 16",
    ),
    "boxes without owners": (
        changed(start(9, 0, boxes(0, 1)), box_objects=None),
        InvalidInput,
        "tracker.box_objects: got 0, expected one per row of boxes, 2",
    ),
    "owners without boxes": (
        changed(start(9, 0, boxes(0, 1)), boxes=None),
        InvalidInput,
        "tracker.box_objects: got 2, expected one per row of boxes, 0",
    ),
    "owner too many": (
        changed(start(9, 0, boxes(0, 1)), box_objects=np.zeros(3, np.int32)),
        InvalidInput,
        r"tracker.box_objects: got \[3\] int32, expected boxes = 2 as in boxes",
    ),
    "points without labels": (
        changed(start(9, 0, points(0, 1)), point_labels=None),
        InvalidInput,
        "tracker.point_labels: got 0, expected one per point",
    ),
    "label": (
        changed(start(9, 0, points(0, 1)), point_labels=np.array([1, 2], np.int32)),
        InvalidInput,
        "tracker.point_labels: got values 1..2, expected 0..1",
    ),
    "too many points": (
        start(9, 0, points(*[3] * 14)),
        InvalidInput,
        "tracker.points: got 14 for object 3, expected at most 13",
    ),
    "two texts": (
        start(9, 0, text(2) | {"text_objects": np.array([4, 4], np.int32)}),
        InvalidInput,
        "tracker.text_objects: got object 4 more than once",
    ),
    "two masks": (start(9, 0, drawn(4, 4)), InvalidInput, "tracker.mask_objects: got object 4 more than once"),
    "mask and box": (start(9, 0, drawn(4) | boxes(4)), InvalidInput, "tracker.masks: got a mask and other prompts for object 4"),
    "empty mask": (
        changed(start(9, 0, drawn(4)), masks=np.zeros((1, *SIZE), bool)),
        InvalidInput,
        "tracker.masks: got a mask that is empty",
    ),
    "mask that vanishes": (
        changed(
            start(9, 0, drawn(4)),
            frame_size=np.array([900, 1200], np.int32),
            masks=np.eye(1200, dtype=bool)[None, :900] & (np.arange(1200) == 7),
        ),
        InvalidInput,
        "tracker.masks: got a mask that is empty at 256x256 px",
    ),
    "mask of another size": (
        changed(start(9, 0, drawn(4)), masks=np.ones((1, 64, 48), bool)),
        InvalidInput,
        "tracker.masks: got masks of 64x48 px, expected 48x64 px as the frame",
    ),
    "text that is not finite": (
        start(9, 0, {"text_embeddings": np.full((1, SAM2.width), np.nan, np.float32)}),
        InvalidInput,
        "tracker.text_embeddings: got values that are not finite",
    ),
    "box that is not finite": (
        changed(start(9, 0, boxes(0)), boxes=np.array([[0, 0, np.inf, 1]], np.float32)),
        InvalidInput,
        "tracker.boxes: got values that are not finite",
    ),
    "box outside the frame": (
        changed(start(9, 0, boxes(0)), boxes=ONE_BOX + 1),
        InvalidInput,
        r"tracker.boxes: got \[1.1.*\], which lies outside the frame",
    ),
    "box in pixels": (
        changed(start(9, 0, boxes(0)), boxes=ONE_BOX * 100),
        InvalidInput,
        "outside the frame, 0..1. Divide pixels by its width and height",
    ),
    "box turned round": (
        changed(start(9, 0, boxes(0)), boxes=ONE_BOX[:, ::-1]),
        InvalidInput,
        r"tracker.boxes: got \[0.5, 0.5, 0.1.*\], expected x1 <= x2 and y1 <= y2",
    ),
    "point outside the frame": (
        changed(start(9, 0, points(0)), points=np.array([[0.5, 1.5]], np.float32)),
        InvalidInput,
        r"tracker.points: got \[0.5, 1.5\], which lies outside the frame",
    ),
    "no features": (
        changed(start(9, 0, text(1)), high_res_1=None),
        InvalidInput,
        "tracker.high_res_1: got nothing, expected the features of a frame",
    ),
    "no size": (changed(start(9, 0, text(1)), frame_size=None), InvalidInput, "tracker.frame_size: got nothing"),
    "other features": (
        changed(start(9, 0, text(1)), high_res_0=np.zeros((1, 8, 3, 3), np.float32)),
        InvalidInput,
        r"tracker.high_res_0: got \[1, 8, 3, 3\]",
    ),
    "features of a frame without their dimension of frames": (
        changed(request(1, 1), high_res_0=features(1)["high_res_0"][0]),
        InvalidInput,
        r"tracker.high_res_0: got \[8, 64, 64\] float32, expected \[frames 1..4, 8, 64, 64\] float32",
    ),
    "features of other numbers of frames": (
        changed(request(1, [1, 2]), high_res_0=features(1)["high_res_0"]),
        InvalidInput,
        r"tracker.high_res_0: got \[1, 8, 64, 64\] float32, expected frames = 2 as in frame_embeddings",
    ),
    "too many frames": (request(1, range(5)), InvalidInput, r"tracker.frame_embeddings: got \[5, .*Keep frames within 1..4"),
    "frame of another size": (
        changed(request(1, 1), frame_size=np.array([64, 48], np.int32)),
        InvalidInput,
        "tracker: got a frame of 64x48 px, expected 48x64 px as the session's first",
    ),
    "frame out of order": (request(1, 1, frame_idx=2), InvalidInput, "tracker: got frame 2, expected frame 1. Send every frame once"),
    "frame again": (request(1, 0, frame_idx=0), InvalidInput, "tracker: got frame 0, expected frame 1"),
    "start with a later frame": (start(9, 0, text(1), frame_idx=3), InvalidInput, "tracker: got frame 3, expected frame 0"),
    "removed object that is not there": (
        request(1, 1, {"removed_objects": np.array([5], np.int32)}),
        InvalidInput,
        r"tracker.removed_objects: got 5, expected one of \[0\]",
    ),
    "mask format": (
        start(9, 0, text(1), mask_format="png"),
        InvalidInput,
        "tracker: got mask_format = 'png', expected rle or bits or logits",
    ),
    "unknown parameter": (start(9, 0, text(1), speed=3), InvalidInput, "tracker: got an option 'speed', expected one of mask_format"),
    "reset": (request(1, 1, reset="yes"), InvalidInput, "tracker: got reset = 'yes', expected bool"),
    "cancelled": (replace(request(1, 1), cancelled=True), Cancelled, "tracker: the request was cancelled before its turn"),
    "cancelled start": (replace(start(9, 0, text(1)), cancelled=True), Cancelled, "tracker: the request was cancelled"),
}


@pytest.mark.parametrize(("bad", "kind", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_request_fails_alone(tracker, graphs, bad, kind, message):
    going_on, fresh = slow_tracks(graphs, text(1)), slow_tracks(graphs, boxes(0))
    tracker.step([start(1, 0, text(1))])
    going_on[0].next(features(0))
    error, first, second = tracker.step([bad, request(1, 1), start(2, 5, boxes(0))])
    with pytest.raises(kind, match=message):
        raise error
    check_response(first, going_on, features(1))
    check_response(second, fresh, features(5))
    check_banks(tracker, 1, going_on)
    assert len(tracker.sessions) == 2
    assert tracker.metrics.counts[metrics.REFUSED, kind.__name__] == 1


def test_refused_request_leaves_its_tensors_at_once(tracker, graphs):
    def fail(inputs):
        raise ComponentFailed("no answer")

    graphs["mask_decoder"].run = fail
    steps = [request(9, 0), start(1, 0, text(1))]  # one is refused, one fails
    tensors = [weakref.ref(one.inputs["high_res_0"]) for one in steps]
    gc.disable()  # Triton's tensors lie in shared memory, which would fill up until the garbage collector comes round
    try:
        results = tracker.step(steps)
        steps.clear()
        assert [type(result) for result in results] == [UnknownSession, ComponentFailed]
        assert [tensor() is None for tensor in tensors] == [True, True]
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [ComponentFailed("no answer"), RuntimeError("out of memory")], ids=["known", "bug"])
@pytest.mark.parametrize("part", ["memory_attention", "mask_decoder", "memory_encoder"])
def test_frames_fail_and_sessions_stay_where_they_were_when_a_graph_fails(tracker, graphs, part, error):
    tracks = slow_tracks(graphs, text(1))
    check_response(tracker.step([start(1, 0, text(1))])[0], tracks, features(0))
    graphs[part].error = error
    joining = boxes(7)
    *failed, empty = tracker.step([request(1, 1, joining), start(2, 0, text(1)), SequenceRequest(3, CLOSING["tracker"], end=True)])
    assert all(isinstance(error, ComponentFailed) for error in failed)
    assert len(empty["object_ids"]) == 0
    assert len(tracker.sessions) == 1  # session 2 never got its first frame
    graphs[part].error = None
    check_response(tracker.step([request(1, 1, frame_idx=1)])[0], tracks, features(1))
    check_banks(tracker, 1, tracks)


# Life of a session ------------------------------------------------------------------------------------------------------


def test_end_frees_the_session_after_its_last_frame(tracker):
    for last in (start(1, 0, text(1), end=True), request(1, 1, end=True)):
        if not last.start:
            tracker.step([start(1, 0, text(1))])
        (result,) = tracker.step([last])
        assert unpack(result).shape == (1, *SIZE)
        assert len(tracker.sessions) == 0
    with pytest.raises(UnknownSession):
        raise tracker.step([request(1, 2)])[0]


def test_start_with_reset_takes_over_an_open_session(tracker, graphs):
    tracker.step([start(1, 0, text(3))])
    with pytest.raises(InvalidInput, match="lies outside"):  # which leaves it alone
        raise tracker.step([start(1, 1, boxes(0) | {"boxes": ONE_BOX + 1}, reset=True)])[0]
    assert tracker.step([request(1, 1)])[0]["object_ids"].tolist() == [0, 1, 2]
    tracks = slow_tracks(graphs, boxes(9))
    check_response(tracker.step([start(1, 2, boxes(9), reset=True)])[0], tracks, features(2))
    check_response(tracker.step([request(1, 3, frame_idx=1)])[0], tracks, features(3))
    assert len(tracker.sessions) == 1


def test_refused_start_with_end_leaves_the_open_session_alone(tracker):
    tracker.step([start(1, 0, text(1))])
    for refused in (start(1, 0, text(1), end=True), start(1, 0, {}, end=True)):
        with pytest.raises(InvalidInput):
            raise tracker.step([refused])[0]
        assert len(tracker.sessions) == 1


def test_empty_frame_with_start_and_end_closes_a_session_that_triton_has_forgotten(tracker):
    tracker.step([start(1, 0, text(1)), start(2, 0, text(1))])
    tracker.step([SequenceRequest(1, CLOSING["tracker"], start=True, end=True)])
    assert len(tracker.sessions) == 1


def test_last_frame_that_is_refused_frees_the_session_all_the_same(tracker):
    tracker.step([start(1, 0, text(1))])
    with pytest.raises(InvalidInput):
        raise tracker.step([request(1, 1, end=True, frame_idx=7)])[0]
    assert len(tracker.sessions) == 0


@pytest.mark.parametrize("mask_format", ["rle", "bits", "logits"])
def test_closing_request_frees_the_session_without_a_frame_and_may_come_late(tracker, mask_format):
    tracker.step([start(1, 0, text(2)), start(2, 0, text(1))])
    for _ in range(2):  # the second finds the session closed
        closed = SequenceRequest(1, CLOSING["tracker"], end=True, parameters={"mask_format": mask_format})
        result, going_on = tracker.step([closed, request(2, 1)])
        assert len(result["object_ids"]) == 0
        assert len(going_on["mask_rle"]) == 1
        assert len(tracker.sessions) == 1


def test_sessions_beyond_the_limit_are_refused_alone(graphs):
    tracker = Tracker(TINY, graphs, limits=Limits(max_sessions=3))
    for session in range(3):
        tracker.step([start(session, 0, text(1))])
    refused, going_on = tracker.step([start(99, 0, text(1)), request(2, 1)])
    with pytest.raises(CapacityExceeded, match="tracker: got session 99, but all 3 are in use"):
        raise refused
    assert len(going_on["mask_rle"]) == 1
    assert tracker.metrics.counts[metrics.LIMITED, "sessions"] == 1
    tracker.step([request(2, 2, end=True)])
    (result,) = tracker.step([start(99, 0, text(1))])
    assert len(result["mask_rle"]) == 1


@pytest.fixture
def small(graphs):
    """A tracker with memory for 10 objects, and a clock for its sessions."""
    tracker = Tracker(TINY, graphs, limits=Limits(max_memory_mib=1))
    room = 2**20 // bank_bytes(SAM2, Host())
    assert room == 8
    tracker.clock = [0.0]
    tracker.sessions._clock = lambda: tracker.clock[0]
    return tracker


def test_objects_beyond_the_memory_are_refused_alone(small):
    assert isinstance(small.step([start(1, 0, text(5)), start(2, 0, text(2))])[0], dict)
    for refused in (start(3, 0, text(2)), request(2, 1, boxes(5, 6))):
        with pytest.raises(CapacityExceeded, match=r"but the 1 MiB of memory hold 8, and \d are in use. Retry when a session has ended"):
            raise small.step([refused])[0]
    assert small.metrics.counts[metrics.LIMITED, "memory"] == 2
    assert len(small.step([request(2, 1, boxes(5))])[0]["object_ids"]) == 3
    assert len(small.step([request(1, 1, {"removed_objects": np.array([0, 1], np.int32)})])[0]["object_ids"]) == 3
    assert len(small.step([start(3, 0, text(2))])[0]["object_ids"]) == 2


def test_two_sessions_that_start_in_one_step_cannot_both_take_the_last_room(small):
    results = small.step([start(session, 0, text(3)) for session in range(4)])
    assert [isinstance(result, CapacityExceeded) for result in results] == [False, False, True, True]
    assert small.metrics.gauges[metrics.OBJECTS] == 6
    assert len(small.sessions) == 2


def test_objects_of_a_client_that_vanished_make_room(small):
    small.step([start(1, 0, text(7))])
    small.clock[0] = settings.EVICTABLE_IDLE_S + 1
    assert isinstance(small.step([start(2, 0, text(3))])[0], dict)
    with pytest.raises(UnknownSession, match="session 1 is not open: it was closed after 11 s without a request to make room for another"):
        raise small.step([request(1, 1)])[0]
    assert small.metrics.counts[metrics.CLOSED, "evicted"] == 1


def test_idle_session_expires_and_its_next_request_is_told_so(tracker):
    now = 0.0
    tracker.sessions = SessionStore("tracker", settings.MAX_SESSIONS, settings.SESSION_IDLE_S, clock=lambda: now)
    tracker.step([start(1, 0, text(1))])
    now = settings.SESSION_IDLE_S
    tracker.step([request(1, 1), start(2, 0, text(1))])
    now += settings.SESSION_IDLE_S / 2
    tracker.step([request(2, 1)])
    now += settings.SESSION_IDLE_S / 2 + 1
    tracker.expire()
    assert tracker.metrics.gauges[metrics.SESSIONS] == 1  # without a request of anybody
    expired, going_on = tracker.step([request(1, 2), request(2, 2)])
    with pytest.raises(UnknownSession, match=r"session 1 is not open: it was closed after 60 s without a request"):
        raise expired
    assert len(going_on["mask_rle"]) == 1


def test_metrics_follow_what_happens(tracker):
    def gauge(metric):
        return tracker.metrics.gauges[metric]

    tracker.step([start(1, 0, text(2)), start(2, 0, boxes(0, 1, 2))])
    assert (gauge(metrics.SESSIONS), gauge(metrics.OBJECTS), gauge(metrics.MEMORY)) == (2, 5, 5 * bank_bytes(SAM2, Host()))
    tracker.step([request(1, 1)])
    tracker.step([request(2, 1, {"removed_objects": np.array([1], np.int32)}), request(1, 2, end=True)])
    assert (gauge(metrics.SESSIONS), gauge(metrics.OBJECTS)) == (1, 2)
    taken = tracker.metrics.take()
    assert taken.counts[metrics.FRAMES, ""] == 5
    assert taken.counts[metrics.CLOSED, "ended"] == 1
    assert taken.observations[metrics.STEP_FRAMES] == [2, 1, 2]
    assert taken.observations[metrics.STEP_OBJECTS] == [5, 2, 4]
    assert {label for metric, label in taken.counts if metric is metrics.STAGE} == set(metrics.STAGE.values)
    assert all(value >= 0 for value in taken.counts.values())
    assert not tracker.metrics.counts


@pytest.mark.parametrize("changed", [{"max_sessions": "0"}, {"session_idle_s": "120"}])
def test_limits_that_make_no_sense_are_refused(changed):
    parameters = {name: str(value) for name, value in vars(Limits()).items()}
    assert Limits.from_parameters(parameters, 120) == Limits()
    with pytest.raises(ValueError, match=f"tracker: got {next(iter(changed))} = "):
        Limits.from_parameters(parameters | changed, 120)


# The frame before it reaches the tracker --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 40, 3), (40, 0, 3), (4, 40, 3), (40, 5000, 3)])
def test_frame_is_refused_before_it_reaches_the_tracker_when_a_side_is_out_of_range(shape):
    with pytest.raises(InvalidInput, match=rf"sparrow_track.frame: got a frame of {shape[0]}x{shape[1]} px, expected 8..4096"):
        session_frame({"frame": np.zeros(shape, np.uint8)}, HostPreprocessor(TINY))


def test_empty_frame_becomes_the_closing_request():
    outputs = session_frame({"frame": np.zeros((0, 0, 3), np.uint8)}, HostPreprocessor(TINY))
    assert outputs["frame_size"].tolist() == CLOSING["tracker"]["frame_size"].tolist()
    assert outputs["pictures"].shape == (SAM2.image_size, SAM2.image_size, 3)
