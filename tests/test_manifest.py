"""An export makes only what is stale, and nothing is run that is not what was exported."""

import errno
import json
import shutil

import pytest
from click.testing import CliRunner

from ensemble.components import components
from ensemble.config import TINY
from ensemble.graph import served
from export import manifest, to_repository
from export.checkpoints import Checkpoint
from export.cli import export
from export.manifest import ManifestError, check, read
from export.runners import Engine, open_graph
from export.seeded import write_seeded

TORCH = Engine("torch")
SETTINGS = {"engine_kind": "torch", "precision": "float32"}
PART = "prompt_projector"


@pytest.fixture
def root(tmp_path):
    write_seeded(tmp_path / "checkpoint", TINY, seed=0)
    return tmp_path / "checkpoint"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model" / "1").mkdir(parents=True)
    return tmp_path / "model" / "1"


def make(root, folder, engine=TORCH):
    to_repository.opened.cache_clear()
    return to_repository.export_graph(root, PART, engine, [folder])


def test_engine_that_was_made_from_the_same_stays(root, folder):
    made, anew = make(root, folder)
    written = (folder / f"{PART}.safetensors").stat().st_mtime_ns
    assert anew
    assert made.gate["prompt_embeddings"]["error"] < 1e-6  # the same module, on as many threads as are free
    assert made.size == (folder / f"{PART}.safetensors").stat().st_size
    states = components(TINY)[PART].dims["states"]
    assert made.ranges == {"states": (states.min, states.opt, states.max)}
    assert make(root, folder) == (made, False)
    assert (folder / f"{PART}.safetensors").stat().st_mtime_ns == written
    assert check(folder, PART, SETTINGS) == made


@pytest.mark.parametrize("what", ["weights", "settings", "code", "damage"])
def test_stale_engine_is_made_anew(root, folder, what, monkeypatch):
    first, _ = make(root, folder)
    engine = TORCH
    if what == "weights":
        shutil.rmtree(root)
        write_seeded(root, TINY, seed=1)
    elif what == "settings":
        engine = Engine("torch", "bfloat16")
    elif what == "code":
        monkeypatch.setattr(to_repository, "CODE", to_repository.CODE[1:])
    else:
        (folder / f"{PART}.safetensors").write_bytes(b"")
    second, anew = make(root, folder, engine)
    assert anew
    assert (second.source == first.source) == (what == "damage")
    assert check(folder, PART, {"precision": engine.precision}) == second


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / f"{PART}.json").unlink(), r"no prompt_projector\.json in "),
        (lambda folder: (folder / f"{PART}.json").write_text("{"), r"cannot be read"),
        (lambda folder: (folder / f"{PART}.json").write_text("{}"), r"cannot be read"),
        (lambda folder: (folder / f"{PART}.safetensors").unlink(), r"no prompt_projector\.safetensors in "),
        (lambda folder: (folder / f"{PART}.safetensors").write_bytes(b"x"), r"got 1 bytes, expected \d+: it was cut off"),
        (lambda folder: damage(folder / f"{PART}.safetensors"), r"its content is not what was written"),
    ],
    ids=["no manifest", "cut manifest", "other manifest", "no engine", "cut engine", "damaged engine"],
)
def test_what_was_not_exported_so_is_not_run(root, folder, spoil, message):
    make(root, folder)
    assert open_graph(SETTINGS, folder, PART, TINY)
    spoil(folder)
    with pytest.raises(ManifestError, match=f"{message}(.|\n)*sparrow export CHECKPOINT"):
        open_graph(SETTINGS, folder, PART, TINY)


def test_engine_of_other_settings_is_not_run(root, folder):
    make(root, folder, Engine("torch", "bfloat16"))
    with pytest.raises(ManifestError, match=r"got precision bfloat16 in .*, expected float32"):
        open_graph(SETTINGS, folder, PART, TINY)


def test_fingerprint_reads_blocks_throughout_and_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "BLOCK", 4)
    monkeypatch.setattr(manifest, "EVERY", 16)
    path = tmp_path / "file"
    content = bytes(range(100))
    path.write_bytes(content)
    known = manifest.fingerprint(path)
    for place in (0, 17, 35, 66, 97, 99):
        path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        assert manifest.fingerprint(path) != known
    path.write_bytes(content + b"x")
    assert manifest.fingerprint(path) != known


def test_nothing_half_written_is_left_when_the_disk_is_full(root, folder, monkeypatch):
    make(root, folder)
    (folder / f"{PART}.json").unlink()

    def full(module, path, precision):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(to_repository, "save_module", full)
    with pytest.raises(OSError, match="No space left"):
        make(root, folder)
    assert [path.name for path in folder.iterdir()] == [f"{PART}.safetensors"]
    monkeypatch.undo()
    (folder / f".{PART}-killed").mkdir()
    assert make(root, folder)[1]
    assert sorted(path.name for path in folder.iterdir()) == [f"{PART}.json", f"{PART}.safetensors"]


def test_full_disk_is_one_message(root, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "engine")

    monkeypatch.setattr(to_repository, "save_module", full)
    result = CliRunner().invoke(export, [str(root), "-o", str(tmp_path / "repository"), "--engine", "torch"])
    assert result.exit_code == 1
    assert "Error: engine: No space left on device. Engines that were finished are kept." in result.output


def test_two_exports_at_once_are_one_and_a_message(root, tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    with to_repository.locked(folder):
        result = CliRunner().invoke(export, [str(root), "-o", str(folder), "--engine", "torch"])
    assert result.exit_code == 1
    assert "another export is writing it" in result.output
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_export_says_what_it_made_and_what_it_left(root, tmp_path):
    arguments = [str(root), "-o", str(tmp_path / "repository"), "--engine", "torch"]
    first = CliRunner().invoke(export, arguments)
    assert first.exit_code == 0, first.output
    assert "as it was" not in first.output
    (tmp_path / "repository" / "frame_features" / "1" / "frame_encoder.json").unlink()
    again = CliRunner().invoke(export, arguments)
    lines = [line for line in again.stdout.splitlines() if " MB " in line]
    assert len(lines) == len(Checkpoint(root).components)
    assert [line.split()[0] for line in lines if "as it was" not in line] == ["frame_encoder"]
    written = json.loads((tmp_path / "repository" / "frame_features" / "1" / "frame_encoder.json").read_text())
    assert written["gate"].keys() == {"frame_embeddings", "high_res_1", "high_res_0"}


def test_export_makes_the_graphs_that_are_named_and_leaves_the_others(root, tmp_path):
    folder = tmp_path / "repository"

    def run(*components, precision="float32"):
        arguments = [str(root), *components, "-o", str(folder), "--engine", "torch", "--precision", precision]
        return CliRunner().invoke(export, arguments)

    def made():
        return {path.stem: read(path.parent, path.stem).precision for path in folder.glob("*/1/*.json") if path.stem in components(TINY)}

    assert run(PART, "mask_decoder").exit_code == 0
    assert made() == {PART: "float32", "mask_decoder": "float32"}
    assert len(list(folder.glob("*/config.pbtxt"))) == len(served(components(TINY)))
    assert run("mask_decoder", precision="bfloat16").exit_code == 0
    assert made() == {PART: "float32", "mask_decoder": "bfloat16"}
    refused = run("mask_encoder")
    assert refused.exit_code == 1
    assert f"Error: 'mask_encoder' is no graph of {root}, expected some of vision_encoder, image_encoder, token" in refused.output
