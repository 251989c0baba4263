"""Arrays to Triton's gRPC messages and back; no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse
from tritonclient.utils import (
    TRITON_RESERVED_REQUEST_PARAMS,
    TRITON_RESERVED_REQUEST_PARAMS_PREFIX,
    deserialize_bytes_tensor,
    np_to_triton_dtype,
    triton_to_np_dtype,
)

from ._errors import InvalidInput
from ._stubs import INPUTS

SPARROW, SPARROW_TRACK = "sparrow", "sparrow_track"

CHANNEL_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
"""No limit: a clip is one message."""

Tensors = Mapping[str, NDArray[Any]]

PARAMETER_FIELDS = {str: "string_param", bool: "bool_param", int: "int64_param", float: "double_param"}
"""Type of a parameter's value to the field that carries it; bool before int, which it is a kind of."""


@dataclass(frozen=True)
class Step:
    """A request's part in a session.

    Args:
        session_id: correlation id.
        start, end: whether it is the first, the last.
    """

    session_id: int
    start: bool = False
    end: bool = False


@dataclass(frozen=True)
class Place:
    """Where the server finds a tensor's content instead of in the message.

    Args:
        region: name under which the shared memory is registered.
        offset: bytes into it.
    """

    region: str
    offset: int


def to_request(
    model: str,
    tensors: Tensors,
    parameters: Mapping[str, Any],
    request_id: str,
    step: Step | None = None,
    places: Mapping[str, Place] | None = None,
) -> ModelInferRequest:
    """The message of a request.

    Args:
        model: public model.
        tensors: its inputs, under the dtypes that the server expects; it checks their shapes itself.
        parameters: request parameters: text, bool, int or float.
        request_id: comes back with the responses.
        step: for a request of a session.
        places: tensors that are in shared memory already.
    Raises:
        InvalidInput: a tensor of another dtype, or a parameter that cannot be sent.
    """
    request = ModelInferRequest(model_name=model, id=request_id)
    for name, array in tensors.items():
        expected = INPUTS[model][name]
        if np_to_triton_dtype(array.dtype) != expected:
            raise InvalidInput(f"{model}.{name}: got dtype {array.dtype}, expected {expected}. Convert it.", model, request_id)
        tensor = request.inputs.add(name=name, datatype=expected, shape=array.shape)
        if places and name in places:
            tensor.parameters["shared_memory_region"].string_param = places[name].region
            tensor.parameters["shared_memory_offset"].int64_param = places[name].offset
            tensor.parameters["shared_memory_byte_size"].int64_param = array.nbytes
        else:
            request.raw_input_contents.append(content(array))
    for name, value in parameters.items():
        if name in TRITON_RESERVED_REQUEST_PARAMS or name.startswith(TRITON_RESERVED_REQUEST_PARAMS_PREFIX):
            raise InvalidInput(f'{model}: got an option "{name}", which is a name of Triton\'s own. Remove it.', model, request_id)
        field = next((field for kind, field in PARAMETER_FIELDS.items() if isinstance(value, kind)), None)
        if field is None:
            kinds = ", ".join(kind.__name__ for kind in PARAMETER_FIELDS)
            raise InvalidInput(
                f'{model}: got option "{name}" of type {type(value).__name__}, expected one of {kinds}. Mend it.', model, request_id
            )
        setattr(request.parameters[name], field, value)
    if step:
        request.parameters["sequence_id"].int64_param = step.session_id
        request.parameters["sequence_start"].bool_param = step.start
        request.parameters["sequence_end"].bool_param = step.end
    return request


def content(array: NDArray[Any]) -> bytes:
    """A tensor's bytes; each text has its length before it."""
    if array.dtype == object:
        return b"".join(len(text).to_bytes(4, "little") + text for text in array.flat)
    return array.tobytes()


def from_response(response: ModelInferResponse) -> dict[str, NDArray[Any]]:
    """The outputs of a response by name; texts are bytes. The arrays are read-only."""
    return {
        output.name: array_from_content(raw, output.datatype).reshape(list(output.shape))
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def array_from_content(raw: bytes, datatype: str) -> NDArray[Any]:
    array: NDArray[Any] = deserialize_bytes_tensor(raw) if datatype == "BYTES" else np.frombuffer(raw, triton_to_np_dtype(datatype))
    return array


def is_last(response: ModelInferResponse) -> bool:
    """Whether no response to the same request follows."""
    return bool(response.parameters["triton_final_response"].bool_param)
