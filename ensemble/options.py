"""Options of a `sparrow` request: Triton request parameters, all optional, checked before any work starts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from . import settings
from .errors import InvalidInput
from .masks import MASK_FORMATS
from .runner import Parameters


def option(default: Any, *, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None) -> Any:
    """A field with its default and the values it takes."""
    return field(default=default, metadata={"choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class Options:
    """What a request may change (spec 9)."""

    modality: str = option("auto", choices=("auto", "video", "image"))
    """auto: one frame is an image, more are a video."""
    branch: str = option("tracked", choices=("tracked", "framewise"))
    """How masks of a video follow the object; an image is always framewise."""
    video_init: str = option("text_then_boxes", choices=("text_then_boxes", "text_only"))
    """What conditions the tracker on frame 0 (spec 7.3)."""
    max_new_tokens: int = option(settings.MAX_NEW_TOKENS, low=1, high=settings.MAX_NEW_TOKENS)
    mask_format: str = option("rle", choices=MASK_FORMATS)
    detection_guidance: bool = option(True)
    """Let proposals prompt the mask decoder."""
    roi_helper: bool = option(True)
    box_prior_filter: bool = option(True)
    selection_threshold: float = option(settings.SELECTION_THRESHOLD, low=0, high=1)
    box_prior_min_score: float = option(settings.BOX_PRIOR_MIN_SCORE, low=0, high=1)
    box_prior_max_keep: int = option(settings.BOX_PRIOR_MAX_KEEP, low=1, high=settings.MAX_SELECTED_BOXES)

    @classmethod
    def from_parameters(cls, parameters: Parameters) -> Options:
        """Raises InvalidInput on an unknown option or a value out of range."""
        known = {entry.name: entry for entry in fields(cls)}
        for name, value in parameters.items():
            if name not in known:
                raise InvalidInput(f"sparrow: got an option {name!r}, expected one of {', '.join(known)}. Remove it.")
            default, meta = known[name].default, known[name].metadata
            kind = type(default)
            sound = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
            if (
                not sound
                or (meta["choices"] and value not in meta["choices"])
                or (meta["low"] is not None and not meta["low"] <= value <= meta["high"])
            ):
                expected = " or ".join(meta["choices"]) or (
                    kind.__name__ if meta["low"] is None else f"{kind.__name__} {meta['low']}..{meta['high']}"
                )
                raise InvalidInput(f"sparrow: got {name} = {value!r}, expected {expected}.")
        return cls(**parameters)
