"""Torch module to an AOTInductor package: compiled for this machine, called without torch's Python."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ensemble import settings
from ensemble.components import components
from ensemble.tensors import Component

from .machine import cxx
from .runners import ALONE, INDUCTOR, PROMPT, beside
from .to_onnx import export_sizes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .models.language_model import LanguageDecoder
    from .models.layers import Graph

PROMPT_TOKENS = 1024
"""Of the prompt that the language model's layer is compiled with: kernels are chosen for sizes like it."""


def aoti_from_torch(module: Graph, component: str, path: Path, precision: str, device: str) -> None:
    """Compiles a component's code; its weights are inputs behind those of its contract.

    Args:
        module: in eval mode on the device, with its weights as they shall be kept.
        component: its name.
        path: .pt2 file to write; a second one lies beside it where 1 of a size has an engine of its own (`Graph.alone`).
        precision: of products, as eager torch has it under autocast.
        device: cpu or cuda.
    """
    import torch

    from .models.layers import GraphOfWeights

    contract, weights = components(module.config)[component], tuple(module.parameters())
    fixed_sizes: dict[Path, dict[str, int]] = {path: {}}
    if module.alone:
        fixed_sizes[beside(path, ALONE)] = {module.alone: 1}
    for package, fixed in fixed_sizes.items():
        sample = contract.sample(seed=0, **{**export_sizes(contract), **fixed})
        inputs = tuple(torch.from_numpy(array).to(device) for array in sample.values())
        sizes = (*dynamic_shapes(contract, fixed), *(None for _ in weights))
        compile_package(GraphOfWeights(module), (*inputs, *weights), (sizes,), package, precision, device)


def aoti_from_decoder(decoder: LanguageDecoder, path: Path, precision: str, device: str) -> None:
    """Compiles what stands for each of the decoder's layers, in a step of any number of answers, of one alone, and in a prompt: three
    packages; arguments as of `aoti_from_torch`.
    """
    import torch

    from .models.language_model import DecodeLayer, PromptLayer, ring_slots

    language, slots = decoder.config.language, ring_slots(decoder.config)
    size = language.width // language.heads
    layer: Any = decoder.layers[0]
    weights = tuple(layer.parameters())
    fixed = (None,) * len(weights)
    ring = torch.export.Dim("slots", min=2, max=slots)
    for count, rows, package in ((2, torch.export.Dim("sequences", max=settings.MAX_GENERATIONS), path), (1, None, beside(path, ALONE))):
        positions = torch.arange(count, device=device)[:, None] + 3
        angles = [torch.zeros(count, 1, 1, size // 2, dtype=decoder.cos.dtype, device=device) for _ in range(2)]
        caches = [torch.zeros(count, language.heads, slots, size, dtype=getattr(torch, precision), device=device) for _ in range(2)]
        inputs = (torch.zeros(count, 1, language.width, device=device), *angles, positions, decoder.visible(positions, slots), *caches)
        sizes = ({0: rows}, {0: rows}, {0: rows}, {0: rows}, {0: rows, 3: ring}, {0: rows, 2: ring}, {0: rows, 2: ring})
        compile_package(DecodeLayer(layer), (*inputs, *weights), (*sizes, fixed), package, precision, device)

    tokens = torch.export.Dim("tokens", min=2, max=decoder.config.max_sequence)
    prompt = [torch.zeros(1, PROMPT_TOKENS, language.width, device=device)]
    prompt += [torch.zeros(1, 1, PROMPT_TOKENS, size // 2, dtype=decoder.cos.dtype, device=device) for _ in range(2)]
    along = ({1: tokens}, {2: tokens}, {2: tokens})
    compile_package(
        PromptLayer(layer, language.sliding_window), (*prompt, *weights), (*along, fixed), beside(path, PROMPT), precision, device
    )


def compile_package(module: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: Any, path: Path, precision: str, device: str) -> None:
    """Traces a module under autocast and compiles what comes out."""
    import torch
    from torch._inductor import aoti_compile_and_package

    check_compiler()
    dtype = getattr(torch, precision)
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes)
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=INDUCTOR)


@cache
def check_compiler() -> None:
    """Raises ValueError where there is no C++ compiler, or one that links a C++ runtime of its own into what it makes.

    Beside torch's runtime, loading such a package ends the process.
    """
    words = cxx()
    advice = "Name another compiler: CXX=/usr/bin/g++"
    if not shutil.which(words[0]):
        raise ValueError(f"aoti: got no C++ compiler {words[0]}, expected one. Install it. {advice}")
    with TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text("#include <string>\nstd::string probe(int x) { return std::to_string(x); }\n")
        made = subprocess.run([*words, "-shared", "-fPIC", source, "-o", library], capture_output=True, text=True, check=False)
        if made.returncode:
            raise ValueError(f"aoti: {words[0]} makes no shared library. {advice}\n{made.stderr[-500:]}")
        if b"libstdc++.so" not in library.read_bytes():
            raise ValueError(
                f"aoti: {shutil.which(words[0])} has linked libstdc++ into a library, expected it to be shared with torch. {advice}"
            )


def dynamic_shapes(contract: Component, fixed: Collection[str] = ()) -> tuple[dict[int, object], ...]:
    """Of every input in order, axis to size, as `torch.export` takes them; without those that are `fixed`."""
    from torch.export import Dim as Size

    sizes = {name: Size(name, min=size.min, max=size.max) for name, size in contract.dims.items() if name not in fixed}
    return tuple({axis: sizes[name] for axis, name in axes.items() if name in sizes} for axes in contract.dynamic_axes().values())
