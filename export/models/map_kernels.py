"""Kernels in Triton for what a GPU's libraries are slow at on SAM2's maps, in half precision (docs/performance.md).

Imported as those of decode_kernels.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

WINDOW_TOKENS = 64
"""Tokens of a program of `window_attention`: one window, or several small ones."""
HALVED_CELLS = 256
"""Of a program of `halve`."""
DEPTHWISE_CELLS, DEPTHWISE_CHANNELS = 64, 64
"""Of a program of `depthwise`."""
KEY_ROWS, KEY_PROGRAMS = 32, 2
"""Cells of a program of `rotated_keys`, and programs that share the maps."""


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
def _convolve_halving(  # type: ignore[no-untyped-def]
    x, weight, bias, out, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, OUT: tl.constexpr, CELLS: tl.constexpr
):
    """All channels of CELLS cells of the smaller maps; those of a batch lie below each other."""
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    line, column = cell // (WIDTH // 2), cell % (WIDTH // 2)
    within, channel = line % (HEIGHT // 2), tl.arange(0, OUT)
    total = tl.zeros([CELLS, OUT], tl.float32) + tl.load(bias + channel).to(tl.float32)[None, :]
    for tap in tl.static_range(9):
        down, right = tap // 3 - 1, tap % 3 - 1
        there = (within * 2 + down >= 0) & (column * 2 + right >= 0)  # sides are even: nothing is read behind the last line
        place = ((line * 2 + down) * WIDTH + column * 2 + right) * CHANNELS
        for source in tl.static_range(CHANNELS):
            values = tl.load(x + place + source, mask=there, other=0.0).to(tl.float32)
            total += values[:, None] * tl.load(weight + (channel * CHANNELS + source) * 9 + tap).to(tl.float32)[None, :]
    tl.store(out + cell[:, None] * OUT + channel[None, :], total.to(out.dtype.element_ty))


@torch.library.triton_op("sparrow::halve", mutates_args={})
def halve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3 by 3 convolution of stride 2 over maps of few channels and even sides.

    Args:
        x: [N, H, W, C]
        weight: [D, C, 3, 3], D a power of two.
        bias: [D]; all of them float16, or all bfloat16.
    Returns:
        [N, H / 2, W / 2, D]
    """
    count, height, width, channels = x.shape
    cells = math.gcd(height * width // 4, HALVED_CELLS)
    out = torch.empty(count, height // 2, width // 2, weight.shape[0], dtype=x.dtype, device=x.device)
    torch.library.wrap_triton(_convolve_halving)[(count * (height * width // 4 // cells),)](
        x.contiguous(), weight, bias, out, HEIGHT=height, WIDTH=width, CHANNELS=channels, OUT=weight.shape[0], CELLS=cells
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _convolve_depthwise(  # type: ignore[no-untyped-def]
    x, weight, bias, out, GRID: tl.constexpr, CHANNELS: tl.constexpr, SIDE: tl.constexpr, CELLS: tl.constexpr, CHUNK: tl.constexpr
):
    """CHUNK channels of CELLS cells; maps of a batch lie below each other."""
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    line, column = cell // GRID % GRID, cell % GRID
    channel = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([CELLS, CHUNK], tl.float32)
    for row in range(SIDE):
        down = row - SIDE // 2
        for tap in tl.static_range(SIDE):
            right = tap - SIDE // 2
            there = (line + down >= 0) & (line + down < GRID) & (column + right >= 0) & (column + right < GRID)
            place = (cell + down * GRID + right)[:, None] * CHANNELS + channel[None, :]
            values = tl.load(x + place, mask=there[:, None], other=0.0).to(tl.float32)
            total += values * tl.load(weight + (row * SIDE + tap) * CHANNELS + channel).to(tl.float32)[None, :]
    total += tl.load(bias + channel).to(tl.float32)[None, :]
    tl.store(out + cell[:, None] * CHANNELS + channel[None, :], total.to(out.dtype.element_ty))


@torch.library.triton_op("sparrow::depthwise", mutates_args={})
def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A depthwise convolution that keeps the size of square maps.

    Args:
        x: [N, G, G, C], C a multiple of 16.
        weight: [C, 1, S, S], S odd.
        bias: [C]; all of them float16, or all bfloat16.
    Returns:
        [N, G, G, C]
    """
    count, grid, _, channels = x.shape
    cells, chunk = math.gcd(grid * grid, DEPTHWISE_CELLS), math.gcd(channels, DEPTHWISE_CHANNELS)
    out = torch.empty(count, grid, grid, channels, dtype=x.dtype, device=x.device)
    torch.library.wrap_triton(_convolve_depthwise)[(count * grid * grid // cells, channels // chunk)](
        x.contiguous(),
        weight.flatten(1).t().contiguous(),  # [C, 1, S, S] -> [S * S, C]
        bias,
        out,
        GRID=grid,
        CHANNELS=channels,
        SIDE=weight.shape[3],
        CELLS=cells,
        CHUNK=chunk,
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _project_rotated(  # type: ignore[no-untyped-def]
    maps,
    pointers,
    weight,
    bias,
    cos,
    sin,
    out,
    objects,
    num_maps,
    num_pointers,
    CELLS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The keys of the same ROWS cells of every n-th map, of n programs, so that their angles are read once; behind the programs of the
    last cells come those of pointers, whose angles are none.
    """
    dtype: tl.constexpr = weight.dtype.element_ty
    block = tl.program_id(0)
    of_maps = block < CELLS // ROWS
    row = tl.where(of_maps, block, block - CELLS // ROWS) * ROWS + tl.arange(0, ROWS)
    column, half = tl.arange(0, WIDTH), tl.arange(0, HALF)
    weights = weight + 2 * half[None, :] * WIDTH + column[:, None]
    even_weights, odd_weights = tl.load(weights), tl.load(weights + WIDTH)
    even_bias, odd_bias = tl.load(bias + 2 * half).to(tl.float32)[None, :], tl.load(bias + 2 * half + 1).to(tl.float32)[None, :]
    cell, pointer = (row < tl.where(of_maps, CELLS, 0))[:, None], (row < tl.where(of_maps, 0, num_pointers))[:, None]
    angle = row[:, None] * HALF + half[None, :]
    c, s = tl.load(cos + angle, mask=cell, other=1.0), tl.load(sin + angle, mask=cell, other=0.0)
    keys = num_maps * CELLS + num_pointers
    height, count = tl.where(of_maps, CELLS, num_pointers), tl.where(of_maps, objects * num_maps, objects)
    for item in range(tl.program_id(1), count, tl.num_programs(1)):
        place = (item * height + row)[:, None] * WIDTH + column[None, :]
        x = tl.load(maps + place, mask=cell, other=0.0) + tl.load(pointers + place, mask=pointer, other=0.0)
        even = (tl.dot(x, even_weights) + even_bias).to(dtype).to(tl.float32)
        odd = (tl.dot(x, odd_weights) + odd_bias).to(dtype).to(tl.float32)
        first = tl.where(of_maps, item // num_maps * keys + item % num_maps * CELLS, item * keys + num_maps * CELLS)
        to = out + (first + row)[:, None] * 2 * HALF + half[None, :]
        tl.store(to, (even * c - odd * s).to(dtype), mask=cell | pointer)
        tl.store(to + HALF, (even * s + odd * c).to(dtype), mask=cell | pointer)


@torch.library.triton_op("sparrow::rotated_keys", mutates_args={})
def rotated_keys(maps: Tensor, pointers: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys of memory maps, projected, rounded and rotated as by `memory_attention.rotate`, and keys of pointers, projected, behind them.

    Args:
        maps: [O, M, cells, C], C and D powers of two of 16 and more.
        pointers: [O, P, C]
        weight: [D, C]
        bias: [D]; all of them float16, or all bfloat16.
        cos, sin: [cells, D / 2] float32
    Returns:
        [O, M * cells + P, D]: the first of neighbouring channels before the second ones.
    """
    objects, num_maps, cells, width = maps.shape
    rows = math.gcd(cells, KEY_ROWS)
    out = torch.empty(objects, num_maps * cells + pointers.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
    blocks = cells // rows + (pointers.shape[1] + rows - 1) // rows
    torch.library.wrap_triton(_project_rotated)[(blocks, KEY_PROGRAMS)](
        maps.contiguous(),
        pointers.contiguous(),
        weight,
        bias,
        cos,
        sin,
        out,
        objects,
        num_maps,
        pointers.shape[1],
        CELLS=cells,
        WIDTH=width,
        HALF=weight.shape[0] // 2,
        ROWS=rows,
    )
    return out
