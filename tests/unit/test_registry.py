"""The registry: which handler an event is dispatched to, and which declarations are refused."""

import asyncio
import importlib
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from firstclaim.context import BatchContext, Context, TaskContext
from firstclaim.errors import ConfigurationError, HandlerRuleBroken
from firstclaim.event import Event, parse_event
from firstclaim.follow_up import Outbox
from firstclaim.registry import Handler, Registry, covers, is_pattern, on
from firstclaim.tasks import task
from tests.fixtures import event_body

Write = Callable[[str, str], str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes an importable module and returns its name. The test's modules are unloaded at the end."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name: str, code: str) -> str:
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from firstclaim import on\n" + textwrap.dedent(code))
        importlib.invalidate_caches()
        return name

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def faults(*modules: str) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as refused:
        Registry.load(modules)
    return refused.value.faults


def handler(pattern: str) -> Handler:
    def function(event: Event, context: Context) -> str:
        return pattern

    return Handler(pattern, function)


def pattern_for(registry: Registry, event_type: str) -> str | None:
    found = registry.find(event_type)
    return found.pattern if found else None


# -- the most specific pattern ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event_type", "pattern"),
    [
        ("customer.subscription.updated", "customer.subscription.updated"),
        ("customer.subscription.deleted", "customer.subscription.*"),
        ("customer.subscription.trial.ended", "customer.subscription.*"),
        ("customer.created", "customer.*"),
        ("customer", "*"),
        ("customers.created", "*"),
        ("invoice.paid", "*"),
        ("customer.subscription", "customer.*"),
        ("v1.billing.meter.error_report_triggered", "v1.billing.*"),
        ("v2.core.account[requirements].updated", "v2.core.account[requirements].updated"),
    ],
)
def test_the_most_specific_pattern_is_used(event_type: str, pattern: str) -> None:
    """The type itself, then the longest prefix of whole words, then `*`, in any order of declaration."""
    patterns = [
        "*",
        "customer.*",
        "customer.subscription.*",
        "customer.subscription.updated",
        "v1.billing.*",
        "v2.core.account[requirements].updated",
    ]
    assert pattern_for(Registry(map(handler, patterns)), event_type) == pattern
    assert pattern_for(Registry(map(handler, reversed(patterns))), event_type) == pattern


def test_without_a_star_other_types_have_no_handler() -> None:
    """A type without a matching pattern has no handler, and a pattern without `.*` matches no longer type."""
    registry = Registry([handler("customer.*"), handler("invoice")])
    assert registry.find("charge.refunded") is None
    assert registry.find("invoice.paid") is None
    assert Registry([]).find("invoice.paid") is None


def test_all_handlers_can_be_listed() -> None:
    """The registry lists all its handlers, which `check` shows."""
    assert [each.pattern for each in Registry([handler("a"), handler("b.*")])] == ["a", "b.*"]


# -- loading ------------------------------------------------------------------------------------------


def test_a_module_is_loaded_with_all_it_declares(module: Write) -> None:
    """All patterns of a module's functions are loaded, async and sync ones."""
    name = module(
        "shop_all",
        """
        @on("a.b", "c.*")
        async def first(event, context): ...
        @on("d.e")
        def second(event, context): ...
        """,
    )
    registry = Registry.load([name])
    found = {each.pattern: (each.name, each.is_async) for each in registry}
    assert found == {
        "a.b": ("shop_all.first", True),
        "c.*": ("shop_all.first", True),
        "d.e": ("shop_all.second", False),
    }


def test_fresh_objects_are_declared(module: Write) -> None:
    """`fresh=True` is part of the declaration; a batch handler cannot have it, and it is True or False."""
    name = module(
        "shop_fresh",
        """
        from firstclaim import on

        @on("a.b", "c.*", fresh=True)
        def look(event, context): ...

        @on("d.e")
        def other(event, context): ...
        """,
    )
    assert {each.pattern: each.fresh for each in Registry.load([name])} == {"a.b": True, "c.*": True, "d.e": False}
    with pytest.raises(ValueError, match="a batch handler gets no fresh objects"):
        on("a.b", batch=True, fresh=True)
    with pytest.raises(TypeError, match="fresh=1\\): expected True or False"):
        on("a.b", fresh=1)  # type: ignore[arg-type]


