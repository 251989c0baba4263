import random
from dataclasses import replace

import numpy as np
import pytest

from ensemble import settings
from ensemble.components import TARGET_PLACEHOLDER, VISUAL_PLACEHOLDER, components
from ensemble.config import TINY
from ensemble.errors import Cancelled, CapacityExceeded, ComponentFailed, InvalidInput, UnknownSession
from ensemble.generation import LanguageModel, Outlook
from ensemble.pipeline import Answer
from ensemble.runner import CLOSING, SequenceRequest
from ensemble.sessions import SessionStore
from ensemble.tokenizer import Tokenizer
from export.seeded import write_tokenizer

WIDTH, END = TINY.language.width, TINY.language.eos_token_ids[-1]
ID, STORY = 0, 1
"""Columns of the fake's embeddings: the token's id, and on visual tokens which story to tell."""


class ScriptedDecoder:
    """Tells stories (lists of token ids) by number; refuses every call that a real key/value cache could not serve."""

    def __init__(self, stories):
        self.stories = stories
        self.prompts = []
        self.batches = []
        self._slots = {}  # slot -> [story, tokens told]

    def embed(self, token_ids):
        rows = np.zeros((len(token_ids), WIDTH), np.float32)
        rows[:, ID] = token_ids
        return rows

    def prefill(self, slot, embeddings):
        assert 0 <= slot < settings.MAX_GENERATIONS
        embeddings = np.concatenate(embeddings)
        assert embeddings.dtype == np.float32
        self.prompts.append((slot, embeddings))
        self._slots[slot] = [int(embeddings[:, STORY].max()), 0]
        return self._tell(slot)

    def decode(self, slots, token_ids):
        assert len(set(slots)) == len(slots) == len(token_ids)
        self.batches.append(sorted(slots))
        for slot, token_id in zip(slots, token_ids, strict=True):
            story, told = self._slots[slot]
            assert token_id == self.stories[story][told - 1]
        return self._tell(*slots)

    def _tell(self, *slots):
        logits, states = map(np.stack, zip(*map(self._next, slots), strict=True))
        return Outlook(logits.argmax(1), states, states[:, : TINY.sam2.width] * 2, logits.__getitem__)

    def _next(self, slot):
        story, told = self._slots[slot]
        self._slots[slot][1] += 1
        logits = np.zeros(TINY.language.vocab_size, np.float32)
        logits[self.stories[story][told] :] = 1  # a tie: the first largest logit counts
        return logits, state_of(story, told)


def state_of(story, position):
    return np.full(WIDTH, story + position / 1024, np.float32)


STORIES = [[5, 6, 7, END], [8] * 30 + [END], [END], [*range(10, 90), END], [9, 8, 9, 8, END]]
PROMPT = np.array([1, 7, VISUAL_PLACEHOLDER, 8, 9], np.int32)


def language_model(*stories):
    decoder = ScriptedDecoder(stories or STORIES)
    return LanguageModel(TINY, decoder), decoder


def start(session_id, story=0, num_tokens=1, end=False, num_visual=3, **inputs):
    visual = np.zeros((num_visual, WIDTH), np.float32)
    visual[:, ID], visual[:, STORY] = -1, story
    inputs = {"prompt_ids": PROMPT, "visual_tokens": visual, **inputs}
    inputs = {name: array for name, array in inputs.items() if array is not None}
    return SequenceRequest(session_id, {"num_tokens": np.array([num_tokens], np.int32), **inputs}, start=True, end=end)


def more(session_id, num_tokens=1, end=False):
    return SequenceRequest(session_id, {"num_tokens": np.array([num_tokens], np.int32)}, end=end)


def closing(session_id):
    return SequenceRequest(session_id, CLOSING["language_model"], end=True)


def joined(results):
    """One answer's results as one."""
    return {
        "token_ids": np.concatenate([result["token_ids"] for result in results]).tolist(),
        "final_states": np.concatenate([result["final_states"] for result in results]),
        "prompt_embeddings": np.concatenate([result["prompt_embeddings"] for result in results]),
        "finished": [bool(result["finished"][0]) for result in results],
    }


