"""How the next token is chosen from its logits (spec 3.3)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from .tensors import Array


@dataclass(frozen=True)
class Sampling:
    """Draws among the likeliest tokens, as `generate` of transformers does with do_sample; travels as one request parameter.

    Args:
        temperature: logits are divided by it.
        top_k: tokens to draw from.
        seed: the same seed gives the same draws.
    """

    temperature: float
    top_k: int
    seed: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Sampling:
        return cls(**json.loads(text))

    def generator(self) -> np.random.Generator:
        """The source of one answer's draws."""
        return np.random.default_rng(self.seed)

    def probabilities(self, logits: Array) -> Array:
        """[V] float64: of every token; zero for all but the `top_k` likeliest and what equals the last of them."""
        logits = logits.astype(np.float64) / self.temperature
        least = np.partition(logits, -min(self.top_k, len(logits)))[-min(self.top_k, len(logits))]
        weights = np.where(logits >= least, np.exp(logits - logits.max()), 0)
        return np.asarray(weights / weights.sum())


def draw(logits: Array, sampling: Sampling, generator: np.random.Generator) -> int:
    """A token at random, by its probability."""
    return int(generator.choice(len(logits), p=sampling.probabilities(logits)))
