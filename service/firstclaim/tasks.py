"""`task`: what runs the follow-ups that handlers enqueue.

Guarantees: as `on`, it only stores a declaration in the function's module. A task is a handler of the rows that
`enqueue` writes, so claims, retries, deadline, replay and metrics are those of an event.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, Unpack

from firstclaim.context import TaskContext
from firstclaim.follow_up import NAME_RULE, TASK, is_task_name
from firstclaim.handler_options import TaskOptions, checked
from firstclaim.registry import Handler, note

R = TypeVar("R")


def task(
    name: str, **options: Unpack[TaskOptions]
) -> Callable[[Callable[[TaskContext], R]], Callable[[TaskContext], R]]:
    """Declare what runs the follow-ups that handlers enqueue under `name`: `context.enqueue(name, payload)`.

    The function takes a `TaskContext`, is async or sync (a sync one runs in a thread), and returns its action, a short
    str. None means `handled`. There is one task for a name. A name that a deploy changes leaves its waiting follow-ups
    behind. `options`: those of `on`; a `key` is a path into the payload, or a function of it. Raises `TypeError` or
    `ValueError` at import for a function, name or option that could never work.
    """
    if callable(name):
        raise TypeError('@task: write @task("name"), with the name that is enqueued')
    if not is_task_name(name):
        raise ValueError(f"@task({name!r:.110}): {NAME_RULE}")
    own = checked(options, of="@task")

    def declare(function: Callable[[TaskContext], R]) -> Callable[[TaskContext], R]:
        called: Any = function
        if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
            raise TypeError(f"{called.__qualname__}: a task returns its action, it does not yield")
        try:
            inspect.signature(called).bind(object())
        except TypeError:
            raise TypeError(f"{called.__qualname__}: a task takes (context)") from None
        note(called, [Handler(TASK + name, called, exclusive=True, options=own)])
        return function

    return declare
