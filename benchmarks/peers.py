"""Others at the same work, sizes and precision, in this process: `python -m benchmarks.peers REPOSITORY`.

Figures go to the suite `peers`, under the metrics that we are measured by. Behind each comes `<metric>.ratio` where ours is known: the
latest of the same preset, precision and engine on this machine, by `sparrow bench` and `benchmarks.components`. It says how many times
faster we are.

- `uncached`: our own vision towers and language model, run for every token over everything again, as the original does (spec 11).
- `sam2`: the official video predictor. It has its frames on the device, decoded, stretched and normalised, before the clock starts;
  masks end on the host. Ours come through gRPC and Triton, and every picture is prepared on the way. `compiled` is its
  `compile_image_encoder`, with products and convolutions of torch's own libraries alone: with Triton's among the choices it was still
  being tuned after five minutes, as its `vos_optimized` was.
- `transformers`: greedy `generate`. `dynamic` is what it does by itself. `static` reuses one static cache, over which it compiles its
  steps, and attends to the whole prompt: with a sliding window every token asks for a CUDA graph of its own (transformers 5.17).

All weights are random, which takes the same time.
"""

from __future__ import annotations

import gc
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from ensemble.components import components
from ensemble.config import ModelConfig, Sam2Config
from export.manifest import Manifest, read
from export.runners import INDUCTOR, open_decoder, open_device, open_graph, torch_device

from .components import NEW_TOKENS, engine, engine_folders, engine_name, prompt_length, repository_config
from .records import append, figure, installed, latest, machine, record, suite_path
from .serving import HEIGHT, OBJECTS, TRACK_FRAMES, WARM_UP, WIDTH, first_box, moving_square, track_lines

PACKAGES = {"uncached": None, "sam2": "sam2", "transformers": "transformers"}
"""Peer to the package that it needs."""
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("uncached", {}),
    *(("sam2", {"objects": count}) for count in OBJECTS),
    ("transformers", {"cache": "dynamic", "answers": 1}),
    ("transformers", {"cache": "static", "answers": 1}),
    ("sam2", {"objects": 1, "compiled": True}),
    ("transformers", {"cache": "static", "answers": 8}),
)
"""Peer and how it is run; what compiles for minutes comes last."""
LIBRARIES = {"max_autotune_gemm_backends": "ATEN", "max_autotune_conv_backends": "ATEN"}
"""Options of torch's compiler."""
UNCACHED_WARM_UP, UNCACHED_TOKENS = 3, 5
GENERATE_WARM_UP, PASSES = 2, 3

Line = dict[str, Any]


@dataclass(frozen=True)
class Ours:
    """What the peers are compared with.

    Args:
        config: its sizes, which are the peers', too.
        folders: component to the folder of its engine.
    """

    config: ModelConfig
    folders: dict[str, Path]

    def made(self, component: str) -> Manifest:
        return read(self.folders[component], component)

    def env(self, made: Manifest) -> dict[str, Any]:
        """What the figure of a peer depends on."""
        packages = {package: installed(package) for package in PACKAGES.values() if package}
        return {**machine(), **packages, "engine_kinds": {}, "preset": self.config.preset, "precision": made.precision}


@click.command()
@click.argument("repository", type=click.Path(path_type=Path, exists=True))
@click.option("--only", type=click.Choice(list(PACKAGES)), multiple=True, help="A peer to measure; may be repeated.")
def main(repository: Path, only: tuple[str, ...]) -> None:
    """Measure peers at the sizes of REPOSITORY, and compare them with what was measured of it."""
    config = repository_config(repository)
    ours = Ours(config, engine_folders(repository, config))
    measures: dict[str, Callable[..., Iterator[Line]]] = {"uncached": uncached, "sam2": tracked, "transformers": generated}
    failed = []
    for peer, options in RUNS:
        if only and peer not in only:
            continue
        name = " ".join([peer, *(f"{option}={value}" for option, value in options.items())])
        if (package := PACKAGES[peer]) and installed(package) is None:
            click.echo(f"{name}: skipped, for {package} is not installed.", err=True)
            continue
        if "compiled" in options and torch_device() == "cpu":
            click.echo(f"{name}: skipped, for it is meant for a GPU.", err=True)
            continue
        click.echo(f"{name} ...", err=True)
        try:
            append(list(measures[peer](ours, **options)))
        except Exception:
            traceback.print_exc()
            failed.append(name)
        free()
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}. The figures of the others are kept.")