def test_a_batch_handler_is_loaded_as_one(module: Write) -> None:
    """`batch=True` is part of the declaration, also where the function is re-exported."""
    name = module(
        "shop_batch",
        """
        @on("a.b", "c.*", batch=True)
        async def many(events, context): ...
        @on("d.e")
        def one(event, context): ...
        """,
    )
    exported = module("shop_exported", "from shop_batch import many, one")
    for each in (name, exported):
        assert {h.pattern: h.batch for h in Registry.load([each])} == {"a.b": True, "c.*": True, "d.e": False}


def no_list(events: Event, context: BatchContext) -> None: ...
def a_list(events: list[Event], context: BatchContext) -> None: ...
def too_many(events: Any, context: Any, more: Any) -> None: ...
def ordinary(event: Any, context: Any) -> None: ...


@pytest.mark.parametrize(
    ("function", "batch", "says"),
    [
        (
            no_list,
            True,
            "no_list: a batch handler takes a list of events, and is annotated with firstclaim.event.Event",
        ),
        (a_list, False, "a_list: it is annotated with list\\[.*\\]: to get a list, declare it with batch=True"),
        (too_many, True, "too_many: a batch handler takes \\(events, context\\), where events is a list"),
        (ordinary, 1, "@on\\(..., batch=1\\): expected True or False"),
    ],
)
def test_a_batch_handler_takes_a_list(function: Callable[..., Any], batch: Any, says: str) -> None:
    """What a function takes is checked against `batch` where its signature says it."""
    with pytest.raises(TypeError, match=says):
        on("a.b", batch=batch)(function)


def test_a_function_takes_one_event_or_a_list() -> None:
    """A second `@on` may add patterns, and must not change what the function is called with."""

    def function(events: Any, context: Any) -> None: ...

    on("a.b", batch=True)(function)
    on("c.d", batch=True)(function)
    with pytest.raises(TypeError, match="it cannot do both"):
        on("e.f")(function)


def test_two_functions_of_one_name_are_two_handlers(module: Write) -> None:
    """A second `def handle` replaces the first one in the module, but both handlers are registered."""
    name = module(
        "shop_twins",
        """
        @on("a.b")
        def handle(event, context): return "first"
        @on("c.d")
        def handle(event, context): return "second"
        """,
    )
    registry = Registry.load([name])
    assert {each.pattern: cast(Any, each.function)(None, None) for each in registry} == {
        "a.b": "first",
        "c.d": "second",
    }


def test_a_reexported_handler_is_found_once(module: Write) -> None:
    """A package that re-exports its modules' handlers can be named alone, or beside those modules."""
    module("shop_parts", '@on("a.b")\ndef handle(event, context): ...')
    package = module("shop_package", "from shop_parts import handle\nfrom shop_parts import handle as again")
    for names in ([package], [package, "shop_parts"], ["shop_parts", package]):
        assert [each.pattern for each in Registry.load(names)] == ["a.b"]


def test_stacked_declarations_are_all_reexported(module: Write) -> None:
    """Two `@on` on one function declare both patterns, also where the function is re-exported."""
    module("shop_stacked", '@on("a.b")\n@on("c.d")\ndef handle(event, context): ...')
    package = module("shop_gathers", "from shop_stacked import handle")
    assert {each.pattern for each in Registry.load(["shop_stacked"])} == {"a.b", "c.d"}
    assert {each.pattern for each in Registry.load([package])} == {"a.b", "c.d"}


