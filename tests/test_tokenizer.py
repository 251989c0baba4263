"""The oracle is the slow tokenizer of transformers 4.41.0, which wrote the checkpoints; see data/tokenizer_4_41.json."""

import json
from pathlib import Path

import pytest

from ensemble.tokenizer import Tokenizer
from export.seeded import write_tokenizer
from tests import goldens

ORACLE = json.loads((Path(__file__).parent / "data" / "tokenizer_4_41.json").read_text())
FOLDER = goldens.ROOT / "a" / "ckpt" / "sparrow-finetune"
needs_golden_tokenizer = pytest.mark.skipif(
    not FOLDER.exists(), reason=f"no golden pack in {goldens.ROOT}; name its folder in SPARROW_GOLDENS"
)


@needs_golden_tokenizer
def test_encode_equals_transformers_4_41():
    tokenizer = Tokenizer(FOLDER)
    got = {text: [tokenizer.bos_token_id, *tokenizer.encode(text)] for text, _ in ORACLE["encode"]}
    assert got == dict(ORACLE["encode"])


@needs_golden_tokenizer
def test_decode_equals_transformers_4_41():
    tokenizer = Tokenizer(FOLDER)
    assert [[ids, tokenizer.decode(ids)] for ids, _ in ORACLE["decode"]] == ORACLE["decode"]


@goldens.parametrize_cases()
def test_decode_gives_the_text_of_the_original(case):
    tokenizer = Tokenizer(goldens.checkpoint(case.pack).path("sparrow"))
    ids = [int(id) for id in case.expected["output_ids"] if id >= 0]  # without the placeholders of visual tokens
    assert tokenizer.decode(ids) == case.meta["expected_text"]


def test_tokenizer_names_the_folder_and_the_file_when_one_is_missing(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no tokenizer_config.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["the moving shape", "Grüße, 漢字 🙂 and   spaces", " it  moves "])
def test_tiny_tokenizer_gives_text_back(text, tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text
