"""How operators are written in ONNX where the exporter's own way is slow, or says too little.

Attention: the exporter lays every key out anew before it is transposed, which no runtime undoes; a plain transposition becomes a part of
the product.

Half precision: norms and softmax are in float32, with a Cast before and behind them. Autocast casts the operands of products only, and
torch takes the rest in float32 inside of its kernels. A graph has to say so: since release 10 TensorRT computes every operator in the type
that the graph gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Translations = dict[Callable[..., Any], Callable[..., Any]]


def translations(half: bool) -> Translations:
    """For `torch.onnx.export(custom_translation_table=...)`; `half`: of a graph whose products are in half precision."""
    import onnx
    import onnxscript
    import torch

    opset: Any = onnxscript.opset18
    single = onnx.TensorProto.FLOAT
    lowest = onnx.helper.make_tensor("lowest", single, [], [-1e30])

    def widened(x: Any) -> Any:
        return opset.Cast(x, to=single) if half else x

    def narrowed(x: Any, like: Any) -> Any:
        return opset.CastLike(x, like) if half else x

    def layer_norm(x: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float = 1e-5, cudnn_enable: bool = True) -> Any:
        normal, *_ = opset.LayerNormalization(*map(widened, (x, weight, bias)), axis=-len(shape), epsilon=eps)
        return narrowed(normal, x)

    def softmax(x: Any, dim: int, dtype: int | None = None) -> Any:
        return narrowed(opset.Softmax(widened(x), axis=dim), x)

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
        scores = widened(opset.MatMul(opset.Mul(query, factor), opset.Transpose(opset.Mul(key, factor), perm=[0, 1, 3, 2])))
        if mask is not None:
            scores = opset.Where(mask, scores, opset.Constant(value=lowest))
        return opset.MatMul(narrowed(opset.Softmax(scores, axis=-1), value), value)

    aten = torch.ops.aten
    norms: Translations = {aten.layer_norm.default: layer_norm, aten.softmax.int: softmax} if half else {}
    return {aten.scaled_dot_product_attention.default: attention, **norms}
