"""Frames of several callers to the features that masks are decoded from: each is prepared, then all go through the encoder together."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import SparrowError, known
from .frames import Preprocessor, session_frame
from .runner import Device, DeviceArray, Graph
from .tensors import Arrays

ENCODED = ("pictures", "picture_sizes")
"""What the encoder takes of a prepared frame."""


class FrameFeatures:
    """The server of the component `frame_features`.

    Args:
        preprocessor: prepares frames.
        encoder: the graph frame_encoder.
        device: where it runs, and features stay.
    """

    def __init__(self, preprocessor: Preprocessor, encoder: Graph, device: Device) -> None:
        self._preprocessor, self._encoder, self._device = preprocessor, encoder, device

    def run(self, inputs: Arrays) -> dict[str, DeviceArray]:
        """Outputs of the component for one request; raises SparrowError."""
        (result,) = self.step([inputs])
        if isinstance(result, SparrowError):
            raise result
        return result

    def step(self, requests: Sequence[Arrays]) -> list[dict[str, DeviceArray] | SparrowError]:
        """One result per request, in order; a bad frame fails alone. Features have been computed when this returns."""
        prepared = [self._prepare(inputs) for inputs in requests]
        good = [own for own in prepared if not isinstance(own, SparrowError)]
        try:
            features = iter(self._encode(good) if good else [])
        except Exception as error:
            failure = known("frame_features", error)
            return [own if isinstance(own, SparrowError) else failure for own in prepared]
        return [own if isinstance(own, SparrowError) else {**next(features), "frame_size": own["frame_size"]} for own in prepared]

    def _prepare(self, inputs: Arrays) -> dict[str, DeviceArray] | SparrowError:
        try:
            return session_frame(inputs, self._preprocessor)
        except Exception as error:
            return known("frame_features", error)

    def _encode(self, prepared: Sequence[dict[str, DeviceArray]]) -> list[dict[str, DeviceArray]]:
        """The features of each frame, [1, ...]."""
        together = {name: self._device.join([frame[name][None] for frame in prepared]) for name in ENCODED}
        outputs = self._device.run(self._encoder, together)
        self._device.wait()
        return [{name: array[index : index + 1] for name, array in outputs.items()} for index in range(len(prepared))]
