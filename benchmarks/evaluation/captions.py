"""Texts of VideoGCG: how an answer becomes a caption and its phrases, how captions are scored, how alike two phrases are."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from ensemble.prompt import ASSISTANT, BOX, SEG, SYSTEM

from .samples import DatasetError

TAG = re.compile(r"<.*?>")
PHRASE = re.compile(r"<p>(.*?)</p>")

WORD = re.compile(r"'(?:s|re|ve|ll|d|m)\b|n't\b|\w+?(?=n't\b)|\w+(?:[-./]\w+)*|[^\w\s]")
"""A word as the Penn Treebank splits them: "don't" is two of them."""

BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-"}
PUNCTUATION = frozenset("'`\".?!,:-;{}")
"""Marks that caption scores leave out."""

SCORED_CHARACTERS = 2000
"""The original cuts captions here."""


def clean(answer: str) -> str:
    """The caption of an answer: its words alone."""
    return " ".join(TAG.sub(" ", answer).replace(SEG, " ").replace(BOX, " ").split())


def original_text(prompt: str, answer: str) -> str:
    """What the original takes for the answer: its marker "ASSISTANT: " is nowhere, so the whole template stays in front (spec 12.2.21)."""
    template = " ".join(f"{SYSTEM} {prompt} {ASSISTANT}".split())
    return f"{template} {answer}".replace("\n", "").replace("  ", " ").split("ASSISTANT: ")[-1]


def original_clean(text: str) -> str:
    """The original's caption: [BOX] stays in it, and so do the words of the prompt."""
    return " ".join(TAG.sub("", text).replace(SEG, "").split()).strip("'").strip()


def original_phrases(text: str) -> list[str]:
    """The original's phrases, in the order of the text; nothing ties them to masks."""
    return [phrase.strip() for phrase in PHRASE.findall(text)]


def caption_scores(references: Sequence[str], captions: Sequence[str]) -> dict[str, list[float]]:
    """COCO's measures of captions, in percent, each the mean of its list; what cannot be had is left out, and a line says so.

    `cider` and `rouge_l` have a value per caption, `bleu_4` and `meteor` one for all, as they are defined.

    Args:
        references: one per caption; CIDEr weighs words by how few of these hold them, so a part of a data set has other scores.
        captions: to be scored.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        click.echo("Captions are not scored: pycocoevalcap is not installed. pip install pycocoevalcap", err=True)
        return {}
    if not references:
        return {}
    split = split_all([*references, *captions])
    expected, got = ({index: [text] for index, text in enumerate(texts)} for texts in (split[: len(references)], split[len(references) :]))
    scores = {
        "cider": Cider().compute_score(expected, got)[1],
        "rouge_l": Rouge().compute_score(expected, got)[1],
        "bleu_4": [Bleu(4).compute_score(expected, got, verbose=0)[0][3]],
    }
    if shutil.which("java"):
        try:
            scores["meteor"] = [Meteor().compute_score(expected, got)[0]]
        except (OSError, ValueError) as error:
            click.echo(f"METEOR is left out: its program failed ({error}). It needs Java and 2 GB of memory.", err=True)
    else:
        click.echo(
            "METEOR is left out, and words are split by our own rule: there is no java on this machine. Install a Java runtime.", err=True
        )
    return {name: [100 * float(value) for value in values] for name, values in scores.items()}


def split_all(texts: Sequence[str]) -> list[str]:
    """Words in lower case between single blanks: by the Penn Treebank tokenizer of pycocoevalcap where there is Java, else by `split`."""
    if not shutil.which("java"):
        return [split(text) for text in texts]
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = PTBTokenizer().tokenize({index: [{"caption": " ".join(text.split())}] for index, text in enumerate(texts)})
    return [lines[index][0] for index in range(len(texts))]


def split(text: str) -> str:
    """As the tokenizer does, but for rare abbreviations ("no.13"): all but 7 of the 12902 sentences of VidSTG come out the same."""
    words = WORD.findall(re.sub(r"\bcannot\b", "can not", text.lower()))
    return " ".join(BRACKETS.get(word, word) for word in words if word not in PUNCTUATION)


class PhraseSimilarity:
    """How alike two phrases are: the cosine of the means of BERT's last states, those of [CLS] and [SEP] among them.

    Args:
        folder: of bert-base-uncased, as transformers saves it.
    Raises:
        DatasetError: there is no such model, or transformers is not installed.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise DatasetError(f"{folder}: got no config.json, expected the folder of bert-base-uncased. Check --bert, or leave it out.")
        self.folder = folder
        self.state = cache(self._state)

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise DatasetError(
                f"--bert: {error}, expected transformers beside it. pip install transformers, or leave --bert out."
            ) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            return tokenizer, AutoModel.from_pretrained(self.folder, local_files_only=True).eval()
        except (OSError, ValueError) as error:
            raise DatasetError(f"{self.folder}: not a model that transformers reads ({error}). Fetch bert-base-uncased again.") from error

    def _state(self, phrase: str) -> NDArray[np.float32]:
        """[C]"""
        import torch

        tokenizer, model = self._model
        with torch.inference_mode():
            states = model(**tokenizer(phrase, return_tensors="pt", max_length=512, truncation=True)).last_hidden_state  # [1, S, C]
        mean: NDArray[np.float32] = states[0].mean(0).numpy()
        return mean

    def __call__(self, one: str, other: str) -> float:
        first, second = self.state(one), self.state(other)
        return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))
