"""A daemon of NVIDIA's MPS for one server: kernels of its processes run on the GPU beside each other instead of in turns (ADR 0020)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

from .machine import MPS_CONTROL, MPS_PIPES
from .processes import STOP_TIMEOUT_S, start, stop

START_TIMEOUT_S = 10
POLL_S = 0.1
LONGEST_SOCKET = "control_privileged"
"""Of the names that the daemon gives to its sockets."""
SOCKET_PATH_BYTES = 107
"""unix(7): the path of a socket has no more."""


class MpsError(Exception):
    """The daemon cannot be started; the message says what to do."""


class MpsDaemon:
    """A running control daemon that no other server meets; leaving the context ends it.

    Args:
        folder: for its sockets and logs.
    Raises:
        MpsError: on entering, when it does not come up.
    """

    def __init__(self, folder: Path) -> None:
        self._pipes, self._logs = folder / "pipe", folder / "log"
        self.variables = {MPS_PIPES: str(self._pipes), "CUDA_MPS_LOG_DIRECTORY": str(self._logs)}
        """What processes need in their environment to be its clients."""

    def __enter__(self) -> MpsDaemon:
        if (length := len(os.fsencode(self._pipes / LONGEST_SOCKET))) > SOCKET_PATH_BYTES:
            raise MpsError(
                f"{self._pipes}: got {length} bytes as the path of an MPS socket, expected at most {SOCKET_PATH_BYTES}. "
                "Set TMPDIR to a shorter one, or start without MPS: sparrow serve --no-mps"
            )
        for folder in (self._pipes, self._logs):
            folder.mkdir(parents=True)
        try:
            with (self._logs / "output.log").open("w") as output:
                # In the foreground: a daemon in the background would live on where we are killed.
                self._process = start([MPS_CONTROL, "-f"], {**os.environ, **self.variables}, output)
        except OSError as error:
            raise MpsError(f"{MPS_CONTROL}: {error.strerror}. Mend it, or start without MPS: sparrow serve --no-mps") from error
        try:
            self._wait_until_it_answers()
        except BaseException:
            stop(self._process)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tell("quit"):  # which ends its MPS server with it
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        stop(self._process)

    def last_words(self) -> str:
        """The ends of its logs, for messages."""
        ends = [line for path in sorted(self._logs.glob("*.log")) for line in path.read_text(errors="replace").splitlines()[-5:]]
        return "\n".join(f"  {line}" for line in ends) or "  (it said nothing)"

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._tell("get_server_list"):
            status = self._process.poll()
            if status is not None or time.monotonic() > deadline:
                got = f"no answer in {START_TIMEOUT_S} s" if status is None else f"status {status}"
                raise MpsError(
                    f"{MPS_CONTROL} -f: got {got}, expected a daemon that answers. It says:\n{self.last_words()}\n"
                    "Mend that, or start without MPS: sparrow serve --no-mps"
                )
            time.sleep(POLL_S)

    def _tell(self, command: str) -> bool:
        """Whether the daemon took a command."""
        try:
            done = subprocess.run(
                [MPS_CONTROL],
                input=f"{command}\n",
                env={**os.environ, **self.variables},
                capture_output=True,
                text=True,
                timeout=START_TIMEOUT_S,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0
