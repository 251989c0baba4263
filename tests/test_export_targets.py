"""The right engines are chosen for a GPU, and where there are none the choice is clear."""

from dataclasses import replace

import click
import pytest
from click.testing import CliRunner

from export import cli, doctor, machine, targets
from export.runners import Engine
from export.targets import TargetError, find_target


@pytest.fixture
def gpu(monkeypatch):
    """Sets the name of this machine's GPU."""

    def of(*names):
        monkeypatch.setattr(targets, "gpu_names", lambda: list(names))

    return of


def test_every_target_can_be_read_and_says_what_it_gives_and_how_it_is_run():
    found = targets.targets()
    assert {"cpu", "h100", "a100", "l40s", "l4", "rtx4090", "rtx5090", "b200", "thor", "orin"} == found.keys()
    for name, target in found.items():
        assert target.about.endswith(".")
        text = (targets.FOLDER / f"{name}.toml").read_text()
        assert f"#     sparrow export CHECKPOINT -o repository --target {name}\n" in text
        assert bool(target.gpus) == (name != "cpu")
    assert found["h100"].tried
    assert not found["b200"].tried


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), "cpu"),
        (("NVIDIA H100 80GB HBM3",), "h100"),
        (("NVIDIA H200", "NVIDIA H200"), "h100"),
        (("NVIDIA A100-SXM4-40GB",), "a100"),
        (("NVIDIA L4",), "l4"),
        (("NVIDIA L40S",), "l40s"),
        (("NVIDIA GeForce RTX 4090",), "rtx4090"),
        (("NVIDIA GeForce RTX 5090",), "rtx5090"),
        (("NVIDIA B200",), "b200"),
        (("NVIDIA Thor",), "thor"),
    ],
)
def test_target_auto_is_that_of_the_gpu(gpu, names, expected):
    gpu(*names)
    assert find_target("auto").name == expected


@pytest.mark.parametrize("wanted", ["auto", "h300", "missing.toml"])
def test_where_there_is_no_target_the_choice_is_clear(gpu, wanted):
    gpu("NVIDIA TITAN V")
    with pytest.raises(TargetError, match=r"(TITAN V|h300|missing\.toml)(.|\n)*Choose one with --target: a100, b200, cpu, h100"):
        find_target(wanted)


def test_file_of_ones_own_is_a_target(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text((targets.FOLDER / "l4.toml").read_text().replace("8bit", "4bit"))
    assert find_target(str(path)).engine == Engine("torch", "bfloat16", "4bit")
    path.write_text('gpus = []\nengine_kind = "steam"\nprecision = "float32"\nquantization = "none"\ntried = ""\n')
    with pytest.raises(TargetError, match=r"mine\.toml: got engine: got engine_kind 'steam'"):
        find_target(str(path))


def test_target_may_give_graphs_kinds_of_their_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text((targets.FOLDER / "h100.toml").read_text() + '[components]\nframe_encoder = "tensorrt"\n')
    assert find_target(str(path)).engine == Engine("aoti", "bfloat16", components={"frame_encoder": "tensorrt"})
    path.write_text((targets.FOLDER / "h100.toml").read_text() + '[components]\nframe_decoder = "tensorrt"\n')
    with pytest.raises(TargetError, match=r"mine\.toml: got engine: got component 'frame_decoder', expected one of vision_encoder, "):
        find_target(str(path))


def test_options_of_the_export_stand_above_the_target(gpu):
    gpu("NVIDIA L4")
    own = find_target("l4").engine
    assert cli.choose("auto", None, None, None) == own
    assert cli.choose("auto", None, "float16", "none") == replace(own, precision="float16", quantization="none")
    assert cli.choose("auto", "onnx", None, None) == Engine("onnx")
    assert cli.choose("auto", "torch", "bfloat16", None) == Engine("torch", "bfloat16")


def test_doctor_alone_describes_the_machine(gpu, monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: [["NVIDIA L4", "550.1", "23034 MiB", "8.9"]])
    gpu("NVIDIA L4")
    monkeypatch.setitem(machine.NEEDS, "flying", (("wings", "grow some"),))
    result = CliRunner().invoke(doctor.doctor, [])
    assert result.exit_code == 0
    assert "NVIDIA L4, 23034 MiB, sm_89, driver 550.1" in result.output
    assert "onnx engines     yes  onnxruntime" in result.output
    assert "flying           no   wings is missing: grow some" in result.output
    assert "takes the target l4: L4 (sm_89, 24 GB): eager torch" in result.output
    assert "It has not been tried" in result.output
    gpu("NVIDIA TITAN V")
    assert "which no target names" in CliRunner().invoke(doctor.doctor, []).output


def test_doctor_wants_a_checkpoint_for_what_is_about_one():
    assert CliRunner().invoke(doctor.doctor, ["--json"]).exit_code == click.UsageError.exit_code
