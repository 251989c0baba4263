"""The slow Llama tokenizer of the original checkpoints (spec 2), on SentencePiece alone.

transformers 5 has dropped the slow tokenizer and the fast one splits differently, so its rules around added tokens are kept
here: the longest added token wins, `rstrip` tokens swallow the white space behind them, and every text starts with a prefix
space. Equal to transformers 4.41.0 on the golden prompts and on random text (tests/test_tokenizer.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

SPACE = "▁"
"""How SentencePiece writes a space."""

NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""Protobuf `normalizer_spec { add_dummy_prefix: false }`; appended to a serialised ModelProto it overrides that field."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is split off before SentencePiece.

    Args:
        rstrip: swallows white space behind it.
        special: named by the tokenizer's configuration (bos, unk, ..., additional).
    """

    id: int
    content: str
    rstrip: bool
    special: bool


class Tokenizer:
    """Text to ids and back.

    Args:
        folder: holds tokenizer.model and tokenizer_config.json.
    Raises:
        FileNotFoundError: one of them is missing.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder}: no {name}. Copy the tokenizer files of the checkpoint there.")
        config = json.loads((folder / "tokenizer_config.json").read_text())
        model = (folder / "tokenizer.model").read_bytes()
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        special = {config[f"{role}_token"] for role in ("bos", "eos", "unk", "pad")} | set(config["additional_special_tokens"])
        self.added = {
            int(id): AddedToken(int(id), entry["content"], entry["rstrip"], entry["content"] in special)
            for id, entry in config["added_tokens_decoder"].items()
        }
        self._by_content = {token.content: token for token in self.added.values()}
        longest_first = sorted(self._by_content, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._unknown: str = config["unk_token"]
        self._unknown_length = len(self._pieces.encode(self._unknown))
        self.bos_token_id = self._by_content[config["bos_token"]].id

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS."""
        if not text:
            return []
        parts = self._split.split(SPACE + text.replace(SPACE, " "))
        ids: list[int] = []
        strip = False
        for part in parts:
            token = self._by_content.get(part)
            if token:
                ids.append(token.id)
                strip = token.rstrip
                continue
            part = part.lstrip() if strip else part
            ids += self._encode_piece(part) if part else []
            strip = False
        lone_space = self._pieces.piece_to_id(SPACE)
        if len(ids) > 1 and ids[0] == lone_space and ids[1] in self.added and self.added[ids[1]].special:
            ids = ids[1:]
        return ids

    def _encode_piece(self, text: str) -> list[int]:
        """SentencePiece ids; a leading space is protected from being stripped by the unknown token before it."""
        if not text.startswith((SPACE, " ")):
            return list(self._pieces.encode(text))
        return list(self._pieces.encode(self._unknown + text))[self._unknown_length :]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; runs of words and added tokens are joined by single spaces, as the original does."""
        texts: list[str] = []
        run: list[int] = []
        for id in ids:
            if id >= self._pieces.vocab_size() or (id in self.added and not self.added[id].special):
                texts += [self._decode_run(run), self.added[id].content]
                run = []
            else:
                run.append(id)
        texts.append(self._decode_run(run))
        return " ".join(text for text in texts if text)

    def _decode_run(self, ids: list[int]) -> str:
        """SentencePiece text; the prefix space of the first word is dropped, control tokens stay visible."""
        text = ""
        words: list[int] = []
        for position, id in enumerate(ids):
            if id in self.added:
                text += str(self._pieces.decode(words)) + self.added[id].content
                words = []
                continue
            if position == 1 and not words and text and not self._pieces.id_to_piece(id).startswith(SPACE):
                text += " "
            words.append(id)
        first = self._pieces.id_to_piece(ids[0]) if ids else ""
        text += str(self._pieces.decode(words))
        return text[1:] if first.startswith(SPACE) and text.startswith(" ") else text
