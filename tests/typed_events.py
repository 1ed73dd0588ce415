"""The stub `service/firstclaim/declare.pyi`, generated from the installed stripe-python.

    .venv/bin/python -m tests.typed_events > service/firstclaim/declare.pyi

stripe-python lists the event types and the classes of objects, and does not say which belongs to which. Stripe's naming
does: `object_name` finds the object of a type by it, and `EXCEPTIONS` has the types whose name says something else.
(The types that the npm package `stripe`, 23.1.0, declares for the same 275 event types agree with the result.)
"""

from collections import defaultdict
from itertools import starmap

from stripe._object_classes import OBJECT_CLASSES

from firstclaim.server.event_types import snapshot_event_types

EXCEPTIONS = {
    "account.external_account": ("bank_account", "card"),
    "application_fee.refund": ("fee_refund",),
    "billing.alert.triggered": ("billing.alert_triggered",),
    "customer.source": ("account", "bank_account", "card", "source"),
    "source.mandate_notification": ("source_mandate_notification",),
}

HEAD = '''"""Generated from stripe-python {version} by `python -m tests.typed_events`: do not edit."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, Unpack, overload

import stripe

from firstclaim.context import BatchContext, Context
from firstclaim.event import Event
from firstclaim.handler_options import HandlerOptions

__all__ = ["on"]

_O = TypeVar("_O")
_R = TypeVar("_R", bound=str | Awaitable[str | None] | None)
_RB = TypeVar("_RB", bound=str | Sequence[str | None] | Awaitable[str | Sequence[str | None] | None] | None)

class _Options(HandlerOptions, total=False):
    name: str | None
    exclusive: bool

class _OneOptions(_Options, total=False):
    fresh: bool

class _Declare(Protocol[_O]):
    def __call__(self, function: Callable[[Event[_O], Context], _R], /) -> Callable[[Event[_O], Context], _R]: ...

class _DeclareBatch(Protocol[_O]):
    def __call__(
        self, function: Callable[[list[Event[_O]], BatchContext], _RB], /
    ) -> Callable[[list[Event[_O]], BatchContext], _RB]: ...

'''
ONE = '{alias}: TypeAlias = Literal["{pattern}"]\n'
SEVERAL = """{alias}: TypeAlias = Literal[
{literals}
]
"""
ONE_LINE = "def on({parameters}) -> {result}: ..."
SEVERAL_LINES = """def on(
    {parameters}
) -> {result}: ..."""
LINE_MOST = 120


def object_names(event_type: str) -> tuple[str, ...]:
    """The names of the objects that an event of this type can have, as Stripe's `object` field has them."""
    prefix, _, _ = event_type.rpartition(".")
    if found := EXCEPTIONS.get(event_type) or EXCEPTIONS.get(prefix):
        return found
    spellings = (prefix, prefix.replace("issuing_", "issuing."), prefix.replace(".", "_"), prefix.rpartition(".")[2])
    names = [name for name in spellings if name in OBJECT_CLASSES]
    if not names:
        raise LookupError(f"which object has {event_type}? Add it to EXCEPTIONS")
    return (names[0],)


def class_name(object_name: str) -> str:
    """The public name of stripe-python's class, e.g. `stripe.checkout.Session`."""
    module, name = OBJECT_CLASSES[object_name]
    return ".".join([*(part for part in module.split(".") if not part.startswith("_")), name])


def patterns_by_object() -> dict[str, list[str]]:
    """The event types of each object, and the wildcards that match types of this object alone."""
    objects = {each: " | ".join(map(class_name, object_names(each))) for each in sorted(snapshot_event_types())}
    below: dict[str, set[str]] = defaultdict(set)
    for event_type, name in objects.items():
        words = event_type.split(".")
        for count in range(1, len(words)):
            below[".".join(words[:count]) + ".*"].add(name)
    objects |= {wildcard: next(iter(names)) for wildcard, names in below.items() if len(names) == 1}
    grouped: dict[str, list[str]] = defaultdict(list)
    for pattern, name in sorted(objects.items()):
        grouped[name].append(pattern)
    return dict(sorted(grouped.items()))


def alias_of(name: str) -> str:
    """The name of the patterns of one object, for example `_CheckoutSession`."""
    classes = name.replace("stripe.", "").split(" | ")
    return "_" + "Or".join("".join(word[0].upper() + word[1:] for word in each.split(".")) for each in classes)


def alias(name: str, patterns: list[str]) -> str:
    """The patterns of one object, as ruff formats them."""
    if len(patterns) == 1:
        return ONE.format(alias=alias_of(name), pattern=patterns[0])
    return SEVERAL.format(alias=alias_of(name), literals="\n".join(f'    "{pattern}",' for pattern in patterns))


def overload(patterns: str, batch: str, result: str) -> str:
    """One overload, as ruff formats it."""
    options = "_Options" if batch == "Literal[True]" else "_OneOptions"
    parameters = f"*patterns: {patterns}, batch: {batch}, **options: Unpack[{options}]"
    line = ONE_LINE.format(parameters=parameters, result=result)
    if len(line) > LINE_MOST:
        line = SEVERAL_LINES.format(parameters=parameters, result=result)
    return f"@overload\n{line}\n"


def overloads(name: str, patterns: str) -> str:
    """The overloads for one object: of a handler of one event, and of a batch handler."""
    one = overload(patterns, "Literal[False] = False", f"_Declare[{name}]")
    return one + overload(patterns, "Literal[True]", f"_DeclareBatch[{name}]")


def stub() -> str:
    """The text of the stub."""
    import stripe

    grouped = patterns_by_object()
    return (
        HEAD.format(version=stripe.VERSION)
        + "".join(starmap(alias, grouped.items()))
        + "\n"
        + "".join(overloads(name, alias_of(name)) for name in grouped)
        + overloads("Any", "str")
    )


if __name__ == "__main__":
    print(stub(), end="")
