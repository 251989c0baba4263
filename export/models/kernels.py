"""Kernels in Triton for what a GPU's libraries are slow at, in half precision (docs/performance.md).

Imported while something is exported for a GPU (`layers.by_kernels`): torch brings Triton along there, and nowhere else.

A kernel with `export.capture.EARLY` in its name begins while the one before it still runs. It may fetch weights at once; what other kernels
have written it reads where `_ready` says so, and it writes what follows from that, or where `_ready` says so.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

WINDOW_TOKENS = 64
"""Tokens of a program of `window_attention`: one window, or several small ones."""
PRODUCT_WEIGHTS = 16384
"""Weights that a program of `row_product` has in flight: some whole rows."""
TOKENS = 16
"""Tokens of a program of `tokens_product`: the least that tensor cores take."""
PARTS = 32
"""Programs of `ring_attention_` for each head, shared by the answers: one answer has too few heads for all processors."""
SLOT_BLOCK = 16
"""Slots that a program of `ring_attention_` reads at once."""


def begins_early(tensor: Tensor) -> bool:
    """Whether what has this tensor lets a kernel begin before the one before it has ended: GPUs do from Hopper on."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _begun(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """True, and the next kernel may begin.

    An instruction that has no effects but its result, as that of `_ready`: where there are some, as of Triton's own, torch 2.11 takes all
    that a kernel is given to be written to, weights too, and hands it copies.
    """
    return _answer_to("griddepcontrol.launch_dependents; mov.u32 $0, 1;", EARLY)


@triton.jit  # type: ignore[untyped-decorator]
def _ready(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """True, once the kernel before has ended: the mask of whatever is read of what it, or one before it, has written."""
    return _answer_to("griddepcontrol.wait; mov.u32 $0, 1;", EARLY)


@triton.jit  # type: ignore[untyped-decorator]
def _answer_to(INSTRUCTION: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    answer = tl.full([], 1, tl.int32)
    if EARLY:
        answer = tl.inline_asm_elementwise(INSTRUCTION, "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    return answer != 0


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
def _gated(gate, up, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu(gate) * up, each step rounded as by a layer of its own."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    return (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up


@triton.jit  # type: ignore[untyped-decorator]
def _dot_rows_early(  # type: ignore[no-untyped-def]
    x,
    weight,
    gamma,
    residual,
    out,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    ADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """ROWS values of the result, as fast as memory gives their rows of weights; these are on their way while the token is awaited."""
    begun = _begun(EARLY)
    dtype: tl.constexpr = weight.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    there = column < WIDTH
    place = weight + row[:, None] * WIDTH + column[None, :]
    wanted = tl.where(begun, there, False)[None, :]
    weights = tl.load(place, mask=wanted, other=0.0, eviction_policy="evict_first")
    if GATED:
        half = tl.num_programs(0) * ROWS * WIDTH
        weights_up = tl.load(place + half, mask=wanted, other=0.0, eviction_policy="evict_first")
    ready = _ready(EARLY)
    values = tl.load(x + column, mask=tl.where(ready, there, False), other=0.0).to(tl.float32)
    if NORMED:
        values *= tl.rsqrt(tl.sum(values * values, 0) / WIDTH + EPS) * tl.load(gamma + column, mask=there, other=0.0).to(tl.float32)
    values = values.to(dtype).to(tl.float32)
    result = tl.sum(weights.to(tl.float32) * values[None, :], 1)
    if GATED:
        result = _gated(result, tl.sum(weights_up.to(tl.float32) * values[None, :], 1), dtype)
    result = result.to(dtype)
    if ADDED:
        result = tl.load(residual + row, mask=tl.where(ready, row >= 0, False), other=0.0) + result.to(tl.float32)
    tl.store(out + row, result)


@torch.library.triton_op("sparrow::row_product", mutates_args={})
def row_product(
    x: Tensor,
    weight: Tensor,
    gated: bool = False,
    gamma: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer of a single token with what comes before and behind it, each rounded as in layers of their own.

    Args:
        x: [1, 1, C] float.
        weight: [D, C] float16 or bfloat16.
        gated: the first half of the rows is a gate: silu(gate) * up.
        gamma, eps: weight [C] and eps of an RMS norm that x goes through first.
        residual: [1, 1, D] float32, to which the result is added.
    Returns:
        [1, 1, D] in the weights' precision, or in the residual's; [1, 1, D / 2] where it is gated.
    """
    rows, width = weight.shape[0] // 2 if gated else weight.shape[0], weight.shape[1]
    padded = triton.next_power_of_2(width)
    together = math.gcd(rows, max(1, PRODUCT_WEIGHTS // (2 * padded if gated else padded)))
    out = torch.empty(1, 1, rows, dtype=weight.dtype if residual is None else residual.dtype, device=weight.device)
    torch.library.wrap_triton(_dot_rows_early)[(rows // together,)](
        x.contiguous(),
        weight,
        weight if gamma is None else gamma,
        weight if residual is None else residual.contiguous(),
        out,
        EPS=eps,
        WIDTH=width,
        PADDED=padded,
        ROWS=together,
        GATED=gated,
        NORMED=gamma is not None,
        ADDED=residual is not None,
        EARLY=begins_early(weight),
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _dot_tokens(  # type: ignore[no-untyped-def]
    x,
    weight,
    residual,
    out,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
):
    """ROWS values of the result of every token, with several blocks of weights on their way."""
    dtype: tl.constexpr = weight.dtype.element_ty
    row, rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.num_programs(0) * ROWS
    token, column = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    there = (token < count)[:, None]
    tokens = x + token[:, None] * WIDTH + column[None, :]
    weights = weight + row[:, None] * WIDTH + column[None, :]
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    total_up = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in tl.range(0, WIDTH, BLOCK, num_stages=4):
        values = tl.load(tokens + start, mask=there, other=0.0)
        total = tl.dot(values, tl.trans(tl.load(weights + start)), total)
        if GATED:
            total_up = tl.dot(values, tl.trans(tl.load(weights + rows * WIDTH + start)), total_up)
    result = _gated(total, total_up, dtype).to(dtype) if GATED else total.to(dtype)
    place = token[:, None] * rows + row[None, :]
    if ADDED:
        result = tl.load(residual + place, mask=there, other=0.0) + result.to(tl.float32)
    tl.store(out + place, result, mask=there)


@torch.library.triton_op("sparrow::tokens_product", mutates_args={})
def tokens_product(x: Tensor, weight: Tensor, gated: bool = False, residual: Tensor | None = None) -> Tensor:
    """A linear layer of one token each of a few answers; of more than some dozen tokens, cuBLAS is faster.

    Two warps: of a product with a side of 16, Triton 3.6 has made code for four that writes beside its memory. It does not begin early: its
    few programs, which fill a processor, would go where one is idle first, and leave others idle (docs/performance.md).

    Args:
        x: [N, 1, C] in the weights' precision.
        weight: [D, C] float16 or bfloat16, D and C multiples of 16.
        gated, residual: as of `row_product`; [N, 1, D] float32.
    Returns:
        as `row_product`, of every token
    """
    count, rows, width = x.shape[0], weight.shape[0] // 2 if gated else weight.shape[0], weight.shape[1]
    together, block = (32, 128) if rows > 4096 else (16, 512)  # few rows leave processors idle unless they are shared out finely
    together = math.gcd(rows, together)
    out = torch.empty(count, 1, rows, dtype=weight.dtype if residual is None else residual.dtype, device=weight.device)
    torch.library.wrap_triton(_dot_tokens)[(rows // together, (count + TOKENS - 1) // TOKENS)](
        x.contiguous(),
        weight,
        weight if residual is None else residual.contiguous(),
        out,
        count,
        WIDTH=width,
        BLOCK=math.gcd(width, block),
        ROWS=together,
        TOKENS=TOKENS,
        GATED=gated,
        ADDED=residual is not None,
        num_warps=2,
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _attend_ring_early(  # type: ignore[no-untyped-def]
    qkv,
    cos,
    sin,
    slots,
    keys,
    values,
    visible,
    mixed,
    most,
    totals,
    size,
    rows_apart,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A query of one head over every n-th block of its slots, of n programs: what they mix, and how much weight they have.

    The one that reads the new token's slot writes it first. Caches are counted in rows of HEAD channels: whatever the number of slots,
    it is plain that rows are aligned, without which loads take one channel each.
    """
    ready = _begun(EARLY) & _ready(EARLY)
    pair, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    sequence, head = pair // HEADS, pair % HEADS
    first = sequence.to(tl.int64) * rows_apart + head * size
    channel = tl.arange(0, PADDED)
    there = tl.where(ready, channel < HEAD, False)
    low = channel < HEAD // 2
    other = tl.where(low, channel + HEAD // 2, channel - HEAD // 2)
    angle = sequence * (HEAD // 2) + tl.minimum(channel, other)
    c = tl.load(cos + angle, mask=there, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=there, other=0.0).to(tl.float32)
    s = tl.where(low, -s, s)
    dtype: tl.constexpr = keys.dtype.element_ty
    new = qkv + (sequence * 3 * HEADS + head) * HEAD
    own = tl.load(new + channel, mask=there, other=0.0).to(tl.float32)
    query = own * c + tl.load(new + other, mask=there, other=0.0).to(tl.float32) * s
    query = query.to(dtype).to(tl.float32) * SCALE
    now = tl.load(slots + sequence, mask=ready, other=0)
    if now // BLOCK % parts == part:
        new += HEADS * HEAD
        own = tl.load(new + channel, mask=there, other=0.0).to(tl.float32)
        key = own * c + tl.load(new + other, mask=there, other=0.0).to(tl.float32) * s
        value = tl.load(new + HEADS * HEAD + channel, mask=there, other=0.0)
        tl.store(keys + (first + now) * HEAD + channel, key.to(dtype), mask=there)
        tl.store(values + (first + now) * HEAD + channel, value.to(dtype), mask=there)
        tl.debug_barrier()  # other threads of this program read it
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mix = tl.zeros([BLOCK, PADDED], tl.float32)
    for start in tl.range(part * BLOCK, size, parts * BLOCK, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK)
        place = (first + slot)[:, None] * HEAD + channel[None, :]
        wanted = (slot < size)[:, None] & there[None, :]
        k = tl.load(keys + place, mask=wanted, other=0.0)
        v = tl.load(values + place, mask=wanted, other=0.0)
        seen = tl.load(visible + sequence * size + slot, mask=tl.where(ready, slot < size, False), other=0) != 0
        score = tl.where(seen, tl.sum(k.to(tl.float32) * query[None, :], 1), float("-inf"))
        larger = tl.maximum(largest, score)
        bound = tl.where(larger == float("-inf"), 0.0, larger)
        decay, weight = tl.exp2(largest - bound), tl.exp2(score - bound)
        total = total * decay + weight
        mix = mix * decay[:, None] + weight[:, None] * v.to(tl.float32)
        largest = larger
    peak = tl.max(largest, 0)
    bound = tl.where(peak == float("-inf"), 0.0, peak)
    decay = tl.exp2(largest - bound)
    tl.store(mixed + (pair * parts + part) * HEAD + channel, tl.sum(mix * decay[:, None], 0), mask=there)
    tl.store(most + pair * parts + part, peak, mask=ready)
    tl.store(totals + pair * parts + part, tl.sum(total * decay, 0), mask=ready)


@triton.jit  # type: ignore[untyped-decorator]
def _join_parts_early(  # type: ignore[no-untyped-def]
    mixed, most, totals, out, parts, HEAD: tl.constexpr, PADDED: tl.constexpr, MOST_PARTS: tl.constexpr, EARLY: tl.constexpr
):
    """What the programs of one head have mixed, put together by their weights."""
    ready = _begun(EARLY) & _ready(EARLY)
    pair, part, channel = tl.program_id(0), tl.arange(0, MOST_PARTS), tl.arange(0, PADDED)
    place, there, wanted = pair * parts + part, channel < HEAD, tl.where(ready, part < parts, False)
    peaks = tl.load(most + place, mask=wanted, other=float("-inf"))
    weight = tl.exp2(peaks - tl.max(peaks, 0))
    total = tl.sum(tl.load(totals + place, mask=wanted, other=0.0) * weight, 0)
    mix = tl.load(mixed + place[:, None] * HEAD + channel[None, :], mask=wanted[:, None] & there[None, :], other=0.0)
    result = tl.sum(mix * weight[:, None], 0) / total
    tl.store(out + pair * HEAD + channel, result.to(out.dtype.element_ty), mask=there)


@torch.library.triton_op("sparrow::ring_attention_", mutates_args={"keys", "values"})
def ring_attention_(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """One token of each of N answers over the slots of its cache, into which it is written first.

    Args:
        qkv: [N, 1, 3, heads, C / heads] float16 or bfloat16, not rotated yet.
        cos, sin: [N, 1, 1, C / heads / 2] of the angles that queries and keys are turned by.
        slots: [N, 1] int64, where the tokens go.
        keys, values: [N, heads, slots, C / heads] as qkv; of answers with any number of slots between them.
        visible: [N, 1, 1, slots] bool, the slots to attend to, one of each answer at the least.
    Returns:
        [N, heads, 1, C / heads]
    """
    count, heads, size, head = keys.shape
    alone = isinstance(count, int) and count == 1  # a size that varies, in a traced graph, is not known
    parts = (PARTS + count - 1) // count
    pieces = (count * heads, parts)
    mixed = torch.empty(*pieces, head, dtype=torch.float32, device=qkv.device)
    most, totals = (torch.empty(pieces, dtype=torch.float32, device=qkv.device) for _ in range(2))
    out = torch.empty(count, heads, 1, head, dtype=keys.dtype, device=qkv.device)
    padded = triton.next_power_of_2(head)
    torch.library.wrap_triton(_attend_ring_early)[pieces](
        qkv.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        slots.contiguous(),
        keys,
        values,
        visible.contiguous(),
        mixed,
        most,
        totals,
        size,
        keys.stride(0) // head,
        SCALE=math.log2(math.e) / math.sqrt(head),
        HEADS=heads,
        HEAD=head,
        PADDED=padded,
        BLOCK=SLOT_BLOCK,
        STAGES=1 if alone else 3,
        EARLY=begins_early(keys),
        num_warps=1 if alone else 2,
    )
    torch.library.wrap_triton(_join_parts_early)[(count * heads,)](
        mixed, most, totals, out, parts, HEAD=head, PADDED=padded, MOST_PARTS=PARTS, EARLY=begins_early(keys), num_warps=1
    )
    return out
