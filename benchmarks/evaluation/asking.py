"""Asks the server what has no prediction yet, several questions at once; a prediction is a file as soon as it is there."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sparrow_client import (
    CapacityExceeded,
    FrameMasks,
    InvalidInput,
    Objects,
    Proposals,
    RequestFailed,
    ServerUnavailable,
    SparrowClient,
    SparrowClientError,
    Summary,
)
from sparrow_client._media import MediaError
from sparrow_client._results import rle
from tqdm import tqdm

from .clips import Shown, each_frame, read_clip
from .samples import Prediction, Sample

BRANCHES = ("tracked", "framewise")

ATTEMPTS = 3
"""Times that a question is asked if the server goes away, or has no room, in the midst of it."""

PATIENCE_S = 300
"""Longest wait for a server that went away; a large model takes minutes to load."""

POLL_S = 1

Options = Mapping[str, str | float | bool]


class ServerGone(Exception):
    """The server went away and did not come back."""


class OtherRun(Exception):
    """A folder holds what another run left: it would count as this one's."""


@dataclass
class Asking:
    """A benchmark's questions on their way to a server.

    Args:
        client: to ask.
        out: folder of the run.
        options: of every request; a sample's own come on top.
        in_flight: questions under way at once.
    """

    client: SparrowClient
    out: Path
    options: Options
    in_flight: int
    stopped: threading.Event = field(default_factory=threading.Event)
    frames: int = 0
    """That were answered."""

    def ask_all(self, samples: Sequence[Sample]) -> dict[str, str]:
        """Asks what has no prediction yet; key to the reason of what failed.

        Raises:
            ServerGone: it did not come back within PATIENCE_S.
            OSError: a prediction cannot be written, e.g. the disk is full.
        """
        left = [sample for sample in samples if not prediction_file(self.out, sample.key).exists()]
        failures = {}
        with ThreadPoolExecutor(self.in_flight) as pool:
            futures = {pool.submit(self.ask_one, sample): sample for sample in left}
            try:
                with tqdm(total=len(samples), initial=len(samples) - len(left), unit="question", disable=not left) as progress:
                    for future in as_completed(futures):
                        error = future.exception()
                        if isinstance(error, MediaError | SparrowClientError):
                            failures[futures[future].key] = str(error)
                            progress.set_postfix_str(f"{len(failures)} failed")
                        elif error:
                            raise error
                        else:
                            self.frames += future.result()
                        progress.update()
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                self.client.close()  # ends what is under way
                raise
        return failures

    def ask_one(self, sample: Sample) -> int:
        """Writes the prediction; its number of frames. Raises MediaError or SparrowClientError where there is none."""
        shown = read_clip(sample.clip)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                prediction = ask(self.client, sample, shown, {**self.options, **sample.options})
                break
            except InvalidInput:
                for _ in each_frame(sample.clip):  # the server knows a picture by its place: say which file it is
                    pass
                raise
            except SparrowClientError as error:
                passing = isinstance(error, ServerUnavailable | CapacityExceeded) or not self.client.is_ready()
                if not passing or attempt == ATTEMPTS:
                    raise
                self.wait_for_server()
        write_prediction(prediction_file(self.out, sample.key), prediction)
        return shown.size[0]

    def wait_for_server(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while not self.stopped.wait(POLL_S) and not self.client.is_ready():
            if time.monotonic() > end:
                raise ServerGone(f"{self.client.url}: the server went away and did not come back for {PATIENCE_S} s.")


def ask(client: SparrowClient, sample: Sample, shown: Shown, options: Options) -> Prediction:
    """The answer; masks are packed as they come, so that a long clip needs little memory. Raises SparrowClientError."""
    objects, proposals, summary = [], np.zeros((0, 4), np.float32), None
    frames: dict[str, list[list[str]]] = {branch: [] for branch in BRANCHES if options["branch"] in (branch, "both")}  # branch to T of [O]
    events = client.stream(shown.frames, sample.prompt, encoded_frames=shown.encoded_frames, modality="video", **options)
    for event in events:
        if isinstance(event, FrameMasks):
            frames[event.branch].append([rle(mask)["counts"] for mask in event.masks])
        elif isinstance(event, Objects):
            objects = event.objects
        elif isinstance(event, Proposals):
            proposals = event.boxes
        elif isinstance(event, Summary):
            summary = event
    if summary is None:
        raise RequestFailed("sparrow: the stream ended without a summary. See the server's log.", "sparrow", "")
    for branch, masks in frames.items():
        if objects and [len(own) for own in masks] != [len(objects)] * shown.size[0]:
            got, expected = [len(masks), len(masks[0]) if masks else 0], [shown.size[0], len(objects)]
            raise RequestFailed(f"sparrow: got {branch} masks {got}, expected {expected}. See the server's log.", "sparrow", "")
    return Prediction(
        prompt=sample.prompt,
        answer=summary.answer,
        preset=summary.fields["preset"],
        phrases=[entry.phrase for entry in objects],
        selected_boxes=[entry.selected_boxes for entry in objects],
        proposals=proposals,
        size=shown.size,
        tracks={branch: [list(track) for track in zip(*masks, strict=True)] if objects else [] for branch, masks in frames.items()},
    )


def prediction_file(out: Path, key: str) -> Path:
    return out / "predictions" / f"{key}.json"


def write_prediction(path: Path, prediction: Prediction) -> None:
    """As JSON, whole or not at all."""
    boxes = [own.tolist() for own in prediction.selected_boxes]
    fields = {**vars(prediction), "selected_boxes": boxes, "proposals": prediction.proposals.tolist()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    try:
        unfinished.write_text(json.dumps(fields))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_prediction(path: Path) -> Prediction:
    """Raises OtherRun where it is none."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        boxes = [np.array(own, np.float32).reshape(-1, 4) for own in fields["selected_boxes"]]
        proposals = np.array(fields["proposals"], np.float32).reshape(-1, 4)
        num_frames, height, width = fields["size"]
        return Prediction(**{**fields, "selected_boxes": boxes, "proposals": proposals, "size": (num_frames, height, width)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OtherRun(f"{path}: not a prediction ({error}). Remove it, and the same command asks again.") from error


@dataclass
class Reader:
    """Predictions of a run by their samples; raises OtherRun where one answers another question.

    Args:
        out: folder of the run.
        presets: of the models whose predictions were read.
    """

    out: Path
    presets: set[str] = field(default_factory=set)

    def __call__(self, sample: Sample) -> Prediction:
        path = prediction_file(self.out, sample.key)
        prediction = read_prediction(path)
        if prediction.prompt != sample.prompt:
            raise OtherRun(f"{path}: got an answer to {prediction.prompt!r}, expected one to {sample.prompt!r}. Choose another folder.")
        self.presets.add(prediction.preset)
        return prediction
