"""Starts the real tritonserver of the nvidia-pytriton wheel on a model repository, and stops it cleanly."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import IO

from .machine import MPS_PIPES, Sharing, gpu_sharing
from .mps import MpsDaemon
from .processes import STOP_TIMEOUT_S, start, stop

GPU_POOL_BYTES = 192 << 20
"""For tensors on their way between models on the GPU, of which those of a frame take 17 MB; what finds no room goes by way of the host."""
POLL_S = 0.1
SHARED_MEMORY = Path("/dev/shm")
"""Where models and server exchange tensors."""


class ServerError(Exception):
    """The server cannot be started; the message says what to do."""


@dataclass(frozen=True)
class Ports:
    """Where the server listens; 0 stands for any free port."""

    grpc: int = 8001
    http: int = 8000
    metrics: int = 8002

    def chosen(self) -> Ports:
        """These ports, with one that nobody uses for every 0."""
        with contextlib.ExitStack() as stack:
            ports = list(vars(self).values())
            for index in [index for index, port in enumerate(ports) if port == 0]:
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", 0))
                ports[index] = probe.getsockname()[1]
            return Ports(*ports)


class Server:
    """A running tritonserver; leaving the context stops it.

    Args:
        repository: written by `sparrow export`.
        ports: where to listen.
        log: receives the server's output; None keeps only its end, for messages.
        ready_timeout_s: how long models may take to load.
        mps: whether its processes may share a GPU by MPS.
    Raises:
        ServerError: on entering, when the server cannot be started or a model does not load.
        MpsError: on entering, when the daemon of MPS cannot be started.
    """

    def __init__(
        self, repository: Path | str, ports: Ports, log: IO[str] | None = None, ready_timeout_s: float = 300, mps: bool = True
    ) -> None:
        self.repository, self.ports, self._log, self._ready_timeout_s = Path(repository), ports.chosen(), log, ready_timeout_s
        self._mps = mps
        self.sharing: Sharing | None = None
        """How its processes share a GPU, once it has started; None without one."""
        self._daemon: MpsDaemon | None = None
        self._tail: deque[str] = deque(maxlen=400)
        self._stack = contextlib.ExitStack()
        self.stopping = Event()
        """Set by whoever wants the server to end, for instance a signal handler: `run` and the wait for its models return."""

    @property
    def url(self) -> str:
        return f"localhost:{self.ports.grpc}"

    def __enter__(self) -> Server:
        with contextlib.ExitStack() as stack:
            since = time.monotonic()
            self._start(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparrow-"))), stack)
            self._wait_until_ready()
            self.ready_s = time.monotonic() - since
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def run(self, command: Sequence[str] = ()) -> int:
        """Waits until a command has ended, or without one until the server ends.

        The command finds the server in SPARROW_SERVER, the seconds that it took to get ready in SPARROW_READY_S, and on a GPU how the
        server's processes share it in SPARROW_GPU_SHARING.

        Returns:
            The exit status of what ended; 0 where nothing did and `stopping` is set.
        """
        environment = {**os.environ, "SPARROW_SERVER": self.url, "SPARROW_READY_S": f"{self.ready_s:.2f}"}
        if self.sharing:
            environment["SPARROW_GPU_SHARING"] = self.sharing.by
        process = subprocess.Popen(command, env=environment) if command else self._process
        while process.poll() is None and not self.stopping.wait(POLL_S):
            pass
        if command and process.poll() is None:
            process.terminate()
            process.wait()
        return process.returncode or 0

    def _start(self, workspace: Path, stack: contextlib.ExitStack) -> None:
        if not (self.repository / "sparrow_track" / "config.pbtxt").exists():
            raise ServerError(f"{self.repository}: no model repository there. Write one: sparrow export CHECKPOINT -o {self.repository}")
        for name, port in vars(self.ports).items():
            check_port(name, port)
        self._shm_prefix = f"sparrow_{secrets.token_hex(4)}_"
        binary, libraries = find_tritonserver()
        check_backends(self.repository, binary)
        backends = write_backends(workspace / "backends", binary)
        command = [
            str(binary),
            f"--model-repository={self.repository}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            f"--grpc-port={self.ports.grpc}",
            f"--http-port={self.ports.http}",
            f"--metrics-port={self.ports.metrics}",
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={STOP_TIMEOUT_S // 2}",
        ]
        self.sharing = gpu_sharing(self._mps)
        if self.sharing:
            command.append(f"--cuda-memory-pool-byte-size=0:{GPU_POOL_BYTES}")
        environment = {
            "OMP_WAIT_POLICY": "passive",  # threads of torch that spin while they wait would take the cores from the other models
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
            # The stub is an isolated interpreter: it reads no PYTHONPATH, but takes the packages of the first `python3` on the path.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
        if self.sharing and self.sharing.starts_daemon:
            self._daemon = stack.enter_context(MpsDaemon(workspace / "mps"))
            environment |= self._daemon.variables
            # The daemon has numbered the GPUs that it sees anew: to choose among them once more would choose others.
            environment.pop("CUDA_VISIBLE_DEVICES", None)
        elif not self._mps:
            environment[MPS_PIPES] = os.devnull  # where nobody finds a daemon, not even that of the machine
        self._process = start(command, environment, subprocess.PIPE)
        stack.callback(self._stop)
        Thread(target=self._read_log, daemon=True).start()

    def _read_log(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._tail.append(line)
            if self._log:
                self._log.write(line)
                self._log.flush()

    def _wait_until_ready(self) -> None:
        import tritonclient.grpc as triton

        deadline = time.monotonic() + self._ready_timeout_s
        with triton.InferenceServerClient(self.url) as client:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise ServerError(f"tritonserver ended with status {self._process.returncode}.\n{self._failures()}")
                with contextlib.suppress(triton.InferenceServerException):
                    if client.is_server_ready(client_timeout=1):
                        return
                if self.stopping.wait(POLL_S):
                    raise ServerError("Stopped before the server was ready.")
        # Processes wait for an MPS server as long as the daemon tries to start one.
        mps = f"\nMPS says:\n{self._daemon.last_words()}\nWithout it: sparrow serve --no-mps" if self._daemon else ""
        raise ServerError(f"tritonserver was not ready after {self._ready_timeout_s:g} s.\n{self._failures()}{mps}")

    def _failures(self) -> str:
        """What the log says went wrong: a line per model that did not load, else its end."""
        failures = [line.split("failed to load", 1)[1].split("\\n")[0] for line in self._tail if "failed to load '" in line]
        reasons = [f"  cannot load{failure}" for failure in failures if ": " in failure]
        return "\n".join(reasons) or "".join(list(self._tail)[-20:]).rstrip()

    def _stop(self) -> None:
        """Ends the server and its model processes."""
        stop(self._process)
        for region in SHARED_MEMORY.glob(f"{self._shm_prefix}*"):  # what a server leaves that had to be killed
            region.unlink()


def check_port(name: str, port: int) -> None:
    """Raises ServerError when somebody listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError as error:
            raise ServerError(f"{name} port {port}: {error.strerror}. Stop what uses it, or choose another with --{name}-port.") from error


