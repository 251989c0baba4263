"""The one place that knows Triton's Python backend: requests to arrays, arrays to responses, errors to codes, calls to other models.

Only importable inside a model.py, where Triton provides `triton_python_backend_utils`.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import secrets
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from . import settings
from .components import components
from .config import ModelConfig
from .errors import SparrowError, from_wire, known, to_wire
from .features import FrameFeatures
from .frames import Preprocessor
from .graph import parts
from .metrics import Metric, Metrics
from .pipeline import Pipeline
from .runner import Device, DeviceArray, Graph, Host, Parameters, SequenceRequest, Session, Stateful
from .tensors import Arrays
from .tokenizer import Tokenizer

MPS_PRIORITY, BELOW_NORMAL = "CUDA_MPS_CLIENT_PRIORITY", "1"
"""Frames are encoded ahead of their masks: where models share a GPU by MPS, that gives way to what an answer or a frame waits for."""


def read_inputs(request: Any, device: Device | None = None) -> dict[str, DeviceArray]:
    """Inputs of a request by name, as copies; on the device those that are on a GPU."""
    return (device or Host()).adopt({tensor.name(): tensor for tensor in request.inputs()})


def to_tensors(arrays: Mapping[str, DeviceArray]) -> list[Any]:
    """What is on a GPU stays there: Triton hands it on to models that take it so, and copies it for everybody else."""
    return [
        pb_utils.Tensor(name, array) if isinstance(array, np.ndarray) else pb_utils.Tensor.from_dlpack(name, array)
        for name, array in arrays.items()
    ]


def to_response(result: Mapping[str, DeviceArray] | SparrowError) -> Any:
    """A response, or the error of the request under its status code."""
    if isinstance(result, SparrowError):
        return to_error(result, to_wire(result))
    return pb_utils.InferenceResponse(to_tensors(result))


def to_error(error: SparrowError, text: str) -> Any:
    """An error response under the status code of `error`."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, getattr(pb_utils.TritonError, error.triton_code)))


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


OpenGraphs = Callable[[dict[str, str], Path, Sequence[str], ModelConfig], dict[str, Graph]]
"""Settings, folder, components and sizes to loaded graphs."""
OpenDevice = Callable[[dict[str, str]], Device]
"""Settings to where graphs take and leave their arrays."""
OpenPreprocessor = Callable[[dict[str, str], ModelConfig], Preprocessor]
"""Settings and sizes to what prepares frames."""


class FramesModel(Model):
    """Serves frames of several requests through one graph."""

    open_graphs: OpenGraphs
    open_device: OpenDevice
    open_preprocessor: OpenPreprocessor

    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        os.environ.setdefault(MPS_PRIORITY, BELOW_NORMAL)
        (encoder,) = self.open_graphs(self.settings, self.folder, ["frame_encoder"], self.config).values()
        self._features = FrameFeatures(self.open_preprocessor(self.settings, self.config), encoder, self.open_device(self.settings))

    def execute(self, requests: list[Any]) -> list[Any]:
        results = self._features.step([strip_batch(read_inputs(request)) for request in requests])
        return [to_response(result if isinstance(result, SparrowError) else add_batch(result)) for result in results]


class FunctionModel(Model):
    """Serves a function of one request, which leaves the interpreter to others: requests that wait together run beside each other."""

    open_function: Callable[[dict[str, str], ModelConfig], Callable[[Arrays], dict[str, DeviceArray]]]

    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        self._function = self.open_function(self.settings, self.config)
        self._pool = ThreadPoolExecutor(settings.MAX_FRAME_BATCH, thread_name_prefix=self.name)

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = [strip_batch(read_inputs(request)) for request in requests]
        return [to_response(result) for result in self._pool.map(self._run, inputs)]

    def finalize(self) -> None:
        self._pool.shutdown()

    def _run(self, inputs: Arrays) -> dict[str, DeviceArray] | SparrowError:
        try:
            return add_batch(self._function(inputs))
        except Exception as error:
            return known(self.name, error)


class SequenceModel(Model):
    """Serves a component with state; steps of several sequences run together."""

    server: Stateful
    device: Device = Host()
    """Where it takes inputs that are on a GPU."""

    triton_idle_s: float
    """Seconds without a request after which Triton forgets a sequence."""

    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        batching = json.loads(args["model_config"])["sequence_batching"]
        self.triton_idle_s = int(batching["max_sequence_idle_microseconds"]) / 1e6
        self.server = self.open_server()
        self.lock, self._closing, self._idle = Lock(), Event(), False
        self._sweeper = Thread(target=self._keep_sweeping, name=f"{self.name} sweeper", daemon=True)
        self._sweeper.start()

    def open_server(self) -> Stateful:
        """The component, loaded."""
        raise NotImplementedError

    def finalize(self) -> None:
        self._closing.set()
        self._sweeper.join()

    def sweep(self) -> None:
        """What is due once in a while."""
        with self.lock:
            self.server.expire()
            if self._idle:  # a request that comes next waits for its memory: 15 ms at full size
                self.device.trim()
            self._idle = True

    def _keep_sweeping(self) -> None:
        while not self._closing.wait(settings.SWEEP_S):
            try:
                self.sweep()
            except Exception:
                logging.getLogger(self.name).exception("sweep failed")

    def execute(self, requests: list[Any]) -> list[Any]:
        try:
            with self.lock:
                self._idle = False
                results = self.server.step([self._read(request) for request in requests])
        except Exception as error:
            return [to_response(known(self.name, error)) for _ in requests]
        return [to_response(result if isinstance(result, SparrowError) else add_batch(result)) for result in results]

    def _read(self, request: Any) -> SequenceRequest:
        flags = request.flags()
        return SequenceRequest(
            session_id=request.correlation_id(),
            inputs=strip_batch(read_inputs(request, self.device)),
            start=bool(flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START),
            end=bool(flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END),
            cancelled=request.is_cancelled(),
            parameters=json.loads(request.parameters()),
        )


