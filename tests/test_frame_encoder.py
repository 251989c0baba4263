import numpy as np
import pytest
import torch

from ensemble import frames
from ensemble.config import TINY, HieraConfig
from export.models.hiera import FeaturePyramid, Hiera
from tests import goldens, sam2_oracle

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 summation order on values of order 1


# At 256 px every map is a whole number of windows; at 224 px the maps of 14 and 7 cells are padded.
@pytest.mark.parametrize("image_size", [256, 224])
def test_frame_encoder_equals_sam2(image_size):
    oracle = sam2_oracle.Oracle(sam2_oracle.config_at(image_size))
    frames = torch.randn(2, 3, image_size, image_size)
    expected = oracle.sam2.forward_image(frames)["backbone_fpn"]
    for got, want in zip(oracle.build("frame_encoder").encode(frames), reversed(expected), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("size", [(480, 854), (854, 480), (64, 64), (9, 400), (3000, 50)])
def test_picture_is_normalised_and_stretched_in_the_graph_as_the_original_does_it_before(size, monkeypatch):
    module = sam2_oracle.Oracle(TINY).build("frame_encoder")
    monkeypatch.setattr(module, "encode", lambda grounding: grounding)
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    inputs = frames.encoder_frame(frame, TINY)
    inputs["pictures"][inputs["picture_sizes"][0] :] = 255  # beyond the picture, where nobody looks
    inputs["pictures"][:, inputs["picture_sizes"][1] :] = 255
    got = module(*(torch.from_numpy(array)[None].repeat(2, *[1] * array.ndim) for array in inputs.values()))
    expected = frames.grounding_frame(frame, TINY)
    for own in got:
        np.testing.assert_allclose(own.numpy(), expected, atol=2e-6)  # float32 ulps of values up to 2.7


def test_trunk_and_pyramid_equal_sam2_with_the_windows_of_the_smaller_models():
    torch.manual_seed(0)
    hiera = HieraConfig(8, 1, (1, 2, 3, 2), (4,), (8, 4, 14, 7), 14)
    expected = sam2_oracle.image_encoder(hiera, 16).requires_grad_(False)
    for parameter in expected.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    trunk, neck = Hiera(hiera, 256), FeaturePyramid(hiera, 16)
    trunk.load_state_dict(expected.trunk.state_dict())
    neck.load_state_dict(expected.neck.state_dict())
    images = torch.randn(1, 3, 256, 256)
    for got, want in zip(neck(trunk(images)), expected(images)["backbone_fpn"], strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@goldens.parametrize_cases(lambda case: "sam.frame0.level0.slice" in case.expected)
def test_frame_embeddings_equal_the_original(case):
    no_mem_embed = goldens.checkpoint(case.pack).tensors("sparrow")["model.visual_model.no_mem_embed"].float()
    frame_embeddings, high_res_1, high_res_0 = sam2_oracle.encoded_frame(case, 0)
    levels = [high_res_0, high_res_1, frame_embeddings + no_mem_embed.reshape(1, -1, 1, 1)]
    for level, got in enumerate(levels):
        step = got.shape[2] // 16
        expected = torch.from_numpy(case.expected[f"sam.frame0.level{level}.slice"])
        torch.testing.assert_close(got[0, ::4, 1::step, 1::step], expected, atol=1e-4, rtol=1e-4)
