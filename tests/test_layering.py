"""Who may import whom. A folder is one stage of the flow: ensemble says what runs, export builds it, model_repository serves it,
client calls it, benchmarks measures it, tests prove it."""

import ast
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"ensemble", "export", "client", "sparrow_client", "benchmarks", "model_repository", "tests", "training"}
RELATIVE = "."


@dataclass(frozen=True)
class Rule:
    """What the files of a folder may import.

    Args:
        advice: where the code belongs that would need more.
        ours: modules of ours, with everything below them; RELATIVE stands for the folder's own.
        third_party: packages; None: any.
        files: file name to further packages.
        late: packages that only functions import.
        early: files in which packages of `late` may be imported at the top.
    """

    advice: str
    ours: frozenset[str]
    third_party: frozenset[str] | None
    files: dict[str, frozenset[str]] = field(default_factory=dict)
    late: frozenset[str] = frozenset()
    early: dict[str, frozenset[str]] = field(default_factory=dict)


COMMAND_LINE = frozenset({"av", "click", "PIL", "pycocotools", "tqdm"})
RULES = {
    "ensemble": Rule(
        advice="ensemble says what runs and is imported by every process: what builds or loads engines goes to export/, "
        "what calls a server to client/",
        ours=frozenset({RELATIVE}),
        third_party=frozenset({"numpy", "PIL", "cv2", "sentencepiece", "pycocotools"}),
        files={"backend.py": frozenset({"triton_python_backend_utils"})},
    ),
    "export": Rule(
        advice="export builds from ensemble: what the server needs while it runs goes to ensemble/, what calls a server to "
        "client/; heavy packages are imported by the function that needs them",
        ours=frozenset({RELATIVE, "ensemble"}),
        third_party=None,
        late=frozenset({"av", "onnx", "onnxruntime", "onnxscript", "safetensors", "sentencepiece", "tensorrt", "torch", "tritonclient"}),
        early={"checkpoints.py": frozenset({"torch", "safetensors"}), "models/*.py": frozenset({"torch"})},
    ),
    "model_repository": Rule(
        advice="a model.py is an adapter: the algorithm goes to ensemble/, loading of engines to export/runners.py, "
        "what else a GPU does to export/resize.py",
        ours=frozenset({"ensemble", "export.runners", "export.resize"}),
        third_party=frozenset(),
    ),
    "client": Rule(
        advice="client is all that an application installs: what it shares with the server is generated into client/_stubs.py by "
        "export/generate.py",
        ours=frozenset({RELATIVE}),
        third_party=frozenset({"numpy", "tritonclient", "grpc"}),
        files=dict.fromkeys(
            ("cli.py", "segment.py", "track.py", "_media.py", "_overlay.py", "_results.py", "_chat_files.py"), COMMAND_LINE
        ),
    ),
    "training": Rule(
        advice="training makes checkpoints of the modules in export/models: what a server or a client needs belongs there",
        ours=frozenset({RELATIVE, "ensemble", "export", "benchmarks.evaluation.palettes"}),  # it writes what is read there
        third_party=None,
    ),
    "benchmarks": Rule(
        advice="benchmarks measures what users see through sparrow_client, and engines as servers open them: what else it wants from "
        "export belongs there",
        ours=frozenset({RELATIVE, "ensemble", "sparrow_client", "export.manifest", "export.models", "export.runners"}),
        third_party=None,
    ),
}


