"""`sparrow segment`: a file and a question to an answer, masks and an overlay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ._client import SparrowClient
from ._errors import SparrowClientError
from ._media import Media, MediaError, read_image, read_media
from ._overlay import blend, write_picture, write_video
from ._stubs import VIDEO_SAMPLE_FPS
from ._types import Answer, Event, FrameMasks, TextPiece


@click.command()
@click.argument("input", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
@click.option(
    "--server",
    default="localhost:8001",
    envvar="SPARROW_SERVER",
    show_default=True,
    show_envvar=True,
    help="host:port of its gRPC endpoint.",
)
@click.option(
    "--branch", type=click.Choice(["tracked", "framewise"]), default="tracked", show_default=True, help="How masks follow an object."
)
@click.option("--video-init", type=click.Choice(["text_then_boxes", "text_only"]), default="text_then_boxes", show_default=True)
@click.option("--max-new-tokens", type=int, help="Longest answer.")
@click.option(
    "--sample-fps",
    type=click.FloatRange(0, min_open=True),
    default=VIDEO_SAMPLE_FPS,
    show_default=True,
    help="Frames per second taken from a video.",
)
@click.option("--target-boxes", type=click.Path(exists=True, path_type=Path), help="Text file: a box per frame, 4 numbers a line.")
@click.option("--target-crop", type=click.Path(exists=True, path_type=Path), help="Picture of the target.")
@click.option("--timeout", "timeout_s", type=float, default=300, show_default=True, help="Seconds to wait for the next response.")
def segment(
    input: Path,
    prompt: str,
    out: Path,
    server: str,
    branch: str,
    video_init: str,
    max_new_tokens: int | None,
    sample_fps: float,
    target_boxes: Path | None,
    target_crop: Path | None,
    timeout_s: float,
) -> None:
    """Answer PROMPT about INPUT (picture, video or folder of frames) and draw what the answer mentions."""
    try:
        media = read_media(input, sample_fps)
        prepare_folder(out)
        request: dict[str, Any] = {"modality": media.modality, "branch": branch, "video_init": video_init}
        if max_new_tokens is not None:
            request["max_new_tokens"] = max_new_tokens
        if target_boxes:
            request["target_boxes"] = read_boxes(target_boxes)
        if target_crop:
            request["target_crop"] = read_image(target_crop)
        with SparrowClient(server, timeout_s=timeout_s) as client, Progress(len(media.frames)) as progress:
            answer = client.segment(media.frames, prompt, on_event=progress, **request)
    except (MediaError, SparrowClientError) as error:
        raise click.ClickException(str(error)) from error
    write_results(out, prompt, media, answer)
    report(out, answer)


class Progress:
    """A bar over the frames; the answer appears beside it as it is generated.

    Args:
        num_frames: frames that masks are expected for.
    """

    def __init__(self, num_frames: int) -> None:
        self._bar = tqdm(total=num_frames, unit="frame", desc="thinking", leave=False)
        self._text = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def __call__(self, event: Event) -> None:
        if isinstance(event, TextPiece):
            self._text += event.text
            self._bar.set_postfix_str(self._text[-60:])
        elif isinstance(event, FrameMasks):
            self._bar.set_description("masks")
            self._bar.update()


def prepare_folder(out: Path) -> None:
    """Creates the folder for the results; raises MediaError when it holds anything but an earlier result."""
    if out.exists() and not out.is_dir():
        raise MediaError(f"{out}: a file, expected a folder. Choose another.")
    if out.exists() and any(out.iterdir()) and not (out / "result.json").exists():
        raise MediaError(f"{out}: not empty, and no earlier result. Choose another folder.")
    out.mkdir(parents=True, exist_ok=True)


def clear_folder(out: Path) -> None:
    """Removes the results of an earlier run, and nothing else."""
    shutil.rmtree(out / "masks", ignore_errors=True)
    for name in ("answer.txt", "result.json", "overlay.jpg", "overlay.mp4"):
        (out / name).unlink(missing_ok=True)


def read_boxes(path: Path) -> NDArray[np.float32]:
    """[R, 4] float32: the first four numbers of every line, separated by white space or commas."""
    try:
        rows = [line.replace(",", " ").split()[:4] for line in path.read_text().splitlines() if line.strip()]
        boxes = np.array(rows, np.float32)
    except (ValueError, UnicodeDecodeError) as error:
        raise MediaError(f"{path}: not a list of boxes ({error}). Write four numbers a line.") from error
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise MediaError(f"{path}: got lines of other lengths, expected four numbers a line.")
    return boxes


def write_results(out: Path, prompt: str, media: Media, answer: Answer) -> None:
    """answer.txt, result.json, masks/<object>/<frame>.png and the overlay, in place of those of an earlier run."""
    clear_folder(out)
    (out / "answer.txt").write_text(answer.text + "\n")
    (out / "result.json").write_text(json.dumps(result_fields(prompt, media, answer), indent=2))
    for index in range(len(answer.objects)):
        folder = out / "masks" / str(index)
        folder.mkdir(parents=True)
        for frame in answer.frames:
            write_picture(folder / f"{media.names[frame.frame_idx]}.png", frame.masks[index].astype(np.uint8) * 255)
    masks = {frame.frame_idx: frame.masks for frame in answer.frames}
    nothing = np.zeros((0, *media.frames.shape[1:3]), bool)
    drawn = [blend(frame, masks.get(index, nothing)) for index, frame in enumerate(media.frames)]
    if media.modality == "image":
        write_picture(out / "overlay.jpg", drawn[0])
    else:
        write_video(out / "overlay.mp4", drawn, media.fps)


def result_fields(prompt: str, media: Media, answer: Answer) -> dict[str, Any]:
    """result.json: the answer, and per object its boxes and an RLE mask per frame in COCO's compressed format."""
    from pycocotools import mask as coco

    def rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
        encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}

    objects = [
        {
            "phrase": entry.phrase,
            "selected_boxes_xyxy_norm": entry.selected_boxes.tolist(),
            "boxes_xyxy_norm": entry.boxes.tolist(),
            "frames": [
                {
                    "frame": media.names[frame.frame_idx],
                    "mask": rle(frame.masks[index]),
                    "predicted_iou": float(frame.predicted_iou[index]),
                    "object_score": float(frame.object_scores[index]),
                    "visible": bool(frame.visible[index]),
                }
                for frame in answer.frames
            ],
        }
        for index, entry in enumerate(answer.objects)
    ]
    return {"prompt": prompt, **answer.summary.fields, "objects": objects}


def report(out: Path, answer: Answer) -> None:
    """What a person wants to know first."""
    click.echo(f"Answer:  {answer.text}")
    click.echo(f"Objects: {', '.join(entry.phrase for entry in answer.objects) or 'none'}  ({answer.summary.branch})")
    click.echo(f"Overlay: {next(out.glob('overlay.*'))}")
    click.echo("Stages:  " + ", ".join(f"{name} {value:.0f} ms" for name, value in answer.summary.timings_ms.items()))
