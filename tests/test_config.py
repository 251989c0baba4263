import dataclasses
import json

import pytest

from ensemble import settings
from ensemble.components import components
from ensemble.config import FULL, PRESETS, TINY, HieraConfig, ModelConfig


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_config_survives_json(config, tmp_path):
    assert ModelConfig.from_json(config.to_json()) == config
    (tmp_path / "config.json").write_text(config.to_json())
    assert ModelConfig.load(tmp_path / "config.json") == config


def test_config_survives_json_when_every_number_differs_from_the_preset():
    def changed(part):
        fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        return dataclasses.replace(part, **{name: other(value) for name, value in fields.items()})

    def other(value):
        if dataclasses.is_dataclass(value):
            return changed(value)
        if isinstance(value, tuple):
            return (*value, 99)
        return value + type(value)(1) if isinstance(value, int | float) else f"{value}!"

    config = changed(FULL)
    assert config.language.eos_token_ids == (32000, 32001, 32007, 99)
    assert ModelConfig.from_json(config.to_json()) == config


def test_config_keeps_an_unlimited_window_through_json():
    config = dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, sliding_window=None))
    assert ModelConfig.from_json(config.to_json()).language.sliding_window is None


def test_config_is_refused_when_json_holds_an_unknown_field():
    fields = json.loads(TINY.to_json())
    fields["language"]["num_experts"] = 8
    with pytest.raises(TypeError, match="num_experts"):
        ModelConfig.from_json(json.dumps(fields))


def test_presets_carry_their_names():
    assert {name: config.preset for name, config in PRESETS.items()} == {name: name for name in ("full", "tiny", "nano")}


def test_full_has_the_numbers_of_the_specification():
    assert (FULL.context.grid, FULL.video.grid, FULL.sam2.grid, FULL.proposer.grid) == (24, 16, 64, 28)  # spec 1.3, 1.4, 6.1, 4.2
    assert (FULL.video_tokens, FULL.context_tokens) == (3328, 576)  # spec 1.5
    assert FULL.sam2.low_res == 256  # spec 6.3
    assert (FULL.sam2.num_maps, FULL.sam2.num_pointers) == (7, 16)  # spec 7.6
    assert FULL.sam2.hiera.widths == (144, 288, 576, 1152)  # spec 7.1
    assert sum(FULL.sam2.hiera.stages) == 48
    assert FULL.video.width // FULL.video.heads == 88  # spec 1.4
    assert FULL.language.width // FULL.language.heads == 96  # spec 3.1
    assert FULL.language.vocab_size == 32013  # spec 2
    assert FULL.sam2.hiera == FULL.proposer.hiera == HieraConfig()


def test_full_contracts_have_the_shapes_of_the_specification():
    def shapes(name):
        return {spec.name: tuple(spec.dims()) for spec in (*components(FULL)[name].inputs, *components(FULL)[name].outputs)}

    assert shapes("vision_encoder") == {
        "video_frames": (16, 3, 224, 224),
        "context_frames": (16, 3, 336, 336),
        "visual_tokens": (3328, 3072),
    }
    assert shapes("image_encoder")["image_tokens"] == (-1, 576, 3072)
    assert shapes("proposal_detector") == {
        "proposal_image": (1, 3, 448, 448),
        "query_boxes": (300, 4),
        "query_features": (300, 256),
        "coco_scores": (300,),
        "sa1b_scores": (300,),
    }
    assert shapes("frame_encoder") == {
        "pictures": (-1, 1024, 1024, 3),
        "picture_sizes": (-1, 2),
        "frame_embeddings": (-1, 256, 64, 64),
        "high_res_1": (-1, 64, 128, 128),
        "high_res_0": (-1, 32, 256, 256),
    }
    assert shapes("memory_attention")["memory_maps"] == (-1, -1, 64, 64, 64)
    assert shapes("mask_decoder")["mask_logits"] == (-1, 256, 256)


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_key_value_cache_holds_the_longest_prompt_and_answer(config):
    visual = max(config.video_tokens, config.context_tokens)
    assert config.max_sequence == visual + settings.MAX_PROMPT_TOKENS + settings.MAX_TARGET_TOKENS + settings.MAX_NEW_TOKENS
    decoder = components(config)["language_decoder"]
    assert config.max_sequence <= decoder.dims["slots"].max
    assert config.max_sequence - settings.MAX_NEW_TOKENS <= decoder.dims["tokens"].max


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_tracked_memory_fits_the_contract_of_memory_attention(config):
    attention = components(config)["memory_attention"]
    assert attention.dims["memories"].max == config.sam2.num_maps
    assert attention.dims["pointers"].max == config.sam2.num_pointers
