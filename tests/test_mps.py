"""The daemon of MPS that a server on a GPU starts, by programs that stand in for NVIDIA's."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from export import cli, doctor, mps
from export.machine import MPS_CONTROL, MPS_PIPES, gpu_sharing
from export.mps import MpsDaemon, MpsError
from export.serve import Ports, Server, ServerError

NVIDIA_SMI = f"#!{sys.executable}\nprint('NVIDIA H200, 580.1, 143771 MiB, 9.0')\n"
CONTROL = f"""#!{sys.executable}
import json, os, sys, time
from pathlib import Path

pipes, events = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"]), Path(__file__).parent / "events"

def tell(**event):
    with events.open("a") as file:
        file.write(json.dumps(event) + "\\n")

if sys.argv[1:] == ["-f"]:
    tell(pid=os.getpid(), environment=dict(os.environ))
    (pipes / "control").touch()
    print("Starting control daemon", flush=True)
    while (pipes / "control").exists():
        time.sleep(0.02)
elif (pipes / "control").exists():
    tell(command=(command := sys.stdin.read()))
    if command == "quit\\n":
        (pipes / "control").unlink()
else:
    sys.exit("Cannot find MPS control daemon process")
"""
FAILS = f"#!{sys.executable}\nimport sys\nsys.exit('No suitable GPU.')\n"
HANGS = (
    f"#!{sys.executable}\nimport sys, time\nprint('Looking for a GPU', flush=True)\ntime.sleep(600 if sys.argv[1:] else 0)\nsys.exit(1)\n"
)


class Programs:
    """A folder that is all of the PATH, with programs of ours."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        for shell in ("bash", "sh"):  # tritonserver starts its models in one
            (folder / shell).symlink_to(shutil.which(shell))
        self.put("nvidia-smi", NVIDIA_SMI)

    def put(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    @property
    def events(self):
        """What the daemon and its commands were started with, in order."""
        path = self.folder / "events"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def started(self):
        return [event for event in self.events if "pid" in event]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A machine with a GPU; MPS comes with `put`."""
    programs = Programs(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(programs.folder))
    for name in (MPS_PIPES, "CUDA_MPS_LOG_DIRECTORY", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return programs


@pytest.fixture
def broken(tmp_path):
    """A repository that tritonserver refuses."""
    (tmp_path / "repository" / "sparrow_track").mkdir(parents=True)
    (tmp_path / "repository" / "sparrow_track" / "config.pbtxt").write_text('backend: "python"')
    return tmp_path / "repository"


def alive(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def environment_of(pid):
    return dict(entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry)


def test_daemon_has_folders_of_its_own_and_ends_with_its_context(programs, tmp_path):
    programs.put(MPS_CONTROL, CONTROL)
    with MpsDaemon(tmp_path / "mps") as daemon:
        (started,) = programs.started
        assert started["environment"].items() >= daemon.variables.items()
        assert set(daemon.variables) == {MPS_PIPES, "CUDA_MPS_LOG_DIRECTORY"}
        assert all(Path(folder).is_dir() and Path(folder).is_relative_to(tmp_path / "mps") for folder in daemon.variables.values())
        assert alive(started["pid"])
        assert daemon.last_words() == "  Starting control daemon"
    assert [event.get("command") for event in programs.events] == [None, "get_server_list\n", "quit\n"]
    assert not alive(started["pid"])


def test_daemon_that_does_not_heed_quit_is_ended(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(mps, "STOP_TIMEOUT_S", 0.1)
    programs.put(MPS_CONTROL, CONTROL.replace('while (pipes / "control").exists()', "while True"))
    with MpsDaemon(tmp_path / "mps"):
        (started,) = programs.started
    assert not alive(started["pid"])


def test_daemon_that_ends_at_once_is_reported(programs, tmp_path):
    programs.put(MPS_CONTROL, FAILS)
    expected = (
        r"nvidia-cuda-mps-control -f: got status 1, expected a daemon that answers\. It says:\n  No suitable GPU\.\n"
        r"Mend that, or start without MPS: sparrow serve --no-mps"
    )
    with pytest.raises(MpsError, match=expected):
        MpsDaemon(tmp_path / "mps").__enter__()


def test_daemon_that_never_answers_is_reported_and_ended(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(mps, "START_TIMEOUT_S", 0.5)
    programs.put(MPS_CONTROL, HANGS)
    daemon = MpsDaemon(tmp_path / "mps")
    with pytest.raises(MpsError, match=r"got no answer in 0\.5 s, .*\n  Looking for a GPU\n"):
        daemon.__enter__()
    assert daemon._process.returncode == -signal.SIGTERM


def test_program_that_cannot_run_is_reported(programs, tmp_path):
    programs.put(MPS_CONTROL, "#!/nowhere\n")
    with pytest.raises(MpsError, match=r"nvidia-cuda-mps-control: No such file or directory\. .* --no-mps"):
        MpsDaemon(tmp_path / "mps").__enter__()


def test_sockets_with_too_long_a_path_are_refused(programs, tmp_path):
    programs.put(MPS_CONTROL, CONTROL)
    with pytest.raises(MpsError, match=r"got \d+ bytes as the path of an MPS socket, expected at most 107\. Set TMPDIR to a shorter one"):
        MpsDaemon(tmp_path / ("x" * 100)).__enter__()
    assert not programs.events


@pytest.mark.parametrize("hidden", [None, "", "-1"])
def test_nothing_is_said_where_no_gpu_is_seen(programs, monkeypatch, hidden):
    programs.put(MPS_CONTROL, CONTROL)
    if hidden is None:
        (programs.folder / "nvidia-smi").unlink()
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert gpu_sharing() is None


def test_gpu_is_shared_by_mps_where_there_is_one(programs, monkeypatch, tmp_path):
    assert str(gpu_sharing()) == (
        "GPU shared by time slices (nvidia-cuda-mps-control is not on the PATH; it is a part of NVIDIA's driver): "
        "kernels of two models never run at once, and several sessions get fewer frames"
    )
    programs.put(MPS_CONTROL, CONTROL)
    assert str(gpu_sharing()) == f"GPU shared by MPS ({programs.folder / MPS_CONTROL})"
    assert gpu_sharing().starts_daemon
    assert str(gpu_sharing(mps=False)).startswith("GPU shared by time slices (--no-mps): ")
    monkeypatch.setenv(MPS_PIPES, str(tmp_path))
    assert str(gpu_sharing()).startswith(f"GPU shared by time slices (no daemon at {MPS_PIPES}={tmp_path}): ")
    (tmp_path / "control").touch()
    assert str(gpu_sharing()) == f"GPU shared by MPS (the daemon of {MPS_PIPES}={tmp_path})"
    assert not gpu_sharing().starts_daemon


def test_doctor_says_how_a_gpu_would_be_shared(programs):
    assert "\nGPU shared by time slices (nvidia-cuda-mps-control is not on the PATH" in CliRunner().invoke(doctor.doctor, []).output
    programs.put(MPS_CONTROL, CONTROL)
    assert f"\nGPU shared by MPS ({programs.folder / MPS_CONTROL})\n" in CliRunner().invoke(doctor.doctor, []).output
    (programs.folder / "nvidia-smi").unlink()
    assert "GPU shared" not in CliRunner().invoke(doctor.doctor, []).output


def test_server_that_does_not_get_ready_takes_its_daemon_with_it(programs, broken, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    programs.put(MPS_CONTROL, CONTROL)
    with pytest.raises(ServerError, match="tritonserver ended with status"):
        Server(broken, Ports(0, 0, 0)).__enter__()
    (started,) = programs.started
    assert not alive(started["pid"])
    assert not list(tmp_path.glob("sparrow-*"))


def test_server_that_waits_in_vain_says_what_mps_says(programs, broken):
    programs.put(MPS_CONTROL, CONTROL)
    with pytest.raises(ServerError, match=r"not ready after 0 s\.(.|\n)*MPS says:\n  Starting control daemon\nWithout it: sparrow serve"):
        Server(broken, Ports(0, 0, 0), ready_timeout_s=0).__enter__()


def test_server_without_a_daemon_is_not_started(programs, broken):
    programs.put(MPS_CONTROL, FAILS)
    result = CliRunner().invoke(cli.serve, ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", str(broken)])
    assert result.exit_code == 1
    assert result.output.startswith("Error: nvidia-cuda-mps-control -f: got status 1")


# With a real tritonserver ----------------------------------------------------------------------------------------------

ASK = "import json, os; print(json.dumps(dict(os.environ)))"


def serve(*arguments):
    words = [sys.executable, "-c", "from sparrow_client.cli import main; main()", "serve"]
    return [*words, "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", *map(str, arguments)]


@pytest.mark.serving
def test_server_alone_is_a_client_of_its_daemon(programs, repository, monkeypatch):
    programs.put(MPS_CONTROL, CONTROL)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with Server(repository, Ports(0, 0, 0)) as server:
        (started,) = programs.started
        environment = environment_of(server._process.pid)
        for name in (MPS_PIPES, "CUDA_MPS_LOG_DIRECTORY"):
            assert environment[name] == started["environment"][name]
            assert name not in os.environ
        # The daemon sees one of the GPUs, and the server all that the daemon sees.
        assert started["environment"]["CUDA_VISIBLE_DEVICES"] == "1"
        assert "CUDA_VISIBLE_DEVICES" not in environment
        assert alive(started["pid"])
    assert not alive(started["pid"])
    assert not Path(environment[MPS_PIPES]).exists()


@pytest.mark.serving
def test_no_mps_starts_no_daemon_and_meets_none(programs, repository, tmp_path, monkeypatch):
    programs.put(MPS_CONTROL, CONTROL)
    (tmp_path / "control").touch()
    monkeypatch.setenv(MPS_PIPES, str(tmp_path))
    with Server(repository, Ports(0, 0, 0), mps=False) as server:
        assert environment_of(server._process.pid)[MPS_PIPES] == os.devnull
    assert not programs.events


@pytest.mark.serving
def test_daemon_of_the_machine_is_used(programs, repository, tmp_path, monkeypatch):
    programs.put(MPS_CONTROL, CONTROL)
    (tmp_path / "control").touch()
    monkeypatch.setenv(MPS_PIPES, str(tmp_path))
    with Server(repository, Ports(0, 0, 0)) as server:
        assert environment_of(server._process.pid)[MPS_PIPES] == str(tmp_path)
    assert not programs.events


@pytest.mark.serving
def test_serve_says_how_the_gpu_is_shared_to_people_and_to_its_command(programs, repository):
    for control, option, by in ((None, "--mps", "time slices"), (CONTROL, "--mps", "MPS"), (CONTROL, "--no-mps", "time slices")):
        if control:
            programs.put(MPS_CONTROL, control)
        done = subprocess.run(serve(option, repository, "--", sys.executable, "-c", ASK), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        sharing, ready = done.stderr.splitlines()
        assert sharing.startswith(f"GPU shared by {by} (") and ready.startswith("Ready: ")
        environment = json.loads(done.stdout)
        assert environment["SPARROW_GPU_SHARING"] == by
        assert MPS_PIPES not in environment
    assert len(programs.started) == 1


@pytest.mark.serving
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_daemon_ends_when_serve_is_stopped(programs, repository, stop):
    programs.put(MPS_CONTROL, CONTROL)
    process = subprocess.Popen(serve("--log", os.devnull, repository), stderr=subprocess.PIPE, text=True)
    while not re.match("Ready: ", line := process.stderr.readline()):
        assert line.startswith("GPU shared by MPS")
    (started,) = programs.started
    process.send_signal(stop)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while alive(started["pid"]) and time.monotonic() < deadline:  # a killed parent waits for nobody
        time.sleep(0.1)
    assert not alive(started["pid"])
    if stop == signal.SIGKILL:
        shutil.rmtree(Path(started["environment"][MPS_PIPES]).parent.parent, ignore_errors=True)  # its server is ending still
    else:
        assert not Path(started["environment"][MPS_PIPES]).exists()
