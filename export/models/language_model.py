"""Language model: token embeddings, Phi-3 over a static key/value cache, projector of the [SEG] and [BOX] states (spec 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble.components import SLOTS
from ensemble.config import LanguageConfig, ModelConfig

from .layers import Graph

Write = Callable[[Tensor, int, Tensor, Tensor], Tensor]
"""(cache of one layer, axis, indices, new rows) to that cache with the rows: `Tensor.scatter`, or `Tensor.scatter_` in place."""


class TokenEmbedder(Graph):
    """Rows of the embedding table."""

    keys: ClassVar[dict[str, str]] = {"embed_tokens.": "sparrow:model.embed_tokens."}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.language.vocab_size, config.language.width)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[S] int64 vocabulary indices to [S, C] float."""
        return self.embed_tokens(token_ids)  # type: ignore[no-any-return]


class PromptProjector(Graph):
    """`text_hidden_fcs`: states that emitted [SEG] or [BOX] to prompt embeddings."""

    keys: ClassVar[dict[str, str]] = {"text_hidden_fcs.": "sparrow:model.text_hidden_fcs.0."}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width = config.language.width
        self.text_hidden_fcs = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.sam2.width))

    def forward(self, final_states: Tensor) -> Tensor:
        """[N, C] float final-norm states to [N, config.sam2.width] float."""
        return self.text_hidden_fcs(final_states)  # type: ignore[no-any-return]


class LanguageDecoder(Graph):
    """Phi-3 over new tokens and the keys and values of earlier ones.

    Cache slot p holds the key and value of position p. A query at position i sees the slots p with 0 <= i - p <= sliding_window;
    the other slots may hold anything finite. Work grows with the number of slots: pass a view of the cache that is no longer than
    the highest position asks for, in a prefill above all.
    """

    keys: ClassVar[dict[str, str]] = {
        "layers.": "sparrow:model.layers.",
        "norm.": "sparrow:model.norm.",
        "lm_head.": "sparrow:lm_head.",
    }

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        language = config.language
        self.layers = nn.ModuleList(Layer(language) for _ in range(language.layers))
        self.norm = nn.RMSNorm(language.width, language.rms_norm_eps)
        self.lm_head = nn.Linear(language.width, language.vocab_size, bias=False)
        cos, sin = rotary_table(language)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, token_embeddings: Tensor, positions: Tensor, key_cache: Tensor, value_cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reads the new tokens of each sequence, leaving the given caches as they are.

        Args:
            token_embeddings: [N, S, C] float, text and visual tokens of N sequences.
            positions: [N, S] int64, each below the number of slots, ascending along S.
            key_cache, value_cache: [layers, N, heads, slots, C / heads] float, filled below each sequence's first position.
        Returns:
            logits: [N, vocabulary] float, after the last token of each sequence.
            final_states: [N, C] float, the state that `lm_head` turned into them.
            new_key_cache, new_value_cache: the caches with the new tokens.
        """
        logits, final_states, layers = self._run(token_embeddings, positions, key_cache, value_cache, Tensor.scatter)
        new_keys, new_values = zip(*layers, strict=True)
        return logits, final_states, torch.stack(new_keys), torch.stack(new_values)

    def decode_(self, token_embeddings: Tensor, positions: Tensor, key_cache: Tensor, value_cache: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, but writes the new tokens into the given caches and returns (logits, final_states) only.

        The shapes alone decide what runs, so that a call can be captured into a CUDA graph.
        """
        logits, final_states, _ = self._run(token_embeddings, positions, key_cache, value_cache, Tensor.scatter_)
        return logits, final_states

    def _run(
        self, x: Tensor, positions: Tensor, key_cache: Tensor, value_cache: Tensor, write: Write
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        _, _, heads, slots, head_width = key_cache.shape
        step = Step(
            cos=F.embedding(positions, self.cos).unsqueeze(1),  # [N, S] -> [N, 1, S, C / heads / 2]
            sin=F.embedding(positions, self.sin).unsqueeze(1),
            visible=self._visible(positions, slots),
            slots=positions[:, None, :, None].expand(-1, heads, -1, head_width),  # [N, S] -> [N, heads, S, C / heads]
            write=write,
        )
        caches = []
        for index, layer in enumerate(self.layers):
            x, keys, values = layer(x, step, key_cache[index], value_cache[index])
            caches.append((keys, values))
        final_states = self.norm(x[:, -1])  # [N, S, C] -> [N, C]
        return self.lm_head(final_states), final_states, caches

    def _visible(self, positions: Tensor, slots: int) -> Tensor:
        """[N, S] positions to [N, 1, S, slots] bool: which slots each token attends to."""
        age = positions[:, None, :, None] - torch.arange(slots, device=positions.device)
        window = self.config.language.sliding_window
        return age >= 0 if window is None else (age >= 0) & (age <= window)


@dataclass(frozen=True)
class Step:
    """What every layer needs to know about the new tokens."""

    cos: Tensor
    sin: Tensor
    visible: Tensor
    slots: Tensor
    write: Write


class Layer(nn.Module):
    """Pre-norm Phi-3 layer."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, config.rms_norm_eps)
        self.self_attn = Attention(config.width, config.heads)
        self.post_attention_layernorm = nn.RMSNorm(config.width, config.rms_norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(self, x: Tensor, step: Step, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed, keys, values = self.self_attn(self.input_layernorm(x), step, keys, values)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), keys, values


class Attention(nn.Module):
    """Rotary multi-head attention of new tokens over the cache that they are written to first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, step: Step, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [N, S, 3, heads, C / heads] -> 3 x [N, heads, S, C / heads]
        keys = step.write(keys, 2, step.slots, rotate(k, step).to(keys.dtype))
        values = step.write(values, 2, step.slots, v.to(values.dtype))
        mixed = F.scaled_dot_product_attention(rotate(q, step), keys, values, step.visible)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), keys, values  # [N, heads, S, C / heads] -> [N, S, C]


class Mlp(nn.Module):
    """SiLU-gated MLP; the first half of the fused projection is the gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)  # type: ignore[no-any-return]


def rotary_table(config: LanguageConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, [SLOTS.max, C / heads / 2] each.

    A float32 table gives every engine and precision the same angles: at position 3400 one ulp of a frequency turns by 2e-4 rad.
    """
    size = config.width // config.heads
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, size, 2).float() / size)
    angles = torch.outer(torch.arange(SLOTS.max).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, step: Step) -> Tensor:
    """Turns the pairs (i, i + half) of every head by the angles of their position ("rotate half")."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * step.cos - high * step.sin, high * step.cos + low * step.sin), dim=-1)
