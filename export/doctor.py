"""The verb `sparrow doctor`: what a checkpoint is, and everything that keeps it from being served."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble.config import PRESETS, ModelConfig

from .machine import describe
from .targets import AUTO, TargetError, find_target, ran_on

if TYPE_CHECKING:
    from .checkpoints import Checkpoint

BEHAVIOUR = {
    "sparrow": (
        "sliding_window",
        "rope_theta",
        "rope_scaling",
        "vocab_size",
        "bos_token_id",
        "eos_token_id",
        "seg_token_idx",
        "box_token_idx",
        "mm_projector_type",
        "image_mm_projector_type",
        "mm_vision_select_layer",
        "mm_vision_select_feature",
        "mm_use_im_start_end",
        "mm_vision_tower",
        "image_mm_vision_tower",
        "torch_dtype",
    ),
    "clip": ("hidden_act",),
    "ddetr": ("num_feature_levels", "two_stage", "two_stage_num_proposals", "with_box_refine", "sam2_cfg"),
}
"""Fields of each config.json that change what the model answers (spec 12.1, 12.4)."""

TRUNKS: dict[tuple[int, ...], str] = {(2, 6, 36, 4): "large", (2, 3, 16, 3): "base_plus", (1, 2, 11, 2): "small", (1, 2, 7, 2): "tiny"}
"""Blocks per stage of a SAM2 trunk to the name of its release."""

ABSENT = "absent"
"""Said of a field that its file does not have."""

LISTED = 10
"""Lines of one list that people see; --json has them all."""


@dataclass(frozen=True)
class File:
    """A file that is read; `sha256` is None where it was not asked for."""

    name: str
    size_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Part:
    """A part of the weights.

    Args:
        path: None where it is missing.
        files: what is read of it.
        unread: tensors that no component reads, by the beginning of their names, and how many.
    """

    path: str | None
    files: tuple[File, ...]
    unread: dict[str, int]


@dataclass(frozen=True)
class Build:
    """Whether a component can be built.

    Args:
        state: ready; absent, where a checkpoint of this scope does not have it; or broken.
        reasons: why it is not ready.
    """

    state: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two sets of weights, tensor by tensor.

    Args:
        tensors: how many names there are in either.
        different: those whose tensors differ, or that only one has.
    """

    tensors: int
    different: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What `examine` found.

    Args:
        model: full, tiny, reduced, the name of a SAM2 file, or unknown.
        scope: as `ModelConfig.scope`, or unknown.
        versions: of torch here, and of the transformers that wrote each part.
        parts: by name.
        components: by name.
        values: what changes the answers, by the file that says it.
        proposer_encoder: the proposer's SAM2 encoder against SPARROW's; None where there are not both.
        problems: what has to be mended; broken components have their own.
    """

    root: str
    model: str
    scope: str
    versions: dict[str, str]
    parts: dict[str, Part]
    components: dict[str, Build]
    values: dict[str, dict[str, Any]]
    proposer_encoder: Comparison | None
    problems: tuple[str, ...]

    @property
    def servable(self) -> bool:
        return not self.problems and all(build.state != "broken" for build in self.components.values())


def examine(root: Path | str, hashes: bool = True) -> Report:
    """Finds out everything about a checkpoint, however broken it is.

    Args:
        root: as of `Checkpoint`.
        hashes: whether to read all files for their SHA-256.
    """
    import torch

    from .checkpoints import SOURCES, Checkpoint, CheckpointError, config_problems, read_sizes

    checkpoint = Checkpoint(root, complete=False)
    problems = config_problems(checkpoint)
    for name in checkpoint.sources:
        try:
            checkpoint.tensors(name)
        except CheckpointError as error:
            problems.append(str(error))
    try:
        problems += checkpoint.missing()
    except CheckpointError as error:
        problems.append(str(error))
    config = None
    try:
        config = read_sizes(checkpoint)
    except Exception as error:  # a field may be anything, which config_problems has said already
        problems += [str(error)] if isinstance(error, CheckpointError) or not problems else []

    configs = config_files(checkpoint)
    wrote = {
        f"transformers of {name}": str(fields["transformers_version"])
        for name, fields in configs.items()
        if "transformers_version" in fields
    }
    return Report(
        root=str(root),
        model=model_name(config),
        scope=config.scope if config else "unknown",
        versions={"torch": torch.__version__, **wrote},
        parts={name: examine_part(checkpoint, name, hashes) for name in (("sam2",) if "sam2" in checkpoint.sources else SOURCES)},
        components=examine_components(checkpoint, config),
        values=examine_values(checkpoint, config, configs),
        proposer_encoder=compare_encoders(checkpoint),
        problems=tuple(dict.fromkeys(problems)),
    )


def model_name(config: ModelConfig | None) -> str:
    if config is None:
        return "unknown"
    if config.scope == "tracking":
        return config.preset
    return config.preset if config.preset in PRESETS else "reduced"


def config_files(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The fields of each part's config.json as far as it can be read, nested ones among them."""
    from .checkpoints import CheckpointError, read_json

    found = {}
    for name in (name for name in BEHAVIOUR if name in checkpoint.sources):
        try:
            fields = read_json(checkpoint.path(name) / "config.json")
        except CheckpointError:
            continue
        nested = [fields[key] for key in ("vision_config", "ddetr_cfg") if isinstance(fields.get(key), dict)]
        found[name] = {key: value for part in (*nested, fields) for key, value in part.items()}
    return found