def find_tritonserver() -> tuple[Path, list[str]]:
    """The server's binary and the folders of the libraries that it and its Python stub need.

    Raises:
        ServerError: the wheel or libpython is missing, or NumPy is too new; says what to install.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError("tritonserver: not installed. Install it: pip install 'sparrow-serving[server]'")
    numpy = importlib.metadata.version("numpy")
    if not numpy.startswith("1."):
        raise ServerError(f"NumPy {numpy}: tritonserver's Python stub of this version reads arrays wrongly with it. Install it: 'numpy<2'")
    package = Path(spec.origin).parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    library = f"libpython{version}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}", "/usr/local/lib", "/usr/lib64"]
    python = next((folder for folder in folders if folder and (Path(folder) / library).exists()), None)
    if python is None:
        raise ServerError(f"{library}: not found in {', '.join(map(str, folders))}. Install it, e.g. apt install libpython{version}")
    return package / "tritonserver" / "bin" / "tritonserver", [str(package.parent / "nvidia_pytriton.libs"), python]


def check_backends(repository: Path, binary: Path) -> None:
    """Raises ServerError where the server lacks the backend of a model: the wheel has Python's alone."""
    if (binary.parent.parent / "backends" / "tensorrt").exists():
        return
    for path in sorted(repository.glob("*/config.pbtxt")):
        if 'platform: "tensorrt_plan"' in path.read_text():
            raise ServerError(
                f"{path.parent.name}: it is a TensorRT plan, and this tritonserver has no TensorRT backend. Run it in the container: "
                f"REPOSITORY={repository} docker compose up"
            )


def write_backends(folder: Path, binary: Path) -> Path:
    """A backend directory with the Python backend and the stub of this Python version."""
    tritonserver = binary.parent.parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = tritonserver / "python_backend_stubs" / version
    if not stubs.exists():
        known = ", ".join(sorted(path.name for path in stubs.parent.iterdir()))
        raise ServerError(f"Python {version}: tritonserver has stubs for {known} only. Use one of these.")
    shutil.copytree(tritonserver / "backends" / "python", folder / "python")
    shutil.copytree(stubs, folder / "python", dirs_exist_ok=True)
    for executable in (folder / "python" / "triton_python_backend_stub", binary):
        if not os.access(executable, os.X_OK):  # wheels do not keep the run bit
            executable.chmod(0o755)
    return folder
