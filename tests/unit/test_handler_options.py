"""The options of a handler: what is refused at its declaration, what is shown, and the lock of a key."""

import textwrap
from pathlib import Path
from typing import Any

import pytest

from firstclaim import Context, Event, TaskContext, on, task
from firstclaim.backoff import Backoff
from firstclaim.cli.serve import _handler_lines
from firstclaim.errors import HandlerRuleBroken
from firstclaim.event import parse_event
from firstclaim.follow_up import TaskData
from firstclaim.handler_options import NONE, checked, key_of, lock_number
from firstclaim.inbox.task_event import parse_row
from firstclaim.registry import handlers_of
from firstclaim.server.check import Verdict
from firstclaim.server.preflight import check_handlers
from firstclaim.settings import Settings
from tests.fixtures import event_body


async def _slow_key(event: Event) -> str:
    return event.id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": ""}, r"key=''\): expected a path into data\.object"),
        ({"key": "a..b"}, "expected a path into data.object"),
        ({"key": 3}, "expected a path, or a function of the event or payload"),
        ({"key": _slow_key}, "an async function cannot give a key"),
        ({"key": lambda: "x"}, "takes one argument, the event"),
        ({"slots": 0}, "expected a whole number from 1 to 500"),
        ({"slots": True}, "expected a whole number"),
        ({"slots": 2.0}, "expected a whole number"),
        ({"per_second": 0}, r"expected a number of events a second, from 0\.001 to 1000"),
        ({"per_second": float("nan")}, "expected a number of events a second"),
        ({"deadline": 0.1}, r"expected a number of seconds, from 0\.5 to 3600"),
        ({"deadline": "30"}, "expected a number of seconds"),
        ({"backoff": 5}, r"expected \(first, most\), two numbers of seconds"),
        ({"backoff": (5, 1)}, "the second not below it"),
        ({"backoff": (0, 1)}, "the first at most 3600"),
        ({"give_up": 0}, "expected a number of seconds, above 0, at most 2592000"),
        ({"priority": 1.5}, "expected a whole number from -100 to 100"),
        ({"priority": 101}, "expected a whole number from -100 to 100"),
        ({"priorty": 1}, "no such option; did you mean priority?"),
    ],
)
def test_an_option_that_could_never_work_is_refused(options: Any, message: str) -> None:
    """At the declaration, with the option, the value and what was expected."""
    with pytest.raises((TypeError, ValueError), match=message):
        on("invoice.paid", **options)


@pytest.mark.parametrize("options", [{"key": "customer"}, {"slots": 1}, {"per_second": 1}, {"priority": 1}])
def test_a_batch_handler_cannot_have_it(options: Any) -> None:
    """The error says why."""
    with pytest.raises(ValueError, match=r"batch=True, \w+=...\): a batch handler cannot have it: "):
        on("invoice.paid", batch=True, **options)


def test_a_batch_handler_may_have_times() -> None:
    """Its deadline, its backoff and its time to give up."""
    options = checked({"deadline": 60, "backoff": (1, 2), "give_up": 3600}, batch=True)
    assert (options.deadline_seconds, options.backoff, options.give_up_seconds) == (60.0, Backoff(1.0, 2.0), 3600.0)
    assert not options.limited


def test_none_is_as_good_as_left_out() -> None:
    """An option from a setting of the user's own may be None; a handler without options shares one value."""
    assert checked({}, batch=False) is NONE
    assert checked({"key": None, "slots": None, "priority": 0}, batch=False) is NONE
    assert NONE.words == []


def test_the_patterns_of_one_declaration_share_its_options() -> None:
    """And two declarations share none, also if they say the same."""

    @on("invoice.paid", "invoice.voided", slots=1)
    @on("invoice.updated", slots=1)
    async def act(event: Event, context: Context) -> None: ...

    updated, paid, voided = handlers_of(act)
    assert paid.options is voided.options
    assert paid.options is not updated.options


@pytest.mark.parametrize(
    ("key", "about", "expected"),
    [
        ("customer", {"customer": "cus_1"}, "cus_1"),
        ("customer", {"customer": None}, None),
        ("customer", {"customer": {"id": "cus_1", "object": "customer"}}, "cus_1"),
        ("parent.subscription", {"parent": {"subscription": "sub_1"}}, "sub_1"),
        ("parent.subscription", {"parent": None}, None),
        ("number", {"number": 7}, "7"),
        (lambda event: event.object_id, {"id": "in_1"}, "in_1"),
        (lambda _: None, {}, None),
    ],
)
def test_the_key_of_an_event(key: Any, about: dict[str, Any], expected: str | None) -> None:
    """A path into its object, also to an object that is expanded; or what the function returns."""
    assert key_of(key, parse_event(event_body("invoice.paid", data={"object": about}))) == expected


