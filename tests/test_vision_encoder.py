import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from ensemble import frames
from ensemble.components import components
from ensemble.config import TINY, ContextTowerConfig, VideoTowerConfig
from export.models.context_tower import ContextTower
from export.models.video_tower import VideoTower
from export.models.vision_encoder import ImageEncoder, Projector, VisionEncoder
from tests import goldens

TOLERANCE = 1e-4
"""Float32 summation order; features have rms 1. Measured against the packs: 3e-6."""

_tokens = {}


pytestmark = pytest.mark.usefixtures("inference")


def randomise(module):
    """Weights large enough for attention to be far from uniform."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def encoder_inputs(case):
    """(video_frames, context_frames) of a video, (context_frames,) of an image."""
    config = goldens.checkpoint(case.pack).config
    if not case.is_video:
        return (torch.from_numpy(frames.context_frame(case.frames[0], config))[None],)
    chosen = case.frames[frames.encoder_indices(len(case.frames), config.num_frames)]
    sized = [np.stack([function(frame, config) for frame in chosen]) for function in (frames.video_frame, frames.context_frame)]
    return tuple(map(torch.from_numpy, sized))


def build_encoder(case):
    return goldens.checkpoint(case.pack).build("vision_encoder" if case.is_video else "image_encoder")


def visual_tokens(case):
    """[S, C] visual tokens of a golden case, computed once for every input."""
    key = case.pack, case.meta["frames"]
    if key not in _tokens:
        _tokens[key] = build_encoder(case)(*encoder_inputs(case)).flatten(0, -2)  # [..., S, C] -> [S, C]
    return _tokens[key]


def test_context_tower_equals_transformers():
    config = ContextTowerConfig(image_size=56, width=32, layers=4, heads=4, mlp_width=48)
    oracle_config = CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    oracle = randomise(CLIPVisionModel(oracle_config))
    weights = {name.removeprefix("vision_model."): tensor for name, tensor in oracle.state_dict().items()}
    tower = ContextTower(config).eval()
    tower.load_state_dict({name: weights[name] for name in tower.state_dict()})
    images = torch.randn(3, 3, config.image_size, config.image_size)
    expected = oracle(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert tower(images).shape == (3, config.grid**2, config.width)
    torch.testing.assert_close(tower(images), expected, atol=TOLERANCE, rtol=0)


@pytest.fixture
def video_config():
    return VideoTowerConfig(image_size=56, width=32, blocks=3, heads=4, mlp_width=48)


def test_video_tower_keeps_chunks_apart(video_config):
    tower = randomise(VideoTower(video_config))
    clip = torch.randn(3 * video_config.chunk_frames, 3, 56, 56)
    features = tower(clip)
    assert features.shape == (3, video_config.chunk_frames * video_config.grid**2, video_config.width)
    for chunk, alone in zip(features, clip.split(video_config.chunk_frames), strict=True):
        torch.testing.assert_close(chunk, tower(alone)[0], atol=TOLERANCE, rtol=0)


def test_video_tower_is_the_patch_embedding_when_blocks_are_scaled_to_zero(video_config):
    tower = randomise(VideoTower(video_config))
    for block in tower.blocks:
        block.ls1.gamma.zero_()
        block.ls2.gamma.zero_()
    clip = torch.randn(2, video_config.chunk_frames, 3, 56, 56)
    patches = tower.patch_embed.proj(clip.transpose(1, 2))  # [chunks, 3, frames, S, S], the original's layout
    expected = patches.flatten(2).transpose(1, 2) + tower.pos_embed[:, 1:]  # [chunks, C, frames, g, g] -> [chunks, S, C]
    torch.testing.assert_close(tower(clip.flatten(0, 1)), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "tower, key, waived",
    [
        (ContextTower, "vision_model.encoder.layers.23.self_attn.out_proj.bias", True),
        (ContextTower, "vision_model.encoder.layers.23.self_attn.q_norm.weight", False),
        (VideoTower, "vision_encoder.clip_projector.cross_attn.q_bias", True),
        (VideoTower, "vision_encoder.blocks.39.ls2.gamma", True),
        (VideoTower, "vision_encoder.blocks.39.attn.qkv.bias", False),
    ],
)
def test_towers_waive_only_the_weights_that_the_original_does_not_use(tower, key, waived):
    assert any(re.fullmatch(pattern, key) for pattern in tower.unused) == waived


def test_projector_pools_exactly_when_it_pools_before_the_second_linear():
    projector = randomise(Projector(12, 24))
    features = torch.randn(2, 3 * 6 * 6, 12)  # two chunks of three frames of 6 by 6 patches
    maps = projector(features).reshape(6, 6, 6, 24).permute(0, 3, 1, 2)  # [2, 3 * 36, C] -> [frames, C, 6, 6]
    expected = F.avg_pool2d(maps, 2).permute(0, 2, 3, 1).flatten(0, 2)  # [frames, C, 3, 3] -> [frames * 9, C]
    torch.testing.assert_close(projector.pooled(features, 6), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, encoder", [("vision_encoder", VisionEncoder), ("image_encoder", ImageEncoder)])
def test_encoders_keep_their_contract(name, encoder):
    config = replace(TINY, num_frames=8)
    component = components(config)[name]
    inputs = [torch.from_numpy(array) for array in component.sample(0).values()]
    (output,) = component.outputs
    assert list(encoder(config).eval()(*inputs).shape) == [1 if size == -1 else size for size in output.dims()]


@goldens.parametrize_cases()
def test_tower_features_equal_the_original(case):
    encoder, inputs = build_encoder(case), encoder_inputs(case)
    context = encoder.context_tower(inputs[-1])
    assert list(context.shape) == case.expected["feat.clip.shape"].tolist()
    np.testing.assert_allclose(context[::5, ::37], case.expected["feat.clip.slice"], atol=TOLERANCE, rtol=0)
    if case.is_video:
        video = encoder.video_tower(inputs[0])
        assert list(video.shape) == case.expected["feat.internvideo.shape"].tolist()
        np.testing.assert_allclose(video[:, ::61], case.expected["feat.internvideo.slice"], atol=TOLERANCE, rtol=0)


@goldens.parametrize_cases()
def test_visual_tokens_equal_the_original(case):
    tokens = visual_tokens(case)
    assert list(tokens.shape) == case.expected["visual_tokens.shape"].tolist()
    np.testing.assert_allclose(tokens[::29], case.expected["visual_tokens.slice"], atol=TOLERANCE, rtol=0)
    assert float(tokens.std()) == pytest.approx(float(case.expected["visual_tokens.std"]), abs=TOLERANCE)
