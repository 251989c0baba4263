import hashlib
import json
import shutil

import pytest
import torch
from click.testing import CliRunner

from export.checkpoints import SAM2, read_tensors
from export.doctor import doctor, examine
from export.models import MODULES
from tests.test_checkpoints import PLACES, TRACKING, copy_original, edit, replace_weights, sam2_file, without_selector, write_original


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original") / "working_directory"
    write_original(root)
    return root


@pytest.fixture
def damaged(original, tmp_path):
    return copy_original(original, tmp_path / "working_directory")


def states(report):
    return {name: build.state for name, build in report.components.items()}


def test_whole_checkpoint_is_servable(original):
    report = examine(original)
    assert report.servable
    assert (report.model, report.scope, report.problems) == ("reduced", "full", ())
    assert states(report) == dict.fromkeys(MODULES, "ready")
    assert report.versions == {"torch": torch.__version__, "transformers of sparrow": "4.41.0"}
    assert {name: part.path for name, part in report.parts.items()} == {name: str(original / place) for name, place in PLACES.items()}


def test_tiny_checkpoint_is_servable_and_known_by_its_preset(tiny):
    report = examine(tiny.root, hashes=False)
    assert report.servable, report.problems
    assert report.model == "tiny"


def test_files_are_identified(original):
    path = original / PLACES["internvideo"]
    (file,) = examine(original).parts["internvideo"].files
    assert (file.name, file.size_bytes) == (path.name, path.stat().st_size)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert examine(original, hashes=False).parts["internvideo"].files[0].sha256 is None
    names = [file.name for file in examine(original, hashes=False).parts["sparrow"].files]
    assert names == ["pytorch_model.bin", "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model"]


def test_values_that_change_the_answers_are_told(original):
    values = examine(original, hashes=False).values
    assert values["sparrow/config.json"]["sliding_window"] == 2047
    assert values["sparrow/config.json"]["mm_vision_select_layer"] == -2
    assert values["sparrow/config.json"]["torch_dtype"] == "absent"
    assert values["ddetr/config.json"]["num_feature_levels"] == 1
    assert values["sparrow/generation_config.json"] == {"do_sample": True, "bos_token_id": 1, "eos_token_id": [512, 513, 519]}
    assert values["sparrow/tokenizer_config.json"] == {"[SEG]": 523, "[BOX]": 524, "<|end|>": 519}
    assert values["weights"] == {
        "SAM2": "2.0 reduced",
        "roi_fusion_gamma": 0.5,
        "roi_fusion_gamma is loaded by the original": False,
    }


def test_tensors_that_nothing_reads_are_told(original):
    parts = examine(original, hashes=False).parts
    assert parts["sparrow"].unread == {"model.roi_fusion_gamma": 1, "model.vision_tower": 1}
    assert parts["clip"].unread == {"text_model.final_layer_norm": 1}


def test_encoders_are_compared_tensor_by_tensor(damaged):
    sparrow = read_tensors(damaged / PLACES["sparrow"])
    encoder = {name.removeprefix(f"{SAM2}image_encoder."): x for name, x in sparrow.items() if name.startswith(f"{SAM2}image_encoder.")}
    path = damaged / PLACES["ddetr"] / "pytorch_model.bin"
    replace_weights(path, lambda tensors: tensors | {f"vis_encoder.{name}": tensor for name, tensor in encoder.items()})
    compared = examine(damaged, hashes=False).proposer_encoder
    assert (compared.tensors, compared.different) == (len(encoder), ())

    replace_weights(path, lambda tensors: tensors | {"vis_encoder.trunk.pos_embed": tensors["vis_encoder.trunk.pos_embed"] + 1})
    assert examine(damaged, hashes=False).proposer_encoder.different == ("trunk.pos_embed",)


def test_stage_1_checkpoint_says_what_it_lacks(damaged):
    replace_weights(damaged / PLACES["sparrow"] / "pytorch_model.bin", without_selector)
    shutil.rmtree(damaged / PLACES["ddetr"])
    report = examine(damaged, hashes=False)
    assert report.servable
    assert report.scope == "unguided"
    assert {name for name, state in states(report).items() if state == "absent"} == {"proposal_detector", "proposal_selector"}
    assert report.components["proposal_selector"].reasons == ("a stage-1 checkpoint: no model.proposal_selector.* and model.roi_helper.*",)
    assert report.proposer_encoder is None


