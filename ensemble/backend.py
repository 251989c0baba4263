"""The one place that knows Triton's Python backend: requests to arrays, arrays to responses, errors to codes, calls to other models.

Only importable inside a model.py, where Triton provides `triton_python_backend_utils`.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from . import settings
from .components import components
from .config import ModelConfig
from .errors import ComponentFailed, SparrowError, from_wire, to_wire
from .pipeline import Pipeline
from .runner import Graph, Parameters, SequenceRequest, Session, Stateful
from .tensors import Arrays
from .tokenizer import Tokenizer


def read_inputs(request: Any) -> Arrays:
    """Inputs of a request by name, as copies."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def to_tensors(arrays: Arrays) -> list[Any]:
    return [pb_utils.Tensor(name, array) for name, array in arrays.items()]


def to_response(result: Arrays | SparrowError) -> Any:
    """A response, or the error of the request under its status code."""
    if isinstance(result, SparrowError):
        return to_error(result, to_wire(result))
    return pb_utils.InferenceResponse(to_tensors(result))


def to_error(error: SparrowError, text: str) -> Any:
    """An error response under the status code of `error`."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, getattr(pb_utils.TritonError, error.triton_code)))


def unexpected(name: str, error: Exception) -> ComponentFailed:
    """What the caller is told of a bug; the log gets the trace."""
    logging.getLogger(name).exception("request failed")
    return ComponentFailed(f"{name}: {type(error).__name__}: {error}. See the server's log.")


class Model:
    """What the model.py files have in common: name, version folder, sizes of the model and its settings.

    Set by `initialize`, which Triton calls once.
    """

    name: str
    folder: Path
    config: ModelConfig
    settings: dict[str, str]

    def initialize(self, args: dict[str, str]) -> None:
        faulthandler.enable()  # a crash of the process leaves a trace in the server's log
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        self.name = args["model_name"]
        self.folder = Path(args["model_repository"]) / args["model_version"]
        self.config = ModelConfig.load(self.folder / "config.json")
        parameters = json.loads(args["model_config"])["parameters"]
        self.settings = {key: value["string_value"] for key, value in parameters.items()}


class GraphModel(Model):
    """Serves one exported graph; requests of a batched graph run together."""

    open_graph: Callable[[dict[str, str], Path, str, ModelConfig], Graph]
    """Settings, folder, component and sizes to a loaded graph."""

    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        self.graph = self.open_graph(self.settings, self.folder, self.name, self.config)
        self.batched = json.loads(args["model_config"])["max_batch_size"] > 0

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = [read_inputs(request) for request in requests]
        if not self.batched:
            return [to_response(self._run(arrays)) for arrays in inputs]
        sizes = [len(next(iter(arrays.values()))) for arrays in inputs]
        outputs = self._run({name: np.concatenate([arrays[name] for arrays in inputs]) for name in inputs[0]})
        if isinstance(outputs, SparrowError):
            return [to_response(outputs) for _ in requests]
        bounds = np.cumsum(sizes)[:-1]
        parts = {name: np.split(array, bounds) for name, array in outputs.items()}
        return [to_response({name: part[index] for name, part in parts.items()}) for index in range(len(requests))]

    def _run(self, inputs: Arrays) -> Arrays | SparrowError:
        try:
            return self.graph.run(inputs)
        except Exception as error:
            return unexpected(self.name, error)


class FunctionModel(Model):
    """Serves a function of one request."""

    function: Callable[[Arrays, ModelConfig], Arrays]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [to_response(self._run(strip_batch(read_inputs(request)))) for request in requests]

    def _run(self, inputs: Arrays) -> Arrays | SparrowError:
        try:
            return add_batch(self.function(inputs, self.config))
        except SparrowError as error:
            return error
        except Exception as error:
            return unexpected(self.name, error)


class SequenceModel(Model):
    """Serves a component with state; steps of several sequences run together."""

    server: Stateful

    def execute(self, requests: list[Any]) -> list[Any]:
        try:
            results = self.server.step([self._read(request) for request in requests])
        except Exception as error:
            return [to_response(unexpected(self.name, error)) for _ in requests]
        return [to_response(result if isinstance(result, SparrowError) else add_batch(result)) for result in results]

    def _read(self, request: Any) -> SequenceRequest:
        flags = request.flags()
        return SequenceRequest(
            session_id=request.correlation_id(),
            inputs=strip_batch(read_inputs(request)),
            start=bool(flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START),
            end=bool(flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END),
            parameters=json.loads(request.parameters()),
        )


class StreamModel(Model):
    """Serves the pipeline: many responses to one request, several requests at once."""

    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        self._pipeline = Pipeline(self.config, Tokenizer(self.folder), BlsRunner(self.config))
        self._pool = ThreadPoolExecutor(settings.MAX_REQUESTS, thread_name_prefix=self.name)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._pool.submit(self._answer, read_inputs(request), json.loads(request.parameters()), request.get_response_sender())

    def finalize(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _answer(self, inputs: Arrays, parameters: Parameters, sender: Any) -> None:
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        responses = self._pipeline.answer(inputs, parameters)
        try:
            for response in responses:
                if sender.is_cancelled():
                    break
                sender.send(to_response(response))
            sender.send(flags=final)
        except Exception as error:
            failure = error if isinstance(error, SparrowError) else unexpected(self.name, error)
            # Streams carry an error's text only, so the status stands in it, in the form that unary errors are printed in. The
            # final flag goes with it: Triton 24.10 crashes when it follows an error that has closed the stream (ADR 0003).
            sender.send(to_error(failure, f"[StatusCode.{failure.grpc_status}] {to_wire(failure)}"), flags=final)
        finally:
            responses.close()


class BlsRunner:
    """Reaches the other models of this server.

    Decoupled calls are avoided: on Triton 24.10 they corrupt shared memory when other calls run beside them (ADR 0003), so
    components with state are asked one step at a time.

    Args:
        config: sizes of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._outputs = {name: [spec.name for spec in component.outputs] for name, component in components(config).items()}

    def run(self, component: str, inputs: Arrays) -> Arrays:
        return self._exec(component, inputs)

    def session(self, component: str, parameters: Parameters) -> Session:
        def send(request: SequenceRequest) -> Arrays:
            flags = request.start * pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
            flags |= request.end * pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END
            sequence = {"correlation_id": request.session_id, "flags": flags, "parameters": dict(request.parameters)}
            return strip_batch(self._exec(component, add_batch(request.inputs), **sequence))

        return Session(component, secrets.randbits(63) | 1, parameters, send)

    def _exec(self, component: str, inputs: Arrays, **sequence: Any) -> Arrays:
        request = pb_utils.InferenceRequest(
            model_name=component, requested_output_names=self._outputs[component], inputs=to_tensors(inputs), **sequence
        )
        response = request.exec()
        if response.has_error():
            raise from_wire(response.error().message())
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}


def add_batch(arrays: Arrays) -> Arrays:
    """[...] -> [1, ...]"""
    return {name: array[None] for name, array in arrays.items()}


def strip_batch(arrays: Arrays) -> Arrays:
    """[1, ...] -> [...]"""
    return {name: array[0] for name, array in arrays.items()}
