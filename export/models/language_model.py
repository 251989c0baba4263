"""Language model: token embeddings, Phi-3 over a static key/value cache, projector of the [SEG] and [BOX] states (spec 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble.components import SLOTS
from ensemble.config import LanguageConfig, ModelConfig

from .layers import Call, Graph, OfWeights, by_kernels, on_tensor_cores, several

Write = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(cache of one layer [N, heads, slots, C / heads], slots [N, S], new tokens [N, heads, S, C / heads]) to the cache with the tokens."""
Caches = tuple[Tensor, Tensor]
"""Keys and values of one layer, [N, heads, slots, C / heads] each."""
Attend = Callable[[Tensor, "Step", Caches | None], tuple[Tensor, Tensor, Tensor]]
"""(queries, keys and values [N, S, 3, heads, C / heads] of new tokens, their step, caches) to (mixed values [N, heads, S, C / heads], keys,
values): those of the caches with the new tokens, or of a prompt, which has no caches before it, those of its tokens."""


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

    The cache is a ring: position p has slot p % slots. A query at position i sees the positions p with 0 <= i - p <= sliding_window; the
    other slots may hold anything finite. Work grows with the number of slots, of which a token needs `ring_slots` or, where fewer came
    before it, one for each.
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
        """Reads the new tokens of each sequence, no more than there are slots, leaving the given caches as they are.

        Args:
            token_embeddings: [N, S, C] float, text and visual tokens of N sequences.
            positions: [N, S] int64, ascending along S.
            key_cache, value_cache: [layers, N, heads, slots, C / heads] float, filled below each sequence's first position.
        Returns:
            logits: [N, vocabulary] float, after the last token of each sequence.
            final_states: [N, C] float, the state that `lm_head` turned into them.
            new_key_cache, new_value_cache: the caches with the new tokens.
        """
        visible, slots = self.visible(positions, key_cache.shape[3]), slots_of(positions, key_cache.shape[3])
        step = self._step(positions, over_cache(visible, slots, with_tokens))
        x, caches = token_embeddings, []
        for index, layer in enumerate(self.layers):
            x, *written = layer(x, step, (key_cache[index], value_cache[index]))
            caches.append(written)
        new_keys, new_values = zip(*caches, strict=True)
        return *self._finish(x), torch.stack(new_keys), torch.stack(new_values)

    def decode_(
        self,
        token_embeddings: Tensor,
        positions: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        compiled: Call | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, but writes the new tokens into the given caches and returns (logits, final_states) only.

        The shapes alone decide what runs, so that a call can be captured into a CUDA graph.

        Args:
            compiled: a `DecodeLayer` that stands for every layer.
        """
        visible, slots = self.visible(positions, key_cache.shape[3]), slots_of(positions, key_cache.shape[3])
        step, x = self._step(positions, over_cache(visible, slots, write_)), token_embeddings
        for index, layer in enumerate(self.layers):
            caches = key_cache[index], value_cache[index]
            if compiled is None:
                x, *_ = layer(x, step, caches)
            else:
                x, *_ = several(compiled(x, step.cos, step.sin, slots, visible, *caches, *layer.parameters()))
        return self._finish(x)

    def prefill_(
        self, token_embeddings: Tensor, key_cache: Tensor, value_cache: Tensor, compiled: Call | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reads whole prompts, as `decode_` would at positions 0, 1, ...; of a long one the last tokens stay in the caches.

        Args:
            compiled: a `PromptLayer` that stands for every layer.
        """
        positions = torch.arange(token_embeddings.shape[1], device=token_embeddings.device)[None]
        step, x = self._step(positions, over_prompt(positions, self.config.language.sliding_window)), token_embeddings
        for index, layer in enumerate(self.layers):
            x, *tokens = layer(x, step, None) if compiled is None else several(compiled(x, step.cos, step.sin, *layer.parameters()))
            for own, new in zip((key_cache[index], value_cache[index]), tokens, strict=True):
                fill_(own, new)
        return self._finish(x)

    def _step(self, positions: Tensor, attend: Attend) -> Step:
        # [N, S] -> [N, 1, S, C / heads / 2]
        return Step(F.embedding(positions, self.cos).unsqueeze(1), F.embedding(positions, self.sin).unsqueeze(1), attend)

    def _finish(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, final_states) after the last token."""
        final_states = self.norm(x[:, -1])  # [N, S, C] -> [N, C]
        return logits_of(self.lm_head, final_states), final_states

    def visible(self, positions: Tensor, slots: int) -> Tensor:
        """`visible_slots` with the model's window."""
        return visible_slots(positions, slots, self.config.language.sliding_window)


def logits_of(lm_head: nn.Linear, states: Tensor) -> Tensor:
    """[N, C] states to [N, vocabulary]. Several are columns of the product, up to a multiple of eight: the vocabulary is odd, and rows of
    odd length leave a GPU's tensor cores nothing but an old kernel, of a fourth of the speed.
    """
    count = states.shape[0]
    if not on_tensor_cores(lm_head.weight) or count == 1:
        return lm_head(states)  # type: ignore[no-any-return]
    columns = F.pad(states.to(lm_head.weight.dtype), (0, 0, 0, -count % 8)).T
    return (lm_head.weight @ columns)[:, :count].T


def visible_slots(positions: Tensor, slots: int, window: int | None) -> Tensor:
    """[N, S] positions to [N, 1, S, slots] bool: which slots of a ring each token attends to."""
    now = positions[:, None, :, None]
    age = slots_of(now - torch.arange(slots, device=positions.device), slots)
    return age <= now if window is None else (age <= now) & (age <= window)


def ring_slots(config: ModelConfig) -> int:
    """Slots of the cache that hold all that a token may see."""
    window = config.language.sliding_window
    return config.max_sequence if window is None else min(window + 1, config.max_sequence)


@dataclass(frozen=True)
class Step:
    """What every layer needs to know about the new tokens."""

    cos: Tensor
    sin: Tensor
    attend: Attend


def slots_of(positions: Tensor, slots: int) -> Tensor:
    """Where positions lie in a ring; by a tensor, since ONNX takes no size that varies as the divisor."""
    return positions % torch.full((), slots, dtype=positions.dtype, device=positions.device)


def over_cache(visible: Tensor, slots: Tensor, write: Write) -> Attend:
    """Attention over the caches, to which the new tokens are written first."""

    def attend(qkv: Tensor, step: Step, caches: Caches | None) -> tuple[Tensor, Tensor, Tensor]:
        assert caches is not None
        q, k, v = rotated(qkv, step)
        keys, values = (write(own, slots, new.to(own.dtype)) for own, new in zip(caches, (k, v), strict=True))
        return F.scaled_dot_product_attention(q, keys, values, visible), keys, values

    return attend


def by_ring_kernel(visible: Tensor, slots: Tensor) -> Attend:
    """`over_cache` for one new token of each answer, which is written in place, by a kernel of our own."""

    def attend(qkv: Tensor, step: Step, caches: Caches | None) -> tuple[Tensor, Tensor, Tensor]:
        from . import decode_kernels

        assert caches is not None
        return decode_kernels.ring_attention_(qkv, step.cos, step.sin, slots, *caches, visible), *caches

    return attend


def with_tokens(cache: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """`Write` that leaves the cache as it is."""
    return cache.scatter(2, slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]), new)


