"""Coroutines that a handler forgot to await: they never ran, so the event must not be completed.

Guarantees, while `detected()` is entered: a coroutine that is dropped unawaited while a handler runs, in its task, its
thread, or a task or thread that it started, is on that handler's list when it has ended. Python reports each one with a
warning when the last reference to it goes, and at that moment the context still has the list. One that a cycle of
references keeps is reported later, by the garbage collector, and is on no list.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

_NEVER_AWAITED = re.compile(r"coroutine '(?P<name>.+)' was never awaited")

_forgotten: ContextVar[list[str] | None] = ContextVar("forgotten", default=None)


def note_in(names: list[str]) -> None:
    """Add to `names` what is dropped unawaited from now on: in this task or thread, and in those that it starts."""
    _forgotten.set(names)


@contextmanager
def detected() -> Iterator[None]:
    """Python's warnings of coroutines that were never awaited go to the handlers that dropped them."""
    with warnings.catch_warnings():
        # Each one: by default Python reports one per line of code and process.
        warnings.filterwarnings("always", _NEVER_AWAITED.pattern, RuntimeWarning)
        show = warnings.showwarning

        def note(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            names, found = _forgotten.get(), _NEVER_AWAITED.match(str(message))
            if names is not None and found is not None and category is RuntimeWarning:
                names.append(found["name"])
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = note
        yield
