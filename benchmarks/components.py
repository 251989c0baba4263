"""Every graph of a repository on its own, in this process: `sparrow bench REPOSITORY`; of some, `python -m benchmarks.components`.

Figures go to the suites `component` (latency, and the share of it that the GPU's vendor's figures make unavoidable), `llm` (the decode
loop) and `gate` (what the export has measured against torch in float32).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from ensemble.components import components
from ensemble.config import ModelConfig
from ensemble.generation import Decoder
from ensemble.tensors import Arrays, Component
from export.manifest import Manifest, read
from export.runners import (
    INDUCTOR,
    QUANTIZATION_BITS,
    Engine,
    TensorGraph,
    TorchDecoder,
    TorchDevice,
    engine_file,
    load_module,
    open_decoder,
    open_graph,
    torch_device,
)

from .records import append, gate_records, machine, record

WARM_UP, REPEATS = 5, 50
BATCHES = {"frames": (1, 4), "objects": (1, 4, 8)}
"""Size to what it is measured at; the others stay at the usual ones."""
PROMPT_TOKENS, NEW_TOKENS, PREFILLS = 3400, 64, 5
ANSWERS = (1, 8)
PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
"""Word of a GPU's name to its dense bfloat16 operations and bytes per second, by its vendor."""


@click.command()
@click.argument("repository", type=click.Path(path_type=Path, exists=True))
@click.option("--graph", "only", multiple=True, help="Only this graph; repeatable. [default: all]")
@click.option("--compiled", is_flag=True, help="Graphs in torch at their least size, as torch.compile has them (reduce-overhead).")
@click.option("--quantization", type=click.Choice(list(QUANTIZATION_BITS)), default="none", help="Of the language model's layers.")
def main(repository: Path, only: Sequence[str], compiled: bool, quantization: str) -> None:
    """Measure the graphs of REPOSITORY in this process."""
    measure(repository, only, compiled, quantization)


def measure(repository: Path, only: Sequence[str] = (), compiled: bool = False, quantization: str = "none") -> None:
    """Adds the figures of a repository's graphs, as its servers would run them; arguments as of the command line."""
    config = repository_config(repository)
    folders = engine_folders(repository, config)
    for component in tqdm(only or folders, unit="graph"):
        made = read(folders[component], component)
        env = {**machine(), "engine_kinds": {component: made.engine_kind}, "preset": config.preset, "precision": made.precision}
        name, folder = engine_name(made, config), folders[component]
        if compiled:
            append(list(compiled_lines(folder, made, config, name, env)))
            continue
        if component == "language_decoder":
            parameters, suffix = {**engine(made), "quantization": quantization}, "" if quantization == "none" else f"_{quantization}"
            figures = decode_lines(open_decoder(parameters, folder, config), config, f"{name}{suffix}", env)
        else:
            figures = latency_lines(folder, made, config, name, env)
        for lines in map(list, (gate_records(made.gate, f"{name}_{component}", env), figures)):
            if lines:
                append(lines)  # at once: a run that is cut off keeps what it has measured


def repository_config(repository: Path) -> ModelConfig:
    return ModelConfig.load(repository / "tracker" / "1" / "config.json")


def engine_folders(repository: Path, config: ModelConfig) -> dict[str, Path]:
    """Component to the folder that holds its engine."""
    return {path.stem: path.parent for path in sorted(repository.glob("*/1/*.json")) if path.stem in components(config)}


def engine_name(made: Manifest, config: ModelConfig) -> str:
    """What the workloads of an engine start with."""
    return f"{config.preset}_{made.engine_kind}_{made.precision}"


def prompt_length(config: ModelConfig) -> int:
    """Tokens of the prompt that the language model is measured with."""
    return min(PROMPT_TOKENS, config.max_sequence - NEW_TOKENS - WARM_UP)


def engine(made: Manifest) -> dict[str, str]:
    """The parameters of a config.pbtxt that run an engine."""
    return {"engine_kind": made.engine_kind, "precision": made.precision}


def latency_lines(folder: Path, made: Manifest, config: ModelConfig, name: str, env: dict[str, Any]) -> Iterator[dict[str, Any]]:
    graph, contract = open_graph(engine(made), folder, made.component, config), components(config)[made.component]
    for sizes in batches(contract):
        inputs = contract.sample(0, **sizes)
        for way, call in ways(graph, inputs):
            samples = measured(call)
            workload = f"{name}{way}{label(sizes)}"
            median = float(np.median(samples))
            yield record("component", workload, f"{made.component}.latency_ms", median, "ms", samples, env)
            if floor := floor_ms(contract, config, inputs, env["gpu"]):
                yield record("component", workload, f"{made.component}.share_of_floor", floor / median, "ratio", samples, env)