def free() -> None:
    """Takes back what a peer has left: memory, compiled code, settings."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def uncached(ours: Ours) -> Iterator[Line]:
    """Every token by the towers and the language model over the whole prompt."""
    made, towers = ours.made("language_decoder"), ours.made("vision_encoder")
    graph = open_graph(engine(towers), ours.folders["vision_encoder"], "vision_encoder", ours.config)
    decoder = open_decoder(engine(made), ours.folders["language_decoder"], ours.config)
    device = open_device(engine(towers))
    clip = {name: device.put(array) for name, array in components(ours.config)["vision_encoder"].sample(0).items()}
    length = prompt_length(ours.config)
    text = np.random.default_rng(0).standard_normal((length - ours.config.video_tokens, ours.config.language.width)).astype(np.float32)
    samples = []
    for _ in range(UNCACHED_WARM_UP + UNCACHED_TOKENS):
        start = time.perf_counter()
        visual = device.run(graph, clip)["visual_tokens"]
        outlook = decoder.prefill(0, [visual, text])
        samples.append(1000 * (time.perf_counter() - start))
        text = np.concatenate([text, decoder.embed(outlook.likeliest.tolist())])
    env = ours.env(made) | {"engine_kinds": {own.component: own.engine_kind for own in (towers, made)}}
    samples = samples[UNCACHED_WARM_UP:]
    lines = [record("peers", f"uncached_batch_1_prompt_{length}", "decode_ms_per_token", np.median(samples), "ms", samples, env)]
    yield from compared(lines, "llm", f"{engine_name(made, ours.config)}_batch_1_prompt_{length}", made)


def tracked(ours: Ours, objects: int, compiled: bool = False) -> Iterator[Line]:
    """Frames of the video and the boxes that `sparrow bench` sends, by the official predictor."""
    import torch
    from sam2.build_sam import build_sam2_video_predictor
    from torch._inductor import config as inductor

    made, sam2, device = ours.made("frame_encoder"), ours.config.sam2, torch_device()
    version = "sam2.1" if sam2.pointer_positions else "sam2"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as in the predictor's own benchmark
    predictor = build_sam2_video_predictor(
        f"configs/{version}/{version}_hiera_l.yaml",
        device=device,
        hydra_overrides_extra=[*hydra_sizes(sam2), f"++model.compile_image_encoder={compiled}"],
    )
    predictor.fill_hole_area = 0  # needs the package's CUDA extension, which its wheel may lack
    dtype, ends = getattr(torch, made.precision), []
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.inference_mode(),
        torch.autocast(device, dtype, enabled=dtype != torch.float32),
        inductor.patch({**INDUCTOR, **LIBRARIES}),
    ):
        for index, frame in enumerate(moving_square(WARM_UP + TRACK_FRAMES)):
            Image.fromarray(frame).save(Path(folder) / f"{index}.jpg")
        state = predictor.init_state(folder)
        for index in range(objects):
            predictor.add_new_points_or_box(state, 0, index, box=np.array(first_box(index), np.float32) * [WIDTH, HEIGHT, WIDTH, HEIGHT])
        for _, _, logits in predictor.propagate_in_video(state):
            (logits > 0).cpu()
            ends.append(1000 * time.perf_counter())
    workload = f"{objects}obj_{HEIGHT}x{WIDTH}"
    samples = np.diff(ends)[WARM_UP - 1 :].tolist()
    lines = track_lines("peers", f"sam2_{'compiled' if compiled else 'eager'}_{workload}", samples, ours.env(made))
    yield from compared(lines, "serving", f"track_{workload}", made, model="frame_features")


def hydra_sizes(sam2: Sam2Config) -> list[str]:
    """What turns the configuration of the large predictor into one of these sizes."""
    hiera, width, grid = sam2.hiera, sam2.width, [sam2.grid] * 2
    sizes = {
        "image_size": sam2.image_size,
        "num_maskmem": sam2.num_maps,
        "image_encoder.trunk.embed_dim": hiera.embed_dim,
        "image_encoder.trunk.num_heads": hiera.heads,
        "image_encoder.trunk.stages": list(hiera.stages),
        "image_encoder.trunk.global_att_blocks": list(hiera.global_blocks),
        "image_encoder.trunk.window_spec": list(hiera.window_sizes),
        "image_encoder.trunk.window_pos_embed_bkg_spatial_size": [hiera.position_grid] * 2,
        "image_encoder.neck.d_model": width,
        "image_encoder.neck.position_encoding.num_pos_feats": width,
        "image_encoder.neck.backbone_channel_list": list(hiera.widths[::-1]),
        "memory_attention.d_model": width,
        "memory_attention.num_layers": sam2.memory_layers,
        "memory_attention.layer.d_model": width,
        "memory_attention.layer.dim_feedforward": sam2.memory_mlp_width,
        "memory_attention.layer.self_attention.embedding_dim": width,
        "memory_attention.layer.self_attention.feat_sizes": grid,
        "memory_attention.layer.cross_attention.embedding_dim": width,
        "memory_attention.layer.cross_attention.feat_sizes": grid,
        "memory_attention.layer.cross_attention.kv_in_dim": sam2.memory_width,
        "memory_encoder.in_dim": width,
        "memory_encoder.out_dim": sam2.memory_width,
        "memory_encoder.position_encoding.num_pos_feats": sam2.memory_width,
        "memory_encoder.mask_downsampler.embed_dim": width,
        "memory_encoder.fuser.layer.dim": width,
    }
    return [f"++model.{name}={size}" for name, size in sizes.items()]


def generated(ours: Ours, cache: str, answers: int) -> Iterator[Line]:
    """Answers that go on together, by transformers; prefill by the prompt, as ours."""
    import torch
    from transformers import AutoModelForCausalLM, Phi3Config, StaticCache

    made, language, length = ours.made("language_decoder"), ours.config.language, prompt_length(ours.config)
    torch.manual_seed(0)
    with torch.device(torch_device()):
        model = AutoModelForCausalLM.from_config(
            Phi3Config(
                vocab_size=language.vocab_size,
                hidden_size=language.width,
                intermediate_size=language.mlp_width,
                num_hidden_layers=language.layers,
                num_attention_heads=language.heads,
                rms_norm_eps=language.rms_norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta},
                sliding_window=None if cache == "static" else language.sliding_window,
                bos_token_id=None,
                eos_token_id=None,  # so that answers have the length that is asked for
                pad_token_id=0,
            ),
            dtype=getattr(torch, made.precision),
        ).eval()
        prompts = torch.randint(1, language.vocab_size, (answers, length))
    kept = StaticCache(model.config, max_cache_len=length + NEW_TOKENS) if cache == "static" else None
    prefills, steps = [], []
    for _ in range(GENERATE_WARM_UP + PASSES):
        if kept is not None:
            kept.reset()
        clock = Clock()
        model.generate(prompts, do_sample=False, max_new_tokens=NEW_TOKENS, past_key_values=kept, streamer=clock)
        prefill, *others = np.diff(clock.ticks).tolist()
        prefills.append(prefill / answers)
        steps += others
    prefills, steps = prefills[GENERATE_WARM_UP:], steps[-PASSES * (NEW_TOKENS - 1) :]
    figures = {
        ("prefill_ms", "ms"): prefills,
        ("decode_ms_per_token", "ms"): steps,
        ("tokens_per_s", "1/s"): [1000 * answers / step for step in steps],
    }
    workload, env = f"batch_{answers}_prompt_{length}", ours.env(made)
    lines = [
        record("peers", f"transformers_{cache}_{workload}", metric, np.median(samples), unit, samples, env)
        for (metric, unit), samples in figures.items()
    ]
    yield from compared(lines, "llm", f"{engine_name(made, ours.config)}_{workload}", made)


class Clock:
    """A streamer of `generate`: the milliseconds at which the prompt and then every token came to the host."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, tokens: object) -> None:
        self.ticks.append(1000 * time.perf_counter())

    def end(self) -> None:
        """There is nothing to be ended."""