def test_answer_ends_with_the_end_token():
    model, _ = language_model([5, 6, 7, END, 8])
    (result,) = model.step([start(1, num_tokens=100)])
    assert result["token_ids"].tolist() == [5, 6, 7, END]
    assert result["finished"].tolist() == [True]
    expected = np.stack([state_of(0, position) for position in range(4)])
    np.testing.assert_array_equal(result["final_states"], expected)
    np.testing.assert_array_equal(result["prompt_embeddings"], expected[:, : TINY.sam2.width] * 2)


@pytest.mark.parametrize("end", TINY.language.eos_token_ids)
def test_every_end_token_finishes_an_answer(end):
    model, _ = language_model([5, end, 6])
    (result,) = model.step([start(1, num_tokens=100)])
    assert result["token_ids"].tolist() == [5, end]
    assert result["finished"].tolist() == [True]


def test_results_satisfy_the_contract():
    model, _ = language_model()
    contract = components(TINY)["language_model"]
    for request in (start(1), more(1, 2), more(1, 0), closing(1)):
        (result,) = model.step([request])
        assert set(result) == {spec.name for spec in contract.outputs}
        for spec in contract.outputs:
            assert (result[spec.name].dtype, result[spec.name].ndim) == (spec.numpy_dtype, len(spec.shape)), spec.name


@pytest.mark.parametrize(
    ("prompt_ids", "with_targets", "expected"),
    [
        ([1, 7, VISUAL_PLACEHOLDER, 8, 9], False, [1, 7, -1, -1, -1, 8, 9]),
        ([VISUAL_PLACEHOLDER, 8, TARGET_PLACEHOLDER, 9], True, [-1, -1, -1, 8, -11, -12, 9]),
        ([8, TARGET_PLACEHOLDER, VISUAL_PLACEHOLDER], True, [8, -11, -12, -1, -1, -1]),
        ([VISUAL_PLACEHOLDER, TARGET_PLACEHOLDER, 0], False, [-1, -1, -1, 0]),
    ],
)
def test_visual_and_target_tokens_take_the_place_of_their_placeholders(prompt_ids, with_targets, expected):
    targets = np.zeros((2, WIDTH), np.float32)
    targets[:, ID] = [-11, -12]
    model, decoder = language_model()
    model.step([start(1, prompt_ids=np.array(prompt_ids, np.int32), target_tokens=targets if with_targets else None)])
    ((_, embeddings),) = decoder.prompts
    assert embeddings[:, ID].tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_interleaved_answers_equal_each_answer_alone(seed):
    rng = random.Random(seed)
    stories = [rng.randrange(len(STORIES)) for _ in range(settings.MAX_GENERATIONS)]
    alone = []
    for story in stories:
        model, _ = language_model()
        alone.append(joined(model.step([start(1, story, num_tokens=1000)])))

    model, _ = language_model()
    results = {session: [] for session in range(len(stories))}
    unfinished = set(results)
    while unfinished:
        chosen = rng.sample(sorted(unfinished), rng.randint(1, len(unfinished)))
        sizes = [rng.randint(1, 5) for _ in chosen]
        requests = [
            more(session, size) if results[session] else start(session, stories[session], size)
            for session, size in zip(chosen, sizes, strict=True)
        ]
        for session, size, result in zip(chosen, sizes, model.step(requests), strict=True):
            results[session].append(result)
            assert len(result["token_ids"]) == size or result["finished"][0]
            if result["finished"][0]:
                unfinished.remove(session)
                model.step([closing(session)])
    for session, story in enumerate(stories):
        got = joined(results[session])
        assert got["finished"] == [False] * (len(results[session]) - 1) + [True]
        assert got["token_ids"] == alone[session]["token_ids"] == STORIES[story]
        np.testing.assert_array_equal(got["final_states"], alone[session]["final_states"])
        np.testing.assert_array_equal(got["prompt_embeddings"], alone[session]["prompt_embeddings"])


def test_answers_of_one_step_are_decoded_together():
    model, decoder = language_model()
    model.step([start(1, 3), start(2, 3), start(3, 3)])
    model.step([more(1, 4), more(2, 2), more(3, 4)])
    assert decoder.batches == [[0, 1, 2], [0, 1, 2], [0, 2], [0, 2]]