@pytest.mark.parametrize("other", ["slots=2", "key='id'", "fresh=True", "exclusive=True"])
def test_a_function_has_one_set_of_options_for_a_pattern(module: Write, other: str) -> None:
    """A second declaration with other options would not hold, and is refused; an equal one changes nothing."""
    code = "@on('a.b', {})\n@on('a.b', 'a.c', {})\ndef f(event, context): ..."
    assert len([*Registry.load([module("shop_equal", code.format(other, other))])]) == 2
    assert faults(module("shop_different", code.format("", other))) == (
        "FIRSTCLAIM_HANDLERS: cannot import shop_different: ValueError: "
        'f is declared twice for "a.b", with different options: leave one out (at shop_different.py:2)',
    )
    named = module("shop_named", code.format("name='one'", f"name='two', {other}"))
    assert ("exclusive" in other) or len([*Registry.load([named])]) == 4  # both, by a row each


def test_nothing_else_of_another_module_is_registered(module: Write) -> None:
    """Importing another module does not register the handlers that it declares."""
    module("shop_hidden", '@on("a.b")\ndef handle(event, context): ...')
    assert list(Registry.load([module("shop_uses", "import shop_hidden")])) == []


# -- refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_a_second_handler_beside_an_exclusive_one_is_refused(module: Write, first: bool) -> None:
    """`exclusive` on either of two handlers for one pattern refuses both by name."""
    module("shop_one", f'@on("a.b", exclusive={first})\ndef one(event, context): ...')
    module("shop_two", f'@on("a.b", exclusive={not first})\ndef two(event, context): ...')
    assert faults("shop_one", "shop_two") == ('two handlers for "a.b": shop_one.one and shop_two.two',)


def test_two_handlers_of_one_name_are_refused(module: Write) -> None:
    """Two handlers for one pattern that have one name could not be told apart by their rows."""
    name = module("shop_same", '@on("a.b")\ndef f(event, context): ...\n@on("a.b")\ndef f(event, context): ...')
    assert faults(name) == ('two handlers for "a.b" have the name shop_same.f: give one of them another, with name=',)


def test_rows_of_one_name_have_one_set_of_options(module: Write) -> None:
    """A function declared twice shares its events with others: a row has its name only, and could get either key."""
    other = '@on("a.b", "c.d", name="other")\ndef other(event, context): ...\n'
    one, two = '@on("a.b", key="id"{})\n', '@on("c.d", key="customer"{})\n'
    twice = module("shop_twice", other + one.format("") + two.format("") + "def f(event, context): ...")
    assert faults(twice) == (
        'the handler "shop_twice.f" shares its events with others, and its declarations have different options: give '
        "each of them a name of its own, with name=",
    )
    named = other + one.format(', name="f"') + two.format(', name="g"') + "def f(event, context): ..."
    found = Registry.load([module("shop_named", named)])
    assert [found.find(f"handler:{name}").options.key for name in "fg"] == ["id", "customer"]  # type: ignore[union-attr]


def test_several_handlers_have_a_row_each(module: Write) -> None:
    """Of several handlers for one pattern each is found by its name, and the pattern has a fan-out to them."""
    name = module(
        "shop_several",
        """
        @on("a.b", "c.d")
        def one(event, context): ...
        @on("a.b", name="crm:two")
        def two(event, context): ...
        @on("a.b", batch=True, name="three")
        def many(events, context): ...
        """,
    )
    registry = Registry.load([name])
    assert {(each.pattern, each.name, each.batch) for each in registry} == {
        ("a.b", "shop_several.one, crm:two, three", False),
        ("c.d", "shop_several.one", False),
        ("handler:shop_several.one", "shop_several.one", False),
        ("handler:crm:two", "crm:two", False),
        ("handler:three", "three", True),
    }
    assert pattern_for(registry, "handler:crm:two") == "handler:crm:two"


def test_the_last_of_several_handlers_keeps_its_rows(module: Write) -> None:
    """When the others are gone, the rows that wait for it are still its own; those of the others are nobody's."""
    registry = Registry.load([module("shop_alone", '@on("a.*", name="one")\ndef one(event, context): ...')])
    assert pattern_for(registry, "handler:one") == "a.*"
    assert registry.find("handler:two") is None