@pytest.mark.parametrize("about", [{"customer": ["cus_1"]}, {"customer": ""}, {"customer": 1.5}, {"customer": True}])
def test_what_is_no_text_is_no_key(about: dict[str, Any]) -> None:
    """It is an error, and does not name the value."""
    with pytest.raises(HandlerRuleBroken, match=r'key="customer": data.object.customer gave') as refused:
        key_of("customer", parse_event(event_body("invoice.paid", data={"object": about})))
    assert "cus_1" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "payload", "expected"),
    [
        ("customer", {"customer": "cus_1"}, "cus_1"),
        ("shop.number", {"shop": {"number": 7}}, "7"),
        ("customer", {"customer": None}, None),
        (lambda payload: payload["customer"], {"customer": "cus_1"}, "cus_1"),
        (lambda payload: payload, None, None),
    ],
)
def test_the_key_of_a_payload(key: Any, payload: Any, expected: str | None) -> None:
    """A path into what was enqueued for a task, or a function of it."""
    body = TaskData(payload, "evt_1", "evt_1", None, False).body()
    assert key_of(key, parse_row("task_1", "task:send", body)) == expected


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({}, r"payload of task:send has no such field"),
        ("cus_1", r"payload of task:send has no such field"),
        (None, r"no payload: it is null"),
        ({"customer": 1.5}, r"payload\.customer gave float"),
    ],
)
def test_a_payload_without_the_key_is_an_error(payload: Any, message: str) -> None:
    """As for an event: it would lock nothing, and nobody would notice."""
    with pytest.raises(HandlerRuleBroken, match=rf'key="customer": {message}'):
        key_of("customer", parse_row("task_1", "task:send", TaskData(payload, "evt_1", "evt_1", None, False).body()))


def test_a_task_has_the_options_of_a_handler() -> None:
    """All of them, with the same checks, which name `@task`."""

    @task("send", key="customer", slots=2, per_second=10, deadline=60, backoff=(1, 2), give_up=3600, priority=-1)
    async def send(context: TaskContext) -> None: ...

    [handler] = handlers_of(send)
    assert handler.options.words == [
        *("key customer", "slots 2", "per_second 10", "deadline 60 s", "backoff 1 to 2 s", "give_up 3600 s"),
        "priority -1",
    ]
    with pytest.raises(ValueError, match=r"@task\(..., slots=0\): expected a whole number from 1 to"):
        task("send", slots=0)
    with pytest.raises(TypeError, match=r"@task\(..., slot=...\): no such option; did you mean slots\?"):
        task("send", slot=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match='send is declared twice for "task:send", with different options'):
        task("send", slots=1)(send)


def test_a_path_that_does_not_exist_is_an_error() -> None:
    """A misspelt path would lock nothing; a thin event has no object at all."""
    event = parse_event(event_body("invoice.paid"))
    with pytest.raises(HandlerRuleBroken, match=r"data.object of invoice.paid has no such field"):
        key_of("custmer", event)
    with pytest.raises(HandlerRuleBroken, match=r"no data\.object: a thin event has none"):
        key_of("customer", parse_event(event_body("v1.billing.meter.error_report_triggered")))


def test_the_lock_of_a_key_is_the_same_in_every_build() -> None:
    """Two builds that hash a key differently would run it twice at once; two schemas do not block one another."""
    assert lock_number("firstclaim", "cus_1") == -8599753912731995584
    assert lock_number("billing", "cus_1") != lock_number("firstclaim", "cus_1")
    assert -(2**63) <= lock_number("firstclaim", "\ud800") < 2**63


def test_what_limits_nothing_is_said() -> None:
    """More slots than there are, and a deadline that no shutdown waits for."""
    options = checked({"slots": 50, "deadline": 600}, batch=False)
    assert list(options.advice(Settings())) == [
        "slots=50 limits nothing: FIRSTCLAIM_HANDLER_SLOTS is 20",
        "deadline=600 is above FIRSTCLAIM_SHUTDOWN_SECONDS=25: a deploy may interrupt it, and it then begins anew, "
        "uncharged",
    ]
    assert list(checked({"slots": 5, "deadline": 20}, batch=False).advice(Settings())) == []


def test_the_checks_and_the_first_lines_of_serve_show_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each handler that has some, and a warning for one that limits nothing; nothing where there are none."""
    code = """
        from firstclaim import on, task

        @on("invoice.paid", slots=50, per_second=0.5, key="customer")
        async def act(event, context): ...

        @on("charge.refunded")
        async def refund(event, context): ...

        @task("send", slots=2)
        async def send(context): ...
        """
    (tmp_path / "limited_shop.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    settings = Settings(handlers=("limited_shop",))
    options = "key customer, slots 50, per_second 0.5"
    found = [(each.verdict, each.detail) for each in check_handlers(settings) if each.name == "limits"]
    assert found == [
        (Verdict.OK, f"invoice.paid: {options}; task:send: slots 2"),
        (Verdict.WARN, "invoice.paid: slots=50 limits nothing: FIRSTCLAIM_HANDLER_SLOTS is 20"),
    ]
    assert list(_handler_lines(settings)) == [
        "charge.refunded limited_shop.refund",
        f"invoice.paid    limited_shop.act ({options})",
        "task:send       limited_shop.send (slots 2)",
    ]
    assert [each.name for each in check_handlers(Settings())] == ["handlers"]
