import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper

from ensemble.sampling import Sampling, draw

LOGITS = np.random.default_rng(0).normal(0, 2, 60).astype(np.float32)


@pytest.mark.parametrize(("temperature", "top_k"), [(1, 50), (0.5, 5), (3, 1), (1, 1000)])
def test_probabilities_equal_transformers(temperature, top_k):
    scores = TemperatureLogitsWarper(float(temperature))(None, torch.from_numpy(LOGITS[None]).double())
    expected = TopKLogitsWarper(top_k)(None, scores).softmax(1)[0]
    np.testing.assert_allclose(Sampling(temperature, top_k, 0).probabilities(LOGITS), expected, atol=1e-12)


def test_tokens_as_likely_as_the_last_one_are_kept():
    assert Sampling(1, 2, 0).probabilities(np.float32([1, 0, 1, 1])).tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])


def test_draws_follow_the_probabilities_and_repeat_with_the_seed():
    sampling = Sampling(1, 5, 7)
    drawn = [[draw(LOGITS, sampling, generator) for _ in range(4000)] for generator in (sampling.generator(), sampling.generator())]
    assert drawn[0] == drawn[1]
    found = np.bincount(drawn[0], minlength=60) / 4000
    np.testing.assert_allclose(found, sampling.probabilities(LOGITS), atol=0.03)  # 3 sigma of 4000 draws: 0.024
    other = Sampling(1, 5, 8)
    assert drawn[0] != [draw(LOGITS, other, other.generator()) for _ in range(1)] * 4000


def test_sampling_survives_the_wire():
    assert Sampling.from_json(Sampling(0.7, 20, 3).to_json()) == Sampling(0.7, 20, 3)
