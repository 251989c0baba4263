"""The user's text to the token sequence of the language model, and the answer's text to phrases (spec 1.6, 2)."""

from __future__ import annotations

import re

from . import settings
from .components import TARGET_PLACEHOLDER, VISUAL_PLACEHOLDER
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


def prompt_ids(tokenizer: Tokenizer, prompt: str, with_targets: bool) -> list[int]:
    """The user's text in its template: token ids with one placeholder for the visual and one for the target tokens.

    Each part between placeholders is tokenised on its own, as the original does.

    Raises:
        InvalidInput: longer than MAX_PROMPT_TOKENS.
    """
    ids = [tokenizer.bos_token_id, *tokenizer.encode(SYSTEM), VISUAL_PLACEHOLDER]
    if with_targets:
        ids += [*tokenizer.encode(f"\n{prompt}\n"), TARGET_PLACEHOLDER, *tokenizer.encode(ASSISTANT)]
    else:
        ids += tokenizer.encode(f"\n{prompt}{ASSISTANT}")
    if len(ids) > settings.MAX_PROMPT_TOKENS:
        raise InvalidInput(
            f"sparrow.prompt: got {len(ids)} tokens with the template, expected at most {settings.MAX_PROMPT_TOKENS}. Shorten it."
        )
    return ids


def phrases(answer: str) -> list[str]:
    """The words of the answer that name each [SEG]: inside the last <p> </p> before it, else all words since the last [SEG]."""
    found: list[str] = []
    for piece in answer.split(SEG)[:-1]:
        marked = re.findall(r"<p>(.*?)</p>", piece, re.DOTALL)
        words = marked[-1] if marked else piece.replace(BOX, " ")
        found.append(" ".join(words.split()))
    return found