def test_slots_are_used_again_after_end():
    model, decoder = language_model()
    everyone = range(1, settings.MAX_GENERATIONS + 1)
    model.step([start(session, 3) for session in everyone])
    assert [slot for slot, _ in decoder.prompts] == list(range(settings.MAX_GENERATIONS))

    refused, going_on = model.step([start(99, 0), more(1)])
    assert isinstance(refused, CapacityExceeded)
    assert len(going_on["token_ids"]) == 1

    last, _ = model.step([more(3, end=True), closing(6)])
    assert last["token_ids"].tolist() == STORIES[3][1:2]
    assert len(model.sessions) == settings.MAX_GENERATIONS - 2
    model.step([start(99, 0), start(98, 1)])
    assert [slot for slot, _ in decoder.prompts[-2:]] == [2, 5]
    (result,) = model.step([more(98, num_tokens=1000)])
    assert result["token_ids"].tolist() == STORIES[1][1:]


def test_second_start_is_refused_and_the_answer_goes_on():
    model, decoder = language_model()
    first = model.step([start(1, 0)])
    for refused in (start(1, 3), start(1, prompt_ids=None)):
        with pytest.raises(InvalidInput):
            raise model.step([refused])[0]
    assert joined([*first, *model.step([more(1, 1000)])])["token_ids"] == STORIES[0]
    assert len(decoder.prompts) == len(model.sessions) == 1


def ids(*values):
    return np.array(values, np.int32)


BAD_REQUESTS = {
    "no prompt": (start(9, prompt_ids=None), InvalidInput, "language_model: got START without prompt_ids and visual_tokens"),
    "no visual tokens": (
        start(9, visual_tokens=None),
        InvalidInput,
        "language_model: got START without prompt_ids and visual_tokens",
    ),
    "no such word": (start(9, prompt_ids=ids(1, 525)), InvalidInput, r"prompt_ids: got values 1..525, expected -201..524"),
    "no such placeholder": (
        start(9, prompt_ids=ids(1, -202)),
        InvalidInput,
        r"prompt_ids: got values -202..1, expected -201..524",
    ),
    "longer than the cache": (
        start(9, num_visual=TINY.max_sequence - 3),
        InvalidInput,
        "language_model: got 2065 tokens, expected at most 2064",
    ),
    "wrong width": (start(9, visual_tokens=np.zeros((3, 7), np.float32)), InvalidInput, r"visual_tokens: got \[3, 7\] float32"),
    "negative count": (start(9, num_tokens=-1), InvalidInput, "num_tokens: got values -1..-1, expected 0..1024"),
    "not open": (more(9), UnknownSession, "language_model: session 9 is not open"),
}


