"""Seeded checkpoints of any size: random weights in the original's formats, and a short clip to try them on.

    python -m export.seeded FOLDER {tiny,full}

Only one thing is not random: the language model is wired to answer every question with one sentence, so that the whole road from a
prompt to masks is walked. What the masks show means nothing.
"""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ensemble.config import PRESETS, TINY, ModelConfig
from ensemble.tensors import Array
from ensemble.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

ANSWER = "the moving shape [BOX] [SEG]"
LONG_ANSWER = (
    "the horse jumps over a small blue fence while you watch: red circle, green triangle and yellow box that moves to left from behind "
    "[BOX] [SEG]"
)
"""30 tokens with that of its end, of the full-size model: as many as its first answer is measured with."""

CORPUS = (
    "Please segment the moving shape in this video.",
    "What is the red circle in this video? Please respond with segmentation masks.",
    "Can you segment the small blue square that moves to the left?",
    "Could you please give me a detailed description of the video? Please respond with interleaved segmentation masks for the "
    "corresponding parts of the answer.",
    "A horse jumps over the fence while a person watches; the dog and the table stay where they are.",
    "You are a helpful AI assistant. It is the large green triangle behind the yellow box, the second from the right.",
)
"""What the tokenizer's words are learned from."""

PIECES = 512
PHI3_TOKENS = (
    ("<|endoftext|>", False),
    ("<|assistant|>", True),
    ("<|placeholder1|>", True),
    ("<|placeholder2|>", True),
    ("<|placeholder3|>", True),
    ("<|placeholder4|>", True),
    ("<|system|>", True),
    ("<|end|>", True),
    ("<|placeholder5|>", True),
    ("<|placeholder6|>", True),
    ("<|user|>", True),
)
"""Added tokens of Phi-3 in order of their ids, and whether they swallow white space behind them (spec 2)."""


def write_seeded(root: Path, config: ModelConfig, seed: int, device: str = "cpu", answer: str = ANSWER) -> None:
    """Writes a checkpoint of any size; the same seed gives the same files.

    Args:
        root: folder to make.
        config: its vocabulary ends with the tokens that Phi-3 and SPARROW add.
        seed: of all weights.
        device: where they are drawn; each draws others.
        answer: to every question.
    """
    from .checkpoints import SOURCES, random_states, write_checkpoint

    states = random_states(config, seed, device)
    folder = root / SOURCES["sparrow"]
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, config.language.vocab_size)
    wire_answer(states["sparrow"], Tokenizer(folder), answer)
    show_masks(states["sparrow"])
    write_checkpoint(root, config, states)


def write_tokenizer(folder: Path, vocab_size: int = TINY.language.vocab_size, corpus: Sequence[str] = CORPUS) -> None:
    """A small SentencePiece model learned from `corpus`, and the added tokens of Phi-3, [SEG] and [BOX] at the end of the vocabulary."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    control = [("<unk>", False, True), ("<s>", False, True), ("</s>", False, True)]
    phi3 = [(content, rstrip, True) for content, rstrip in PHI3_TOKENS]
    ours = [("[SEG]", False, False), ("[BOX]", False, False)]
    ids = [*range(3), *range(vocab_size - len(phi3) - len(ours), vocab_size)]
    config = {
        "added_tokens_decoder": {
            str(id): {"content": content, "rstrip": rstrip, "special": special, "lstrip": False, "single_word": False, "normalized": False}
            for id, (content, rstrip, special) in zip(ids, control + phi3 + ours, strict=True)
        },
        "additional_special_tokens": [content for content, _, _ in phi3],
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def wire_answer(sparrow: dict[str, Tensor], tokenizer: Tokenizer, answer: str) -> None:
    """Makes every token of the answer call for the next one.

    The layers are damped, so that the final state stays close to the embedding of the last token, and each row of lm_head is the
    embedding of the token before it in the answer.
    """
    import torch

    chain = [*tokenizer.encode("<|assistant|>")[-1:], *tokenizer.encode(answer.replace(" [", "[")), *tokenizer.encode("<|end|>")[-1:]]
    if len(set(chain)) < len(chain):
        raise ValueError(f"the answer {answer!r} repeats a token, expected each once: {chain}")
    embeddings = torch.randn_like(sparrow["model.embed_tokens.weight"])
    layers = sum(name.endswith("o_proj.weight") for name in sparrow)
    sparrow["model.embed_tokens.weight"] = embeddings
    for name, tensor in sparrow.items():
        if name.startswith("model.layers.") and name.endswith(("o_proj.weight", "down_proj.weight")):
            sparrow[name] = tensor * 0.42 / layers**0.5
    head = torch.zeros_like(sparrow["lm_head.weight"])
    for previous, following in itertools.pairwise(chain):
        head[following] = embeddings[previous] / embeddings[previous].norm()
    sparrow["lm_head.weight"] = head


def show_masks(sparrow: dict[str, Tensor]) -> None:
    """Makes objects count as present, and masks follow the picture: random weights alone give noise at every pixel."""
    head = "model.visual_model.sam_mask_decoder."
    sparrow[head + "pred_obj_score_head.layers.2.bias"] = sparrow[head + "pred_obj_score_head.layers.2.bias"] + 2
    for name, tensor in sparrow.items():
        if name.startswith((head + "conv_s0", head + "conv_s1")):
            sparrow[name] = tensor * 10
        elif name in (head + "output_upscaling.0.weight", head + "output_upscaling.3.weight"):
            sparrow[name] = tensor.mean((2, 3), keepdim=True).expand_as(tensor)
        elif name.startswith(head + "output_hypernetworks_mlps.") and name.endswith("layers.2.weight"):
            sparrow[name] = tensor * 30


def write_clip(path: Path, num_seconds: int = 6, fps: int = 8, height: int = 240, width: int = 320) -> None:
    """A red disc and a blue square that move over a textured background, as H.264."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for index in range(num_seconds * fps):
            frame = av.VideoFrame.from_ndarray(draw_frame(index / (num_seconds * fps), height, width), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def draw_frame(progress: float, height: int, width: int) -> Array:
    """[height, width, 3] uint8 at `progress` 0..1 of the clip."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([120 + 30 * np.sin(x / 17), 130 + 30 * np.cos(y / 13), 110 + 20 * np.sin((x + y) / 29)], -1)
    disc = (x - width * (0.2 + 0.6 * progress)) ** 2 + (y - height * 0.4) ** 2 < (height * 0.15) ** 2
    square = (abs(x - width * (0.8 - 0.5 * progress)) < height * 0.12) & (abs(y - height * 0.7) < height * 0.12)
    frame[disc], frame[square] = (210, 40, 40), (40, 60, 200)
    return np.asarray(frame, np.uint8)


def main(target: Path, preset: str) -> None:
    """Writes the checkpoint of a preset to <target>/checkpoint, and for the tiny one a clip beside it."""
    import torch

    full = preset == "full"
    device = "cuda" if full and torch.cuda.is_available() else "cpu"
    write_seeded(target / "checkpoint", PRESETS[preset], seed=0, device=device, answer=LONG_ANSWER if full else ANSWER)
    if preset == "tiny":
        write_clip(target / "clip.mp4")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
