"""Processes that do not outlive this one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO

STOP_TIMEOUT_S = 10
PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a child gets when its parent dies."""


def start(command: Sequence[str], environment: Mapping[str, str], output: IO[str] | int) -> subprocess.Popen[str]:
    """Starts a process in a session of its own: Ctrl-C reaches us alone, and `stop` its children too."""
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=end_with_parent,
    )


def end_with_parent() -> None:
    """Runs in the child: it gets SIGTERM when this process is killed, so that it is not left behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def stop(process: subprocess.Popen[str]) -> None:
    """Asks a process that `start` has started to end, then makes sure that it and its children are gone."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