def compared(lines: Iterable[Line], suite: str, workload: str, made: Manifest, model: str | None = None) -> Iterator[Line]:
    """Figures of a peer, each followed by how many times faster ours of `suite` is.

    Args:
        workload: of ours.
        made: the engine whose figures count as ours.
        model: of a server, which runs the engine; in this process it runs by itself.
    """
    for line in lines:
        yield line
        env, metric = line["env"], line["metric"]
        path = suite_path(suite, env["gpu"])
        own = latest(path).get((workload, metric)) if path.exists() else None
        if own is None or not comparable(own["env"], env, made, model or made.component):
            click.echo(f"{line['workload']} {metric}: no ratio, for {path} has no {workload} of this engine.", err=True)
            continue
        faster = line["value"] / own["value"] if line["unit"] == "ms" else own["value"] / line["value"]
        env = env | {"ours": {"suite": suite, "workload": workload, "git": own["env"]["git"], "date": own["env"]["date"]}}
        yield figure("peers", line["workload"], f"{metric}.ratio", faster, "ratio", line["n"], None, env)


def comparable(own: dict[str, Any], env: dict[str, Any], made: Manifest, runs: str) -> bool:
    """Whether a figure of ours is of the peer's sizes and precision, and of the engine, which it lists as that of what `runs`."""
    found = own["preset"], own["precision"], own["engine_kinds"].get(runs)
    return found == (env["preset"], env["precision"], made.engine_kind)


if __name__ == "__main__":
    main()
