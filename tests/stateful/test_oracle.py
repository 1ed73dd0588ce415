"""The oracle misses nothing: a history that breaks an invariant is named by it, and one that breaks none is not."""

from dataclasses import replace

import pytest

from firstclaim import outcome
from firstclaim.outcome import Kind, Outcome
from firstclaim.status import Status
from tests.integration.world import delivery
from tests.stateful.oracle import Key, Limits, Plan, Row, Seen, Story, broken, dishonest, expected

EVENT = "evt_0"
EPOCH = "0123456789abcdef"
LIMITS = Limits(lock_ttl_seconds=20, marker_ttl_seconds=1000, abandoned_most=3)

COMPLETED = Row(Status.COMPLETED, 2, 1, 0, False, (2,))
FAILED = Row(Status.FAILED, 2, 1, 0, False, ())
DEAD = Row(Status.DEAD, 2, 1, 0, False, ())
IGNORED = Row(Status.IGNORED, 1, 0, 0, False, ())
MARKER = Key(f"recorded:{EPOCH}".encode(), 900_000)
OLD_MARKER = Key(b"recorded:another", 900_000)
LOCK = Key(b"claimed:another", 19_000)


def story(**known: object) -> Story:
    """An event whose handler was called twice, and that was promised."""
    defaults = {"wanted_by": frozenset({0, 1}), "promised": Kind.DUPLICATE, "started": {1, 2}}
    return Story(delivery(EVENT), **{**defaults, **known})  # type: ignore[arg-type]


def seen(row: Row | None, key: Key | None = None, *stray: str) -> Seen:
    """One look at both stores."""
    return Seen({EVENT: row} if row else {}, {EVENT: key} if key else {}, EPOCH, stray)


SOUND = {
    "completed": (story(), seen(COMPLETED, MARKER)),
    "completed in a batch": (story(started={1}, batched={2}), seen(COMPLETED, MARKER)),
    "failed": (story(), seen(FAILED)),
    "never promised": (story(promised=None, started=set()), seen(None, LOCK)),
    "an old marker": (story(promised=None, started=set()), seen(None, OLD_MARKER)),
    "committed by itself": (story(rogue={2}), seen(replace(DEAD, effects=(2,)))),
    "committed by itself, then completed": (story(rogue={1}), seen(replace(COMPLETED, effects=(1, 2)))),
    "permanent": (story(permanent={2}), seen(DEAD)),
    "given up": (story(), seen(replace(DEAD, given_up=True))),
    "abandoned": (story(), seen(replace(DEAD, failures=0, abandoned=3, attempt=3))),
    "not wanted": (story(wanted_by=frozenset(), started=set()), seen(IGNORED)),
    "ignored by one build": (story(wanted_by=frozenset({0}), started=set()), seen(IGNORED)),
}

BROKEN = {
    "I1: promised": (story(started=set()), seen(None)),
    "I2: an effect of": (story(promised=None, started=set()), seen(None, None, EVENT)),
    "I2: not one effect": (story(), seen(replace(COMPLETED, effects=()))),
    "I2: not one effect, of": (story(), seen(replace(COMPLETED, effects=(1, 2)))),
    "I2: not one effect, of the": (story(), seen(replace(COMPLETED, effects=(1,)))),
    "I2: not one effect, of the attempt": (story(), seen(replace(FAILED, effects=(2,)))),
    "I2: not one effect, of the attempt that": (story(rogue={2}), seen(COMPLETED)),
    "I2: an attempt's": (story(rogue={2}), seen(replace(DEAD, effects=(2, 2)))),
    "I2: completed before": (story(completed=True), seen(FAILED)),
    "I3: attempt fell": (story(attempt=3), seen(FAILED)),
    "I3: an attempt was": (story(started={3}), seen(FAILED)),
    "I8: ignored": (story(started={1}, acknowledged=True), seen(IGNORED)),
    "I4: dead": (story(), seen(DEAD)),
    "I5: a handler": (story(promised=None), seen(None)),
    "I5: completed": (story(started={1}), seen(COMPLETED)),
    "I7: a marker": (story(promised=None, started=set()), seen(None, MARKER)),
    "more failures": (story(), seen(replace(FAILED, failures=2, abandoned=1))),
    "a key that lives": (story(), seen(FAILED, replace(LOCK, ttl_ms=900_000))),
    "a key that lives longer": (story(), seen(FAILED, replace(MARKER, ttl_ms=-1))),
}


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_said_of_a_sound_history(name: str) -> None:
    """What the service may well come to is no complaint."""
    known, look = SOUND[name]
    assert broken({EVENT: known}, look, LIMITS) == []


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_invariant_is_named(words: str) -> None:
    """Each by its own words, and by no others."""
    known, look = BROKEN[words]
    [said] = broken({EVENT: known}, look, LIMITS)
    assert said.startswith(words)


def test_the_model_learns_what_it_saw() -> None:
    """The next look is compared with this one: an attempt must not fall, completed stays completed."""
    known = story()
    assert broken({EVENT: known}, seen(COMPLETED), LIMITS) == []
    assert len(broken({EVENT: known}, seen(replace(FAILED, attempt=1)), LIMITS)) == 3


