"""What several test files share: the tiny checkpoint, its repository, a running server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ensemble.config import TINY
from export.checkpoints import Checkpoint
from export.seeded import write_seeded
from export.serve import Ports, Server
from export.to_repository import repository_from_checkpoint

os.environ["TRITON_INTERPRET"] = "1"  # of our kernels; read when anything imports Triton, as torch and transformers may


@pytest.fixture
def inference() -> Iterator[None]:
    """Seeded random numbers, and no gradients."""
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The seeded tiny checkpoint, read back from disk."""
    root = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_seeded(root, TINY, seed=0)
    return Checkpoint(root)


@pytest.fixture(scope="session")
def repository(tiny: Checkpoint) -> Path:
    """A complete model repository of the tiny checkpoint."""
    folder = tiny.root.parent / "repository"
    repository_from_checkpoint(tiny, folder, progress=lambda made, anew: None)
    return folder


@pytest.fixture(scope="session")
def server(repository: Path) -> Server:
    """A real tritonserver with the tiny repository."""
    with Server(repository, Ports(0, 0, 0)) as running:
        yield running
