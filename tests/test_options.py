from dataclasses import fields

import pytest

from ensemble import settings
from ensemble.errors import InvalidInput
from ensemble.options import Options

NUMBERS = {
    "max_new_tokens": (int, 1, 1024),
    "selection_threshold": (float, 0, 1),
    "box_prior_min_score": (float, 0, 1),
    "box_prior_max_keep": (int, 1, 16),
}
CHOICES = {
    "modality": ("auto", "video", "image"),
    "branch": ("tracked", "framewise"),
    "video_init": ("text_then_boxes", "text_only"),
    "mask_format": ("rle", "bits"),
}
SWITCHES = ("detection_guidance", "roi_helper", "box_prior_filter")

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
    # spec 9: --max_new_tokens, --proposal_score_threshold, --box_prior_min_score, --box_prior_max_keep
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
        ({"branch": "both"}, "sparrow: got branch = 'both', expected tracked or framewise."),
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
        InvalidInput, match=r"sparrow: got an option 'beams', expected one of modality, branch, .*, box_prior_max_keep. Remove it"
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
