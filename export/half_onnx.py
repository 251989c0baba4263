"""How operators are written in ONNX in half precision: norms and softmax in float32, with a Cast before and behind them.

Autocast casts the operands of products only, and torch takes the rest in float32 inside of its kernels. A graph has to say so: since
release 10 TensorRT computes every operator in the type that the graph gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Translations = dict[Callable[..., Any], Callable[..., Any]]


def float_islands() -> Translations:
    """For `torch.onnx.export(custom_translation_table=...)`."""
    import onnx
    import onnxscript
    import torch

    opset: Any = onnxscript.opset18
    single = onnx.TensorProto.FLOAT
    lowest = onnx.helper.make_tensor("lowest", single, [], [-1e30])

    def layer_norm(x: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float = 1e-5, cudnn_enable: bool = True) -> Any:
        wide, scale, shift = (opset.Cast(tensor, to=single) for tensor in (x, weight, bias))
        normal, *_ = opset.LayerNormalization(wide, scale, shift, axis=-len(shape), epsilon=eps)
        return opset.CastLike(normal, x)

    def softmax(x: Any, dim: int, dtype: int | None = None) -> Any:
        return opset.CastLike(opset.Softmax(opset.Cast(x, to=single), axis=dim), x)

    def attention(
        query: Any,
        key: Any,
        value: Any,
        mask: Any = None,
        dropout: float = 0.0,
        causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        # Both operands are scaled: their product, the scores, has to stay within half precision.
        factor = opset.CastLike((scale or query.shape[-1] ** -0.5) ** 0.5, query)
        scores = opset.MatMul(opset.Mul(query, factor), opset.Transpose(opset.Mul(key, factor), perm=[0, 1, 3, 2]))
        wide = opset.Cast(scores, to=single)
        if mask is not None:
            wide = opset.Where(mask, wide, opset.Constant(value=lowest))
        return opset.MatMul(opset.CastLike(opset.Softmax(wide, axis=-1), value), value)

    aten = torch.ops.aten
    return {
        aten.layer_norm.default: layer_norm,
        aten.softmax.int: softmax,
        aten.scaled_dot_product_attention.default: attention,
    }
