"""State between the requests of one correlation id: capacity, idle expiry, release."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import CapacityExceeded, UnknownSession

State = TypeVar("State")


@dataclass
class Session(Generic[State]):
    """A state and when it was last asked for."""

    state: State
    used_at: float


class SessionStore(Generic[State]):
    """States by session id.

    Args:
        owner: component name for messages.
        capacity: most sessions at once.
        idle_s: seconds without a request after which a session is dropped.
        clock: seconds, monotonic.
    """

    def __init__(self, owner: str, capacity: int, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.owner, self.capacity, self.idle_s, self._clock = owner, capacity, idle_s, clock
        self._sessions: dict[int, Session[State]] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, session_id: int, state: State) -> State:
        """Stores and returns a new state; an open session of that id is replaced, idle ones are dropped.

        Raises:
            CapacityExceeded: `capacity` other sessions are open.
        """
        now = self._clock()
        self._sessions = {
            id: session for id, session in self._sessions.items() if id != session_id and now - session.used_at <= self.idle_s
        }
        if len(self._sessions) >= self.capacity:
            raise CapacityExceeded(f"{self.owner}: got session {session_id}, but all {self.capacity} are in use. Retry when one has ended.")
        self._sessions[session_id] = Session(state, now)
        return state

    def get(self, session_id: int) -> State:
        """The state of an open session; raises UnknownSession when it never started, has ended or was idle too long."""
        session = self._sessions.get(session_id)
        if session is None or self._clock() - session.used_at > self.idle_s:
            self._sessions.pop(session_id, None)
            raise UnknownSession(
                f"{self.owner}: session {session_id} is not open: it never started, has ended, or was idle for over {self.idle_s:g} s. "
                "Start it again with START and its objects."
            )
        session.used_at = self._clock()
        return session.state

    def states(self) -> list[State]:
        """The states of all open sessions."""
        return [session.state for session in self._sessions.values()]

    def close(self, session_id: int) -> None:
        """Frees a session; nothing happens when it is not open."""
        self._sessions.pop(session_id, None)
