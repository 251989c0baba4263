import shutil
from dataclasses import replace

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
    VideoTowerConfig,
)
from export.checkpoints import SOURCES, Checkpoint, CheckpointError, hiera_config, read_tensors
from export.models import MODULES, graph_class
from export.tiny import write_tiny
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
    write_tiny(tmp_path / "again", seed=0)
    write_tiny(tmp_path / "other", seed=1)
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
    listed = {line.strip() for line in listed}
    assert expected <= listed
    assert len(listed - expected) <= 2  # a misshapen key may be called missing too


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


def bin_shards(tensors, folder):
    for index, part in enumerate(halves(tensors), 1):
        torch.save(part, folder / f"pytorch_model-{index:05d}-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text("{}")


def safetensors_shards(tensors, folder):
    for index, part in enumerate(halves(tensors), 1):
        save_file(part, folder / f"model-{index:05d}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")


def one_bin(tensors, folder):
    torch.save(tensors, folder / "pytorch_model.bin")


def safetensors_and_other_bin(tensors, folder):
    save_file(tensors, folder / "model.safetensors")
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("write", [bin_shards, safetensors_shards, one_bin, safetensors_and_other_bin])
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
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read as weights \(.*\). Copy it again"):
        read_tensors(path)


def test_file_that_is_cut_off_is_named(copy):
    path = copy / SOURCES["sparrow"] / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"sparrow-finetune/model.safetensors: cannot be read as weights"):
        Checkpoint(copy).build("memory_encoder")


def test_code_in_a_weight_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"weight": Evil()}, tmp_path / "tower.pt")
    with pytest.raises(CheckpointError, match=r"tower.pt: cannot be read as weights"):
        read_tensors(tmp_path / "tower.pt")
    assert not (tmp_path / "harm").exists()


def test_folder_without_weights_is_named(copy):
    (copy / SOURCES["ddetr"] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"ddetr_sam2: no \*.safetensors and no pytorch_model\*.bin. Copy the weights there"):
        Checkpoint(copy).build("proposal_detector")


def test_every_missing_part_of_a_checkpoint_is_named(copy):
    for source in ("clip", "internvideo"):
        path = copy / SOURCES[source]
        shutil.rmtree(path.parent)
    with pytest.raises(
        CheckpointError,
        match=f"{copy}: no {SOURCES['clip']}, {SOURCES['internvideo']}, expected sparrow-finetune, .*, ddetr_sam2 there",
    ):
        Checkpoint(copy)


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
    config = hiera_config(trunk(width, blocks), "trunk.")
    assert (config.embed_dim, sum(config.stages), config.heads, config.global_blocks) == (width, blocks, heads, global_blocks)


def test_unknown_trunk_is_refused_with_the_list_of_trunks():
    with pytest.raises(CheckpointError, match=r"trunk.: got a trunk of \(width, blocks\) \(17, 3\), expected one of \[\(144, 48\), "):
        hiera_config(trunk(17, 3), "trunk.")


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
    )


@has_pack_a
@pytest.mark.parametrize("component", MODULES)
def test_original_checkpoint_fits_every_component(component):
    module = goldens.checkpoint("a").build(component)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@has_pack_a
def test_tower_of_unknown_width_is_refused(tmp_path):
    for source in ("sparrow", "clip", "ddetr"):
        (tmp_path / SOURCES[source]).parent.mkdir(exist_ok=True)
        (tmp_path / SOURCES[source]).symlink_to(goldens.checkpoint("a").path(source))
    path = tmp_path / SOURCES["internvideo"]
    path.parent.mkdir()
    torch.save({"vision_encoder.pos_embed": torch.zeros(1, 1025, 100)}, path)
    with pytest.raises(CheckpointError, match=r"f4.pt: got width 100, expected one of \[1408, 64\]"):
        Checkpoint(tmp_path).config  # noqa: B018 (the property reads)


def test_modules_of_another_size_are_refused(tiny):
    other = replace(TINY, sam2=replace(TINY.sam2, memory_width=32))
    with pytest.raises(CheckpointError, match=r"out_proj.weight: got \[16, 64, 1, 1\], expected \[32, 64, 1, 1\]"):
        tiny.load(graph_class("memory_encoder")(other))