def write_(cache: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """`Write` in place; indexed, because compiled code copies the whole cache for a scatter."""
    cache[torch.arange(cache.shape[0], device=cache.device)[:, None], :, slots] = new.transpose(1, 2)
    return cache


def over_prompt(positions: Tensor, window: int | None) -> Attend:
    """Attention of a prompt's tokens, at positions [1, S] from 0 on, over each other; a GPU in half precision needs no mask for that."""
    mask = cache(lambda: visible_slots(positions, positions.shape[1], window))  # one for all layers

    def attend(qkv: Tensor, step: Step, caches: Caches | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rotated(qkv, step)
        if not on_tensor_cores(q):
            return F.scaled_dot_product_attention(q, k, v, mask()), k, v
        # Flash attention reads no keys beyond the window, where a mask would be read for every pair of tokens.
        length, by_token = q.shape[2], [x.transpose(1, 2) for x in (q, k, v)]  # [N, heads, S, C / heads] -> [N, S, heads, C / heads]
        options: dict[str, Any] = {"dropout_p": 0.0, "is_causal": True, "return_debug_mask": False, "window_size_left": window}
        mixed, *_ = torch.ops.aten._flash_attention_forward(*by_token, None, None, length, length, **options)
        return mixed.transpose(1, 2), k, v

    return attend


def fill_(cache: Tensor, new: Tensor) -> None:
    """Writes what a prompt's tokens leave in a ring, in place: [N, heads, S, C / heads] at positions 0, 1, ..., of which the last stay."""
    kept = new[:, :, -cache.shape[2] :]
    count = kept.shape[2]
    first = new.shape[2] % count if count < new.shape[2] else 0  # slot of the first that is kept
    cache[:, :, first:count] = kept[:, :, : count - first]
    cache[:, :, :first] = kept[:, :, count - first :]


class Layer(nn.Module):
    """Pre-norm Phi-3 layer."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, config.rms_norm_eps)
        self.self_attn = Attention(config.width, config.heads)
        self.post_attention_layernorm = nn.RMSNorm(config.width, config.rms_norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(self, x: Tensor, step: Step, caches: Caches | None) -> tuple[Tensor, Tensor, Tensor]:
        """[N, S, C] through the layer, and what `Attend` has of keys and values."""
        x, keys, values = self.self_attn(x, self.input_layernorm, step, caches)
        return self.mlp(x, self.post_attention_layernorm), keys, values


class DecodeLayer(OfWeights):
    """A `Layer` of a decode step; caches are written in place."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, visible: Tensor, keys: Tensor, values: Tensor, *weights: Tensor
    ) -> Tensor:
        """[N, 1, C] through the layer; the other arguments as in `Step`, `over_cache` and `Layer`."""
        attend = by_ring_kernel(visible, slots) if by_kernels(keys) else over_cache(visible, slots, write_)
        x, _, _ = self.through(weights, x, Step(cos, sin, attend), (keys, values))
        return x


class PromptLayer(OfWeights):
    """A `Layer` of a prompt.

    Args:
        layer: as of `OfWeights`.
        window: sliding window, in tokens; None: without.
    """

    def __init__(self, layer: Layer, window: int | None) -> None:
        super().__init__(layer)
        self.window = window

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[1, S, C] through the layer, and its keys and values [1, heads, S, C / heads]; cos and sin as in `Step`."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        result: tuple[Tensor, Tensor, Tensor] = self.through(weights, x, Step(cos, sin, over_prompt(positions, self.window)), None)
        return result


class Attention(nn.Module):
    """Adds rotary multi-head attention of new tokens and those before them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, norm: nn.RMSNorm, step: Step, caches: Caches | None) -> tuple[Tensor, Tensor, Tensor]:
        qkv = product(self.qkv_proj, x, norm=norm).unflatten(-1, (3, self.heads, -1))  # [N, S, 3 C] -> [N, S, 3, heads, C / heads]
        mixed, keys, values = step.attend(qkv, step, caches)
        return product(self.o_proj, mixed.transpose(1, 2).flatten(2), residual=x), keys, values  # [N, heads, S, C / heads] -> [N, S, C]


class Mlp(nn.Module):
    """Adds a SiLU-gated MLP; the first half of the fused projection is the gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, norm: nn.RMSNorm) -> Tensor:
        return product(self.down_proj, product(self.gate_up_proj, x, gated=True, norm=norm), residual=x)


