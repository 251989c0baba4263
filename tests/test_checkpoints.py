import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ensemble.config import (
    TINY,
    ContextTowerConfig,
    HieraConfig,
    LanguageConfig,
    ModelConfig,
    ProposerConfig,
    Sam2Config,
    SelectorConfig,
    VideoTowerConfig,
)
from export.checkpoints import HIERA, SOURCES, Checkpoint, CheckpointError, hiera_config, random_states, read_tensors
from export.models import MODULES, graph_class
from export.seeded import write_seeded, write_tokenizer
from tests import goldens

PREFIX = "model.visual_model.memory_encoder."
"""Where the component that these tests damage has its weights."""


@pytest.fixture
def copy(tiny, tmp_path):
    """A checkpoint folder that may be damaged."""
    shutil.copytree(tiny.root, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def change(root, **changes):
    """Replaces tensors of the memory encoder; None removes one."""
    path = root / SOURCES["sparrow"] / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors |= {PREFIX + name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def states_equal(one, other):
    assert list(one) == list(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_tiny_checkpoint_is_read_back_with_its_sizes(tiny):
    assert tiny.config == TINY


@pytest.mark.parametrize("component", MODULES)
def test_tiny_checkpoint_fits_every_component(tiny, component):
    module = tiny.build(component)
    assert not module.training
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
        assert torch.equal(tensor, tensor.half().float()), name  # stored as float16, as the original's are


def test_tiny_checkpoint_is_the_same_for_the_same_seed_only(tiny, tmp_path):
    write_seeded(tmp_path / "again", TINY, seed=0)
    write_seeded(tmp_path / "other", TINY, seed=1)
    again, other = Checkpoint(tmp_path / "again"), Checkpoint(tmp_path / "other")
    for source in SOURCES:
        assert states_equal(tiny.tensors(source), again.tensors(source))
        assert not states_equal(tiny.tensors(source), other.tensors(source))
    for name in ("tokenizer.model", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (tiny.path("sparrow") / name).read_bytes() == (again.path("sparrow") / name).read_bytes()


def test_every_missing_unexpected_and_misshapen_key_is_listed(copy):
    change(
        copy,
        fuser__layers__0__weight=None,
        out_proj__bias=None,
        pix_feat_proj__bias=torch.zeros(3),
        out_proj__weight=torch.zeros(1, 2),
        fuser__layers__7__weight=torch.zeros(1),
    )
    with pytest.raises(CheckpointError) as refused:
        Checkpoint(copy).build("memory_encoder")
    first, *listed = str(refused.value).splitlines()
    assert first == f"{copy}: MemoryEncoder does not fit:"
    width, memory = TINY.sam2.width, TINY.sam2.memory_width
    expected = {
        f"missing sparrow:{PREFIX}fuser.layers.0.weight",
        f"missing sparrow:{PREFIX}out_proj.bias",
        f"sparrow:{PREFIX}pix_feat_proj.bias: got [3], expected [{width}]",
        f"sparrow:{PREFIX}out_proj.weight: got [1, 2], expected [{memory}, {width}, 1, 1]",
        f"unexpected sparrow:{PREFIX}fuser.layers.7.weight",
    }
    assert sorted(line.strip() for line in listed) == sorted(expected)


def test_other_components_are_not_hurt_by_a_damaged_one(copy):
    change(copy, out_proj__bias=None)
    Checkpoint(copy).build("mask_decoder")


def test_keys_that_a_component_never_reads_are_no_surprise(tiny):
    # frame_encoder reads it; it lies below the prefix of mask_decoder.
    assert "model.visual_model.sam_mask_decoder.conv_s0.weight" in tiny.tensors("sparrow")
    assert not any("conv_s0" in name for name in tiny.build("mask_decoder").state_dict())


def rewrite(folder, write):
    """Stores the weights of a folder in another way."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    write(tensors, folder)


def halves(tensors):
    names = sorted(tensors)
    return ({name: tensors[name] for name in part} for part in (names[::2], names[1::2]))


def shards(tensors, folder, stem, suffix, save):
    """Two shards and their index."""
    names = {}
    for index, part in enumerate(halves(tensors), 1):
        file = folder / f"{stem}-{index:05d}-of-00002{suffix}"
        save(part, file)
        names |= dict.fromkeys(part, file.name)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def bin_shards(tensors, folder):
    shards(tensors, folder, "pytorch_model", ".bin", torch.save)


def safetensors_shards(tensors, folder):
    shards(tensors, folder, "model", ".safetensors", save_file)


def bin_shards_without_index(tensors, folder):
    bin_shards(tensors, folder)
    (folder / "pytorch_model.bin.index.json").unlink()


def safetensors_shards_without_index(tensors, folder):
    safetensors_shards(tensors, folder)
    (folder / "model.safetensors.index.json").unlink()


def one_bin(tensors, folder):
    torch.save(tensors, folder / "pytorch_model.bin")


def safetensors_and_other_bin(tensors, folder):
    save_file(tensors, folder / "model.safetensors")
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, folder / "pytorch_model.bin")


WAYS = [bin_shards, safetensors_shards, bin_shards_without_index, safetensors_shards_without_index, one_bin, safetensors_and_other_bin]


@pytest.mark.parametrize("write", WAYS)
def test_weights_are_the_same_however_they_are_stored(copy, tiny, write):
    rewrite(copy / SOURCES["sparrow"], write)
    assert states_equal(Checkpoint(copy).build("memory_encoder").state_dict(), tiny.build("memory_encoder").state_dict())


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state}, lambda state: {"module": state, "epoch": 3}])
def test_tower_may_be_wrapped(tmp_path, wrap):
    state = {"vision_encoder.cls_token": torch.arange(3.0)}
    torch.save(wrap(state), tmp_path / "tower.pt")
    read = read_tensors(tmp_path / "tower.pt")
    assert list(read) == list(state)
    assert torch.equal(read["vision_encoder.cls_token"], torch.arange(3.0))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tower.pt"])
@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"version https://git-lfs.github.com/spec/v1\n"])
def test_file_that_holds_no_weights_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    path = tmp_path / name if name == "tower.pt" else tmp_path
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read as weights \(.+\)\. (Copy it again|Use the original file)"):
        read_tensors(path)


def test_file_without_tensors_is_named(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "tower.pt")
    with pytest.raises(CheckpointError, match=r"tower.pt: cannot be read as weights \(no tensors by name\). Use the original file."):
        read_tensors(tmp_path / "tower.pt")


def test_shard_that_is_cut_off_is_named(copy):
    rewrite(copy / SOURCES["sparrow"], bin_shards)
    path = copy / SOURCES["sparrow"] / "pytorch_model-00002-of-00002.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        CheckpointError, match=r"sparrow-finetune/pytorch_model-00002-of-00002.bin: cannot be read as weights \(.+\). Copy it"
    ):
        Checkpoint(copy).tensors("sparrow")


@pytest.mark.parametrize(
    ("write", "shard", "message"),
    [
        (bin_shards, "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json: weight_map names {shard}, not there. Copy it"),
        (safetensors_shards, "model-00001-of-00002.safetensors", "model.safetensors.index.json: weight_map names {shard}, not there."),
        (bin_shards_without_index, "pytorch_model-00001-of-00002.bin", "finetune: got 1 of 2 shards of pytorch_model.bin. Copy the others"),
    ],
)
def test_shard_that_is_absent_is_named(copy, write, shard, message):
    rewrite(copy / SOURCES["sparrow"], write)
    (copy / SOURCES["sparrow"] / shard).unlink()
    with pytest.raises(CheckpointError, match=message.format(shard=shard)):
        Checkpoint(copy).tensors("sparrow")


def test_file_that_is_cut_off_is_named(copy):
    path = copy / SOURCES["sparrow"] / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"sparrow-finetune/model.safetensors: cannot be read as weights"):
        Checkpoint(copy).build("memory_encoder")


@pytest.mark.parametrize("weight_map", [None, [], {"weight": 3}])
def test_index_that_names_no_files_is_refused(copy, weight_map):
    rewrite(copy / SOURCES["sparrow"], bin_shards)
    (copy / SOURCES["sparrow"] / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.index.json: weight_map is no object of tensor names and files"):
        Checkpoint(copy).tensors("sparrow")


def test_code_in_a_weight_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"weight": Evil()}, tmp_path / "tower.pt")
    message = r"tower.pt: cannot be read as weights \(it asks for io.open, which is code and no tensor, so it was not opened\)"
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path / "tower.pt")
    assert not (tmp_path / "harm").exists()


def test_folder_without_weights_is_named(copy):
    (copy / SOURCES["ddetr"] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"ddetr_sam2: no model\*.safetensors and no pytorch_model\*.bin. Copy the weights there"):
        Checkpoint(copy).build("proposal_detector")


def test_every_missing_part_of_a_checkpoint_is_named_with_its_place_in_the_original(copy):
    for source in ("clip", "internvideo"):
        shutil.rmtree((copy / SOURCES[source]).parent)
    with pytest.raises(CheckpointError) as refused:
        Checkpoint(copy)
    clip, internvideo = str(refused.value).splitlines()
    assert clip == (
        f"{copy}: no clip. Looked for openai/clip-vit-large-patch14-336 and where image_mm_vision_tower in config.json of sparrow says. "
        "The original's README leaves it to transformers' download: put https://huggingface.co/openai/clip-vit-large-patch14-336 at "
        "openai/clip-vit-large-patch14-336/."
    )
    assert internvideo == (
        f"{copy}: no internvideo. Looked for InternVideo2/InternVideo2-stage2_1b-224p-f4.pt, "
        "OpenGVLab/InternVideo2-Stage2_1B-224p-f4/InternVideo2-stage2_1b-224p-f4.pt and where mm_vision_tower in config.json of sparrow "
        "says. The original's README puts https://huggingface.co/OpenGVLab/InternVideo2-Stage2_1B-224p-f4 at "
        "OpenGVLab/InternVideo2-Stage2_1B-224p-f4/."
    )


def test_root_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}/none: no such file or folder."):
        Checkpoint(tmp_path / "none")


def test_folder_of_another_model_is_no_root(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 4096}))
    with pytest.raises(CheckpointError, match=f"{tmp_path}/config.json: model_type is 'llama', but ROOT should be the folder that holds"):
        Checkpoint(tmp_path)


def test_unknown_component_is_refused_with_the_list_of_components(tiny):
    with pytest.raises(KeyError, match=r"tracker: no such graph, expected one of vision_encoder, .*, memory_encoder"):
        tiny.build("tracker")


def trunk(width, blocks):
    return {"trunk.pos_embed": torch.zeros(1, width, 7, 7)} | {
        f"trunk.blocks.{index}.norm.weight": torch.zeros(1) for index in range(blocks)
    }


@pytest.mark.parametrize(
    ("width", "blocks", "heads", "global_blocks"),
    [(144, 48, 2, (23, 33, 43)), (112, 24, 2, (12, 16, 20)), (96, 16, 1, (7, 10, 13))],
)
def test_trunk_is_known_by_its_width_and_depth(width, blocks, heads, global_blocks):
    config = hiera_config(Path("sam2.pt"), trunk(width, blocks), "trunk.")
    assert (config.embed_dim, sum(config.stages), config.heads, config.global_blocks) == (width, blocks, heads, global_blocks)


def test_unknown_trunk_is_refused_with_the_list_of_trunks():
    with pytest.raises(
        CheckpointError, match=r"sam2.pt: trunk. is a trunk of \(width, blocks\) \(17, 3\), expected one of \[\(144, 48\), "
    ):
        hiera_config(Path("sam2.pt"), trunk(17, 3), "trunk.")


has_pack_a = pytest.mark.skipif("a" not in goldens.PACKS, reason=f"no golden pack a in {goldens.ROOT}; name its folder in SPARROW_GOLDENS")


@has_pack_a
def test_sizes_of_an_original_checkpoint_are_read_from_its_files_and_weights():
    hiera = HieraConfig(embed_dim=16, heads=1, stages=(1, 2, 4, 2), global_blocks=(4, 6))
    # As the README of the golden packs lists them; mlp_width of the CLIP tower is from its config.json.
    assert goldens.checkpoint("a").config == ModelConfig(
        preset="ckpt",
        context=ContextTowerConfig(width=64, layers=4, heads=4, mlp_width=160),
        video=VideoTowerConfig(width=64, blocks=4, heads=4, mlp_width=279),
        language=LanguageConfig(
            vocab_size=573,
            width=128,
            layers=3,
            heads=4,
            mlp_width=256,
            seg_token_id=571,
            box_token_id=572,
            eos_token_ids=(560, 561, 567),
        ),
        sam2=Sam2Config(hiera=hiera, memory_layers=2, memory_mlp_width=256),
        proposer=ProposerConfig(hiera=hiera, layers=2, mlp_width=256, queries=120),
        selector=SelectorConfig(trained_gamma=0.75),
    )


@has_pack_a
@pytest.mark.parametrize("component", MODULES)
def test_original_checkpoint_fits_every_component(component):
    module = goldens.checkpoint("a").build(component)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_modules_of_another_size_are_refused(tiny):
    other = replace(TINY, sam2=replace(TINY.sam2, memory_width=32))
    with pytest.raises(CheckpointError, match=r"out_proj.weight: got \[16, 64, 1, 1\], expected \[32, 64, 1, 1\]"):
        tiny.load(graph_class("memory_encoder")(other))


REDUCED = ModelConfig(
    preset="working_directory",
    context=TINY.context,
    video=VideoTowerConfig(width=64, blocks=2, heads=4, mlp_width=32),
    language=replace(TINY.language, sliding_window=2047),
    sam2=Sam2Config(hiera=HIERA[16, 9], decoder_mlp_width=64, memory_layers=1, memory_mlp_width=64),
    proposer=ProposerConfig(hiera=HIERA[16, 9], layers=1, mlp_width=64, queries=20),
    selector=SelectorConfig(trained_gamma=0.5),
)
"""The original at the smallest sizes: what it fixes in code is at full size."""

PLACES = {
    "sparrow": "checkpoints/sparrow-finetune",
    "clip": "openai/clip-vit-large-patch14-336",
    "internvideo": "OpenGVLab/InternVideo2-Stage2_1B-224p-f4/InternVideo2-stage2_1b-224p-f4.pt",
    "ddetr": "checkpoints_hf/ddetr_sam2",
}
"""The layout in the original's README."""

FIELDS = {
    "sparrow": {
        "model_type": "VideoGPT+",
        "mm_vision_tower": PLACES["internvideo"],
        "image_mm_vision_tower": PLACES["clip"],
        "mm_projector_type": "mlp2x_gelu",
        "image_mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "vocab_size": REDUCED.language.vocab_size,
        "hidden_size": REDUCED.language.width,
        "num_hidden_layers": REDUCED.language.layers,
        "num_attention_heads": REDUCED.language.heads,
        "num_key_value_heads": REDUCED.language.heads,
        "intermediate_size": REDUCED.language.mlp_width,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "sliding_window": 2047,
        "seg_token_idx": REDUCED.language.seg_token_id,
        "box_token_idx": REDUCED.language.box_token_id,
        "bos_token_id": 1,
        "eos_token_id": 512,
        "transformers_version": "4.41.0",
    },
    "clip": {
        "model_type": "clip",
        "vision_config": {
            "image_size": REDUCED.context.image_size,
            "patch_size": REDUCED.context.patch_size,
            "hidden_size": REDUCED.context.width,
            "num_hidden_layers": REDUCED.context.layers,
            "num_attention_heads": REDUCED.context.heads,
            "intermediate_size": REDUCED.context.mlp_width,
            "hidden_act": "quick_gelu",
        },
    },
    "ddetr": {
        "model_type": "ddetr_sam2",
        "ddetr_cfg": {
            "d_model": 256,
            "encoder_layers": 1,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 64,
            "encoder_n_points": 4,
            "two_stage_num_proposals": 20,
            "num_feature_levels": 1,
            "two_stage": True,
            "with_box_refine": True,
        },
    },
}
GENERATION = {"do_sample": True, "bos_token_id": 1, "eos_token_id": [512, 513, 519]}


def write_original(root):
    """A working directory of the original, as its README and exporters leave it."""
    states = random_states(REDUCED, seed=0)
    states["sparrow"]["model.roi_fusion_gamma"] = torch.tensor(0.5)
    states["sparrow"]["model.vision_tower.vision_encoder.cls_token"] = torch.zeros(3)
    tower = states["internvideo"]  # of which random_states leaves out the last block, since it does not run
    tower |= {name.replace("blocks.0.", "blocks.1."): tensor for name, tensor in tower.items() if "blocks.0." in name}
    states["clip"]["text_model.final_layer_norm.weight"] = torch.zeros(3)
    for source, tensors in states.items():
        path = root / PLACES[source]
        path.parent.mkdir(parents=True, exist_ok=True)
        halves = {name: tensor.half() for name, tensor in tensors.items()}
        if source == "internvideo":
            torch.save({"module": halves}, path)
            continue
        path.mkdir()
        torch.save(halves, path / "pytorch_model.bin")
        (path / "config.json").write_text(json.dumps(FIELDS[source]))
    write_tokenizer(root / PLACES["sparrow"])
    (root / PLACES["sparrow"] / "generation_config.json").write_text(json.dumps(GENERATION))


def copy_original(original, root):
    """A copy that may be damaged: its weights are links, to be replaced and not written to."""
    weights = {".bin", ".pt"}
    shutil.copytree(original, root, copy_function=lambda a, b: os.link(a, b) if Path(a).suffix in weights else shutil.copyfile(a, b))
    return root


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original") / "working_directory"
    write_original(root)
    return root


@pytest.fixture
def damaged(original, tmp_path):
    return copy_original(original, tmp_path / "working_directory")


def edit(path, **changes):
    """Changes fields of a JSON file; None removes one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def replace_weights(path, change):
    """Stores `change(tensors)` instead of the tensors of a file."""
    tensors = change(read_tensors(path))
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    path.unlink()
    torch.save(saved, path)


def without_selector(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(("model.proposal_selector.", "model.roi_helper."))}


def test_working_directory_of_the_original_is_read(original):
    checkpoint = Checkpoint(original)
    assert checkpoint.config == REDUCED
    assert {source: str(path.relative_to(original)) for source, path in checkpoint.sources.items()} == PLACES
    assert checkpoint.components == tuple(MODULES)
    for component in MODULES:
        checkpoint.build(component)


def test_towers_are_where_the_config_says(damaged):
    other = damaged / "towers" / "InternVideo2.pt"
    other.parent.mkdir()
    (damaged / PLACES["internvideo"]).rename(other)
    edit(damaged / PLACES["sparrow"] / "config.json", mm_vision_tower="towers/InternVideo2.pt")
    assert Checkpoint(damaged).path("internvideo") == other


@pytest.mark.parametrize("tower", ["", 3, "elsewhere", "OpenGVLab/InternVideo2-Stage2_1B-224p-f4"])
def test_towers_are_found_where_the_config_does_not_help(damaged, tower):
    edit(damaged / PLACES["sparrow"] / "config.json", mm_vision_tower=tower, image_mm_vision_tower=tower if tower == "" else PLACES["clip"])
    checkpoint = Checkpoint(damaged)
    assert [checkpoint.path(source) for source in ("internvideo", "clip")] == [
        damaged / PLACES[source] for source in ("internvideo", "clip")
    ]


def test_stage_1_checkpoint_does_without_selector_and_proposer(damaged):
    replace_weights(damaged / PLACES["sparrow"] / "pytorch_model.bin", without_selector)
    shutil.rmtree(damaged / PLACES["ddetr"])
    checkpoint = Checkpoint(damaged)
    assert checkpoint.config.scope == "unguided"
    assert set(MODULES) - set(checkpoint.components) == {"proposal_selector", "proposal_detector"}
    for component in checkpoint.components:
        checkpoint.build(component)
    with pytest.raises(CheckpointError, match=r"directory: holds no weights for proposal_selector, only for vision_encoder, .*, memory_en"):
        checkpoint.build("proposal_selector")


def test_proposer_is_missed_where_there_is_a_selector(damaged):
    shutil.rmtree(damaged / PLACES["ddetr"])
    message = (
        r"no ddetr. Looked for ddetr_sam2, checkpoints_hf/ddetr_sam2. .*/RISys-Lab/sparrow-det-pretrain .* at checkpoints_hf/ddetr_sam2/"
    )
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(damaged)


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        (
            "sparrow",
            {"model_type": "llama"},
            r"model_type is 'llama', expected 'VideoGPT\+': another model's folder. The original's README puts",
        ),
        ("clip", {"model_type": "siglip"}, r"model_type is 'siglip', expected 'clip' or 'clip_vision_model': another model's folder"),
        ("ddetr", {"model_type": "detr"}, r"model_type is 'detr', expected 'ddetr_sam2'"),
        ("sparrow", {"hidden_size": 128}, r"hidden_size is 128, the weights have 64\."),
        ("sparrow", {"vocab_size": 600}, r"vocab_size is 600, the weights have 525\."),
        ("sparrow", {"num_hidden_layers": 32}, r"num_hidden_layers is 32, the weights have 2\."),
        ("sparrow", {"intermediate_size": 1}, r"intermediate_size is 1, the weights have 128\."),
        ("sparrow", {"rope_theta": None}, r"no field rope_theta, expected int \| float\. Copy the file from the release\."),
        ("sparrow", {"hidden_size": "64"}, r"hidden_size is '64', expected int\."),
        ("sparrow", {"seg_token_idx": 7}, r"seg_token_idx is 7, the tokenizer's \[SEG\] is 523\."),
        ("sparrow", {"box_token_idx": 523}, r"box_token_idx is 523, the tokenizer's \[BOX\] is 524\."),
        ("sparrow", {"mm_projector_type": "linear"}, r"mm_projector_type is 'linear', expected 'mlp2x_gelu': no other is implemented\."),
        ("sparrow", {"mm_vision_select_layer": -1}, r"mm_vision_select_layer is -1, expected -2"),
        ("sparrow", {"mm_use_im_start_end": True}, r"mm_use_im_start_end is True, expected False"),
        ("sparrow", {"num_key_value_heads": 1}, r"num_key_value_heads is 1, expected 4 as num_attention_heads"),
        ("ddetr", {"ddetr_cfg": {"num_feature_levels": 4}}, r"num_feature_levels is 4, expected 1"),
    ],
)
def test_wrong_field_is_named_with_its_file(damaged, place, changes, message):
    edit(damaged / PLACES[place] / "config.json", **changes)
    with pytest.raises(CheckpointError, match=rf"(?m)^{damaged}/{PLACES[place]}/config\.json: {message}"):
        Checkpoint(damaged).config  # noqa: B018 (the property reads)


def test_all_wrong_fields_are_listed(damaged):
    edit(damaged / PLACES["sparrow"] / "config.json", hidden_size=65, sliding_window="all", rms_norm_eps=None)
    edit(damaged / PLACES["clip"] / "config.json", vision_config={"hidden_act": "gelu"})
    with pytest.raises(CheckpointError) as refused:
        Checkpoint(damaged).config  # noqa: B018
    for message in ("hidden_size is 65", "sliding_window is 'all', expected int | None", "no field rms_norm_eps", "hidden_act is 'gelu'"):
        assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 3 + 1 + 6


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is not JSON"), ("{'a': 1}", "is not JSON"), ("[]", "got list, expected a JSON object"), ("\xff", "is not JSON")],
)
def test_config_that_is_not_json_is_named(damaged, content, message):
    (damaged / PLACES["sparrow"] / "config.json").write_text(content, encoding="latin1")
    with pytest.raises(CheckpointError, match=rf"checkpoints/sparrow-finetune/config.json: {message}.*Copy it again"):
        Checkpoint(damaged).config  # noqa: B018


def test_config_that_is_missing_is_named(damaged):
    (damaged / PLACES["ddetr"] / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"ddetr_sam2/config.json: not there. Copy it from the release."):
        Checkpoint(damaged).config  # noqa: B018


@pytest.mark.parametrize("token", ["[SEG]", "[BOX]"])
def test_tokenizer_without_prompt_token_is_refused(damaged, token):
    path = damaged / PLACES["sparrow"] / "tokenizer_config.json"
    added = json.loads(path.read_text())["added_tokens_decoder"]
    edit(path, added_tokens_decoder={id: entry for id, entry in added.items() if entry["content"] != token})
    message = rf"tokenizer_config.json: added_tokens_decoder has no \{token}, and its embedding would be random"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(damaged).config  # noqa: B018


def test_tokenizer_that_is_missing_or_broken_is_named(damaged):
    folder = damaged / PLACES["sparrow"]
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"sparrow-finetune/tokenizer_config.json: cannot be read as a tokenizer \(KeyError: .*\)"):
        Checkpoint(damaged).config  # noqa: B018
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"sparrow-finetune: no tokenizer.model. Copy the tokenizer files"):
        Checkpoint(damaged).config  # noqa: B018


def test_answers_that_would_not_end_are_refused(damaged):
    path = damaged / PLACES["sparrow"] / "generation_config.json"
    edit(path, eos_token_id=512)
    with pytest.raises(
        CheckpointError, match=r"generation_config.json: eos_token_id is \[512\], expected <\|end\|> = 519 among them: answers"
    ):
        Checkpoint(damaged).config  # noqa: B018
    path.unlink()
    assert Checkpoint(damaged).config.language.eos_token_ids == (512,)  # what the original falls back to


def test_tower_of_unknown_width_is_refused(damaged):
    replace_weights(damaged / PLACES["internvideo"], lambda tensors: tensors | {"vision_encoder.pos_embed": torch.zeros(1, 1025, 100)})
    with pytest.raises(CheckpointError, match=r"f4.pt: got width 100, expected one of \[1408, 64\]"):
        Checkpoint(damaged).config  # noqa: B018


def sam2_file(original, path, **more):
    """SAM2 of a checkpoint as it is released, with the names of its layer scales."""
    tensors = read_tensors(original / PLACES["sparrow"])
    sam2 = {name.removeprefix("model.visual_model."): tensor for name, tensor in tensors.items() if ".visual_model." in name}
    scales = {f"memory_encoder.fuser.layers.{index}.weight" for index in (0, 1)}
    assert scales <= sam2.keys()
    renamed = {name.replace(".weight", ".gamma") if name in scales else name: tensor for name, tensor in sam2.items()}
    torch.save({"model": renamed | more}, path)


TRACKING = ("frame_encoder", "mask_downsampler", "memory_attention", "mask_decoder", "memory_encoder")


def test_sam2_file_tracks_without_language_model(original, tmp_path):
    path = tmp_path / "sam2_hiera_large.pt"
    sam2_file(original, path)
    checkpoint = Checkpoint(path)
    assert checkpoint.components == TRACKING
    assert checkpoint.config == ModelConfig(preset="sam2_hiera_large", scope="tracking", sam2=REDUCED.sam2)
    for component in TRACKING:
        assert states_equal(checkpoint.build(component).state_dict(), Checkpoint(original).build(component).state_dict())
    with pytest.raises(CheckpointError, match=r"sam2_hiera_large.pt: holds no weights for token_embedder, only for frame_encoder, "):
        checkpoint.build("token_embedder")


def test_sam21_file_is_known_by_its_weights(original, tmp_path):
    path = tmp_path / "sam2.1_hiera_tiny.pt"
    more = {
        "obj_ptr_tpos_proj.weight": torch.ones(64, 256),
        "obj_ptr_tpos_proj.bias": torch.ones(64),
        "no_obj_embed_spatial": torch.ones(1, 64),
    }
    sam2_file(original, path, **more)
    checkpoint = Checkpoint(path)
    assert checkpoint.config.preset == "sam2.1_hiera_tiny"
    assert checkpoint.config.sam2 == replace(REDUCED.sam2, pointer_positions=True, absent_embedding=True)
    assert checkpoint.build("memory_attention").obj_ptr_tpos_proj.bias.sum() == 64
    assert checkpoint.build("memory_encoder").no_obj_embed_spatial.sum() == 64


def test_damaged_sam2_file_is_refused_with_its_own_names(original, tmp_path):
    path = tmp_path / "sam2.pt"
    sam2_file(original, path, no_obj_ptr=torch.zeros(3), **{"sam_mask_decoder.extra": torch.zeros(3)})
    with pytest.raises(CheckpointError) as refused:
        Checkpoint(path).build("mask_decoder")
    assert "sam2:no_obj_ptr: got [3], expected [1, 256]" in str(refused.value)
    assert "unexpected sam2:sam_mask_decoder.extra" in str(refused.value)
    torch.save({"model": {"weight": torch.zeros(3)}}, path)
    with pytest.raises(CheckpointError, match=r"sam2.pt: holds no image_encoder.neck.convs.0.conv.weight, .*, maskmem_tpos_enc."):
        Checkpoint(path).config  # noqa: B018
