import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from ensemble import selection
from ensemble.components import components
from ensemble.config import TINY
from export.models.proposal_selector import ProposalSelector
from export.models.roi_align import roi_align
from tests import goldens, sam2_oracle

TOLERANCE = 1e-4
"""Float32 summation order on logits up to 10. Measured: 2e-6."""
GOLDEN_TOLERANCE = 1e-3
"""As the goldens' README has it. Measured: 5e-6."""

PROMPTS = 3


pytestmark = pytest.mark.usefixtures("inference")


@cache
def tiny_selector():
    """Weights large enough for attention to be far from uniform."""
    selector = ProposalSelector(TINY).eval()
    for parameter in selector.parameters():
        nn.init.normal_(parameter, std=0.3)
    return selector


def tiny_inputs():
    """Random inputs of the contract: boxes that may leave the frame, scores of which some are below the least one."""
    inputs = components(TINY)["proposal_selector"].sample(0, states=PROMPTS)
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def pair_logit(helper, prompt, regions):
    """The original's formula for one prompt and one box (spec 5.2).

    Args:
        prompt: [C]
        regions: [C_level, 7, 7] of every level.
    """
    tokens = torch.cat([proj(region.flatten(1).T) for proj, region in zip(helper.level_token_proj, regions, strict=True)])
    pooled = [proj(region.mean((1, 2))) for proj, region in zip(helper.level_pool_proj, regions, strict=True)]
    attention = (tokens @ helper.query_proj(prompt) / math.sqrt(tokens.shape[1])).softmax(0)
    return helper.score_head(torch.cat([attention @ tokens, sum(pooled) / 3, helper.seg_proj(prompt)]))


def test_selector_equals_the_formula_pair_by_pair():
    selector, inputs = tiny_selector(), tiny_inputs()
    selector_logits, roi_logits, refined = selector(*inputs.values())
    frame = inputs["frame_embeddings"] + selector.no_mem_embed.reshape(1, -1, 1, 1)
    boxes = inputs["proposal_boxes"] * TINY.sam2.image_size
    levels = [(inputs["high_res_0"], 1 / 4), (inputs["high_res_1"], 1 / 8), (frame, 1 / 16)]
    regions = [roi_align(level, boxes, TINY.selector.roi_size, scale) for level, scale in levels]
    for s, prompt in enumerate(inputs["prompt_embeddings"]):
        scores = []
        for p, feature in enumerate(inputs["proposal_features"]):
            closeness = selector.seg_proj(prompt) @ selector.prop_proj(feature) / math.sqrt(TINY.selector.width)
            scores.append(closeness + math.log(max(inputs["proposal_scores"][p], 1e-6)))
            expected = pair_logit(selector.roi_helper, prompt, [region[p] for region in regions])
            torch.testing.assert_close(roi_logits[s, p : p + 1], expected, atol=TOLERANCE, rtol=TOLERANCE)
        logits = torch.stack(scores)
        torch.testing.assert_close(selector_logits[s], logits, atol=TOLERANCE, rtol=TOLERANCE)
        expected = prompt + selector.fuse_proj(logits.softmax(0) @ inputs["proposal_features"])
        torch.testing.assert_close(refined[s], expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_selector_keeps_its_contract_when_there_is_one_prompt():
    inputs = tiny_inputs()
    together = tiny_selector()(*inputs.values())
    for index in range(PROMPTS):
        inputs = inputs | {"prompt_embeddings": tiny_inputs()["prompt_embeddings"][index : index + 1]}
        for got, expected in zip(tiny_selector()(*inputs.values()), together, strict=True):
            torch.testing.assert_close(got, expected[index : index + 1], atol=TOLERANCE, rtol=TOLERANCE)


def selected(case):
    return "sel.prob" in case.expected


@goldens.parametrize_cases(selected)
def test_logits_and_refined_embeddings_equal_the_original(case):
    expected = case.expected
    prompts = expected["box.emb"] if len(expected.get("box.emb", ())) else expected["seg.emb"]
    proposals = [expected[f"ddetr.{name}"] for name in ("boxes", "features", "scores")]
    selector = sam2_oracle.component(case.pack, "proposal_selector")
    outputs = selector(*map(torch.from_numpy, (prompts, *proposals)), *sam2_oracle.encoded_frame(case, 0))
    for name, output in zip(("logits_old", "roi_logits", "refined"), outputs, strict=True):
        np.testing.assert_allclose(output, expected[f"sel.{name}"], atol=GOLDEN_TOLERANCE, rtol=0)

    gamma = float(expected["sel.gamma"]) if case.options["roi_helper"] else 0
    probabilities = selection.fuse(outputs[0].numpy(), outputs[1].numpy(), gamma)
    np.testing.assert_allclose(probabilities, expected["sel.prob"], atol=GOLDEN_TOLERANCE, rtol=0)
    for index, chosen in enumerate(selection.choose(probabilities, case.options["selection_threshold"])):
        np.testing.assert_array_equal(proposals[0][chosen], expected[f"sel.raw_boxes.tok{index}"])
