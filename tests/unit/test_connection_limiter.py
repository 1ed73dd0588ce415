"""Which connection is evicted at a limit, and how many connections the limit on open files allows."""

import resource

import pytest

from firstclaim.server.connection_limiter import ConnectionLimiter, affordable_connections
from firstclaim.settings import Settings


class FakeConnection:
    """Remembers that it was evicted, and calls the limiter as a connection does."""

    def __init__(self, limiter: ConnectionLimiter) -> None:
        self.limiter = limiter
        self.evicted = False

    def evict(self) -> None:
        assert not self.evicted
        self.evicted = True
        self.limiter.request_awaited(self)  # as a connection does that lingers; it must not count again
        self.limiter.closed(self)


def opened(limiter: ConnectionLimiter, count: int) -> list[FakeConnection]:
    """`count` new connections, for all of which there is capacity."""
    connections = [FakeConnection(limiter) for _ in range(count)]
    assert [limiter.opened(each) for each in connections] == [True] * count
    return connections


def evicted(connections: list[FakeConnection]) -> list[bool]:
    return [each.evicted for each in connections]


def test_the_longest_incomplete_is_evicted_first() -> None:
    """Each new connection above the limit evicts one: the connection that has been incomplete for longest."""
    limiter = ConnectionLimiter(3, 1000)
    first, second, third = opened(limiter, 3)
    opened(limiter, 2)
    assert evicted([first, second, third]) == [True, True, False]


def test_a_complete_request_is_not_evicted() -> None:
    """A connection with a complete request is not evicted; once answered, it is the last in line for eviction."""
    limiter = ConnectionLimiter(2, 1000)
    first, second = opened(limiter, 2)
    limiter.request_complete(first)
    opened(limiter, 1)
    assert evicted([first, second]) == [False, True]
    limiter.request_awaited(first)
    opened(limiter, 1)
    assert not first.evicted  # the third was incomplete for longer


def test_with_all_requests_complete_the_new_connection_is_refused() -> None:
    """If no connection can be evicted, the new one is refused, and the next one takes its place, not an extra one."""
    limiter = ConnectionLimiter(2, 1000)
    for each in opened(limiter, 2):
        limiter.request_complete(each)
    refused = FakeConnection(limiter)
    assert not limiter.opened(refused)
    assert not refused.evicted
    assert not limiter.opened(FakeConnection(limiter))
    assert refused.evicted


def test_a_closed_connection_frees_its_place() -> None:
    """A closed connection frees one place, once, whether or not its request was complete."""
    limiter = ConnectionLimiter(2, 1000)
    first, second = opened(limiter, 2)
    limiter.request_complete(first)
    for each in (first, first, second):
        limiter.closed(each)
    assert not any(evicted(opened(limiter, 2)))


def test_bytes_are_bounded() -> None:
    """Too many bytes of incomplete requests evict the connections that were incomplete for longest, and no more."""
    limiter = ConnectionLimiter(10, 100)
    first, second, third, fourth = connections = opened(limiter, 4)
    for each, count in ((first, 30), (second, 30), (third, 40)):
        limiter.received(each, count)
    assert not any(evicted(connections))
    limiter.received(fourth, 31)
    assert evicted(connections) == [True, True, False, False]
    limiter.request_complete(third)  # the bytes of a complete request are bounded elsewhere
    limiter.received(fourth, 69)
    assert not fourth.evicted
    limiter.received(fourth, 1)
    assert fourth.evicted


def test_one_too_large_is_evicted_itself() -> None:
    """A connection that exceeds the limit alone is evicted too, and its later bytes are not counted."""
    limiter = ConnectionLimiter(10, 100)
    [only] = opened(limiter, 1)
    limiter.received(only, 101)
    limiter.received(only, 101)
    assert only.evicted
    assert not any(evicted(opened(limiter, 10)))


@pytest.mark.parametrize(
    ("soft", "hard", "affordable", "raised"),
    [
        (1_000_000, 1_000_000, 2000, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 2000, None),
        (1024, 1_000_000, 2000, 2227),
        (1024, resource.RLIM_INFINITY, 2000, 2227),
        (256, 1024, 797, 1024),
        (20, 20, 1, 20),
    ],
)
def test_the_limit_on_files_is_raised_or_respected(
    soft: int, hard: int, affordable: int, raised: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The soft limit is raised as far as needed and allowed; clients get the files that the stores do not need."""
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.append(wanted))
    assert affordable_connections(Settings()) == affordable
    assert limits == ([] if raised is None else [(raised, hard)])