@pytest.mark.parametrize(
    ("answer", "row", "words"),
    [
        (outcome.processed("done", 2), COMPLETED, None),
        (outcome.processed("done", 1), COMPLETED, "I6"),
        (outcome.processed("done", 2), FAILED, "I6"),
        (outcome.unhandled("no handler", 1), IGNORED, None),
        (outcome.unhandled("no handler", 1), replace(FAILED, attempt=1), "I6"),
        (outcome.dead(EVENT, 2), DEAD, None),
        (outcome.dead(EVENT, 2), FAILED, "I6"),
        (outcome.duplicate(EVENT), FAILED, None),
        (outcome.duplicate(EVENT), None, "I1"),
        (outcome.deferred("later"), None, "I1"),
        (outcome.failed(2), None, "I1"),
        (outcome.unavailable("away"), None, None),
    ],
)
def test_a_dishonest_answer_is_named(answer: Outcome, row: Row | None, words: str | None) -> None:
    """By the row right after it; an answer that promises nothing is never dishonest."""
    said = dishonest(story(), answer, row)
    assert (said or "").split(":")[0] == (words or "")


def test_an_answer_that_a_replay_overtook_is_honest() -> None:
    """It spoke of the row as it was; but what is completed is never replayed."""
    pending = replace(FAILED, status=Status.PENDING)
    assert dishonest(story(), outcome.dead(EVENT, 2), pending, replayed=True) is None
    assert dishonest(story(), outcome.processed("done", 2), pending, replayed=True) is not None


@pytest.mark.parametrize(
    ("answer", "promises"),
    [
        (outcome.processed("done", 2), True),
        (outcome.duplicate(EVENT), True),
        (outcome.deferred("later"), True),
        (outcome.failed(2), False),
        (outcome.unavailable("away"), False),
    ],
)
def test_what_is_answered_with_2xx_is_promised(answer: Outcome, promises: bool) -> None:
    """From then on there has to be a row."""
    known = story(promised=None)
    dishonest(known, answer, COMPLETED)
    assert (known.promised is not None) is promises


def test_only_a_process_with_a_handler_acknowledges() -> None:
    """A build without a handler may answer 2xx for what it has ignored, and another build may still take it over."""
    known = story(promised=None)
    dishonest(known, outcome.unhandled("no handler", 1), IGNORED, wanted=False)
    assert (known.promised, known.acknowledged) == (Kind.UNHANDLED, False)
    dishonest(known, outcome.duplicate(EVENT), IGNORED)
    assert known.acknowledged


@pytest.mark.parametrize(
    ("row", "key", "plan", "foresees"),
    [
        (None, None, Plan.WORK, (Kind.PROCESSED, Status.COMPLETED)),
        (None, None, Plan.HOLD, (None, Status.PROCESSING)),
        (None, OLD_MARKER, Plan.FAIL, (Kind.FAILED, Status.FAILED)),
        (None, LOCK, Plan.WORK, (Kind.DUPLICATE, Status.PENDING)),
        (None, MARKER, Plan.WORK, (Kind.DUPLICATE, None)),
        (FAILED, None, Plan.COMMIT, (Kind.FAILED, Status.DEAD)),
        (FAILED, LOCK, Plan.WORK, (Kind.DUPLICATE, None)),
        (COMPLETED, None, Plan.WORK, (Kind.DUPLICATE, None)),
        (DEAD, OLD_MARKER, Plan.WORK, (Kind.DUPLICATE, None)),
        (IGNORED, None, Plan.WORK, (Kind.PROCESSED, Status.COMPLETED)),
        (IGNORED, LOCK, Plan.WORK, (Kind.UNAVAILABLE, None)),
    ],
)
def test_what_a_delivery_comes_to(
    row: Row | None, key: Key | None, plan: Plan, foresees: tuple[Kind | None, Status | None]
) -> None:
    """By the protocol's two tables: the lock's reply, then the row."""
    assert expected(True, row, key, epoch=EPOCH, plan=plan, capacity=True) == foresees


@pytest.mark.parametrize(
    ("row", "key", "foresees"),
    [
        (None, None, (Kind.UNHANDLED, Status.IGNORED)),
        (None, LOCK, (Kind.UNAVAILABLE, None)),
        (None, MARKER, (Kind.DUPLICATE, None)),
        (FAILED, None, (Kind.DEFERRED, None)),
        (FAILED, LOCK, (Kind.DEFERRED, None)),
        (COMPLETED, LOCK, (Kind.DUPLICATE, None)),
        (IGNORED, None, (Kind.DUPLICATE, None)),
    ],
)
def test_what_a_delivery_to_another_build_comes_to(
    row: Row | None, key: Key | None, foresees: tuple[Kind | None, Status | None]
) -> None:
    """A process without a handler settles only what no other has recorded, and promises only what is recorded."""
    assert expected(False, row, key, epoch=EPOCH, plan=Plan.WORK, capacity=True) == foresees
