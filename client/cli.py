"""The command `sparrow`: one verb per entry point of the group `sparrow.verbs`, so that every part of the system brings its own."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path

import click

out_option = click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
server_option = click.option(
    "--server",
    default="localhost:8001",
    envvar="SPARROW_SERVER",
    show_default=True,
    show_envvar=True,
    help="host:port of its gRPC endpoint.",
)
timeout_option = click.option(
    "--timeout", "timeout_s", type=float, default=300, show_default=True, help="Seconds to wait for the next response."
)


class Verbs(click.Group):
    """Finds verbs by their entry points and imports a verb's code only when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(entry_points(group="sparrow.verbs").names)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        for entry in entry_points(group="sparrow.verbs", name=name):
            try:
                command: click.Command = entry.load()
            except ImportError as error:
                return unavailable(name, f"needs {error.name}: pip install 'sparrow-serving[{','.join(entry.extras)}]'")
            return command
        return None


def unavailable(name: str, reason: str) -> click.Command:
    """A verb whose packages are not installed: the others work, and this one says what it needs."""

    def refuse(arguments: tuple[str, ...]) -> None:
        raise click.ClickException(f"{name} {reason}")

    settings = {"ignore_unknown_options": True}
    parameters: list[click.Parameter] = [click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)]
    return click.Command(name, settings, refuse, parameters, help=reason[0].upper() + reason[1:])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def sparrow() -> None:
    """Ask a video a question in words; get the answer and a mask track for every object that it mentions."""


def main() -> None:
    """Runs a verb; what the machine refuses (full disk, no permission) is one line, not a stack trace."""
    try:
        sparrow(prog_name="sparrow")
    except OSError as error:
        sys.exit(f"sparrow: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