def examine_part(checkpoint: Checkpoint, name: str, hashes: bool) -> Part:
    """What there is of a part, and what of it goes unused."""
    from .checkpoints import SAM2, CheckpointError
    from .models import MODULES, graph_class

    if name not in checkpoint.sources:
        return Part(None, (), {})
    source = "sparrow" if name == "sam2" else name
    places = tuple(place for graph in MODULES for names in graph_class(graph).keys.values() for place in names.split("|"))
    try:
        unread = [tensor for tensor in checkpoint.tensors(source) if not f"{source}:{tensor}".startswith(places)]
    except CheckpointError:
        unread = []
    groups = Counter(".".join(tensor.split(".")[: 3 if tensor.startswith(SAM2) else 2]) for tensor in unread)
    if name == "sam2":
        groups = Counter({group.removeprefix(SAM2): number for group, number in groups.items()})
    path = checkpoint.sources[name]
    return Part(str(path), tuple(examine_file(file, hashes) for file in files_of(path)), dict(groups))


def files_of(path: Path) -> Iterable[Path]:
    """The files of a part that are read, weights first."""
    from .checkpoints import CheckpointError, weight_files

    if path.is_file():
        return [path]
    try:
        weights = weight_files(path)
    except CheckpointError:
        weights = []
    named = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model")
    return [*weights, *(path / name for name in named if (path / name).is_file())]


def examine_file(path: Path, hashes: bool) -> File:
    digest = None
    if hashes:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(path.name, path.stat().st_size, digest)


def examine_components(checkpoint: Checkpoint, config: ModelConfig | None) -> dict[str, Build]:
    """Compares the keys and shapes of every component; no weight is read."""
    import torch

    from .checkpoints import CheckpointError
    from .models import MODULES, graph_class

    absent = {"unguided": "a stage-1 checkpoint: no model.proposal_selector.* and model.roi_helper.*", "tracking": "SAM2 alone"}
    found = {}
    for name in MODULES:
        if config is None:
            found[name] = Build("broken", ("the sizes are unknown",))
        elif name not in checkpoint.components:
            found[name] = Build("absent", (absent[config.scope],))
        else:
            try:
                with torch.device("meta"):
                    module = graph_class(name)(config)
                reasons = checkpoint.fit(module)[1]
            except CheckpointError as error:
                reasons = [str(error)]
            except Exception as error:  # sizes that no module can have
                reasons = [f"cannot be built ({type(error).__name__}: {error})"]
            found[name] = Build("broken" if reasons else "ready", tuple(reasons))
    return found