@pytest.mark.parametrize(("bad", "kind", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_request_fails_alone(bad, kind, message):
    model, _ = language_model()
    model.step([start(1, 0)])
    going_on, error, fresh = model.step([more(1, 1000), bad, start(2, 1, 1000)])
    with pytest.raises(kind, match=message):
        raise error
    assert going_on["token_ids"].tolist() == STORIES[0][1:]  # the first token came with START
    assert fresh["token_ids"].tolist() == STORIES[1]
    assert len(model.sessions) == 2


def test_failed_start_holds_no_slot(monkeypatch):
    model, decoder = language_model()

    def fail(slot, embeddings):
        raise ComponentFailed("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(decoder, "prefill", fail)
        with pytest.raises(ComponentFailed):
            raise model.step([start(1)])[0]
    assert len(model.sessions) == 0
    assert isinstance(model.step([start(1)])[0], dict)


def test_cancelled_request_decodes_nothing():
    model, _ = language_model()
    model.step([start(1, 0)])
    cancelled, other = model.step([replace(more(1, 5), cancelled=True), start(2, 1, 3)])
    assert isinstance(cancelled, Cancelled)
    assert other["token_ids"].tolist() == STORIES[1][:3]
    assert model.step([more(1, 1000)])[0]["token_ids"].tolist() == STORIES[0][1:]


def test_closing_request_decodes_nothing_and_may_come_late():
    model, decoder = language_model()
    model.step([start(1)])
    for _ in range(2):  # the second finds the session closed
        (result,) = model.step([closing(1)])
        assert result["token_ids"].shape == (0,)
        assert result["final_states"].shape == (0, WIDTH)
        assert result["prompt_embeddings"].shape == (0, TINY.sam2.width)
        assert len(model.sessions) == 0
    assert not decoder.batches


def test_finished_answer_has_nothing_more_to_say():
    model, decoder = language_model()
    model.step([start(1, 0, num_tokens=1000)])
    before = len(decoder.batches)
    (result,) = model.step([more(1, 5)])
    assert (result["token_ids"].tolist(), result["finished"].tolist(), len(decoder.batches)) == ([], [True], before)


def test_answer_is_finished_when_the_cache_is_full():
    model, decoder = language_model([5] * 1000)
    room = 10
    (result,) = model.step([start(1, num_tokens=1000, num_visual=TINY.max_sequence - (len(PROMPT) - 1) - room)])
    assert len(decoder.prompts[0][1]) == TINY.max_sequence - room
    assert len(decoder.batches) == room  # as many tokens as fit were written behind the prompt
    assert len(result["token_ids"]) == room + 1
    assert result["finished"].tolist() == [True]


def test_answer_is_dropped_when_idle():
    now = 0.0
    model, _ = language_model()
    model.sessions = SessionStore("language_model", settings.MAX_GENERATIONS, settings.GENERATION_IDLE_S, clock=lambda: now)
    model.step([start(1)])
    now = settings.GENERATION_IDLE_S + 1
    with pytest.raises(UnknownSession, match="is not open: it was closed after 30 s without a request"):
        raise model.step([more(1)])[0]


def test_start_decides_the_first_token_even_when_none_is_asked_for():
    model, _ = language_model()
    (result,) = model.step([start(1, num_tokens=0)])
    assert result["token_ids"].tolist() == STORIES[0][:1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer(folder)


def told(tokenizer, token_ids, size=1):
    """An answer that comes `size` tokens at a time, and its pieces of text."""
    answer = Answer(tokenizer, TINY.language)
    groups = [token_ids[first : first + size] for first in range(0, len(token_ids), size)]
    embeddings = [np.stack([state_of(id, 0)[: TINY.sam2.width] for id in group]) for group in groups]
    last = len(groups) - 1
    return answer, [
        answer.accept(np.array(group), rows, index == last) for index, (group, rows) in enumerate(zip(groups, embeddings, strict=True))
    ]


def test_text_pieces_are_whole_characters_and_add_up_when_tokens_come_one_by_one(tokenizer):
    token_ids = tokenizer.encode("a 🙂 漢字 é [BOX] [SEG] 🙂")
    answer, pieces = told(tokenizer, [*token_ids, END])
    assert "".join(pieces) == answer.text == tokenizer.decode(token_ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum("🙂" in piece for piece in pieces) == 2
    assert answer.token_ids == [*token_ids, END]


def test_bytes_that_never_become_a_character_are_shown_once_they_are_final(tokenizer):
    half, word = tokenizer.encode("🙂")[:-1], tokenizer.encode("the")
    answer, pieces = told(tokenizer, [*half, *word, *half])
    assert not "".join(pieces[: len(half)]).strip()
    assert "".join(pieces) == answer.text == tokenizer.decode([*half, *word, *half])
    assert answer.text.endswith("\ufffd")


@pytest.mark.parametrize("seed", range(20))
def test_text_pieces_add_up_to_the_decoded_answer_whatever_the_tokens(tokenizer, seed):
    rng = random.Random(seed)
    words = [id for id in range(TINY.language.vocab_size) if id not in TINY.language.eos_token_ids]
    token_ids = [rng.choice(words) for _ in range(60)]
    answer, pieces = told(tokenizer, [*token_ids, END], size=rng.randint(1, 3))
    assert "".join(pieces) == answer.text == tokenizer.decode(token_ids)


def test_answer_keeps_the_embeddings_of_seg_and_box_in_order(tokenizer):
    seg, box = TINY.language.seg_token_id, TINY.language.box_token_id
    answer = Answer(tokenizer, TINY.language)
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    answer.accept(np.array([5, box, seg]), rows[:3], is_last=False)
    answer.accept(np.array([seg, box, END]), rows[3:], is_last=True)
    np.testing.assert_array_equal(answer.seg, rows[[2, 3]])
    np.testing.assert_array_equal(answer.box, rows[[1, 4]])
