"""The decode loop: several answers at once, one token of each per step (spec 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from . import settings
from .components import TARGET_PLACEHOLDER, VISUAL_PLACEHOLDER, components
from .config import ModelConfig
from .errors import Cancelled, InvalidInput, SparrowError
from .runner import DeviceArray, Parameters, SequenceRequest
from .sampling import Sampling, draw
from .sessions import SessionStore
from .tensors import Array, Arrays

NO_SLOT = NO_TOKEN = -1

SAMPLING = "sampling"
"""Request parameter of START: a `Sampling`; without it decoding is greedy."""


class Decoder(Protocol):
    """The language model over a key/value cache with a fixed number of slots, one per answer."""

    def embed(self, token_ids: list[int]) -> Array:
        """[S, H] float32 rows of the embedding table."""

    def prefill(self, slot: int, embeddings: Sequence[DeviceArray]) -> Outlook:
        """Fills an empty slot with embeddings, [S, H] in pieces; what follows the last one, n = 1."""

    def decode(self, slots: list[int], token_ids: list[int]) -> Outlook:
        """Appends one token to each of n slots; what follows them."""


@dataclass(frozen=True)
class Outlook:
    """What n answers go on with.

    Args:
        likeliest: [n] int64, the first largest logit of each.
        states: [n, H] float32, final-norm states behind the last token.
        prompt_embeddings: [n, C] float32, text_hidden_fcs of the states.
        logits: row to [V] float32; few answers ask for them.
    """

    likeliest: Array
    states: Array
    prompt_embeddings: Array
    logits: Callable[[int], Array]


@dataclass
class Answer:
    """An answer in the making."""

    slot: int
    length: int
    """Cache positions in use."""
    draw: Callable[[Array], int] | None = None
    """Logits to the next token; the likeliest where not given."""
    last_token: int = NO_TOKEN
    finished: bool = False


@dataclass
class Turn:
    """A request of the running step and what it has decoded so far."""

    answer: Answer
    num_tokens: int
    token_ids: list[int] = field(default_factory=list)
    states: list[Array] = field(default_factory=list)
    prompt_embeddings: list[Array] = field(default_factory=list)

    @property
    def waiting(self) -> bool:
        return not self.answer.finished and len(self.token_ids) < self.num_tokens


def drawing(parameters: Parameters) -> Callable[[Array], int] | None:
    """How a request asks for its tokens to be drawn, if it does."""
    if SAMPLING not in parameters:
        return None
    sampling = Sampling.from_json(parameters[SAMPLING])
    return partial(draw, sampling=sampling, generator=sampling.generator())


class LanguageModel:
    """The server of the component `language_model`.

    Args:
        config: sizes of the model.
        decoder: with settings.MAX_GENERATIONS slots.
    """

    def __init__(self, config: ModelConfig, decoder: Decoder) -> None:
        self._config, self._decoder = config, decoder
        self._contract = components(config)["language_model"]
        self.sessions: SessionStore[Answer] = SessionStore("language_model", settings.MAX_GENERATIONS, settings.GENERATION_IDLE_S)

    def step(self, requests: list[SequenceRequest]) -> list[Arrays | SparrowError]:
        """Decodes the tokens that each request asks for, all answers together; a bad request fails alone."""
        results: dict[int, Arrays | SparrowError] = {}
        turns: dict[int, Turn] = {}
        for position, request in enumerate(requests):
            try:
                turns[position] = self._begin(request)
            except SparrowError as error:
                results[position] = error
        while waiting := [turn for turn in turns.values() if turn.waiting]:
            outlook = self._decoder.decode([turn.answer.slot for turn in waiting], [turn.answer.last_token for turn in waiting])
            for row, turn in enumerate(waiting):
                turn.answer.length += 1
                self._accept(turn, outlook, row)
        results |= {position: self._respond(turn) for position, turn in turns.items()}
        for position, request in enumerate(requests):
            refused = request.start and isinstance(results[position], SparrowError)
            if request.end and not refused:
                self.sessions.close(request.session_id)
        return [results[position] for position in range(len(requests))]

    def expire(self) -> None:
        self.sessions.expire()

    def _begin(self, request: SequenceRequest) -> Turn:
        """The answer of a request; START reads the prompt, which decides the first token."""
        if request.cancelled:
            raise Cancelled("language_model: the request was cancelled before its turn.")
        self._contract.check_inputs(request.inputs)
        num_tokens = int(request.inputs["num_tokens"][0])
        if not request.start:
            if request.end and not num_tokens:
                return Turn(Answer(NO_SLOT, 0, finished=True), 0)
            return Turn(self.sessions.get(request.session_id), num_tokens)
        embeddings = self._embeddings(request.inputs)
        length = sum(map(len, embeddings))
        if length > self._config.max_sequence:
            raise InvalidInput(f"language_model: got {length} tokens, expected at most {self._config.max_sequence}. Shorten the prompt.")
        answer = self.sessions.open(request.session_id, Answer(NO_SLOT, length, drawing(request.parameters)))
        used = {other.slot for other in self.sessions.states()}
        answer.slot = next(slot for slot in range(settings.MAX_GENERATIONS) if slot not in used)
        turn = Turn(answer, max(1, num_tokens))
        try:
            self._accept(turn, self._decoder.prefill(answer.slot, embeddings), row=0)
        except BaseException:
            self.sessions.close(request.session_id)
            raise
        return turn

    def _embeddings(self, inputs: Arrays) -> list[DeviceArray]:
        """The prompt with visual and target tokens in the place of their placeholders: [S, H] in pieces."""
        if "prompt_ids" not in inputs or "visual_tokens" not in inputs:
            raise InvalidInput("language_model: got START without prompt_ids and visual_tokens. Add them to the request.")
        ids = inputs["prompt_ids"]
        nothing = np.zeros((0, self._config.language.width), np.float32)
        tokens = {VISUAL_PLACEHOLDER: inputs["visual_tokens"], TARGET_PLACEHOLDER: inputs.get("target_tokens", nothing)}
        words = self._decoder.embed(np.maximum(ids, 0).tolist())
        pieces, start = [], 0
        for index in np.flatnonzero(ids < 0):
            pieces += [words[start:index], tokens[int(ids[index])]]
            start = index + 1
        return [*pieces, words[start:]]

    def _accept(self, turn: Turn, outlook: Outlook, row: int) -> None:
        answer = turn.answer
        token_id = int(outlook.likeliest[row]) if answer.draw is None else answer.draw(outlook.logits(row))
        answer.last_token = token_id
        turn.token_ids.append(token_id)
        turn.states.append(outlook.states[row])
        turn.prompt_embeddings.append(outlook.prompt_embeddings[row])
        answer.finished = token_id in self._config.language.eos_token_ids or answer.length >= self._config.max_sequence

    def _respond(self, turn: Turn) -> Arrays:
        count = len(turn.token_ids)
        return {
            "token_ids": np.array(turn.token_ids, np.int32),
            "prompt_embeddings": np.array(turn.prompt_embeddings, np.float32).reshape(count, self._config.sam2.width),
            "final_states": np.array(turn.states, np.float32).reshape(count, self._config.language.width),
            "finished": np.array([turn.answer.finished]),
        }
