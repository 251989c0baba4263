"""The verbs `sparrow export` and `sparrow serve`."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from .manifest import Manifest
from .mps import MpsError
from .runners import ENGINE_SUFFIX, PRECISIONS, QUANTIZATION_BITS, Engine
from .serve import Ports, Server, ServerError
from .targets import AUTO, TargetError, find_target, ran_on


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("components", nargs=-1)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Model repository to write.")
@click.option("--target", default=AUTO, show_default=True, help="auto: of this machine's GPU; a name (cpu, h100, l4, ...) or a .toml file.")
@click.option("--engine", type=click.Choice(list(ENGINE_SUFFIX)), help="What the graphs run in, in float32: instead of a target.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="Instead of the target's; ONNX has no bfloat16.")
@click.option("--quantization", type=click.Choice(list(QUANTIZATION_BITS)), help="Of the language model's layers, instead of the target's.")
@click.option("--bisect", is_flag=True, help="Where the gate refuses an engine, name the first layer that drifts.")
def export(
    checkpoint: Path,
    components: tuple[str, ...],
    out: Path,
    target: str,
    engine: str | None,
    precision: str | None,
    quantization: str | None,
    bisect: bool,
) -> None:
    """Turn CHECKPOINT into a model repository, or make only the graphs named as COMPONENTS and leave the others as they are.

    CHECKPOINT is a folder in our layout, the original's working directory, or a SAM2 file, which serves sparrow_track alone. What an
    earlier export into the same repository made from the same stays.
    """
    from .checkpoints import Checkpoint, CheckpointError
    from .gate import GateError
    from .to_repository import RepositoryBusy, UnknownGraph, repository_from_checkpoint
    from .to_tensorrt import TensorRtError

    try:
        source = Checkpoint(checkpoint)
        settings = choose(target, engine, precision, quantization)
        with tqdm(total=len(components or source.components), unit="graph") as bar:

            def progress(made: Manifest, anew: bool) -> None:
                took = f"{made.seconds:6.1f} s" if anew else "as it was"
                kind = f"{made.engine_kind} {made.precision}"
                bar.write(f"{made.component:<18} {kind:<15} {took:>9} {made.size / 1e6:9.2f} MB   {gated(made)}")
                bar.update()

            repository_from_checkpoint(source, out, progress, settings, components, bisect)
    except (CheckpointError, GateError, RepositoryBusy, TargetError, TensorRtError, UnknownGraph, ValueError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:  # e.g. the disk is full
        raise click.ClickException(f"{error.filename or out}: {error.strerror or error}. Engines that were finished are kept.") from error
    click.echo(f"Model repository: {out}\nStart it: sparrow serve {out}")


def gated(made: Manifest) -> str:
    """The figures that the gate has decided on."""
    worst = {key: [figures[key] for figures in made.gate.values() if key in figures] for key in ("error", "matched", "cosine", "mask_iou")}
    masks = f", mask IoU {min(worst['mask_iou']):.4f}" if worst["mask_iou"] else ""
    if made.precision == "float32":
        return f"error {max(worst['error']):.1e}{masks}"
    return f"matched {min(worst['matched']):.2f}" if worst["matched"] else f"cosine {min(worst['cosine']):.5f}{masks}"


def choose(target: str, engine: str | None, precision: str | None, quantization: str | None) -> Engine:
    """The engines that were asked for; says which target they are of."""
    if engine:
        chosen = Engine(engine)
    else:
        found = find_target(target)
        click.echo(f"Target {found.name}: {found.about} {ran_on(found)}")
        chosen = found.engine
    given: dict[str, Any] = {"precision": precision, "quantization": quantization}
    return replace(chosen, **{name: value for name, value in given.items() if value})


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("repository", type=click.Path(path_type=Path))
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--grpc-port", default=Ports.grpc, show_default=True)
@click.option("--http-port", default=Ports.http, show_default=True)
@click.option("--metrics-port", default=Ports.metrics, show_default=True)
@click.option(
    "--log", type=click.Path(path_type=Path, dir_okay=False), help="File for the server's log; without a command it goes to stderr."
)
@click.option("--mps/--no-mps", default=True, help="Share a GPU by NVIDIA's MPS, where there is one.", show_default=True)
def serve(
    repository: Path, command: tuple[str, ...], grpc_port: int, http_port: int, metrics_port: int, log: Path | None, mps: bool
) -> None:
    """Run tritonserver on REPOSITORY until Ctrl-C; with COMMAND, run that while the server is up and stop it afterwards.

    Port 0 stands for any free one. COMMAND finds the gRPC address in SPARROW_SERVER, where `sparrow segment` looks for it.
    """
    command = command[1:] if command[:1] == ("--",) else command
    output = log.open("w") if log else None if command else sys.stderr
    server = Server(repository, Ports(grpc_port, http_port, metrics_port), output, mps=mps)
    for number in (signal.SIGINT, signal.SIGTERM):
        # A flag instead of KeyboardInterrupt, which is lost when it comes up in a callback of a library.
        signal.signal(number, lambda *_: server.stopping.set())
    try:
        with server:
            ports = server.ports
            if server.sharing:
                click.echo(server.sharing, err=True)
            click.echo(f"Ready: gRPC {server.url}, HTTP localhost:{ports.http}, metrics localhost:{ports.metrics}/metrics", err=True)
            status = server.run(command)
    except (MpsError, ServerError) as error:
        raise click.ClickException(str(error)) from error
    sys.exit(status)