def product(linear: nn.Linear, x: Tensor, gated: bool = False, norm: nn.RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
    """A linear layer without bias and what is around it; of a step's tokens, in half precision on a GPU, all by one kernel, with the norm
    if it is one token.

    Args:
        linear: the layer.
        x: [N, S, C]
        gated: the first half of what the layer gives is a gate for the other: silu(gate) * up.
        norm: what x goes through first.
        residual: what the result is added to.
    """
    if is_known(x.shape[1], 1) and by_kernels(linear.weight):
        from . import decode_kernels

        if is_known(x.shape[0], 1):
            gamma, eps = (norm.weight, norm.eps) if norm else (None, 0.0)
            return decode_kernels.row_product(x, linear.weight, gated, gamma, eps, residual)  # type: ignore[no-any-return]
        x = (norm(x) if norm else x).to(linear.weight.dtype)
        return decode_kernels.tokens_product(x, linear.weight, gated, residual)  # type: ignore[no-any-return]
    y: Tensor = linear(norm(x) if norm else x)
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


def is_known(size: int | torch.SymInt, value: int) -> bool:
    """Whether a size is the value in every call; those that vary, in a traced graph, are not."""
    return isinstance(size, int) and size == value


def rotary_table(config: LanguageConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, [SLOTS.max, C / heads / 2] each.

    A float32 table gives every engine and precision the same angles: at position 3400 one ulp of a frequency turns by 2e-4 rad.
    """
    size = config.width // config.heads
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, size, 2).float() / size)
    angles = torch.outer(torch.arange(SLOTS.max).float(), frequencies)
    return angles.cos(), angles.sin()


def rotated(qkv: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """[N, S, 3, heads, C / heads] to queries, keys and values [N, heads, S, C / heads]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return rotate(q, step).to(v.dtype), rotate(k, step).to(v.dtype), v


def rotate(x: Tensor, step: Step) -> Tensor:
    """Turns the pairs (i, i + half) of every head by the angles of their position ("rotate half")."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * step.cos - high * step.sin, high * step.cos + low * step.sin), dim=-1)
