from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

from ensemble.components import TARGET_PLACEHOLDER, VISUAL_PLACEHOLDER
from ensemble.config import TINY, LanguageConfig
from ensemble.frames import HostPreprocessor, encoder_indices
from ensemble.options import Options
from ensemble.pipeline import Clip, Pipeline
from ensemble.runner import LocalRunner
from export.models.language_model import DecodeLayer, LanguageDecoder, PromptLayer, logits_of
from export.runners import TorchGraph
from tests import goldens
from tests.test_vision_encoder import visual_tokens

TOLERANCE = 1e-4
"""Float32 summation order; final-norm states have rms 1. Measured against the packs: 3e-6."""
PROMPT_TOLERANCE = 1e-3
"""Prompt embeddings have rms 2.5. Measured against the packs: 1e-5."""
WINDOW = 5
LENGTH = 17


pytestmark = pytest.mark.usefixtures("inference")


def make_oracle(language):
    """Phi-3 without a window of its own: versions of transformers disagree on it, and spec 3.2 decides."""
    config = Phi3Config(
        vocab_size=language.vocab_size,
        hidden_size=language.width,
        intermediate_size=language.mlp_width,
        num_hidden_layers=language.layers,
        num_attention_heads=language.heads,
        num_key_value_heads=language.heads,
        rms_norm_eps=language.rms_norm_eps,
        sliding_window=None,
        tie_word_embeddings=False,
        pad_token_id=0,
        attn_implementation="eager",
    )
    oracle = Phi3ForCausalLM(config)
    for parameter in oracle.parameters():
        nn.init.normal_(parameter, std=0.3)  # far from uniform attention
    return oracle.eval()


def make_pair(window):
    language = LanguageConfig(vocab_size=97, width=32, layers=3, heads=4, mlp_width=48, sliding_window=window)
    oracle = make_oracle(language)
    decoder = LanguageDecoder(replace(TINY, language=language)).eval()
    weights = {name.removeprefix("model."): tensor for name, tensor in oracle.state_dict().items()}
    decoder.load_state_dict({name: weights[name] for name in decoder.state_dict()})
    return decoder, oracle


