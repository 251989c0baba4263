"""Our GPU kernels in Triton's interpreter, against plain torch: the arithmetic, not the speed or what a GPU makes of it."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is there on Linux alone")

from export.models import decode_kernels, map_kernels
from export.models.hiera import join_windows, split_windows
from export.models.language_model import Step, over_cache, write_
from export.models.layers import split_heads
from export.models.memory_attention import rotated_keys

ROUNDING = 2e-5
"""Float32 sums in another order."""


@pytest.mark.parametrize(
    ("count", "grid", "window", "heads", "head"),
    [(1, 16, 8, 2, 72), (2, 16, 4, 4, 72), (2, 8, 2, 3, 16), (1, 16, 8, 2, 8), (3, 16, 1, 1, 32)],
    ids=["a_window", "several_windows", "power_of_two", "narrow_head", "single_cells"],
)
def test_window_attention_equals_attention_of_every_window(count, grid, window, heads, head):
    torch.manual_seed(0)
    qkv = torch.randn(count, grid, grid, 3 * heads * head)
    assert map_kernels.takes_windows(grid, window)
    q, k, v = (split_heads(x, heads) for x in split_windows(qkv, window).flatten(1, 2).chunk(3, -1))
    expected = join_windows(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), window, grid)
    torch.testing.assert_close(map_kernels.window_attention(qkv, heads, window), expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(("grid", "window"), [(16, 16), (14, 8), (4, 2), (16, 3)])
def test_windows_that_fill_no_program_are_left_to_others(grid, window):
    assert not map_kernels.takes_windows(grid, window)


@pytest.mark.parametrize("width", [300, 1024, 2500])
def test_row_product_equals_a_linear_layer(width):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, width), torch.randn(48, width) / width**0.5
    torch.testing.assert_close(decode_kernels.row_product(x, weight), F.linear(x, weight), atol=ROUNDING, rtol=0)
    gate, up = F.linear(x, weight).chunk(2, -1)
    torch.testing.assert_close(decode_kernels.row_product(x, weight, gated=True), F.silu(gate) * up, atol=ROUNDING, rtol=0)


def test_products_round_as_the_layers_between_would():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, 64), torch.randn(256, 64).half()  # the interpreter cuts bfloat16 off instead of rounding
    gate, up = F.linear(x.half(), weight).chunk(2, -1)
    for got in (decode_kernels.row_product(x, weight, gated=True), decode_kernels.tokens_product(x.half(), weight, gated=True)):
        assert got.dtype == torch.float16
        torch.testing.assert_close(got, F.silu(gate) * up, atol=0, rtol=2**-9)  # a sum that crosses a rounding boundary, times two
    residual = torch.randn(1, 1, 256)
    for got in (
        decode_kernels.row_product(x, weight, residual=residual),
        decode_kernels.tokens_product(x.half(), weight, residual=residual),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, residual + F.linear(x.half(), weight), atol=2**-6, rtol=0)  # an ulp of half at 16


def test_row_product_norms_what_it_takes_and_adds_to_what_is_there():
    torch.manual_seed(0)
    x, gamma, residual = torch.randn(1, 1, 300), torch.rand(300), torch.randn(1, 1, 48)
    weight = torch.randn(48, 300) / 300**0.5
    expected = residual + F.linear(F.rms_norm(x, (300,), gamma, 1e-5), weight)
    got = decode_kernels.row_product(x, weight, gamma=gamma, eps=1e-5, residual=residual)
    torch.testing.assert_close(got, expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("count", [2, 8, 21])
@pytest.mark.parametrize(("rows", "width"), [(48, 96), (8192, 64)], ids=["few_rows", "many_rows"])
def test_tokens_product_equals_a_linear_layer(count, rows, width):
    torch.manual_seed(0)
    x, weight = torch.randn(count, 1, width), torch.randn(rows, width) / width**0.5
    residual = torch.randn(count, 1, rows)
    torch.testing.assert_close(decode_kernels.tokens_product(x, weight), F.linear(x, weight), atol=ROUNDING, rtol=0)
    got = decode_kernels.tokens_product(x, weight, residual=residual)
    torch.testing.assert_close(got, residual + F.linear(x, weight), atol=ROUNDING, rtol=0)
    gate, up = F.linear(x, weight).chunk(2, -1)
    torch.testing.assert_close(decode_kernels.tokens_product(x, weight, gated=True), F.silu(gate) * up, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("slots", [40, 700])
def test_ring_attention_writes_the_token_and_attends_to_the_slots_in_sight(count, slots):
    """Of the first answers of a larger cache; some blocks of slots hold nothing that may be seen."""
    torch.manual_seed(0)
    heads, head = 2, 24
    keys, values = (torch.randn(2, 9, heads, slots, head)[1, :count] for _ in range(2))
    angles = torch.rand(count, 1, 1, head // 2) * 6
    qkv, places = torch.randn(count, 1, 3, heads, head), torch.randint(16, 32, (count, 1))
    visible = torch.rand(count, 1, 1, slots) > 0.3
    visible[0, ..., 1:] = False
    visible[..., 64:600] = False
    visible[..., 0] = True
    visible.scatter_(3, places[:, None, None], True)
    step = Step(angles.cos(), angles.sin(), over_cache(visible, places, write_))
    own = [cache.clone() for cache in (keys, values)]
    expected, *caches = step.attend(qkv, step, (keys, values))
    got = decode_kernels.ring_attention_(qkv, step.cos, step.sin, places, *own, visible)
    for one, other in zip((got, *own), (expected, *caches), strict=True):
        torch.testing.assert_close(one, other, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(("count", "grid", "channels", "side"), [(1, 8, 16, 7), (3, 12, 128, 3)])
def test_depthwise_equals_a_convolution(count, grid, channels, side):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(count, grid, grid, channels), torch.randn(channels, 1, side, side) / side, torch.randn(channels)
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=side // 2, groups=channels).permute(0, 2, 3, 1)
    torch.testing.assert_close(map_kernels.depthwise(x, weight, bias), expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(("objects", "maps", "pointers", "grid"), [(1, 1, 4, 8), (3, 7, 64, 16), (2, 5, 76, 8)])
def test_rotated_keys_equal_a_projection_that_is_rotated(objects, maps, pointers, grid):
    """More maps than programs that share them, and more pointers than a program has."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 64)
    angles = torch.rand(grid * grid, 32) * 6
    map_keys, pointer_keys = torch.randn(objects, maps, grid * grid, 16), torch.randn(objects, pointers, 16)
    with torch.no_grad():
        expected = rotated_keys(linear, map_keys, pointer_keys, angles.cos(), angles.sin())
        got = map_kernels.rotated_keys(map_keys, pointer_keys, linear.weight, linear.bias, angles.cos(), angles.sin())
    torch.testing.assert_close(got, expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(("channels", "out_channels", "height", "width"), [(1, 4, 16, 12), (4, 16, 8, 32)])
def test_halve_equals_a_convolution(channels, out_channels, height, width):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, height, width, channels), torch.randn(out_channels, channels, 3, 3) / 3, torch.randn(out_channels)
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=2, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(map_kernels.halve(x, weight, bias), expected, atol=ROUNDING, rtol=0)