def examine_values(checkpoint: Checkpoint, config: ModelConfig | None, configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Everything that changes the answers and can differ between checkpoints."""
    from .checkpoints import END, CheckpointError, read_json

    values = {f"{name}/config.json": {key: fields.get(key, ABSENT) for key in BEHAVIOUR[name]} for name, fields in configs.items()}
    if "sparrow" in checkpoint.sources:
        folder = checkpoint.path("sparrow")
        try:
            generation = read_json(folder / "generation_config.json")
        except CheckpointError:
            generation = {}
        values["sparrow/generation_config.json"] = generation or {"do_sample": ABSENT, "eos_token_id": ABSENT}
        values["sparrow/tokenizer_config.json"] = {token: added_tokens(folder).get(token, ABSENT) for token in ("[SEG]", "[BOX]", END)}
    if config:
        sam2 = config.sam2
        version = "2.1" if sam2.pointer_positions or sam2.absent_embedding else "2.0"
        values["weights"] = {"SAM2": f"{version} {TRUNKS.get(sam2.hiera.stages, 'reduced')}"}
        if config.scope == "full":
            gamma = config.selector.trained_gamma
            values["weights"] |= {
                "roi_fusion_gamma": ABSENT if gamma is None else gamma,
                "roi_fusion_gamma is loaded by the original": False,
            }
    return values


def added_tokens(folder: Path) -> dict[str, int]:
    """Token to id; empty where the tokenizer cannot be read."""
    from ensemble.tokenizer import Tokenizer

    try:
        return {token.content: token.id for token in Tokenizer(folder).added.values()}
    except Exception:  # config_problems says what is wrong
        return {}


def compare_encoders(checkpoint: Checkpoint) -> Comparison | None:
    """Whether the proposer could share SPARROW's image encoder (spec 12.4)."""
    import torch

    from .checkpoints import SAM2, CheckpointError

    try:
        proposer, sparrow = (
            {name.removeprefix(prefix): tensor for name, tensor in checkpoint.tensors(source).items() if name.startswith(prefix)}
            for source, prefix in (("ddetr", "vis_encoder."), ("sparrow", f"{SAM2}image_encoder."))
        )
    except CheckpointError:
        return None
    names = sorted(proposer.keys() | sparrow.keys())
    shared = proposer.keys() & sparrow.keys()
    same = {name for name in shared if torch.equal(proposer[name].float(), sparrow[name].float())}
    return Comparison(len(names), tuple(name for name in names if name not in same))


@click.command()
@click.argument("root", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--hash/--no-hash", "hashes", default=True, help="Read all files for their SHA-256.", show_default=True)
def doctor(root: Path | None, as_json: bool, hashes: bool) -> None:
    """Say what the checkpoint ROOT is and whether it can be served; exits with 1 if not. Without ROOT, what this machine has and can do.

    ROOT is a folder in our layout, the original's working directory, or a file of SAM2.
    """
    if root is None:
        if as_json or not hashes:
            raise click.UsageError("got no ROOT, expected one: --json and --hash are about a checkpoint.")
        return describe_machine()
    report = examine(root, hashes)
    if as_json:
        click.echo(json.dumps({"servable": report.servable, **dataclasses.asdict(report)}, indent=2, default=str))
    else:
        click.echo("\n".join(lines(report)))
    sys.exit(not report.servable)


def describe_machine() -> None:
    """Prints what there is, and which target `sparrow export` would take."""
    click.echo("\n".join(describe()))
    try:
        target = find_target(AUTO)
        click.echo(f"\nsparrow export takes the target {target.name}: {target.about} {ran_on(target)}")
    except TargetError as error:
        click.echo(f"\n{error}")


def lines(report: Report) -> Iterable[str]:
    """The report as people read it."""
    yield f"{report.root}: {report.model}, scope {report.scope}, {'servable' if report.servable else 'not servable'}"
    yield "\nParts"
    for name, part in report.parts.items():
        yield f"  {name:12} {part.path or 'missing'}"
        for file in part.files:
            yield f"    {file.name:34} {file.size_bytes / 1e6:10.3f} MB  {f'sha256 {file.sha256}' if file.sha256 else ''}".rstrip()
        if part.unread:
            yield f"    read by no component: {', '.join(f'{prefix} ({number})' for prefix, number in part.unread.items())}"
    yield "\nVersions"
    yield from (f"  {name} {version}" for name, version in report.versions.items())
    yield "\nComponents"
    for name, build in report.components.items():
        reasons = shortened(build.reasons)
        one_line = f"  {reasons[0]}" if len(reasons) == 1 else ""
        yield f"  {name:18} {build.state:7}{one_line}".rstrip()
        yield from (f"    {reason}" for reason in reasons if not one_line)
    yield "\nValues"
    for place, values in report.values.items():
        yield f"  {place}"
        yield from (f"    {name} = {json.dumps(value, default=str)}" for name, value in values.items())
    if compared := report.proposer_encoder:
        different = f"differs from SPARROW's in {len(compared.different)}" if compared.different else "equals SPARROW's in all"
        yield f"\nThe proposer's SAM2 encoder {different} of {compared.tensors} tensors."
        yield from (f"  {name}" for name in shortened(compared.different))
    if report.problems:
        yield "\nProblems"
        yield from (f"  {problem}" for problem in report.problems)


def shortened(items: tuple[str, ...]) -> list[str]:
    more = [f"and {len(items) - LISTED} more"] if len(items) > LISTED else []
    return [*items[:LISTED], *more]
