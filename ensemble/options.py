"""Options of a request: Triton request parameters, all optional, checked before any work starts."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Self

from . import settings
from .components import PROPOSALS
from .errors import InvalidInput
from .masks import MASK_FORMATS
from .runner import Parameters


def option(default: Any, doc: str, *, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None) -> Any:
    """A field with its default, meaning and the values it takes."""
    return field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "high": high})


class RequestOptions:
    """A dataclass of the parameters that a model takes."""

    model: ClassVar[str]

    @classmethod
    def from_parameters(cls, parameters: Parameters) -> Self:
        """Raises InvalidInput on an unknown option or a value out of range."""
        known = {entry.name: entry for entry in fields(cls)}  # type: ignore[arg-type]
        for name, value in parameters.items():
            if name not in known:
                raise InvalidInput(f"{cls.model}: got an option {name!r}, expected one of {', '.join(known)}. Remove it.")
            if not is_sound(known[name], value):
                raise InvalidInput(f"{cls.model}: got {name} = {value!r}, expected {values(known[name])}.")
        return cls(**parameters)


@dataclass(frozen=True)
class Options(RequestOptions):
    """What a request of `sparrow` may change (spec 9); the defaults are those of the original's chat.py, decoding apart (ADR 0002)."""

    model = "sparrow"

    modality: str = option("auto", "auto: one frame is an image, more are a video", choices=("auto", "video", "image"))
    branch: str = option(
        "tracked", "how masks of a video follow an object; an image is always framewise", choices=("tracked", "framewise", "both")
    )
    video_init: str = option("text_then_boxes", "what conditions the tracker on frame 0", choices=("text_then_boxes", "text_only"))
    mask_format: str = option("rle", "which of mask_rle, mask_bits and mask_logits is filled", choices=MASK_FORMATS)

    max_new_tokens: int = option(settings.MAX_NEW_TOKENS, "longest answer", low=1, high=settings.MAX_NEW_TOKENS)
    do_sample: bool = option(False, "draw tokens at random instead of taking the likeliest")
    temperature: float = option(1.0, "of the draw", low=0.01, high=10)
    top_k: int = option(settings.SAMPLING_TOP_K, "tokens to draw from, the likeliest", low=1, high=settings.MAX_SAMPLING_TOP_K)
    seed: int = option(0, "of the draw: the same seed gives the same answer", low=0, high=2**31 - 1)

    target_placeholders: bool = option(False, "reserve target tokens without a target; they are zeros")
    target_tokens: int = option(settings.TARGET_TOKENS, "tokens that stand for the target", low=1, high=settings.MAX_TARGET_TOKENS)
    target_kmeans_steps: int = option(settings.TARGET_KMEANS_STEPS, "most steps that choose them", low=0, high=100)

    detection_guidance: bool = option(True, "let proposals prompt the mask decoder")
    proposal_topk: int = option(settings.PROPOSAL_TOPK, "proposals to choose from", low=1, high=PROPOSALS.max)
    coco_score_power: float = option(settings.COCO_SCORE_POWER, "weight of the COCO head in a proposal's score", low=0, high=10)
    sa1b_score_power: float = option(settings.SA1B_SCORE_POWER, "weight of the SA-1B head", low=0, high=10)
    selection_threshold: float = option(settings.SELECTION_THRESHOLD, "least probability of a chosen proposal", low=0, high=1)
    roi_helper: bool = option(True, "let features of the regions take part in choosing proposals")
    roi_fusion_gamma: float = option(settings.ROI_FUSION_GAMMA, "their weight", low=0, high=1)
    trained_roi_fusion_gamma: bool = option(False, "take the checkpoint's roi_fusion_gamma instead, which the original never loads")
    box_prior_filter: bool = option(True, "drop chosen boxes whose masks do not fill them")
    box_prior_min_score: float = option(settings.BOX_PRIOR_MIN_SCORE, "least score of a box that the filter keeps", low=0, high=1)
    box_prior_max_keep: int = option(settings.BOX_PRIOR_MAX_KEEP, "boxes that it keeps", low=1, high=settings.MAX_SELECTED_BOXES)
    proposal_debug: bool = option(False, "also return the proposals and the picture that they were found in")


@dataclass(frozen=True)
class TrackOptions(RequestOptions):
    """What a request of `sparrow_track` may change."""

    model = "tracker"

    mask_format: str = option("rle", "which of mask_rle, mask_bits and mask_logits is filled", choices=MASK_FORMATS)
    frame_idx: int = option(-1, "index of the frame in its session, refused where another is due; -1: not checked", low=-1, high=2**31 - 1)
    reset: bool = option(False, "forget the objects so far; the request's own start. With START: an open session of that id, too")


def is_sound(entry: Field[Any], value: Any) -> bool:
    """Whether a value has the type of the default and lies within the choices or bounds."""
    kind, meta = type(entry.default), entry.metadata
    if not isinstance(value, (int, float) if kind is float else kind) or (kind is not bool and isinstance(value, bool)):
        return False
    return (not meta["choices"] or value in meta["choices"]) and (meta["low"] is None or meta["low"] <= value <= meta["high"])


def values(entry: Field[Any]) -> str:
    """The values that an option takes, in words."""
    kind, meta = type(entry.default).__name__, entry.metadata
    return " or ".join(meta["choices"]) or (kind if meta["low"] is None else f"{kind} {meta['low']}..{meta['high']}")