def imports(source: str) -> list[tuple[str, int, bool]]:
    """(module, line, only inside a function or for type checkers) of every import."""
    found = []

    def visit(node: ast.AST, late: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, child.lineno, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                # `from export import runners` names the module export.runners.
                names = [RELATIVE] if child.level else [f"{child.module}.{alias.name}" for alias in child.names]
                found.extend((name, child.lineno, late) for name in names)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for_types = isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
            visit(child, late or inside or for_types)

    visit(ast.parse(source), False)
    return found


def problems(folder: str, file: Path, source: str) -> list[str]:
    """What a file of a folder imports although it may not; `file` is relative to the folder."""
    rule = RULES[folder]
    more = {package for pattern, packages in rule.files.items() if file.match(pattern) for package in packages}
    early = {package for pattern, packages in rule.early.items() if file.match(pattern) for package in packages}
    found = []
    for module, line, late in imports(source):
        package = module.split(".")[0]
        if module == RELATIVE or package in OURS:
            allowed = any(module == ours or module.startswith(f"{ours}.") for ours in rule.ours)
        elif package in sys.stdlib_module_names or package == "__future__":
            continue
        else:
            allowed = rule.third_party is None or package in rule.third_party | more
        if not allowed or (package in rule.late - early and not late):
            found.append(f"{folder}/{file}:{line} imports {module}{'' if not allowed else ' at the top'}. Move it: {rule.advice}.")
    return found


def files(folder: str) -> list[Path]:
    return sorted(path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", RULES)
def test_folder_imports_only_what_its_stage_may(folder):
    found = [problem for file in files(folder) for problem in problems(folder, file, (ROOT / folder / file).read_text())]
    assert not found, "\n".join(["", *found])


def test_every_folder_with_code_has_a_rule():
    with_code = {path.parts[0] for path in (path.relative_to(ROOT) for path in ROOT.glob("*/**/*.py")) if path.parts[0] in OURS}
    assert with_code - {"tests"} <= set(RULES)
    assert {"ensemble", "export", "model_repository", "client"} <= with_code


@pytest.mark.parametrize(
    ("folder", "file", "source"),
    [
        ("ensemble", "pipeline.py", "import export.runners"),
        ("ensemble", "pipeline.py", "from ensemble.masks import resize"),
        ("ensemble", "pipeline.py", "def f():\n    import torch"),
        ("ensemble", "pipeline.py", "import triton_python_backend_utils as pb_utils"),
        ("ensemble", "pipeline.py", "from tests import goldens"),
        ("export", "serve.py", "from sparrow_client import SparrowClient"),
        ("export", "serve.py", "from client import SparrowClient"),
        ("export", "serve.py", "import torch"),
        ("export", "serve.py", "try:\n    import onnxruntime\nexcept ImportError:\n    pass"),
        ("export", "models/roi_align.py", "from onnxscript import opset18"),
        ("export", "checkpoints.py", "import onnx"),
        ("model_repository", "tracker/1/model.py", "from export.checkpoints import Checkpoint"),
        ("model_repository", "tracker/1/model.py", "from export import checkpoints"),
        ("model_repository", "tracker/1/model.py", "import export"),
        ("model_repository", "tracker/1/model.py", "import numpy"),
        ("client", "_client.py", "from ensemble import settings"),
        ("client", "_client.py", "from sparrow_client import _types"),
        ("client", "_client.py", "import click"),
        ("client", "segment.py", "import cv2"),
        ("client", "_track.py", "import tqdm"),
        ("benchmarks", "run.py", "from export.local import torch_pipeline"),
    ],
)
def test_rules_catch_an_import_in_the_wrong_place(folder, file, source):
    (problem,) = problems(folder, Path(file), source)
    assert problem.startswith(f"{folder}/{file}:")
    assert RULES[folder].advice in problem


@pytest.mark.parametrize(
    ("folder", "file", "source"),
    [
        ("ensemble", "backend.py", "from __future__ import annotations\nimport json\nimport triton_python_backend_utils"),
        ("ensemble", "masks.py", "from .errors import InvalidInput\nfrom pycocotools import mask"),
        (
            "export",
            "to_onnx.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import onnx",
        ),
        ("export", "models/hiera.py", "import torch.nn.functional as F\nfrom ensemble.config import HieraConfig"),
        ("model_repository", "tracker/1/model.py", "from export.runners import open_graph\nfrom ensemble.backend import Model"),
        ("client", "segment.py", "import click\nfrom ._client import SparrowClient\nimport numpy"),
        ("client", "_stream.py", "import grpc\nfrom tritonclient.grpc.service_pb2 import ModelInferRequest"),
        ("benchmarks", "run.py", "import sparrow_client, numpy\nfrom ensemble import settings"),
    ],
)
def test_rules_leave_imports_in_the_right_place_alone(folder, file, source):
    assert problems(folder, Path(file), source) == []


def test_command_line_and_client_start_without_the_heavy_packages():
    heavy = ("torch", "onnx", "onnxruntime", "onnxscript", "safetensors", "tensorrt", "transformers")
    code = f"import sys, export.cli, export.generate, sparrow_client; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"