class StreamModel(Model):
    """Serves the pipeline: many responses to one request, several requests at once."""

    open_graphs: OpenGraphs
    open_device: OpenDevice
    open_preprocessor: OpenPreprocessor

    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        names = [part.name for part in parts(components(self.config), self.name)]
        graphs = self.open_graphs(self.settings, self.folder, names, self.config)
        self._device = self.open_device(self.settings)
        runner = BlsRunner(self.config, graphs, self._device)
        self._pipeline = Pipeline(self.config, Tokenizer(self.folder), runner, self.open_preprocessor(self.settings, self.config))
        self._pool = ThreadPoolExecutor(settings.MAX_REQUESTS, thread_name_prefix=self.name)
        self._under_way, self._lock = 0, Lock()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            with self._lock:
                self._under_way += 1
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
            failure = known(self.name, error)
            # Streams carry an error's text only, so the status stands in it, in the form that unary errors are printed in. The
            # final flag goes with it: Triton 24.10 crashes when it follows an error that has closed the stream (ADR 0003).
            sender.send(to_error(failure, f"[StatusCode.{failure.grpc_status}] {to_wire(failure)}"), flags=final)
        finally:
            responses.close()
            with self._lock:
                self._under_way -= 1
                if not self._under_way:
                    self._device.trim()


class BlsRunner:
    """Reaches the graphs in this process and the other models of this server.

    Decoupled calls are avoided: on Triton 24.10 they corrupt shared memory when other calls run beside them (ADR 0003), so
    components with state are asked one step at a time.

    Args:
        config: sizes of the model.
        graphs: those in this process; one call of each at a time, since requests would share its memory on a GPU.
        device: of the graphs; what comes from a GPU stays there.
    """

    def __init__(self, config: ModelConfig, graphs: Mapping[str, Graph], device: Device) -> None:
        self._outputs = {name: [spec.name for spec in component.outputs] for name, component in components(config).items()}
        self._graphs, self._device = graphs, device
        self._locks: defaultdict[str, Lock] = defaultdict(Lock)

    @property
    def on_gpu(self) -> bool:
        return self._device.on_gpu

    def run(self, component: str, inputs: Arrays, on_device: bool = False) -> dict[str, DeviceArray]:
        on_device = on_device and self.on_gpu
        if component not in self._graphs:
            gpu = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_GPU, 0)
            return strip_batch(self._exec(component, add_batch(inputs), **({"preferred_memory": gpu} if on_device else {})))
        graph = self._graphs[component]
        with self._locks[component]:
            return self._device.run(graph, inputs) if on_device else graph.run(inputs)

    def join(self, arrays: Sequence[DeviceArray]) -> DeviceArray:
        return self._device.join(arrays)

    def session(self, component: str, parameters: Parameters) -> Session:
        def send(request: SequenceRequest) -> Arrays:
            flags = request.start * pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
            flags |= request.end * pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END
            sequence = {"correlation_id": request.session_id, "flags": flags, "parameters": dict(request.parameters)}
            if any(not isinstance(array, np.ndarray) for array in request.inputs.values()):
                self._device.wait()
            return strip_batch(self._exec(component, add_batch(request.inputs), **sequence))

        return Session(component, secrets.randbits(63) | 1, parameters, send)

    def _exec(self, component: str, inputs: Mapping[str, DeviceArray], **more: Any) -> dict[str, DeviceArray]:
        request = pb_utils.InferenceRequest(
            model_name=component, requested_output_names=self._outputs[component], inputs=to_tensors(inputs), **more
        )
        response = request.exec()
        if response.has_error():
            raise from_wire(response.error().message())
        return self._device.adopt({tensor.name(): tensor for tensor in response.output_tensors()})


class TritonMetrics:
    """Families of figures on Triton's /metrics endpoint.

    Args:
        families: all that will be passed on.
    """

    def __init__(self, families: Sequence[Metric]) -> None:
        # Families live as long as somebody holds them.
        self._families = {
            metric: pb_utils.MetricFamily(metric.name, metric.doc, getattr(pb_utils.MetricFamily, metric.kind.upper()))
            for metric in families
        }
        self._figures = {(metric, value): self._figure(metric, value) for metric in families for value in metric.values}

    def _figure(self, metric: Metric, value: str) -> Any:
        labels = {metric.label: value} if metric.label else {}
        buckets = {"buckets": list(metric.buckets)} if metric.buckets else {}
        return self._families[metric].Metric(labels=labels, **buckets)

    def pass_on(self, taken: Metrics) -> None:
        """Brings the endpoint up to date; every figure is a message to the server."""
        for metric, value in taken.gauges.items():
            self._figures[metric, ""].set(value)
        for key, value in taken.counts.items():
            self._figures[key].increment(value)
        for metric, values in taken.observations.items():
            for value in values:
                self._figures[metric, ""].observe(value)


def add_batch(arrays: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
    """[...] -> [1, ...]"""
    return {name: array[None] for name, array in arrays.items()}


def strip_batch(arrays: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
    """[1, ...] -> [...]"""
    return {name: array[0] for name, array in arrays.items()}
