import pytest

from ensemble import settings
from ensemble.errors import InvalidInput
from ensemble.prompt import ASSISTANT, SYSTEM, check_prompt, phrases, prompt_parts
from ensemble.tokenizer import Tokenizer
from export.tiny import write_tokenizer
from tests import goldens

IMAGE_PLACEHOLDER = -200


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer(folder)


@goldens.parametrize_cases()
def test_prompt_parts_equal_the_original(case):
    before, between, behind = prompt_parts(Tokenizer(goldens.checkpoint(case.pack).path("sparrow")), case.meta["prompt"], with_targets=False)
    visual = [IMAGE_PLACEHOLDER] * (16 if case.is_video else 1)
    assert [*before, *visual, *between, *behind] == case.expected["prompt_ids"].ravel().tolist()
    assert not behind


def test_prompt_parts_leave_room_for_target_tokens_behind_the_question(tokenizer):
    before, between, behind = prompt_parts(tokenizer, "the dog", with_targets=True)
    assert before == [tokenizer.bos_token_id, *tokenizer.encode(SYSTEM)]
    assert between == tokenizer.encode("\nthe dog\n")
    assert behind == tokenizer.encode(ASSISTANT)
    # Spec 2: behind the target placeholders the piece starts directly with <|end|>; its newlines are swallowed.
    assert [tokenizer.added[id].content for id in behind] == ["<|end|>", "<|assistant|>"]


def test_prompt_parts_are_refused_when_one_token_over_the_limit(tokenizer):
    template = sum(map(len, prompt_parts(tokenizer, "a", with_targets=False))) - 1
    longest = " ".join(["a"] * (settings.MAX_PROMPT_TOKENS - template))
    assert sum(map(len, prompt_parts(tokenizer, longest, with_targets=False))) == settings.MAX_PROMPT_TOKENS
    for with_targets in (False, True):
        with pytest.raises(InvalidInput, match=r"sparrow.prompt: got 51\d tokens with the template, expected at most 512. Shorten it"):
            prompt_parts(tokenizer, f"{longest} a", with_targets)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t "])
def test_check_prompt_refuses_an_empty_text(prompt):
    with pytest.raises(InvalidInput, match="sparrow.prompt: got an empty text, expected a question"):
        check_prompt(prompt)


@pytest.mark.parametrize("literal", ["<image>", "<video>", "<tsf>", "[SEG]", "[BOX]", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|x|>"])
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
