import pytest

from ensemble.errors import CapacityExceeded, UnknownSession
from ensemble.sessions import SessionStore


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(clock):
    return SessionStore("tracker", capacity=2, idle_s=60, clock=clock)


def test_store_gives_each_session_its_own_state(store):
    first, second = {}, {}
    assert store.open(1, first) is first
    assert store.open(2, second) is second
    assert store.get(1) is first
    assert store.get(2) is second
    assert len(store) == 2
    assert [id(state) for state in store.states()] == [id(first), id(second)]


def test_store_replaces_a_session_that_starts_again_even_when_full(store):
    store.open(1, "a")
    store.open(2, "b")
    store.open(1, "c")
    assert (store.get(1), store.get(2), len(store)) == ("c", "b", 2)


def test_store_refuses_a_session_when_full_and_says_what_to_do(store):
    store.open(1, "a")
    store.open(2, "b")
    with pytest.raises(CapacityExceeded, match=r"tracker: got session 3, but all 2 are in use. Retry when one has ended"):
        store.open(3, "c")
    assert (store.get(1), store.get(2), len(store)) == ("a", "b", 2)
    store.close(1)
    assert store.open(3, "c") == "c"


def test_session_expires_when_idle_for_longer_than_allowed(store, clock):
    store.open(1, "a")
    clock.now += 60
    assert store.get(1) == "a"  # which starts the time anew
    clock.now += 60
    assert store.get(1) == "a"
    clock.now += 60.1
    with pytest.raises(UnknownSession, match=r"tracker: session 1 is not open: .* was idle for over 60 s. Start it again with START"):
        store.get(1)
    assert len(store) == 0


def test_idle_sessions_make_room_for_new_ones(store, clock):
    store.open(1, "a")
    clock.now += 50
    store.open(2, "b")
    clock.now += 20
    store.open(3, "c")
    assert store.states() == ["b", "c"]
    with pytest.raises(UnknownSession):
        store.get(1)


def test_closed_session_is_unknown_and_closing_it_again_does_nothing(store):
    store.open(1, "a")
    store.close(1)
    store.close(1)
    store.close(7)
    with pytest.raises(UnknownSession, match="session 1 is not open"):
        store.get(1)


def test_session_that_never_started_is_unknown(store):
    with pytest.raises(UnknownSession, match="session 5 is not open: it never started"):
        store.get(5)
