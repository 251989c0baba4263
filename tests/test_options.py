from dataclasses import fields

import pytest

from ensemble import settings
from ensemble.errors import InvalidInput
from ensemble.options import Options

NUMBERS = {
    "max_new_tokens": (int, 1, 1024),
    "temperature": (float, 0.01, 10),
    "top_k": (int, 1, 1000),
    "seed": (int, 0, 2**31 - 1),
    "target_tokens": (int, 1, 16),
    "target_kmeans_steps": (int, 0, 100),
    "proposal_topk": (int, 1, 300),
    "coco_score_power": (float, 0, 10),
    "sa1b_score_power": (float, 0, 10),
    "selection_threshold": (float, 0, 1),
    "roi_fusion_gamma": (float, 0, 1),
    "box_prior_min_score": (float, 0, 1),
    "box_prior_max_keep": (int, 1, 16),
}
CHOICES = {
    "modality": ("auto", "video", "image"),
    "branch": ("tracked", "framewise", "both"),
    "video_init": ("text_then_boxes", "text_only"),
    "mask_format": ("rle", "bits"),
}
SWITCHES = (
    "do_sample",
    "target_placeholders",
    "detection_guidance",
    "roi_helper",
    "trained_roi_fusion_gamma",
    "box_prior_filter",
    "proposal_debug",
)

ACCEPTED = [
    *((name, choice) for name, choices in CHOICES.items() for choice in choices),
    *((name, bound) for name, (_, *bounds) in NUMBERS.items() for bound in bounds),
    *((name, 0.5) for name, (kind, *_) in NUMBERS.items() if kind is float),
    *((name, value) for name in SWITCHES for value in (True, False)),
]
REFUSED = [
    *((name, value) for name in CHOICES for value in ("", "other", "RLE", 1, True, None)),
    *((name, value) for name, (kind, low, high) in NUMBERS.items() for value in (low - 1, high + 1, low - kind(1), True, False, "1", None)),
    *((name, value) for name in NUMBERS for value in (float("nan"), float("inf"))),
    *((name, 2.0) for name, (kind, *_) in NUMBERS.items() if kind is int),
    *((name, value) for name in SWITCHES for value in (0, 1, 1.0, "true", None)),
]


def test_defaults_are_those_of_the_original():
    options = Options.from_parameters({})
    assert options == Options()
    assert (options.modality, options.branch, options.video_init, options.mask_format) == (
        "auto",
        "tracked",
        "text_then_boxes",
        "rle",
    )
    assert options.detection_guidance and options.roi_helper and options.box_prior_filter
    assert not (options.do_sample or options.target_placeholders or options.trained_roi_fusion_gamma or options.proposal_debug)
    # spec 9: --tsf_k, --tsf_kmeans_iters, --proposal_topk, --proposal_score_power, --roi_fusion_init
    assert (options.target_tokens, options.target_kmeans_steps, options.proposal_topk) == (4, 8, 100)
    assert (options.coco_score_power, options.sa1b_score_power, options.roi_fusion_gamma) == (0.3, 0.7, 0.1)
    # --max_new_tokens, --proposal_score_threshold, --box_prior_min_score, --box_prior_max_keep
    assert (options.max_new_tokens, options.selection_threshold, options.box_prior_min_score, options.box_prior_max_keep) == (
        1024,
        0.4,
        0.35,
        4,
    )


def test_every_option_is_covered_here():
    assert {field.name for field in fields(Options)} == {*CHOICES, *NUMBERS, *SWITCHES}
    assert settings.MAX_SELECTED_BOXES == 16


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_option_is_taken_when_within_its_bounds(name, value):
    assert getattr(Options.from_parameters({name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_option_is_refused_by_name_and_value_when_out_of_bounds_or_of_another_type(name, value):
    with pytest.raises(InvalidInput) as refused:
        Options.from_parameters({name: value})
    assert str(refused.value).startswith(f"sparrow: got {name} = {value!r}, expected ")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"branch": "all"}, "sparrow: got branch = 'all', expected tracked or framewise or both."),
        ({"max_new_tokens": 0}, "sparrow: got max_new_tokens = 0, expected int 1..1024."),
        ({"selection_threshold": 2}, "sparrow: got selection_threshold = 2, expected float 0..1."),
        ({"roi_helper": 1}, "sparrow: got roi_helper = 1, expected bool."),
    ],
)
def test_refusal_says_what_is_expected(parameters, message):
    with pytest.raises(InvalidInput) as refused:
        Options.from_parameters(parameters)
    assert str(refused.value) == message


def test_unknown_option_is_refused_with_the_list_of_options():
    with pytest.raises(
        InvalidInput, match=r"sparrow: got an option 'beams', expected one of modality, branch, .*, proposal_debug. Remove it"
    ):
        Options.from_parameters({"branch": "tracked", "beams": 4})


def test_options_combine():
    options = Options.from_parameters({"branch": "framewise", "box_prior_max_keep": 1, "roi_helper": False})
    assert (options.branch, options.box_prior_max_keep, options.roi_helper, options.max_new_tokens) == (
        "framewise",
        1,
        False,
        1024,
    )
