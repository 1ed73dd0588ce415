"""The checker is checked: for each invariant, histories that break it, each a small change to one that holds."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from firstclaim.status import Status
from tests.acceptance.harness import DEFERRED, FAILED, IGNORED, PROCESSED, UNAVAILABLE, UNHANDLED, Row
from tests.chaos.checker import Effect, Evidence, Vacuous, check
from tests.chaos.history import Delivery, Unseen
from tests.chaos.trace import CLAIM, END, HOLD, LOCK, OUTSIDE, START, Line

EPOCH = "0123456789abcdef"
DISPATCH = (LOCK, CLAIM, HOLD, START, OUTSIDE, END)


def row(status: Status, attempt: int, failures: int = 0, abandoned: int = 0, error: str | None = None) -> Row:
    return Row(status, attempt, failures, abandoned, None, error, due_in_seconds=60)


def delivery(
    event_id: str, at: int, said: tuple[int, bool, str] | None, seen: Row | Unseen, *, wanted: bool = True
) -> Delivery:
    return Delivery(event_id, "serve", at, at + 10, said, seen, at + 12, wanted)


def lines(event_id: str, attempt: int, pid: int, at: int, whats: Iterable[str] = DISPATCH) -> list[Line]:
    """One dispatch, each line lasting 5 and following 10 after the one before."""
    return [
        Line(what, event_id, pid, at + 10 * n, at + 10 * n + 5, 0 if what == LOCK else attempt, event_id)
        for n, what in enumerate(whats)
    ]


DONE = row(Status.COMPLETED, 1)
AGAIN = row(Status.COMPLETED, 2, failures=1)
NO_ANSWER = delivery("once", 50, None, Unseen.NOT_READ)

# `once` went through at once, `again` failed once and was completed by another process, `unwanted` has no handler,
# `poison` killed its process until it was dead, `hopeless` raised Permanent, `unsure` was never recorded. `new` has a
# handler in one of two builds: the other ignored it, and its resend was completed. `old` reached only the other build,
# except for a delivery that was refused and one that was not answered.
CLEAN = Evidence(
    deliveries=[
        NO_ANSWER,
        delivery("once", 100, PROCESSED, DONE),
        delivery("once", 101, IGNORED, row(Status.PROCESSING, 1)),
        delivery("once", 200, IGNORED, Unseen.NOT_READ),
        delivery("again", 100, FAILED, row(Status.FAILED, 1, failures=1)),
        delivery("again", 400, IGNORED, AGAIN),
        delivery("unwanted", 100, UNHANDLED, row(Status.IGNORED, 1), wanted=False),
        delivery("poison", 100, DEFERRED, row(Status.PENDING, 0)),
        delivery("hopeless", 100, (200, False, "dead"), row(Status.DEAD, 1, failures=1)),
        delivery("unsure", 100, UNAVAILABLE, Unseen.NO_ROW),
        delivery("new", 100, UNHANDLED, row(Status.IGNORED, 1), wanted=False),
        delivery("new", 300, PROCESSED, row(Status.COMPLETED, 2)),
        delivery("old", 100, UNHANDLED, row(Status.IGNORED, 1), wanted=False),
        delivery("old", 300, UNAVAILABLE, row(Status.IGNORED, 1)),
        delivery("old", 400, None, Unseen.NOT_READ),
    ],
    rows={
        "once": DONE,
        "again": AGAIN,
        "unwanted": row(Status.IGNORED, 1),
        "poison": row(Status.DEAD, 8, abandoned=8, error="attempt 8 was abandoned: its process vanished or froze"),
        "hopeless": row(Status.DEAD, 1, failures=1, error="Permanent: never"),
        "new": row(Status.COMPLETED, 2),
        "old": row(Status.IGNORED, 1),
    },
    effects=[Effect("once", 1), Effect("again", 2), Effect("new", 2)],
    lines=[
        *lines("once", 1, pid=1, at=100),
        *lines("again", 1, pid=1, at=100),
        *lines("again", 2, pid=2, at=300),
        *lines("unwanted", 1, pid=1, at=100, whats=(LOCK, CLAIM)),
        *(line for n in range(1, 9) for line in lines("poison", n, pid=n, at=1000 * n, whats=DISPATCH[:5])),
        *lines("hopeless", 1, pid=1, at=100),
        *lines("new", 2, pid=1, at=300),
    ],
    markers={"once": f"recorded:{EPOCH}", "again": "claimed:5eed", "unsure": "recorded:another epoch"},
    epoch=EPOCH,
)

Change = Callable[[Evidence], Evidence]


def answered(event_id: str, said: tuple[int, bool, str], seen: Row | Unseen, *, wanted: bool = True) -> Change:
    return lambda e: replace(e, deliveries=[*e.deliveries, delivery(event_id, 900, said, seen, wanted=wanted)])


def with_row(event_id: str, changed: Row) -> Change:
    return lambda e: replace(e, rows={**e.rows, event_id: changed})


def without_row(event_id: str) -> Change:
    return lambda e: replace(e, rows={key: value for key, value in e.rows.items() if key != event_id})


def with_effects(*effects: Effect) -> Change:
    return lambda e: replace(e, effects=[*e.effects, *effects])


def without_effect(effect: Effect) -> Change:
    return lambda e: replace(e, effects=[each for each in e.effects if each != effect])


def with_lines(*more: Line) -> Change:
    return lambda e: replace(e, lines=[*e.lines, *more])


def without_lines(event_id: str, *whats: str) -> Change:
    return lambda e: replace(e, lines=[x for x in e.lines if x.event_id != event_id or x.what not in whats])


def changed_line(event_id: str, what: str, change: Callable[[Line], Line]) -> Change:
    return lambda e: replace(e, lines=[change(x) if (x.event_id, x.what) == (event_id, what) else x for x in e.lines])


def with_marker(event_id: str, value: str) -> Change:
    return lambda e: replace(e, markers={**e.markers, event_id: value})


def named(*changes: Change, base: Evidence = CLEAN) -> set[tuple[str, str]]:
    """The (invariant, event) that the checker names once the changes are made."""
    for change in changes:
        base = change(base)
    return {(violation.invariant, violation.event_id) for violation in check(base)}


def test_a_history_that_holds_is_passed() -> None:
    """Success, a failure made good, an unhandled type, two kinds of dead, no answer, and a refusal: all in order."""
    assert check(CLEAN) == []


BROKEN: dict[str, tuple[tuple[Change, ...], set[tuple[str, str]]]] = {
    "a 2xx and no row at that instant": (
        (answered("once", DEFERRED, Unseen.NO_ROW),),
        {("I1", "once")},
    ),
    "a 2xx whose row went away": (
        (answered("unsure", DEFERRED, row(Status.PENDING, 0)),),
        {("I1", "unsure")},
    ),
    "completed without an effect": (
        (without_effect(Effect("once", 1)),),
        {("I2", "once")},
    ),
    "completed with two effects": (
        (with_effects(Effect("once", 1)),),
        {("I2", "once")},
    ),
    "dead with an effect": (
        (with_effects(Effect("hopeless", 1)),),
        {("I2", "hopeless")},
    ),
    "an effect of an event without a row": (
        (with_effects(Effect("unsure", 1)),),
        {("I2", "unsure")},
    ),
    "one attempt given twice, to two processes": (
        (with_lines(*lines("once", 1, pid=2, at=300)),),
        {("I3", "once")},
    ),
    "one attempt started twice": (
        (with_lines(*lines("once", 1, pid=1, at=300, whats=(START,))),),
        {("I3", "once")},
    ),
    "attempts that do not rise": (
        (
            with_lines(*lines("hopeless", 2, pid=2, at=10)),
            with_row("hopeless", row(Status.DEAD, 2, error="Permanent: ")),
        ),
        {("I3", "hopeless")},
    ),
    "an attempt that the ledger forgot": (
        (with_lines(*lines("hopeless", 2, pid=2, at=500)),),
        {("I3", "hopeless")},
    ),
    "an attempt that fell between two looks": (
        (answered("again", IGNORED, row(Status.PROCESSING, 1)),),
        {("I3", "again")},
    ),
    "an earlier attempt that committed all the same": (
        (without_effect(Effect("again", 2)), with_effects(Effect("again", 1))),
        {("I3", "again")},
    ),
    "a handler started without the row's lock": (
        (without_lines("once", HOLD),),
        {("I3", "once")},
    ),
    "a row that never settles": (
        (with_row("poison", row(Status.PENDING, 8)),),
        {("I4", "poison")},
    ),
    "a row left to a holder that vanished": (
        (with_row("hopeless", row(Status.PROCESSING, 1)),),
        {("I4", "hopeless")},
    ),
    "dead after a mere failure": (
        (with_row("hopeless", row(Status.DEAD, 1, failures=1, error="RuntimeError: down")),),
        {("I4", "hopeless")},
    ),
    "dead before it was abandoned often enough": (
        (with_row("poison", row(Status.DEAD, 8, abandoned=7, error="attempt 8 was abandoned")),),
        {("I4", "poison")},
    ),
    "a claim without the lock": (
        (without_lines("once", LOCK),),
        {("I5", "once")},
    ),
    "the lock after the claim": (
        (changed_line("once", LOCK, lambda line: replace(line, at=line.at + 20)),),
        {("I5", "once")},
    ),
    "one lock for two claims": (
        (
            with_lines(*lines("hopeless", 2, pid=1, at=500, whats=DISPATCH[1:])),
            with_row("hopeless", row(Status.DEAD, 2, error="Permanent: never")),
        ),
        {("I5", "hopeless")},
    ),
    "the lock of another process": (
        (changed_line("once", LOCK, lambda line: replace(line, pid=2)),),
        {("I5", "once")},
    ),
    "a start without the ledger's claim": (
        (without_lines("once", CLAIM),),
        {("I5", "once")},
    ),
    "a start before the ledger's claim": (
        (changed_line("once", CLAIM, lambda line: replace(line, at=line.at + 50)),),
        {("I5", "once")},
    ),
    "the claim of another process": (
        (changed_line("once", CLAIM, lambda line: replace(line, pid=2)), with_lines(Line(LOCK, "once", 2, 1, 2))),
        {("I5", "once")},
    ),
    "completed, and no start was recorded": (
        (without_lines("once", *DISPATCH),),
        {("I5", "once"), ("OUTSIDE", "once")},
    ),
    "processed, and the row is not settled": (
        (answered("once", PROCESSED, row(Status.PROCESSING, 1)),),
        {("I6", "once")},
    ),
    "processed, and the row is dead": (
        (answered("hopeless", PROCESSED, row(Status.DEAD, 1)),),
        {("I6", "hopeless")},
    ),
    "processed, and not a 200": (
        (answered("once", (500, True, "failed"), DONE),),
        {("I6", "once")},
    ),
    "ignored before there was a row": (
        (answered("once", IGNORED, Unseen.NO_ROW),),
        {("I1", "once"), ("I6", "once")},
    ),
    "a marker of the current epoch without a row": (
        (with_marker("unsure", f"recorded:{EPOCH}"),),
        {("I7", "unsure")},
    ),
    "acknowledged by a build with a handler, and ignored at the end": (
        (answered("old", DEFERRED, row(Status.PENDING, 1)),),
        {("I8", "old")},
    ),
    "a duplicate at a build with a handler, and ignored at the end": (
        (answered("old", IGNORED, Unseen.NOT_READ),),
        {("I8", "old")},
    ),
    "acknowledged by a build with a handler while it was ignored": (
        (answered("new", IGNORED, row(Status.IGNORED, 2)),),
        {("I8", "new")},
    ),
    "not handled, said by a build with a handler": (
        (answered("unwanted", UNHANDLED, row(Status.IGNORED, 1)),),
        {("I8", "unwanted")},
    ),
    "completed without a call to the outside": (
        (without_lines("once", OUTSIDE),),
        {("OUTSIDE", "once")},
    ),
    "a call to the outside by an attempt that did not start": (
        (with_lines(*lines("poison", 9, pid=9, at=9900, whats=(OUTSIDE,))),),
        {("OUTSIDE", "poison")},
    ),
    "a call to the outside under another key": (
        (changed_line("once", OUTSIDE, lambda line: replace(line, key="attempt-1")),),
        {("OUTSIDE", "once")},
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_invariant_is_named(what: str) -> None:
    """Each single change to a history that holds is found, under its own invariant and its own event, and no other."""
    changes, expected = BROKEN[what]
    assert named(*changes) == expected


def test_every_invariant_is_broken_here() -> None:
    """No invariant is without a history that breaks it."""
    broken = {invariant for _, expected in BROKEN.values() for invariant, _ in expected}
    assert broken == {"I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8", "OUTSIDE"}


@pytest.mark.parametrize(
    "deliveries",
    [
        [],
        [NO_ANSWER],
        [delivery("once", 100, UNAVAILABLE, Unseen.NO_ROW)],
        [delivery("once", 100, PROCESSED, Unseen.NOT_READ)],
    ],
    ids=["empty", "never answered", "nothing promised", "never looked"],
)
def test_a_run_that_shows_nothing_is_refused(deliveries: list[Delivery]) -> None:
    """Without one promise that was compared with the ledger there is nothing to pass, whatever else there is."""
    with pytest.raises(Vacuous):
        check(replace(CLEAN, deliveries=deliveries))


def test_a_frozen_process_may_tell_of_it_late() -> None:
    """Attempt 1's lines come after attempt 2's, but cover the time before: a frozen process broke no order."""
    late = [
        replace(line, at=line.at + 5000) if (line.event_id, line.pid) == ("again", 1) else line for line in CLEAN.lines
    ]
    assert check(replace(CLEAN, lines=late)) == []


def test_looks_that_overlap_have_no_order() -> None:
    """A look that began earlier and ended later than another may show an earlier attempt."""
    slow = Delivery("again", "serve", 90, 105, IGNORED, row(Status.PROCESSING, 1), 5000, wanted=True)
    assert check(replace(CLEAN, deliveries=[*CLEAN.deliveries, slow])) == []


def test_a_build_without_a_handler_promises_no_handling() -> None:
    """A 2xx of a build without a handler for the event says nothing about its end: the event may be ignored."""
    both = answered("old", DEFERRED, row(Status.IGNORED, 1), wanted=False), answered("old", IGNORED, Unseen.NOT_READ)
    assert named(both[0]) == set()
    assert named(*both) == {("I8", "old")}


def test_a_rogue_handler_waives_only_the_count_of_effects() -> None:
    """A handler that committed by itself is waived of I2, and of no other invariant."""
    rogue = with_effects(Effect("hopeless", 1))
    waived = replace(CLEAN, waived=frozenset({"hopeless"}))
    assert named(rogue, base=waived) == set()
    assert named(rogue, without_lines("hopeless", LOCK), base=waived) == {("I5", "hopeless")}


def test_the_budgets_of_the_dead() -> None:
    """Dead is in order after the time to give up, or after as many abandonments as this run's services allow."""
    failed = with_row("hopeless", row(Status.DEAD, 1, failures=9, error="RuntimeError: down"))
    assert named(failed, base=replace(CLEAN, given_up={"hopeless"})) == set()
    early = with_row("poison", row(Status.DEAD, 8, abandoned=2, error="attempt 8 was abandoned"))
    assert named(early, base=replace(CLEAN, abandoned_most=2)) == set()