def test_sam2_file_is_known_by_its_name(original, tmp_path):
    sam2_file(original, tmp_path / "sam2_hiera_small.pt")
    report = examine(tmp_path / "sam2_hiera_small.pt")
    assert report.servable
    assert (report.model, report.scope) == ("sam2_hiera_small", "tracking")
    assert {name for name, state in states(report).items() if state == "ready"} == set(TRACKING)


def test_sam2_file_has_its_own_names(original, tmp_path):
    sam2_file(original, tmp_path / "sam2.pt", no_mem_pos_enc=torch.zeros(1, 1, 256))
    assert examine(tmp_path / "sam2.pt").parts["sam2"].unread == {"no_mem_pos_enc": 1}


def test_every_problem_is_found_at_once(damaged):
    shutil.rmtree(damaged / PLACES["clip"])
    edit(damaged / PLACES["sparrow"] / "config.json", seg_token_idx=7)
    edit(damaged / PLACES["sparrow"] / "generation_config.json", eos_token_id=None)
    tower = damaged / PLACES["internvideo"]
    content = tower.read_bytes()
    tower.unlink()
    tower.write_bytes(content[:1000])
    report = examine(damaged)
    assert not report.servable
    expected = ("seg_token_idx is 7", "eos_token_id is []", "f4.pt: cannot be read as weights", "no clip. Looked for")
    assert len(report.problems) == len(expected)
    for problem in expected:
        assert any(problem in found for found in report.problems), problem


def test_broken_components_list_their_keys(damaged):
    name = "model.visual_model.memory_encoder.out_proj.bias"
    path = damaged / PLACES["sparrow"] / "pytorch_model.bin"
    replace_weights(path, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    report = examine(damaged, hashes=False)
    assert not report.servable
    assert states(report) == dict.fromkeys(MODULES, "ready") | {"memory_encoder": "broken"}
    assert report.components["memory_encoder"].reasons == (f"missing sparrow:{name}",)


def empty(root):
    shutil.rmtree(root)
    root.mkdir()


def not_there(root):
    shutil.rmtree(root)


def text_file(root):
    shutil.rmtree(root)
    root.write_text("no weights")


def of_llama(root):
    empty(root)
    (root / "config.json").write_text(json.dumps({"model_type": "llama"}))


def config_of_nonsense(root):
    (root / PLACES["sparrow"] / "config.json").write_text(json.dumps({"model_type": "VideoGPT+", "hidden_size": [], "mm_vision_tower": 3}))


def no_json(root):
    for source in ("sparrow", "clip", "ddetr"):
        (root / PLACES[source] / "config.json").write_text("{")


def no_weights(root):
    for file in root.rglob("pytorch_model.bin"):
        file.unlink()


@pytest.mark.parametrize("damage", [empty, not_there, text_file, of_llama, config_of_nonsense, no_json, no_weights])
def test_nothing_is_too_broken_to_be_examined(damaged, damage):
    damage(damaged)
    report = examine(damaged)
    assert not report.servable
    assert report.problems
    assert set(states(report)) == set(MODULES)


def run(*arguments):
    return CliRunner().invoke(doctor, [str(argument) for argument in arguments])


def test_command_tells_people(original):
    result = run(original, "--no-hash")
    assert result.exit_code == 0
    assert f"{original}: reduced, scope full, servable" in result.output
    for line in ("  vision_encoder     ready", "    sliding_window = 2047", "    read by no component: text_model.final_layer_norm (1)"):
        assert line in result.output.splitlines()
    assert "The proposer's SAM2 encoder differs from SPARROW's in " in result.output
    assert "sha256" not in result.output


def test_command_fails_and_says_where_a_missing_part_belongs(damaged):
    shutil.rmtree(damaged / PLACES["ddetr"])
    result = run(damaged)
    assert result.exit_code == 1
    assert "  ddetr        missing" in result.output
    assert "RISys-Lab/sparrow-det-pretrain (any checkpoint of it) at checkpoints_hf/ddetr_sam2/." in result.output


def test_command_tells_machines(original):
    result = run(original, "--json")
    report = json.loads(result.output)
    assert result.exit_code == 0
    assert report["servable"] is True
    assert report["components"]["mask_decoder"] == {"state": "ready", "reasons": []}
    assert len(report["parts"]["clip"]["files"][0]["sha256"]) == 64
