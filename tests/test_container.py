"""`make verify-container` without a container: what the script refuses, how it compares, and all its steps with another engine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sparrow_client._results import rle

from export.serve import Ports

ROOT = Path(__file__).parent.parent
SAME, MOVED = slice(10, 30), slice(20, 40)
"""Columns of an object."""


def run(*words, **environment):
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **own, **environment})


@pytest.fixture
def image(tmp_path):
    """The environment of an image whose server has one version of TensorRT, and Python another."""

    def of(server, python):
        library = tmp_path / f"libnvinfer.so.{server}"
        library.touch()
        (tmp_path / "libnvinfer.so.10").symlink_to(library)
        (tmp_path / "ldd").write_text(
            f"#!/bin/sh\necho 'libc.so.6 => /lib/libc.so.6 (0x0)'\necho 'libnvinfer.so.10 => {tmp_path}/libnvinfer.so.10 (0x0)'\n"
        )
        (tmp_path / "ldd").chmod(0o755)
        (tmp_path / "tensorrt.py").write_text(f"__version__ = '{python}'")
        return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}

    return of


def test_the_version_that_the_server_runs_engines_in_is_its_library_s(image):
    assert run("docker/tensorrt_of_server.sh", **image("10.8.0", "10.8.0.43")).stdout == "10.8.0\n"


def test_a_server_without_tensorrt_is_refused():
    done = run("docker/tensorrt_of_server.sh", TENSORRT_BACKEND="/bin/sh")
    assert done.returncode == 1
    assert done.stderr == "/bin/sh: finds no libnvinfer.so. Take an image of tritonserver that has the TensorRT backend.\n"


@pytest.mark.parametrize("python", ["10.9.0.34", "10.80.0"])
def test_engines_of_another_version_of_tensorrt_are_not_built(image, tmp_path, python):
    done = run("docker/verify.sh", "checkpoint", "clip", tmp_path / "work", **image("10.8.0", python))
    assert done.returncode == 1
    assert done.stderr == (
        f"TensorRT {python} would build the engines, but the server runs them in 10.8.0. Install it: pip install 'tensorrt==10.8.0.*'\n"
    )
    assert not (tmp_path / "work").exists()


def answer(folder, *objects):
    """Writes an answer of `sparrow segment`: per object the columns of each frame."""
    folder.mkdir()
    frames = []
    for columns in objects:
        masks = np.zeros((len(columns), 40, 40), bool)
        for mask, columns_of_frame in zip(masks, columns, strict=True):
            mask[:, columns_of_frame] = columns_of_frame is not None
        frames.append({"frames": [{"mask": rle(mask)} for mask in masks]})
    (folder / "result.json").write_text(json.dumps({"objects": frames}))
    return folder


@pytest.mark.parametrize(
    ("ours", "theirs", "wrong"),
    [
        ([(SAME, None)], [(SAME, None)], None),
        ([(SAME, SAME)], [(SAME, MOVED)], "object 0 has other masks than in"),
        ([(SAME,), (SAME,)], [(SAME,)], "got 1 objects, expected as many as"),
        ([], [], "got 0 objects"),
        ([(None,)], [(None,)], "object 0 has other masks"),
    ],
)
def test_masks_of_an_answer_are_compared(tmp_path, ours, theirs, wrong):
    done = run("python", "docker/same_masks.py", answer(tmp_path / "ours", *ours), answer(tmp_path / "theirs", *theirs))
    assert done.returncode == bool(wrong), done.stderr
    assert (wrong or "") in done.stderr
    if wrong is None:
        assert done.stdout == "object 0: 2 frames, 25.0% of the picture, IoU 1.0000\n"


def test_all_steps_with_an_engine_that_needs_no_container(tiny, repository, tmp_path):
    shutil.copytree(repository, tmp_path / "onnx")  # the export finds its engines as they were
    ports = Ports(0, 0, 0).chosen()
    done = run(
        "docker/verify.sh", tiny.root, "docs/demo/clip.mp4", tmp_path, ENGINE="onnx", GRPC_PORT=str(ports.grpc), HTTP_PORT=str(ports.http)
    )
    assert done.returncode == 0, done.stderr
    assert "IoU 1.0000" in done.stdout and done.stdout.endswith("onnx: verified\n")
