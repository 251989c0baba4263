"""`sparrow track`: a video, a folder or a camera, and what to follow in it, to masks of every frame."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ._client import SparrowClient
from ._errors import SparrowClientError
from ._media import FrameSource, MediaError, open_frames, read_mask
from ._results import TrackFiles, prepare_folder
from ._stubs import MAX_FRAMES
from ._track import TrackSession
from ._types import FrameMasks, Prompt
from .cli import out_option, server_option, timeout_option


def split_numbers(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> list[NDArray[np.float32]]:
    """As many numbers as the option's metavar has, with commas between them."""
    numbers = []
    for value in values:
        try:
            numbers.append(np.array(value.split(","), np.float32))
        except ValueError:
            numbers.append(np.zeros(0, np.float32))
        if len(numbers[-1]) != len(str(parameter.metavar).split(",")):
            raise click.BadParameter(f"{value!r}: expected {parameter.metavar}, numbers from 0 to 1.", context, parameter)
    return numbers


@click.command()
@click.argument("input")
@click.argument("prompt", required=False)
@out_option
@server_option
@click.option(
    "--first-frames",
    type=click.IntRange(1, MAX_FRAMES),
    default=16,
    show_default=True,
    help="Frames that PROMPT is asked about.",
)
@click.option(
    "--box",
    "boxes",
    metavar="X1,Y1,X2,Y2",
    multiple=True,
    callback=split_numbers,
    help="Instead of PROMPT: an object's box, 0 to 1. May be repeated, and so may the next two.",
)
@click.option(
    "--point", "points", metavar="X,Y", multiple=True, callback=split_numbers, help="Instead of PROMPT: a point on an object, 0 to 1."
)
@click.option(
    "--mask",
    "masks",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Instead of PROMPT: a picture that is not zero where the object is.",
)
@timeout_option
def track(
    input: str,
    prompt: str | None,
    out: Path,
    server: str,
    first_frames: int,
    boxes: Sequence[NDArray[np.float32]],
    points: Sequence[NDArray[np.float32]],
    masks: Sequence[Path],
    timeout_s: float,
) -> None:
    """Follow what the answer to PROMPT mentions, or boxes, points and masks, through INPUT: a video, a folder of frames, a camera's URL.

    Every frame is tracked as it comes, and its results are there at once. Ctrl-C ends an endless INPUT.
    """
    if bool(prompt) == bool(boxes or points or masks):
        raise click.UsageError("Say what to track: PROMPT, or --box, --point and --mask.")
    try:
        prompts = plain_prompts(boxes, points, masks)
        with open_frames(input, timeout_s) as source, SparrowClient(server, timeout_s=timeout_s) as client:
            prepare_folder(out)
            first = list(islice(source.frames, first_frames)) if prompt else []
            with client.track(prompt or prompts, first) as session, TrackFiles(out, source.fps, session.text) as files:
                follow(source, first, session, files)
    except (MediaError, SparrowClientError) as error:
        raise click.ClickException(str(error)) from error
    if not files.num_frames:
        raise click.ClickException(f"{input}: no frame was tracked.")
    report(out, session, files)


def plain_prompts(boxes: Sequence[NDArray[np.float32]], points: Sequence[NDArray[np.float32]], masks: Sequence[Path]) -> list[Prompt]:
    """One object each, numbered in this order."""
    places = [{"boxes": box} for box in boxes] + [{"points": point} for point in points] + [{"mask": read_mask(path)} for path in masks]
    return [Prompt(object_id, **place) for object_id, place in enumerate(places)]


def follow(source: FrameSource, first: list[NDArray[np.uint8]], session: TrackSession, files: TrackFiles) -> None:
    """Tracks every frame until the source ends or Ctrl-C is pressed."""
    under_way = deque(first)
    with tqdm(total=source.total, unit="frame", desc="tracking", leave=False) as bar:

        def write(results: list[FrameMasks]) -> None:
            for result in results:
                files.add(under_way.popleft(), result)
                bar.set_postfix(objects=int(result.visible.sum()), refresh=False)
                bar.update()

        try:
            for frame in source.frames:
                under_way.append(frame)
                write(session.push(frame))
            write(session.finish())
        except KeyboardInterrupt:
            session.cancel()


def report(out: Path, session: TrackSession, files: TrackFiles) -> None:
    """What a person wants to know first."""
    if session.text:
        click.echo(f"Answer:  {session.text}")
        click.echo(f"Objects: {', '.join(entry.phrase for entry in session.objects)}")
    click.echo(f"Tracks:  {out / 'tracks.jsonl'}  ({files.num_frames} frames)")
    click.echo(f"Overlay: {out / 'overlay.mp4'}")
