"""`sparrow segment`: a file and a question to an answer, masks and an overlay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ._chat_files import write_chat_files
from ._client import SparrowClient
from ._errors import SparrowClientError
from ._media import MediaError, read_image, read_media
from ._results import prepare_folder, write_results
from ._stubs import OPTIONS, VIDEO_SAMPLE_FPS
from ._types import Answer, Event, FrameMasks, TextPiece
from .cli import out_option, server_option, timeout_option

OURS = ("modality", "mask_format", "proposal_debug")
"""Request parameters that the command sets itself."""


def request_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command-line option for every request parameter of `sparrow`; None where it is not given."""
    for name, entry in reversed(OPTIONS.items()):
        if name in OURS:
            continue
        flag, default = f"--{name.replace('_', '-')}", entry["default"]
        kind: Any = click.Choice(entry["choices"]) if entry["choices"] else type(default)
        if isinstance(default, bool):
            flag, kind = f"{flag}/--no-{flag[2:]}", None
        elif entry["low"] is not None:
            kind = (click.IntRange if isinstance(default, int) else click.FloatRange)(entry["low"], entry["high"])
        command = click.option(flag, name, type=kind, default=None, help=f"{entry['doc']}  [default: {default}]")(command)
    return command


@click.command()
@click.argument("input", type=click.Path(path_type=Path))
@click.argument("prompt")
@out_option
@server_option
@click.option(
    "--sample-fps",
    type=click.FloatRange(0, min_open=True),
    default=VIDEO_SAMPLE_FPS,
    show_default=True,
    help="Frames per second taken from a video.",
)
@click.option("--target-boxes", type=click.Path(exists=True, path_type=Path), help="Text file: a box per frame, 4 numbers a line.")
@click.option("--target-crop", type=click.Path(exists=True, path_type=Path), help="Picture of the target.")
@timeout_option
@click.option("--chat-files", is_flag=True, help="Also write the files of the original's chat.py, to OUT/<stem of INPUT>/.")
@click.option(
    "--proposal-debug",
    type=click.Choice(["none", "proposal", "selected", "both"]),
    default="none",
    show_default=True,
    help="With the files of chat.py, those of its proposal_debug: proposals; also the selected boxes; the same for both branches.",
)
@request_options
def segment(
    input: Path,
    prompt: str,
    out: Path,
    server: str,
    sample_fps: float,
    target_boxes: Path | None,
    target_crop: Path | None,
    timeout_s: float,
    chat_files: bool,
    proposal_debug: str,
    **options: Any,
) -> None:
    """Ask a question (PROMPT) about INPUT, a video, a picture or a folder of frames, and write masks of what the answer mentions."""
    try:
        media = read_media(input, sample_fps)
        prepare_folder(out)
        request = {name: value for name, value in options.items() if value is not None}
        if proposal_debug == "both":
            request["branch"] = "both"
        tensors: dict[str, Any] = {}
        if target_boxes:
            tensors["target_boxes"] = read_boxes(target_boxes)
        if target_crop:
            tensors["target_crop"] = read_image(target_crop)
        asked = {"modality": media.modality, "proposal_debug": proposal_debug != "none", **request, **tensors}
        with SparrowClient(server, timeout_s=timeout_s) as client, Progress(len(media.frames)) as progress:
            answer = client.segment(media.frames, prompt, on_event=progress, **asked)
    except (MediaError, SparrowClientError) as error:
        raise click.ClickException(str(error)) from error
    write_results(out, prompt, media, answer)
    if chat_files or proposal_debug != "none":
        arguments = {"input_path": input, "prompt_text": prompt, "vis_save_path": out, "proposal_debug_modes": proposal_debug, **request}
        write_chat_files(out / input.stem, arguments, media, answer, proposal_debug)
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
            self._bar.update(event.frame_idx + 1 - self._bar.n)


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


def report(out: Path, answer: Answer) -> None:
    """What a person wants to know first."""
    click.echo(f"Answer:  {answer.text}")
    click.echo(f"Objects: {', '.join(entry.phrase for entry in answer.objects) or 'none'}  ({answer.summary.branch})")
    click.echo(f"Overlay: {', '.join(map(str, sorted(out.glob('overlay*'))))}")
    click.echo("Stages:  " + ", ".join(f"{name} {value:.0f} ms" for name, value in answer.summary.timings_ms.items()))