def make_caches(decoder, sequences, slots, fill=0.0):
    language = decoder.config.language
    shape = (language.layers, sequences, language.heads, slots, language.width // language.heads)
    return torch.full(shape, fill), torch.full(shape, fill)


def make_embeddings(sequences, length=LENGTH):
    return torch.randn(sequences, length, 32)


def positions_of(*starts, tokens=1):
    """[N, tokens] consecutive positions from each start."""
    return torch.tensor(starts)[:, None] + torch.arange(tokens)


def assert_close(got, expected, atol=TOLERANCE):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("window", [None, LENGTH - 1, LENGTH + 1000])
def test_decoder_equals_phi3_when_the_window_covers_the_sequence(window):
    decoder, oracle = make_pair(window)
    embeddings = make_embeddings(2)
    logits, states, _, _ = decoder(embeddings, positions_of(0, 0, tokens=LENGTH), *make_caches(decoder, 2, LENGTH + 3))
    assert_close(logits, oracle(inputs_embeds=embeddings).logits[:, -1])
    assert_close(states, oracle.model(inputs_embeds=embeddings).last_hidden_state[:, -1])


def test_decoder_sees_itself_and_a_window_of_earlier_tokens():
    decoder, oracle = make_pair(WINDOW)
    embeddings = make_embeddings(1)
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    visible = (key <= query) & (query - key <= WINDOW)
    mask = torch.where(visible, 0.0, -torch.inf)[None, None]
    expected = oracle(inputs_embeds=embeddings, attention_mask=mask).logits[:, -1]
    logits, *_ = decoder(embeddings, positions_of(0, tokens=LENGTH), *make_caches(decoder, 1, LENGTH))
    assert_close(logits, expected)
    assert (logits - oracle(inputs_embeds=embeddings).logits[:, -1]).abs().max() > 0.1


@pytest.mark.parametrize("pieces", [(11, *[1] * 6), (1,) * LENGTH, (4, 9, 4)])
def test_decoder_equals_one_pass_when_tokens_come_in_pieces(pieces):
    decoder, _ = make_pair(WINDOW)
    embeddings = make_embeddings(1)
    whole = decoder(embeddings, positions_of(0, tokens=LENGTH), *make_caches(decoder, 1, LENGTH + 3))
    caches = make_caches(decoder, 1, LENGTH + 3)
    start = 0
    for piece in embeddings.split(pieces, dim=1):
        logits, states, *caches = decoder(piece, positions_of(start, tokens=piece.shape[1]), *caches)
        start += piece.shape[1]
    for got, expected in zip((logits, states, *caches), whole, strict=True):
        assert_close(got, expected)


def test_decode_in_place_equals_forward():
    decoder, _ = make_pair(WINDOW)
    embeddings, positions = make_embeddings(2), positions_of(0, 2, tokens=LENGTH)
    caches = make_caches(decoder, 2, LENGTH + 3)
    *expected, new_keys, new_values = decoder(embeddings, positions, *caches)
    assert not caches[0].any() and not caches[1].any()
    got = decoder.decode_(embeddings, positions, *caches)
    for one, other in zip((*got, *caches), (*expected, new_keys, new_values), strict=True):
        assert torch.equal(one, other)


def test_decode_of_several_sequences_equals_each_alone_when_one_row_is_idle():
    decoder, _ = make_pair(WINDOW)
    lengths = (4, 13, 9)
    together = make_caches(decoder, 4, LENGTH)
    prompts, tokens = make_embeddings(3), make_embeddings(4, 1)
    alone = []
    for row, length in enumerate(lengths):
        view = [cache[:, row : row + 1, :, : length + 1] for cache in together]  # prefill writes through a narrower view
        decoder.decode_(prompts[row : row + 1, :length], positions_of(0, tokens=length), *view)
        copy = [cache.clone() for cache in view]
        alone.append(decoder.decode_(tokens[row : row + 1], positions_of(length), *copy))
    logits, states = decoder.decode_(tokens, positions_of(*lengths, 0), *together)
    assert_close(logits[:3], torch.cat([row[0] for row in alone]))
    assert_close(states[:3], torch.cat([row[1] for row in alone]))


@pytest.mark.parametrize("window", [WINDOW, None])
def test_prompt_and_answer_in_a_ring_of_slots_equal_one_pass(window):
    """The prompt is longer than the ring, and the answer goes round it more than once."""
    decoder, _ = make_pair(window)
    prompt, answer = 2 * LENGTH, 2 * LENGTH
    embeddings = torch.randn(2, prompt + answer, decoder.config.language.width)
    caches = make_caches(decoder, 2, window + 1 if window else prompt + answer, fill=1e4)
    got = [decoder.prefill_(embeddings[:, :prompt], *caches)]
    for position in range(prompt, prompt + answer):
        got.append(decoder.decode_(embeddings[:, position : position + 1], positions_of(position, position), *caches))
    for length, one in enumerate(got, start=prompt):
        linear = make_caches(decoder, 2, length)
        expected = decoder(embeddings[:, :length], positions_of(0, 0, tokens=length), *linear)[:2]
        for own, wanted in zip(one, expected, strict=True):
            assert_close(own, wanted)


def test_one_compiled_layer_stands_for_all():
    decoder, _ = make_pair(WINDOW)
    embeddings, caches = make_embeddings(2, 1), [make_caches(decoder, 2, LENGTH, fill=0.5) for _ in range(2)]
    expected = decoder.decode_(embeddings, positions_of(3, 5), *caches[0])
    got = decoder.decode_(embeddings, positions_of(3, 5), *caches[1], DecodeLayer(decoder.layers[0]))
    for own, wanted in zip((*got, *caches[1]), (*expected, *caches[0]), strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("window", [WINDOW, None])
def test_one_compiled_layer_stands_for_all_of_a_prompt(window):
    decoder, _ = make_pair(window)
    embeddings, caches = make_embeddings(1, LENGTH), [make_caches(decoder, 1, LENGTH - 2, fill=0.5) for _ in range(2)]
    expected = decoder.prefill_(embeddings, *caches[0])
    got = decoder.prefill_(embeddings, *caches[1], PromptLayer(decoder.layers[0], window))
    for own, wanted in zip((*got, *caches[1]), (*expected, *caches[0]), strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_logits_as_columns_of_a_product_equal_rows(count, monkeypatch):
    monkeypatch.setattr("export.models.language_model.on_tensor_cores", lambda x: True)
    lm_head, states = nn.Linear(32, 97, bias=False), torch.randn(count, 32)
    torch.testing.assert_close(logits_of(lm_head, states), lm_head(states), atol=TOLERANCE, rtol=0)


def test_decoder_ignores_slots_that_no_token_may_see():
    decoder, _ = make_pair(WINDOW)
    prompt, token = make_embeddings(1), make_embeddings(1, 1)
    caches = make_caches(decoder, 1, LENGTH + 9, fill=1e4)
    decoder.decode_(prompt, positions_of(0, tokens=LENGTH), *caches)
    for cache in caches:
        cache[:, :, :, : LENGTH - WINDOW] = -1e4  # older than the window of position LENGTH
    clean = make_caches(decoder, 1, LENGTH + 1)
    expected = decoder(torch.cat((prompt, token), dim=1), positions_of(0, tokens=LENGTH + 1), *clean)[:2]
    for got, wanted in zip(decoder.decode_(token, positions_of(LENGTH), *caches), expected, strict=True):
        assert_close(got, wanted)


def test_rotation_is_kept_in_float32_precision_when_the_decoder_is_cast_to_half():
    decoder, _ = make_pair(None)
    exact = decoder.cos.clone()
    assert_close(decoder.bfloat16().cos.float(), exact, atol=2**-9)  # half an ulp of bfloat16 below 1


def prompt_embeddings(case):
    """[1, S, C]: the ids with each run of placeholders replaced once by the visual tokens or by the target's (spec 1.6, 1.7)."""
    embed = goldens.checkpoint(case.pack).build("token_embedder")
    ids, pieces = torch.from_numpy(case.expected["prompt_ids"]), []
    for placeholder, tokens in ((VISUAL_PLACEHOLDER, visual_tokens), (TARGET_PLACEHOLDER, target_tokens)):
        if len(places := (ids == placeholder).nonzero().flatten()):
            pieces += [embed(ids[: places[0]]), tokens(case)]
            ids = ids[places[-1] + 1 :]
    return torch.cat((*pieces, embed(ids)))[None]


def target_tokens(case):
    """[n, C]: what the pipeline puts in the place of the target."""
    checkpoint = goldens.checkpoint(case.pack)
    images = TorchGraph(checkpoint.build("image_encoder"), "image_encoder")
    pipeline = Pipeline(checkpoint.config, None, LocalRunner({"image_encoder": images}), HostPreprocessor(checkpoint.config))
    indices = encoder_indices(len(case.frames), checkpoint.config.num_frames) if case.is_video else [0]
    request = pipeline._target_tokens(indices, case.inputs, Clip(case.frames, case.is_video), Options.from_parameters(case.options))
    return torch.from_numpy(request["target_tokens"])


def generate(case):
    """Greedy decode through the cache: first logits, ids, the state that emitted each of them."""
    checkpoint = goldens.checkpoint(case.pack)
    embed, decoder = checkpoint.build("token_embedder"), checkpoint.build("language_decoder")
    embeddings = prompt_embeddings(case)
    length = embeddings.shape[1]
    limit = case.meta["flags"]["max_new_tokens"]
    caches = make_caches(decoder, 1, length + limit)
    logits, state = decoder.decode_(embeddings, positions_of(0, tokens=length), *caches)
    first, ids, states = logits[0], [int(logits.argmax())], [state[0]]
    while ids[-1] not in checkpoint.config.language.eos_token_ids and len(ids) < limit:
        logits, state = decoder.decode_(embed(torch.tensor(ids[-1:]))[None], positions_of(length + len(ids) - 1), *caches)
        ids.append(int(logits.argmax()))
        states.append(state[0])
    return first, ids, torch.stack(states)


@goldens.parametrize_cases()
def test_prompt_embeddings_equal_the_original(case):
    embeddings = prompt_embeddings(case)[0]
    assert len(embeddings) == case.expected["llm.seq_len"]
    np.testing.assert_allclose(embeddings[::41], case.expected["llm.inputs_embeds.slice"], atol=TOLERANCE, rtol=0)


@goldens.parametrize_cases()
def test_greedy_decode_equals_the_original(case):
    logits, ids, states = generate(case)
    assert ids == case.expected["generated_ids"].tolist()
    np.testing.assert_allclose(logits, case.expected["llm.logits_step0"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(states, case.expected["llm.final_norm_at_steps"], atol=TOLERANCE, rtol=0)
    project = goldens.checkpoint(case.pack).build("prompt_projector")
    for token in ("seg", "box"):
        if f"{token}.step" in case.expected:
            embeddings = project(states[case.expected[f"{token}.step"]])
            np.testing.assert_allclose(embeddings, case.expected[f"{token}.emb"], atol=PROMPT_TOLERANCE, rtol=0)
