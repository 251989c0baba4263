"""State between the requests of one correlation id: capacity, idle expiry, eviction, release."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import CapacityExceeded, InvalidInput, UnknownSession

State = TypeVar("State")

REMEMBERED = 4096
"""Sessions that the store closed itself and whose next request is told why."""


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
        idle_s: seconds without a request after which a session is closed.
        evictable_idle_s: seconds without a request after which it makes room for another; as `idle_s` where not given.
        clock: seconds, monotonic.
    """

    def __init__(
        self, owner: str, capacity: int, idle_s: float, evictable_idle_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.owner, self.capacity, self.idle_s, self._clock = owner, capacity, idle_s, clock
        self.evictable_idle_s = idle_s if evictable_idle_s is None else evictable_idle_s
        self.on_close: Callable[[str], None] = lambda reason: None
        """Told why a session was closed: ended, failed, expired or evicted."""
        self._sessions: dict[int, Session[State]] = {}
        self._obituaries: OrderedDict[int, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, session_id: int, state: State) -> State:
        """Stores and returns a new state; sessions that were idle for too long are closed, or evicted if there is no other room.

        Raises:
            InvalidInput: a session of that id is open.
            CapacityExceeded: `capacity` other sessions are in use.
        """
        self.expire()
        if session_id in self._sessions:
            raise InvalidInput(
                f"{self.owner}: got START, but session {session_id} is open. Send END first, START with reset, or another correlation id."
            )
        while len(self._sessions) >= self.capacity:
            if not self.evict():
                raise CapacityExceeded(
                    f"{self.owner}: got session {session_id}, but all {self.capacity} are in use. Retry when one has ended."
                )
        self._obituaries.pop(session_id, None)
        self._sessions[session_id] = Session(state, self._clock())
        return state

    def get(self, session_id: int) -> State:
        """The state of an open session; raises UnknownSession that says why there is none."""
        self.expire()
        session = self._sessions.get(session_id)
        if session is None:
            why = self._obituaries.get(session_id, "it never started, or has ended")
            raise UnknownSession(f"{self.owner}: session {session_id} is not open: {why}. Start it with START and its objects.")
        session.used_at = self._clock()
        return session.state

    def states(self) -> list[State]:
        """The states of all open sessions."""
        return [session.state for session in self._sessions.values()]

    def close(self, session_id: int) -> None:
        """Frees a session; nothing happens when it is not open."""
        if self._sessions.pop(session_id, None):
            self.on_close("ended")

    def fail(self, session_id: int) -> None:
        """Closes a session that was left half way; nothing happens when it is not open."""
        if session_id in self._sessions:
            self._drop(session_id, "failed", "it was closed when its frames failed half way")

    def expire(self) -> None:
        """Closes the sessions that were idle for longer than `idle_s`."""
        for session_id in [id for id in self._sessions if self._idle(id) > self.idle_s]:
            self._drop(session_id, "expired", f"it was closed after {self.idle_s:g} s without a request")

    def evict(self, keep: int | None = None) -> bool:
        """Closes the session that has been idle the longest, if that is long enough and it is not `keep`; whether there was one."""
        idle = {id: self._idle(id) for id in self._sessions if id != keep}
        longest = max(idle, key=idle.__getitem__, default=None)
        if longest is None or idle[longest] <= self.evictable_idle_s:
            return False
        self._drop(longest, "evicted", f"it was closed after {idle[longest]:.0f} s without a request to make room for another")
        return True

    def _idle(self, session_id: int) -> float:
        return self._clock() - self._sessions[session_id].used_at

    def _drop(self, session_id: int, reason: str, words: str) -> None:
        del self._sessions[session_id]
        self._obituaries[session_id] = words
        if len(self._obituaries) > REMEMBERED:
            self._obituaries.popitem(last=False)
        self.on_close(reason)
