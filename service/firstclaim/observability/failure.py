"""Failures that belong together: those of one handler, of one class of error, from one line of the user's code.

Guarantees: a failure holds names and one frame (file, line, function), and no message or value. They are redacted, as
generated code may have any name. Nothing here raises, whatever the class of an exception overrides. The same failure
has the same group in every process, and on every machine whose code is laid out alike.

The line is part of the group: two errors of one class in one function are two failures. A deploy that moves the line
begins a new group, and the old one keeps the time at which it was seen last.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from firstclaim.observability.frames import innermost
from firstclaim.observability.redaction import class_name, is_a, redact

_GROUP_CHARACTERS = 12  # of hexadecimal digits: with a million groups, two have the same one in 1 of 500 ledgers


@dataclass(frozen=True, slots=True)
class Failure:
    """What an attempt failed of. `place` is None if no code of the user's is known.

    `requested`: the handler asked for a retry, so that it is a failure only if the event is dead now.
    """

    handler: str
    error_class: str
    place: str | None
    requested: bool = False

    @property
    def group(self) -> str:
        """The id of the group that this failure belongs to."""
        names = "\n".join((self.handler, self.error_class, self.place or ""))
        return hashlib.sha256(names.encode()).hexdigest()[:_GROUP_CHARACTERS]


def failure_of(
    error: BaseException, name: str, function: Callable[..., Any] | None = None, *, requested: bool = False
) -> Failure:
    """The failure of the handler `name`, which is `function`, with `error`: of a group's errors, the first."""
    first = error
    while is_a(first, BaseExceptionGroup):
        first = vars(BaseExceptionGroup)["exceptions"].__get__(first)[0]
    place = innermost((first, error), function)
    return Failure(redact(name), redact(class_name(first)), place, requested)


def failure_columns(failure: Failure | None) -> dict[str, object]:
    """The parameters of a statement that writes what an attempt failed of; None: nothing that a handler raised."""
    if failure is None:
        return {"failure_group": None, "handler": None, "error_class": None, "place": None, "requested": False}
    return {"failure_group": failure.group, **asdict(failure)}
