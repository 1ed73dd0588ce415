"""Who has to go when a process is full, and how many sockets its limit on open files allows."""

import resource

import pytest

from firstclaim.server.connection_limiter import ConnectionLimiter, affordable_connections
from firstclaim.settings import Settings


class Visitor:
    """Remembers that it was shown out, and leaves as a connection does."""

    def __init__(self, house: ConnectionLimiter) -> None:
        self.house = house
        self.gone = False

    def evict(self) -> None:
        assert not self.gone
        self.gone = True
        self.house.expect(self)  # as a connection that still says why; it must not count again
        self.house.leave(self)


def visitors(house: ConnectionLimiter, count: int) -> list[Visitor]:
    """So many newcomers, all of whom may stay."""
    found = [Visitor(house) for _ in range(count)]
    assert [house.arrive(each) for each in found] == [True] * count
    return found


def gone(found: list[Visitor]) -> list[bool]:
    return [each.gone for each in found]


def test_the_longest_arriving_goes_first() -> None:
    """Each newcomer above the most takes the place of whoever has waited longest, one for one."""
    house = ConnectionLimiter(3, 1000)
    first, second, third = visitors(house, 3)
    visitors(house, 2)
    assert gone([first, second, third]) == [True, True, False]


def test_a_request_that_is_here_is_safe() -> None:
    """Whose request has arrived does not go; with its answer it begins to wait anew, behind all others."""
    house = ConnectionLimiter(2, 1000)
    first, second = visitors(house, 2)
    house.complete(first)
    visitors(house, 1)
    assert gone([first, second]) == [False, True]
    house.expect(first)
    visitors(house, 1)
    assert not first.gone  # the third waited longer


def test_with_everyone_at_work_the_newcomer_goes() -> None:
    """Then nobody makes room: the newcomer is told so, and the next one takes its place, not an extra one."""
    house = ConnectionLimiter(2, 1000)
    for each in visitors(house, 2):
        house.complete(each)
    refused = Visitor(house)
    assert not house.arrive(refused)
    assert not refused.gone
    assert not house.arrive(Visitor(house))
    assert refused.gone


def test_who_has_gone_leaves_a_place() -> None:
    """A place that was left is free, whether or not its request had come, and is left once."""
    house = ConnectionLimiter(2, 1000)
    first, second = visitors(house, 2)
    house.complete(first)
    for each in (first, first, second):
        house.leave(each)
    assert not any(gone(visitors(house, 2)))


def test_bytes_are_bounded() -> None:
    """Too many bytes of requests that have not arrived: the longest arriving go until it is enough, no further."""
    house = ConnectionLimiter(10, 100)
    first, second, third, fourth = found = visitors(house, 4)
    for each, count in ((first, 30), (second, 30), (third, 40)):
        house.bring(each, count)
    assert not any(gone(found))
    house.bring(fourth, 31)
    assert gone(found) == [True, True, False, False]
    house.complete(third)  # what has arrived is another's to bound
    house.bring(fourth, 69)
    assert not fourth.gone
    house.bring(fourth, 1)
    assert fourth.gone


def test_one_too_large_goes_itself() -> None:
    """Who alone brings too much has to go too, and what it brings after that counts for nobody."""
    house = ConnectionLimiter(10, 100)
    [only] = visitors(house, 1)
    house.bring(only, 101)
    house.bring(only, 101)
    assert only.gone
    assert not any(gone(visitors(house, 10)))


@pytest.mark.parametrize(
    ("soft", "hard", "affordable", "raised"),
    [
        (1_000_000, 1_000_000, 2000, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 2000, None),
        (1024, 1_000_000, 2000, 2217),
        (1024, resource.RLIM_INFINITY, 2000, 2217),
        (256, 1024, 807, 1024),
        (20, 20, 1, 20),
    ],
)
def test_the_limit_on_files_is_raised_or_kept_to(
    soft: int, hard: int, affordable: int, raised: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The soft limit goes up as far as is needed and allowed; sockets get what the stores' connections leave."""
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.append(wanted))
    assert affordable_connections(Settings()) == affordable
    assert limits == ([] if raised is None else [(raised, hard)])
