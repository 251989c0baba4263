import pytest
import torch
import torch.nn.functional as F

from ensemble.components import components
from tests import goldens, sam2_oracle

CONFIGS = {"sam2.0": sam2_oracle.config_at(128), "sam2.1": sam2_oracle.config_at(128, sam21=True)}
SAM2 = CONFIGS["sam2.0"].sam2
ULP = 2**-7  # largest distance of neighbouring bfloat16 values, relative to them


@pytest.fixture(params=CONFIGS)
def oracle(request):
    return sam2_oracle.Oracle(CONFIGS[request.param])


def encoder_inputs(prompted: bool) -> dict[str, torch.Tensor]:
    """Three objects; the second is not in its frame."""
    return {
        "frame_embeddings": torch.randn(2, SAM2.width, SAM2.grid, SAM2.grid),
        "object_frame": torch.tensor([0, 1, 1]),
        "mask_logits": torch.randn(3, SAM2.low_res, SAM2.low_res) * 4,
        "prompted": torch.full((3,), prompted),
        "object_scores": torch.tensor([2.0, 0.0, 0.1]),
    }


def upstream(oracle: sam2_oracle.Oracle, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = sam2_oracle.gated(inputs["mask_logits"], inputs["object_scores"])  # which SAM2Base does behind its decoder
    masks = F.interpolate(logits[:, None], (SAM2.image_size,) * 2, mode="bilinear", align_corners=False)
    features = [sam2_oracle.flat(inputs["frame_embeddings"][inputs["object_frame"]])]
    sizes, scores = [(SAM2.grid, SAM2.grid)], inputs["object_scores"][:, None]
    return oracle.sam2._encode_new_memory(features, sizes, masks, scores, bool(inputs["prompted"][0]))[0]


@pytest.mark.parametrize("prompted", [True, False])
def test_memory_encoder_equals_sam2_rounded_to_bfloat16(oracle, prompted):
    inputs = encoder_inputs(prompted)
    got, expected = oracle.build("memory_encoder")(*inputs.values()), upstream(oracle, inputs)
    assert torch.equal(got, got.bfloat16().float())
    # Half an ulp of rounding, and float32 summation order on values of order 1.
    torch.testing.assert_close(got, expected, rtol=ULP / 2, atol=1e-4)


def test_memory_encoder_treats_each_object_by_its_own_flag(oracle):
    encoder = oracle.build("memory_encoder")
    inputs = encoder_inputs(True)
    flags = torch.tensor([True, False, True])
    mixed = encoder(*{**inputs, "prompted": flags}.values())
    uniform = {flag: encoder(*{**inputs, "prompted": torch.full((3,), flag)}.values()) for flag in (True, False)}
    torch.testing.assert_close(mixed, torch.where(flags[:, None, None, None], uniform[True], uniform[False]), rtol=ULP, atol=1e-4)
    assert not torch.allclose(uniform[True], uniform[False])


def test_memory_encoder_marks_objects_that_are_absent_in_sam21_only(oracle):
    encoder, inputs = oracle.build("memory_encoder"), encoder_inputs(False)
    inputs["mask_logits"] = sam2_oracle.gated(inputs["mask_logits"], inputs["object_scores"])
    there = encoder(*{**inputs, "object_scores": torch.ones(3)}.values())
    changed = (encoder(*inputs.values()) != there).flatten(1).any(1)
    assert changed.tolist() == [False, oracle.config.sam2.absent_embedding, False]


@pytest.mark.parametrize("version", CONFIGS)
def test_onnx_graph_equals_torch_module_at_every_size(version, tmp_path):
    module, contract = sam2_oracle.Oracle(CONFIGS[version]).build("memory_encoder"), components(CONFIGS[version])["memory_encoder"]
    sizes = [{}, {"objects": 3, "frames": 2}, {"objects": 7, "frames": 5}]
    samples = [contract.sample(seed, **own) for seed, own in enumerate(sizes)]
    sam2_oracle.assert_onnx_equals_torch(module, "memory_encoder", tmp_path / "graph.onnx", samples)


@goldens.parametrize_cases(lambda case: "track.maskmem.frame0.slice" in case.expected)
def test_memory_of_the_conditioning_frame_equals_the_original(case):
    got = sam2_oracle.conditioned_objects(case)[2][:, :, 1::8, 1::8]
    expected = torch.from_numpy(case.expected["track.maskmem.frame0.slice"])
    beyond = (got - expected).abs() > ULP * expected.abs() + 1e-4
    # A mask logit within float32 noise of 0 flips a pixel of the binarised mask, which moves the cells around it.
    assert beyond.float().mean() <= 2e-3
    torch.testing.assert_close(got, expected, rtol=ULP, atol=0.05)
