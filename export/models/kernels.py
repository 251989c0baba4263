"""Kernels in Triton for what a GPU's libraries are slow at, in half precision (docs/performance.md).

Imported while something is exported for a GPU (`layers.by_kernels`): torch brings Triton along there, and nowhere else.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

WINDOW_TOKENS = 64
"""Tokens of a program of `window_attention`: one window, or several small ones."""
PRODUCT_BLOCK = 1024
"""Weights that a program of `row_product` has in flight."""
SPLITS = 16
"""Programs that share the slots of one head in `ring_attention`: an answer has too few heads for all processors."""
SLOT_BLOCK = 32
"""Slots that a program of `ring_attention` reads at once."""


@triton.jit  # type: ignore[untyped-decorator]
def _attend_windows(  # type: ignore[no-untyped-def]
    qkv,
    mixed,
    SCALE: tl.constexpr,  # a plain number would arrive as float64 from compiled code
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    GRID: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One head of TOKENS tokens, which are counted window by window; maps of a batch lie below each other."""
    WINDOWS: tl.constexpr = GRID // WINDOW
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    window, inside = token // (WINDOW * WINDOW), token % (WINDOW * WINDOW)
    line = window // WINDOWS * WINDOW + inside // WINDOW
    cell = line * GRID + window % WINDOWS * WINDOW + inside % WINDOW
    channel = tl.arange(0, PADDED)[None, :]
    there = channel < HEAD
    queries = qkv + cell[:, None] * 3 * CHANNELS + tl.program_id(1) * HEAD + channel
    q = tl.load(queries, mask=there, other=0.0)
    k = tl.load(queries + CHANNELS, mask=there, other=0.0)
    v = tl.load(queries + 2 * CHANNELS, mask=there, other=0.0)
    scores = tl.dot(q, tl.trans(k)) * SCALE
    if TOKENS > WINDOW * WINDOW:
        scores = tl.where(window[:, None] == window[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    out = tl.dot(weights.to(v.dtype), v) / tl.sum(weights, 1)[:, None]
    tl.store(mixed + cell[:, None] * CHANNELS + tl.program_id(1) * HEAD + channel, out.to(v.dtype), mask=there)


@torch.library.triton_op("sparrow::window_attention", mutates_args={})
def window_attention(qkv: Tensor, heads: int, window: int) -> Tensor:
    """Every cell of a map attends to those of its window, read and written where they lie in the map.

    Args:
        qkv: [N, H, W, 3 C] float16 or bfloat16, queries, keys and values of all heads; see `takes_windows`.
        heads: 1 or more.
        window: cells along each side of a window.
    Returns:
        [N, H, W, C]
    """
    channels, grid = qkv.shape[3] // 3, qkv.shape[2]
    head = channels // heads
    mixed = torch.empty(*qkv.shape[:3], channels, dtype=qkv.dtype, device=qkv.device)
    torch.library.wrap_triton(_attend_windows)[(qkv.shape[0] * grid * grid // WINDOW_TOKENS, heads)](
        qkv.contiguous(),
        mixed,
        SCALE=math.log2(math.e) / math.sqrt(head),
        CHANNELS=channels,
        HEAD=head,
        PADDED=max(16, triton.next_power_of_2(head)),
        GRID=grid,
        WINDOW=window,
        TOKENS=WINDOW_TOKENS,
    )
    return mixed


def takes_windows(grid: int, window: int) -> bool:
    """Whether `window_attention` has programs for windows of a square map; of larger ones, cuDNN's are faster."""
    return grid % window == 0 and WINDOW_TOKENS % (window * window) == 0 and grid * grid % WINDOW_TOKENS == 0


@triton.jit  # type: ignore[untyped-decorator]
def _dot_rows(x, weight, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One value of the result: as fast as memory gives the row of weights that it takes."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    total_up = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        there = start + column < WIDTH
        values = tl.load(x + start + column, mask=there, other=0.0).to(weight.dtype.element_ty).to(tl.float32)
        total += tl.load(weight + row * WIDTH + start + column, mask=there, other=0.0).to(tl.float32) * values
        if GATED:
            total_up += tl.load(weight + (row + ROWS) * WIDTH + start + column, mask=there, other=0.0).to(tl.float32) * values
    result = tl.sum(total, 0).to(weight.dtype.element_ty)
    if GATED:
        gate = result.to(tl.float32)
        up = tl.sum(total_up, 0).to(weight.dtype.element_ty).to(tl.float32)
        result = ((gate * tl.sigmoid(gate)).to(weight.dtype.element_ty).to(tl.float32) * up).to(weight.dtype.element_ty)
    tl.store(out + row, result)


@torch.library.triton_op("sparrow::row_product", mutates_args={})
def row_product(x: Tensor, weight: Tensor, gated: bool = False) -> Tensor:
    """A linear layer of a single token, rounded to the weights' precision.

    Args:
        x: [1, 1, C] float.
        weight: [D, C] float16 or bfloat16.
        gated: the first half of the rows is a gate: silu(gate) * up, each rounded as the layers between would.
    Returns:
        [1, 1, D], or [1, 1, D / 2] where it is gated.
    """
    rows, width = weight.shape[0] // 2 if gated else weight.shape[0], weight.shape[1]
    out = torch.empty(1, 1, rows, dtype=weight.dtype, device=weight.device)
    torch.library.wrap_triton(_dot_rows)[(rows,)](
        x.contiguous(), weight, out, WIDTH=width, BLOCK=min(PRODUCT_BLOCK, triton.next_power_of_2(width)), GATED=gated, ROWS=rows
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _attend_slots(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    visible,
    mixed,
    most,
    totals,
    slots,
    sequence_stride,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A query of one head over every PARTS-th block of slots: what they mix, and how much weight they have."""
    pair, part = tl.program_id(0), tl.program_id(1)
    sequence = pair // HEADS
    channel = tl.arange(0, PADDED)
    there = channel < HEAD
    query = tl.load(q + pair * HEAD + channel, mask=there, other=0.0).to(tl.float32) * SCALE
    first = sequence.to(tl.int64) * sequence_stride + pair % HEADS * slots * HEAD
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mix = tl.zeros([BLOCK, PADDED], tl.float32)
    for start in range(part * BLOCK, slots, PARTS * BLOCK):
        slot = start + tl.arange(0, BLOCK)
        seen = tl.load(visible + sequence * slots + slot, mask=slot < slots, other=0) != 0
        place = first + slot[:, None] * HEAD + channel[None, :]
        wanted = (slot < slots)[:, None] & there[None, :]
        score = tl.sum(tl.load(keys + place, mask=wanted, other=0.0).to(tl.float32) * query[None, :], 1)
        score = tl.where(seen, score, float("-inf"))
        larger = tl.maximum(largest, score)
        bound = tl.where(larger == float("-inf"), 0.0, larger)
        decay, weight = tl.exp2(largest - bound), tl.exp2(score - bound)
        total = total * decay + weight
        mix = mix * decay[:, None] + weight[:, None] * tl.load(values + place, mask=wanted, other=0.0).to(tl.float32)
        largest = larger
    peak = tl.max(largest, 0)
    bound = tl.where(peak == float("-inf"), 0.0, peak)
    decay = tl.exp2(largest - bound)
    tl.store(mixed + (pair * PARTS + part) * HEAD + channel, tl.sum(mix * decay[:, None], 0), mask=there)
    tl.store(most + pair * PARTS + part, peak)
    tl.store(totals + pair * PARTS + part, tl.sum(total * decay, 0))


@torch.library.triton_op("sparrow::ring_attention", mutates_args={})
def ring_attention(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """One token of each of N answers over the slots of its cache.

    Args:
        q: [N, heads, 1, C / heads] float.
        keys, values: [N, heads, slots, C / heads] float16 or bfloat16; of answers with any distance between them.
        visible: [N, 1, 1, slots] bool, the slots to attend to, one of each answer at the least.
    Returns:
        [N, heads, 1, C / heads]
    """
    count, heads, slots, head = keys.shape
    pieces = (count * heads, SPLITS)
    mixed = torch.empty(*pieces, head, dtype=torch.float32, device=q.device)
    most, totals = (torch.empty(pieces, dtype=torch.float32, device=q.device) for _ in range(2))
    torch.library.wrap_triton(_attend_slots)[pieces](
        q.contiguous(),
        keys,
        values,
        visible.contiguous(),
        mixed,
        most,
        totals,
        slots,
        keys.stride(0),
        SCALE=math.log2(math.e) / math.sqrt(head),
        HEADS=heads,
        HEAD=head,
        PADDED=triton.next_power_of_2(head),
        PARTS=SPLITS,
        BLOCK=SLOT_BLOCK,
        num_warps=2,
    )
    weights = torch.exp2(most - most.amax(1, keepdim=True))
    together = (mixed * weights[..., None]).sum(1) / (totals * weights).sum(1, keepdim=True)
    return together.reshape(count, heads, 1, head).to(keys.dtype)
