import pytest

from ensemble import sessions
from ensemble.errors import CapacityExceeded, InvalidInput, UnknownSession
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
    store = SessionStore("tracker", capacity=2, idle_s=60, evictable_idle_s=10, clock=clock)
    store.closed = []
    store.on_close = store.closed.append
    return store


def test_store_gives_each_session_its_own_state(store):
    first, second = {}, {}
    assert store.open(1, first) is first
    assert store.open(2, second) is second
    assert store.get(1) is first
    assert store.get(2) is second
    assert len(store) == 2
    assert [id(state) for state in store.states()] == [id(first), id(second)]


def test_session_that_is_open_is_not_opened_again(store):
    store.open(1, "a")
    with pytest.raises(InvalidInput, match=r"tracker: got START, but session 1 is open. Send END first, START with reset"):
        store.open(1, "b")
    assert store.get(1) == "a"
    store.close(1)
    assert store.open(1, "b") == "b"


def test_store_refuses_a_session_when_full_and_says_what_to_do(store):
    store.open(1, "a")
    store.open(2, "b")
    with pytest.raises(CapacityExceeded, match=r"tracker: got session 3, but all 2 are in use. Retry when one has ended"):
        store.open(3, "c")
    assert (store.get(1), store.get(2), len(store)) == ("a", "b", 2)
    store.close(1)
    assert store.open(3, "c") == "c"
    assert store.closed == ["ended"]


def test_session_expires_when_idle_for_longer_than_allowed(store, clock):
    store.open(1, "a")
    clock.now += 60
    assert store.get(1) == "a"  # which starts the time anew
    clock.now += 60
    assert store.get(1) == "a"
    clock.now += 60.1
    with pytest.raises(UnknownSession, match=r"tracker: session 1 is not open: it was closed after 60 s without a request. Start it"):
        store.get(1)
    assert len(store) == 0
    assert store.closed == ["expired"]


def test_idle_session_is_freed_without_anybody_asking_for_it(store, clock):
    store.open(1, "a")
    clock.now += 50
    store.open(2, "b")
    clock.now += 20
    store.expire()
    assert store.states() == ["b"]
    assert store.closed == ["expired"]


def test_session_of_a_client_that_vanished_makes_room_the_longest_idle_first(store, clock):
    store.open(1, "a")
    clock.now += 3
    store.open(2, "b")
    clock.now += 8
    assert store.open(3, "c") == "c"
    assert store.states() == ["b", "c"]
    with pytest.raises(CapacityExceeded):  # "b" was asked for 8 s ago, which is not long enough
        store.open(4, "d")
    assert store.closed == ["evicted"]
    with pytest.raises(UnknownSession, match=r"session 1 is not open: it was closed after 11 s without a request to make room for another"):
        store.get(1)


def test_eviction_spares_the_session_that_needs_the_room(store, clock):
    store.open(1, "a")
    clock.now += 20
    assert not store.evict(keep=1)
    store.open(2, "b")
    assert store.evict(keep=2)
    assert store.states() == ["b"]


def test_session_that_was_left_half_way_is_closed_and_its_next_request_is_told_so(store):
    store.open(1, "a")
    for _ in range(2):  # the second finds it closed
        store.fail(1)
    with pytest.raises(UnknownSession, match="session 1 is not open: it was closed when its frames failed half way"):
        store.get(1)
    assert store.closed == ["failed"]


def test_session_that_starts_again_after_it_expired_is_like_any_other(store, clock):
    store.open(1, "a")
    clock.now += 61
    assert store.open(1, "b") == "b"
    store.close(1)
    with pytest.raises(UnknownSession, match="session 1 is not open: it never started, or has ended"):
        store.get(1)
    assert store.closed == ["expired", "ended"]


def test_store_remembers_why_for_a_bounded_number_of_sessions(store, clock):
    for session in range(2 * sessions.REMEMBERED):
        store.open(session, "a")
        clock.now += 61
    store.expire()
    assert len(store._obituaries) == sessions.REMEMBERED
    with pytest.raises(UnknownSession, match="never started"):
        store.get(0)


def test_closed_session_is_unknown_and_closing_it_again_does_nothing(store):
    store.open(1, "a")
    store.close(1)
    store.close(1)
    store.close(7)
    with pytest.raises(UnknownSession, match="session 1 is not open"):
        store.get(1)
    assert store.closed == ["ended"]
