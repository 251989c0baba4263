"""The user's text to the token sequence of the language model, and the answer's text to phrases (spec 1.6, 2)."""

from __future__ import annotations

import re

from . import settings
from .errors import InvalidInput
from .tokenizer import Tokenizer

SYSTEM = "<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n"
ASSISTANT = "<|end|>\n<|assistant|>\n"
SEG, BOX = "[SEG]", "[BOX]"
MARKUP = ("<image>", "<video>", "<tsf>", SEG, BOX)
"""Literals that the original would interpret inside the user's text (spec 12.1.8)."""


def check_prompt(prompt: str) -> None:
    """Raises InvalidInput when the user's text is empty or holds markup."""
    if not prompt.strip():
        raise InvalidInput("sparrow.prompt: got an empty text, expected a question. Ask something, e.g. 'Please segment the dog.'")
    for literal in (*MARKUP, *re.findall(r"<\|[^|]*\|>", prompt)):
        if literal in prompt:
            raise InvalidInput(f"sparrow.prompt: got the markup {literal!r} in the text, expected plain words. Remove it.")


def prompt_parts(tokenizer: Tokenizer, prompt: str, with_targets: bool) -> tuple[list[int], list[int], list[int]]:
    """Token ids before the visual tokens, between them and the target tokens, and behind those.

    Each part is tokenised on its own, as the original splits the text at its placeholders.

    Raises:
        InvalidInput: the three parts are longer than MAX_PROMPT_TOKENS.
    """
    before = [tokenizer.bos_token_id, *tokenizer.encode(SYSTEM)]
    if with_targets:
        between, behind = tokenizer.encode(f"\n{prompt}\n"), tokenizer.encode(ASSISTANT)
    else:
        between, behind = tokenizer.encode(f"\n{prompt}{ASSISTANT}"), []
    length = len(before) + len(between) + len(behind)
    if length > settings.MAX_PROMPT_TOKENS:
        raise InvalidInput(f"sparrow.prompt: got {length} tokens with the template, expected at most {settings.MAX_PROMPT_TOKENS}. Shorten it.")
    return before, between, behind


def phrases(answer: str) -> list[str]:
    """The words of the answer that name each [SEG]: inside the last <p> </p> before it, else all words since the last [SEG]."""
    found: list[str] = []
    for piece in answer.split(SEG)[:-1]:
        marked = re.findall(r"<p>(.*?)</p>", piece, re.DOTALL)
        words = marked[-1] if marked else piece.replace(BOX, " ")
        found.append(" ".join(words.split()))
    return found