def test_follow_ups_are_no_events_of_a_star(module: Write) -> None:
    """A handler for `*` gets no row of a task or of another handler."""
    name = module(
        "shop_star",
        """
        from firstclaim import task
        @on("*")
        def one(event, context): ...
        @task("send")
        def send(context): ...
        """,
    )
    registry = Registry.load([name])
    assert pattern_for(registry, "task:send") == "task:send"
    assert registry.find("task:other") is None
    assert registry.find("handler:other") is None
    assert registry.tasks == {"send"}


def test_two_tasks_of_one_name_are_refused(module: Write) -> None:
    """A follow-up has one task: import order must not decide which."""
    name = module(
        "shop_tasks",
        """
        from firstclaim import task
        @task("send")
        def one(context): ...
        @task("send")
        def two(context): ...
        """,
    )
    assert faults(name) == ('two handlers for "task:send": shop_tasks.one and shop_tasks.two',)


@pytest.mark.parametrize("name", ["", " ", "a b", "ü", "x" * 101, "a:b", 7, None])
def test_a_name_that_no_task_can_have_is_refused(name: Any) -> None:
    """It is refused where it is declared."""
    with pytest.raises(ValueError, match="expected the name of a task"):
        task(name)


def test_a_function_that_cannot_be_a_task_is_refused() -> None:
    """A task takes its context alone, returns its action, and is declared with a name."""
    with pytest.raises(TypeError, match="a task takes"):
        task("send")(cast(Any, lambda event, context: None))
    with pytest.raises(TypeError, match="does not yield"):
        task("send")(cast(Any, _yields))
    with pytest.raises(TypeError, match="write @task"):
        task(cast(Any, _yields))


def _yields(context: TaskContext) -> Iterator[str]:
    yield "nothing"


@pytest.mark.parametrize("option", [{"name": ""}, {"name": "a b"}, {"name": 7}, {"exclusive": "yes"}])
def test_an_option_that_could_never_work_is_refused(option: Any) -> None:
    """A name that is none, and `exclusive` that is no bool, are refused where they are written."""
    with pytest.raises((TypeError, ValueError), match=r"expected"):
        on("a.b", **option)


def test_all_faults_of_all_modules_at_once(module: Write) -> None:
    """An unknown module, one that raises at import, a bad pattern and a duplicate are reported together."""
    module("shop_raises", "raise RuntimeError('no database')")
    module("shop_syntax", "def")
    module("shop_nonsense", '@on("a b")\ndef f(event, context): ...')
    module("shop_a", '@on("a.b", exclusive=True)\ndef f(event, context): ...')
    module("shop_b", '@on("a.b")\ndef f(event, context): ...')
    found = faults("shop_missing", "shop_raises", "shop_syntax", "shop_nonsense", "shop_a", "shop_b")
    assert len(found) == 5
    assert all(fault.startswith("FIRSTCLAIM_HANDLERS: cannot import shop_") for fault in found[:4])
    assert "No module named 'shop_missing'" in found[0]
    assert "RuntimeError: no database" in found[1]
    assert "SyntaxError" in found[2]
    assert "expected an event type" in found[3]
    assert found[4] == 'two handlers for "a.b": shop_a.f and shop_b.f'


def test_an_import_error_is_shown_without_secrets(module: Write) -> None:
    """The message of a failed import is shown redacted, because it may hold the password of a database."""
    [fault] = faults(module("shop_tells", "raise OSError('postgresql://shop:hunter2@db/shop is down')"))
    assert "OSError: postgresql://[redacted]@db/shop is down" in fault


def test_an_import_error_has_its_place(module: Write) -> None:
    """The user's innermost file and line, also where the module that fails is imported by the one that is named."""
    module("shop_inner", "\nimport shop_away")
    [fault] = faults(module("shop_outer", "import shop_inner"))
    assert fault.endswith("No module named 'shop_away' (at shop_inner.py:3)")
    [fault] = faults(module("shop_typo", "x = (\n"))
    assert "(at shop_typo.py:" in fault
    [fault] = faults("shop_missing")
    assert fault.endswith("No module named 'shop_missing'")