def compiled_lines(folder: Path, made: Manifest, config: ModelConfig, name: str, env: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a graph's module does under torch.compile, for comparison."""
    import torch
    from torch._inductor import config as inductor

    contract, device, dtype = components(config)[made.component], torch_device(), getattr(torch, made.precision)
    sizes = batches(contract)[0]
    module = load_module(folder / engine_file(Engine(made.engine_kind, made.precision), made.component), made.component, config).to(device)
    run = torch.compile(module, mode="reduce-overhead", dynamic=False)
    tensors = [torch.from_numpy(array).to(device) for array in contract.sample(0, **sizes).values()]

    def call() -> None:
        with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            run(*tensors)

    with inductor.patch(INDUCTOR):
        samples = measured(call)
    yield record("component", f"{name}_compiled{label(sizes)}", f"{made.component}.latency_ms", np.median(samples), "ms", samples, env)


def batches(contract: Component) -> list[dict[str, int]]:
    """The sizes that a component is measured at."""
    varying = [(size, count) for size, counts in BATCHES.items() if size in contract.dims for count in counts]
    if "objects" in contract.dims:  # of one frame
        varying = [(size, count) for size, count in varying if size == "objects"]
    return [{size: count} for size, count in varying] or [{}]


def label(sizes: Mapping[str, int]) -> str:
    """What the sizes add to the name of a workload."""
    return "".join(f"_{count}_{size}" for size, count in sizes.items())


def ways(graph: Any, inputs: Arrays) -> Iterator[tuple[str, Callable[[], object]]]:
    """How a graph can be called: as served, and on a GPU also without a captured launch."""
    import torch

    if not isinstance(graph, TensorGraph) or not torch.cuda.is_available():
        yield "", lambda: graph.run(inputs)
        return
    tensors = {name: torch.from_numpy(array).cuda() for name, array in inputs.items()}
    yield "", lambda: graph.run_tensors(tensors)
    yield "_uncaptured", lambda: graph.run_tensors(tensors, captured=False)


def measured(call: Callable[[], object]) -> list[float]:
    """Milliseconds of each call, by the device's clock where there is one."""
    import torch

    for _ in range(WARM_UP):
        call()
    if not torch.cuda.is_available():
        samples = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            call()
            samples.append(1000 * (time.perf_counter() - start))
        return samples
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for start_event, stop_event in events:
        start_event.record()
        call()
        stop_event.record()
    torch.cuda.synchronize()
    return [start_event.elapsed_time(stop_event) for start_event, stop_event in events]


def floor_ms(contract: Component, config: ModelConfig, inputs: Arrays, gpu: str | None) -> float | None:
    """Milliseconds that the operations, or the bytes of weights, inputs and outputs, take at the GPU's peak; None where that is unknown."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from export.models import empty_module
    from export.models.layers import several

    peaks = next((peaks for word, peaks in PEAKS.items() if word in (gpu or "")), None)
    if peaks is None:
        return None
    module: Any = empty_module(contract.name, config).to("meta").requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outputs = several(module(*(torch.from_numpy(array).to("meta") for array in inputs.values())))
    size = sum(2 * parameter.numel() for parameter in module.parameters())
    size += sum(array.nbytes for array in inputs.values()) + sum(output.numel() * output.itemsize for output in outputs)
    return 1000 * max(float(counter.get_total_flops()) / peaks[0], float(size) / peaks[1])


def decode_lines(decoder: Decoder, config: ModelConfig, name: str, env: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Prefill of a long prompt, and tokens per second of answers that go on together; by this process's clock, results on the host."""
    length = prompt_length(config)
    drawn = np.random.default_rng(0).standard_normal((length, config.language.width)).astype(np.float32)
    prompt = TorchDevice().put(drawn) if isinstance(decoder, TorchDecoder) else drawn  # where the towers leave it
    for answers in ANSWERS:
        prefills, steps = [], []
        for slot in [0] * WARM_UP + list(range(answers)) * PREFILLS:
            start = time.perf_counter()
            decoder.prefill(slot, [prompt])
            prefills.append(1000 * (time.perf_counter() - start))
        tokens = [7] * answers
        for _ in range(WARM_UP + NEW_TOKENS):  # as answers go on, and peers: with the likeliest token
            start = time.perf_counter()
            tokens = decoder.decode(list(range(answers)), tokens).likeliest.tolist()
            steps.append(1000 * (time.perf_counter() - start))
        workload, prefills, steps = f"{name}_batch_{answers}_prompt_{length}", prefills[WARM_UP:], steps[WARM_UP:]
        yield record("llm", workload, "prefill_ms", np.median(prefills), "ms", prefills, env)
        yield record("llm", workload, "decode_ms_per_token", np.median(steps), "ms", steps, env)
        rates = [1000 * answers / step for step in steps]
        yield record("llm", workload, "tokens_per_s", np.median(rates), "1/s", rates, env)


if __name__ == "__main__":
    main()
