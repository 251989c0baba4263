import pytest
import torch
import torch.nn.functional as F

from tests import goldens, sam2_oracle

CONFIG = sam2_oracle.config_at(128)
ULP = 2**-7  # largest distance of neighbouring bfloat16 values, relative to them


def encoder_inputs(prompted: bool) -> dict[str, torch.Tensor]:
    sam2 = CONFIG.sam2
    return {
        "frame_embeddings": torch.randn(2, sam2.width, sam2.grid, sam2.grid),
        "object_frame": torch.tensor([0, 1, 1]),
        "mask_logits": torch.randn(3, sam2.low_res, sam2.low_res) * 4,
        "prompted": torch.full((3,), prompted),
    }


def upstream(oracle: sam2_oracle.Oracle, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    sam2 = CONFIG.sam2
    masks = F.interpolate(inputs["mask_logits"][:, None], (sam2.image_size,) * 2, mode="bilinear", align_corners=False)
    features = [sam2_oracle.flat(inputs["frame_embeddings"][inputs["object_frame"]])]
    sizes = [(sam2.grid, sam2.grid)]
    return oracle.sam2._encode_new_memory(features, sizes, masks, torch.ones(3, 1), bool(inputs["prompted"][0]))[0]


@pytest.mark.parametrize("prompted", [True, False])
def test_memory_encoder_equals_sam2_rounded_to_bfloat16(prompted):
    oracle = sam2_oracle.Oracle(CONFIG)
    inputs = encoder_inputs(prompted)
    got, expected = oracle.build("memory_encoder")(*inputs.values()), upstream(oracle, inputs)
    assert torch.equal(got, got.bfloat16().float())
    # Half an ulp of rounding, and float32 summation order on values of order 1.
    torch.testing.assert_close(got, expected, rtol=ULP / 2, atol=1e-4)


def test_memory_encoder_treats_each_object_by_its_own_flag():
    encoder = sam2_oracle.Oracle(CONFIG).build("memory_encoder")
    inputs = encoder_inputs(True)
    flags = torch.tensor([True, False, True])
    mixed = encoder(*{**inputs, "prompted": flags}.values())
    uniform = {flag: encoder(*{**inputs, "prompted": torch.full((3,), flag)}.values()) for flag in (True, False)}
    torch.testing.assert_close(mixed, torch.where(flags[:, None, None, None], uniform[True], uniform[False]), rtol=ULP, atol=1e-4)
    assert not torch.allclose(uniform[True], uniform[False])


@goldens.parametrize_cases(lambda case: "track.maskmem.frame0.slice" in case.expected)
def test_memory_of_the_conditioning_frame_equals_the_original(case):
    got = sam2_oracle.conditioned_objects(case)[2][:, :, 1::8, 1::8]
    expected = torch.from_numpy(case.expected["track.maskmem.frame0.slice"])
    beyond = (got - expected).abs() > ULP * expected.abs() + 1e-4
    # A mask logit within float32 noise of 0 flips a pixel of the binarised mask, which moves the cells around it.
    assert beyond.float().mean() <= 2e-3
    torch.testing.assert_close(got, expected, rtol=ULP, atol=0.05)