def test_a_module_that_exits_is_a_fault(module: Write) -> None:
    """A module that calls sys.exit() at import is reported as a fault, and does not end the service silently."""
    [fault] = faults(module("shop_script", "raise SystemExit(0)"))
    assert fault.startswith("FIRSTCLAIM_HANDLERS: cannot import shop_script: SystemExit")


@pytest.mark.parametrize(
    "pattern",
    ["", " ", "a b", "a..b", ".a", "a.", "a.*.b", "*.a", "**", "a*", "a.**", "a/b", "a.b\n", "\N{EURO SIGN}", "a,b"],
)
def test_a_bad_pattern_is_refused(pattern: str) -> None:
    """A pattern that could never match a type is refused when the module is imported, with its text."""
    with pytest.raises(ValueError, match="expected an event type"):
        on(pattern)


@pytest.mark.parametrize("pattern", ["a", "a.b", "a.b.c", "a.*", "a.b.*", "*", "v2.core.x[y_z].up-dated"])
def test_a_valid_pattern_is_accepted(pattern: str) -> None:
    """Exact types (also thin ones), prefixes and the star are accepted."""

    @on(pattern)
    def function(event: Event, context: Context) -> None: ...

    assert Handler(pattern, function) in vars(sys.modules[__name__])["__firstclaim_handlers__"]


def test_on_without_a_type_is_refused() -> None:
    """`@on()` and `@on` without a call are refused with a message that says how to write it."""
    with pytest.raises(TypeError, match="at least one event type"):
        on()

    def function(event: Event, context: Context) -> None: ...

    with pytest.raises(TypeError, match="with the event type as a string"):
        on(cast(str, function))


def no_argument() -> None: ...
def one_argument(event: Event) -> None: ...
def three_arguments(event: Event, context: Context, more: int) -> None: ...
def by_keyword(*, event: Event, context: Context) -> None: ...
async def one_async(event: Event) -> None: ...


@pytest.mark.parametrize("function", [no_argument, one_argument, three_arguments, by_keyword, one_async])
def test_a_wrong_signature_is_refused(function: Callable[..., Any]) -> None:
    """A handler that could not be called with (event, context) is refused at import, not at its first event."""
    with pytest.raises(TypeError, match=rf"{function.__name__}: a handler takes \(event, context\)"):
        on("a.b")(function)


def test_defaults_and_stars_are_accepted() -> None:
    """Any signature that can be called with (event, context) is accepted."""

    def with_default(event: Event, context: Context, more: int = 1) -> None: ...
    def with_stars(*arguments: Any) -> None: ...

    assert on("a.b")(with_default) is with_default
    assert on("a.b")(with_stars) is with_stars


def generates(event: Event, context: Context) -> Iterator[str]:
    yield "handled"


async def generates_async(event: Event, context: Context) -> AsyncIterator[str]:
    yield "handled"


@pytest.mark.parametrize("function", [generates, generates_async])
def test_a_generator_is_refused(function: Callable[..., Any]) -> None:
    """A generator is refused: calling it runs none of its code, and the event would count as `processed`."""
    with pytest.raises(TypeError, match=f"{function.__name__}: a handler returns its action, it does not yield"):
        on("a.b")(function)


# -- context ------------------------------------------------------------------------------------------


class Unreachable:
    """A transaction that must not be used."""

    @property
    def connection(self) -> AsyncConnection:
        raise AssertionError("used")

    def session(self, **options: Any) -> AsyncSession:
        raise AssertionError("used")

    async def sync_session(self, run: Callable[[Coroutine[Any, Any, Any]], Any], **options: Any) -> Session:
        raise AssertionError("used")

    async def fetch(self, sql: str, *values: object) -> list[object]:
        raise AssertionError("fetched")

    def refuse(self) -> None:
        pass


