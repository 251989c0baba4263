import pytest

from ensemble import settings
from ensemble.components import TARGET_PLACEHOLDER, VISUAL_PLACEHOLDER
from ensemble.errors import InvalidInput
from ensemble.prompt import ASSISTANT, SYSTEM, check_prompt, phrases, prompt_ids
from ensemble.tokenizer import Tokenizer
from export.seeded import write_tokenizer
from tests import goldens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer(folder)


def golden_tokenizer(case):
    return Tokenizer(goldens.checkpoint(case.pack).path("sparrow"))


@goldens.parametrize_cases()
def test_prompt_ids_equal_the_original(case):
    ids = case.expected["prompt_ids"].ravel().tolist()
    with_targets = case.meta["flags"]["use_tsf_token"]
    for placeholder in [VISUAL_PLACEHOLDER] + [TARGET_PLACEHOLDER] * with_targets:
        first, count = ids.index(placeholder), 16 if case.is_video else 1
        assert ids[first : first + count] == [placeholder] * count  # ours stands for all tokens of the clip, or of the target
        del ids[first + 1 : first + count]
    assert prompt_ids(golden_tokenizer(case), case.meta["prompt"], with_targets) == ids


def test_prompt_ids_have_target_tokens_behind_the_question(tokenizer):
    ids = prompt_ids(tokenizer, "the dog", with_targets=True)
    before = [tokenizer.bos_token_id, *tokenizer.encode(SYSTEM)]
    behind = tokenizer.encode(ASSISTANT)
    assert ids == [*before, VISUAL_PLACEHOLDER, *tokenizer.encode("\nthe dog\n"), TARGET_PLACEHOLDER, *behind]
    # Spec 2: behind the target placeholders the piece starts directly with <|end|>; its newlines are swallowed.
    assert [tokenizer.added[id].content for id in behind] == ["<|end|>", "<|assistant|>"]


def test_placeholders_are_those_of_the_original():
    assert (VISUAL_PLACEHOLDER, TARGET_PLACEHOLDER) == (-200, -201)  # spec 1.6


@pytest.mark.parametrize("with_targets", [False, True])
def test_prompt_is_refused_when_one_token_over_the_limit(tokenizer, with_targets):
    template = len(prompt_ids(tokenizer, "a", with_targets)) - 1
    longest = " ".join(["a"] * (settings.MAX_PROMPT_TOKENS - template))
    assert len(prompt_ids(tokenizer, longest, with_targets)) == settings.MAX_PROMPT_TOKENS
    with pytest.raises(InvalidInput, match=r"sparrow.prompt: got 513 tokens with the template, expected at most 512. Shorten it"):
        prompt_ids(tokenizer, f"{longest} a", with_targets)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t "])
def test_check_prompt_refuses_an_empty_text(prompt):
    with pytest.raises(InvalidInput, match=r"sparrow.prompt: got an empty text, expected a question"):
        check_prompt(prompt)


@pytest.mark.parametrize(
    "literal", ["<image>", "<video>", "<tsf>", "[SEG]", "[BOX]", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|x|>"]
)
def test_check_prompt_refuses_markup_and_names_it(literal):
    with pytest.raises(InvalidInput) as refused:
        check_prompt(f"Please segment{literal}the dog.")
    assert f"got the markup {literal!r} in the text" in str(refused.value)


@pytest.mark.parametrize("prompt", ["a < b > c", "the [seg] of an image", "x <|y", "a|b", "<images>", "Größe? 漢字"])
def test_check_prompt_takes_plain_words_and_signs(prompt):
    check_prompt(prompt)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("No object is there.", []),
        ("the moving  shape [BOX] [SEG]", ["the moving shape"]),
        ("ball car [BOX] [SEG] is [BOX] [SEG]", ["ball car", "is"]),
        ("<p> A girl </p> [BOX] [SEG] rides <p>her\nhorse</p> [SEG].", ["A girl", "her horse"]),
        ("<p>A</p> and <p>B</p> [SEG]", ["B"]),
        ("[SEG] [SEG]", ["", ""]),
    ],
)
def test_phrases_name_each_object(answer, expected):
    assert phrases(answer) == expected
