"""The language model in 8 or 4 bits by bitsandbytes: what `chat.py --load_in_8bit` and `--load_in_4bit` ask for (spec 9)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .models.language_model import LanguageDecoder

INT8_THRESHOLD = 6.0
"""Input channels with a larger magnitude skip the 8-bit product: `llm_int8_threshold` of transformers' BitsAndBytesConfig."""


def quantize(decoder: LanguageDecoder, bits: int, device: torch.device | str) -> None:
    """Moves a decoder to a device with the linear layers of its blocks quantised; all else, `lm_head` too, keeps its dtype.

    Each layer is quantised on its way: the device never holds more than one of them in float. In 8 bits, the outliers of any token
    of a call are those of all its tokens: results of other batches and of prefill agree no closer than 8 bits with float.

    Args:
        decoder: on the CPU, with its weights and in the dtype that it will be run in.
        bits: 8 (LLM.int8(): a scale per row of weights and per token) or 4 (NF4: a scale in 8 bits per 64 weights).
        device: cpu or cuda.
    Raises:
        ValueError: other bits.
        ModuleNotFoundError: bitsandbytes is missing; says how to install it.
    """
    if bits not in (8, 4):
        raise ValueError(f"language_decoder: got {bits} bits, expected 8 or 4.")
    from torch import nn

    # It warns at every product that a float32 input is rounded to float16 before to int8, which costs no accuracy.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes.nn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("bitsandbytes: not installed. Install it: pip install 'sparrow-serving[quantized]'") from error
    for name, linear in list(decoder.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            decoder.layers.set_submodule(name, quantized_linear(linear, bits, bitsandbytes.nn))
    decoder.to(device)


def quantized_linear(linear: nn.Linear, bits: int, kinds: Any) -> nn.Linear:
    """A layer of `kinds` (bitsandbytes.nn) with the float weights of another one, which moving it to a device quantises."""
    sizes = linear.in_features, linear.out_features
    if bits == 8:
        layer = kinds.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=INT8_THRESHOLD, device="meta")
    else:
        dtype = linear.weight.dtype
        layer = kinds.Linear4bit(*sizes, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4", device="meta")
    layer.weight = type(layer.weight)(linear.weight.data, requires_grad=False, **vars(layer.weight))
    return cast("nn.Linear", layer.eval())
