"""A loss with its gradients as one CUDA graph: steps of many small kernels wait for the CPU otherwise."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Terms = dict[str, Tensor]
WARM_UP = 3
"""Runs before the capture, in which libraries choose their kernels."""


def weigh(terms: Terms) -> Tensor:
    """What is made small: terms whose names begin with "_" are only logged."""
    return torch.stack([term for name, term in terms.items() if not name.startswith("_")]).sum()


class Replay:
    """Calls a loss and adds its gradients to those of the parameters; on a GPU it is captured at the first call.

    Args:
        loss: of tensors, by name; their shapes never change, and it neither draws random numbers nor waits for the GPU.
        parameters: that it depends on.
    """

    def __init__(self, loss: Callable[..., Terms], parameters: Sequence[Tensor]) -> None:
        self._loss, self._parameters = loss, parameters
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._terms: Terms = {}
        self._gradients: list[tuple[Tensor, Tensor]] = []

    def __call__(self, **inputs: Tensor) -> Terms:
        """The terms."""
        if not next(iter(inputs.values())).is_cuda:
            terms = self._loss(**inputs)
            weigh(terms).backward()
            return detached(terms)
        if self._graph is None:
            self._capture(inputs)
            assert self._graph
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        for parameter, own_gradient in self._gradients:
            parameter.grad = own_gradient if parameter.grad is None else parameter.grad + own_gradient
        return {name: term.clone() for name, term in self._terms.items()}

    def _capture(self, inputs: dict[str, Tensor]) -> None:
        kept = [parameter.grad for parameter in self._parameters]
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                weigh(self._loss(**self._inputs)).backward()
                for parameter in self._parameters:
                    parameter.grad = None  # the next backward pass writes gradients instead of adding to them
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()  # an older graph that is collected during the capture would spoil it
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            terms = self._loss(**self._inputs)
            weigh(terms).backward()
        self._terms = detached(terms)
        self._gradients = [(parameter, parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        for parameter, gradient_before in zip(self._parameters, kept, strict=True):
            parameter.grad = gradient_before


def detached(terms: Terms) -> Terms:
    return {name: term.detach() for name, term in terms.items()}
