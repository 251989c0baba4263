"""Kernels in Triton for a step of the language model, in half precision (docs/performance.md).

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

PRODUCT_WEIGHTS = 16384
"""Weights that a program of `row_product` has in flight: some whole rows."""
TOKENS = 8
"""Tokens of a program of `tokens_product`: the least that tensor cores take."""
PARTS = 32
"""Programs of `ring_attention_` for each head, shared by the answers: one answer has too few heads for all processors."""
SLOT_BLOCK = 16
"""Slots that a program of `ring_attention_` reads at once."""
PIECE = 32
"""Channels of a slot that are read at once: at 8 a thread, four threads share a slot."""


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
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
):
    """ROWS values of the result of every token, with several blocks of weights on their way."""
    dtype: tl.constexpr = weight.dtype.element_ty
    row, rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.num_programs(0) * ROWS
    token, column = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    there = (token < count)[None, :]
    tokens = x + token[None, :] * WIDTH + column[:, None]
    weights = weight + row[:, None] * WIDTH + column[None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    total_up = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in tl.range(0, WIDTH, BLOCK, num_stages=STAGES):
        values = tl.load(tokens + start, mask=there, other=0.0)
        total = tl.dot(tl.load(weights + start), values, total)
        if GATED:
            total_up = tl.dot(tl.load(weights + rows * WIDTH + start), values, total_up)
    result = _gated(total, total_up, dtype).to(dtype) if GATED else total.to(dtype)
    place = token[None, :] * rows + row[:, None]
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
    if rows > 4096:
        together, block, stages = 32, 128, 4
    else:  # few rows leave processors idle unless they are shared out finely, or each takes long
        together, block, stages = (32, 256, 6) if width > rows else (16, 512, 4)
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
        STAGES=stages,
        GATED=gated,
        ADDED=residual is not None,
        num_warps=2,
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _pieces(row, channel, there, HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """The channels from `row` on, HEAD of them, in pieces as long as `channel`."""
    pieces = ()
    for start in tl.static_range(0, HEAD, channel.shape[-1]):
        pieces += (tl.load(row + start + channel, mask=there, other=0.0),)  # type: ignore[assignment]
    return pieces


@triton.jit  # type: ignore[untyped-decorator]
def _rotated(row, cos, sin, channel, there, HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """`_pieces` of what the angles make of a row, float32: each half of the channels with the other."""
    HALF: tl.constexpr = HEAD // 2
    pieces = ()
    for start in tl.static_range(0, HEAD, channel.shape[0]):
        own = start + channel
        low = own < HALF
        other, angle = tl.where(low, own + HALF, own - HALF), tl.where(low, own, own - HALF)
        c = tl.load(cos + angle, mask=there, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=there, other=0.0).to(tl.float32)
        this = tl.load(row + own, mask=there, other=0.0).to(tl.float32)
        that = tl.load(row + other, mask=there, other=0.0).to(tl.float32)
        pieces += (this * c + that * tl.where(low, -s, s),)  # type: ignore[assignment]
    return pieces


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
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A query of one head over every n-th block of its slots, of n programs: what they mix, and how much weight they have.

    The one that reads the new token's slot writes it first. A head's channels are read in pieces of a power of two: nothing is filled up,
    and few threads share a slot. Caches are counted in rows of HEAD channels: whatever the number of slots, it is plain that rows are
    aligned, without which loads take one channel each.
    """
    ready = _begun(EARLY) & _ready(EARLY)
    pair, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    sequence, head = pair // HEADS, pair % HEADS
    first = sequence.to(tl.int64) * rows_apart + head * size
    channel = tl.arange(0, PIECE)
    there = tl.where(ready, channel < PIECE, False)  # all of them: a mask of their shape
    cos += sequence * (HEAD // 2)
    sin += sequence * (HEAD // 2)
    dtype: tl.constexpr = keys.dtype.element_ty
    new = qkv + (sequence * 3 * HEADS + head) * HEAD
    own = _rotated(new, cos, sin, channel, there, HEAD)
    query = ()
    for piece in tl.static_range(HEAD // PIECE):
        query += (own[piece].to(dtype).to(tl.float32) * SCALE,)  # type: ignore[assignment]
    now = tl.load(slots + sequence, mask=ready, other=0)
    if now // BLOCK % parts == part:
        key = _rotated(new + HEADS * HEAD, cos, sin, channel, there, HEAD)
        value = _pieces(new + 2 * HEADS * HEAD, channel, there, HEAD)
        for piece in tl.static_range(HEAD // PIECE):
            place = (first + now) * HEAD + piece * PIECE + channel
            tl.store(keys + place, key[piece].to(dtype), mask=there)
            tl.store(values + place, value[piece].to(dtype), mask=there)
        tl.debug_barrier()  # other threads of this program read it
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mix = ()
    for _ in tl.static_range(HEAD // PIECE):
        mix += (tl.zeros([BLOCK, PIECE], tl.float32),)  # type: ignore[assignment]
    for start in range(part * BLOCK, size, parts * BLOCK):
        slot = start + tl.arange(0, BLOCK)
        row = (first + slot)[:, None] * HEAD
        wanted = (slot < size)[:, None] & there[None, :]
        k = _pieces(keys + row, channel[None, :], wanted, HEAD)
        v = _pieces(values + row, channel[None, :], wanted, HEAD)
        seen = tl.load(visible + sequence * size + slot, mask=tl.where(ready, slot < size, False), other=0) != 0
        products = tl.zeros([BLOCK, PIECE], tl.float32)
        for piece in tl.static_range(HEAD // PIECE):
            products += k[piece].to(tl.float32) * query[piece][None, :]
        score = tl.where(seen, tl.sum(products, 1), float("-inf"))
        larger = tl.maximum(largest, score)
        bound = tl.where(larger == float("-inf"), 0.0, larger)
        decay, weight = tl.exp2(largest - bound), tl.exp2(score - bound)
        total = total * decay + weight
        mixes = ()
        for piece in tl.static_range(HEAD // PIECE):
            mixes += (mix[piece] * decay[:, None] + weight[:, None] * v[piece].to(tl.float32),)  # type: ignore[assignment]
        mix, largest = mixes, larger
    peak = tl.max(largest, 0)
    bound = tl.where(peak == float("-inf"), 0.0, peak)
    decay = tl.exp2(largest - bound)
    for piece in tl.static_range(HEAD // PIECE):
        place = (pair * parts + part) * HEAD + piece * PIECE + channel
        tl.store(mixed + place, tl.sum(mix[piece] * decay[:, None], 0), mask=there)
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
        PIECE=math.gcd(head, PIECE),
        BLOCK=SLOT_BLOCK,
        EARLY=begins_early(keys),
        num_warps=1 if alone else 2,
    )
    torch.library.wrap_triton(_join_parts_early)[(count * heads,)](
        mixed, most, totals, out, parts, HEAD=head, PADDED=padded, MOST_PARTS=PARTS, EARLY=begins_early(keys), num_warps=1
    )
    return out