def context(*, seconds: float) -> Context:
    loop = asyncio.get_running_loop()
    event = parse_event(event_body(id="evt_1"))
    return Context(Unreachable(), loop, loop.time() + seconds, 1, Outbox(), event, b"")


async def test_execute_on_the_loops_thread_is_refused() -> None:
    """On the event loop's thread `execute` would block for ever; it raises, and says what an async handler awaits."""
    with pytest.raises(HandlerRuleBroken, match=r"an async handler awaits context\.connection\.execute\(\)"):
        context(seconds=30).execute(text("SELECT 1"))


async def test_a_session_of_the_other_kind_is_refused() -> None:
    """A thread cannot await an async session, and a sync one would block the event loop: each says what to use."""
    given = context(seconds=30)
    with pytest.raises(HandlerRuleBroken, match=r"an async one uses context\.session\(\)"):
        given.sync_session()
    with pytest.raises(HandlerRuleBroken, match=r"a sync handler uses context\.sync_session\(\)"):
        await asyncio.to_thread(given.session)


async def test_execute_after_the_deadline_is_refused() -> None:
    """A thread that outlives its deadline gets no connection, as it may belong to another handler by then."""
    late = context(seconds=-1)
    with pytest.raises(TimeoutError, match="its transaction was rolled back"):
        await asyncio.to_thread(late.execute, text("SELECT 1"))


async def test_the_idempotency_key_is_the_events_id() -> None:
    """The idempotency key is the event's id, so that it is the same on every attempt."""
    assert context(seconds=30).idempotency_key == "evt_1"


@pytest.mark.parametrize(
    ("pattern", "event_type", "covered"),
    [
        ("invoice.paid", "invoice.paid", True),
        ("invoice.paid", "invoice.paid.x", False),
        ("invoice.*", "invoice.paid", True),
        ("invoice.*", "invoice.paid.x", True),
        ("invoice.*", "invoice", False),
        ("invoice.*", "invoices.paid", False),
        ("invoice.*", "invoice.*", True),
        ("invoice.*", "invoice.item.*", True),
        ("invoice.*", "*", False),
        ("*", "invoice.*", True),
        ("*", "x", True),
    ],
)
def test_what_a_pattern_covers(pattern: str, event_type: str, covered: bool) -> None:
    """A pattern is for a type, and for all types of another pattern, exactly as a handler's is."""
    assert covers(pattern, event_type) is covered
    if not event_type.endswith("*"):
        assert (Registry([Handler(pattern, print)]).find(event_type) is not None) is covered


@pytest.mark.parametrize(
    "name", ["crm", "crm:two", "_x", "a.b-c", "n" * 200, "n" * 201, "bad,good", "bad;", "", "-a", "n*"]
)
def test_a_handler_is_paused_by_the_names_that_it_may_have(name: str) -> None:
    """`handler:` takes exactly what `name=` takes: what it took beyond that was a pause of nothing."""
    try:
        on("invoice.paid", name=name)
        declared = True
    except ValueError:
        declared = False
    assert is_pattern(f"handler:{name}") is declared


@pytest.mark.parametrize("name", ["charge", "a.b-c", "n" * 100, "n" * 101, "a:b", "bad,good", "bad;", "", ".a", "n*"])
def test_a_task_is_paused_by_the_names_that_it_may_have(name: str) -> None:
    """`task:` takes exactly what `@task` takes."""
    try:
        task(name)
        declared = True
    except ValueError:
        declared = False
    assert is_pattern(f"task:{name}") is declared


def test_a_handler_without_a_name_is_paused_by_its_function() -> None:
    """The name that a function gives it is no worse, also of a function in another one or of a lambda."""

    async def act(event: Event, context: Context) -> None: ...

    for function in (handler, act, lambda event, context: None):
        assert is_pattern(f"handler:{Handler('a', function).name}")
    assert "<locals>" in Handler("a", act).name
    assert all(map(is_pattern, ("task:*", "handler:*")))
