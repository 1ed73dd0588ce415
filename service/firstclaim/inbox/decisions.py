"""What a handler has decided by the error that it raised: another attempt, none, or nothing."""

from firstclaim.errors import Pause, Permanent, Retry
from firstclaim.observability.failure import Failure, failure_of
from firstclaim.observability.redaction import is_a
from firstclaim.registry import Handler


def decision(error: Exception) -> Permanent | Pause | Retry | None:
    """What the handler has decided, also in an exception group (of an `asyncio.TaskGroup`): the strongest of several.

    `Permanent` is stronger than `Pause`, and that is stronger than `Retry`.
    """
    found: list[BaseException] = []
    left: list[BaseException] = [error]
    while left:
        each = left.pop()
        if is_a(each, BaseExceptionGroup):
            left.extend(reversed(vars(BaseExceptionGroup)["exceptions"].__get__(each)))
        else:
            found.append(each)
    kinds: tuple[type[Permanent | Pause | Retry], ...] = (Permanent, Pause, Retry)
    return next((each for kind in kinds for each in found if is_a(each, kind)), None)


def requested_wait(retry: Retry) -> float | None:
    """The seconds of `Retry(after=...)`; None if a subclass leaves the attribute out, or sets an invalid one."""
    try:
        after = Retry(after=retry.after).after
        return None if after is None else float(after)
    except Exception:  # noqa: BLE001  (a handler's code may run here)
        return None


def failure(error: Exception, handler: Handler) -> Failure:
    """The cause of the failure, for its group."""
    decided = decision(error)
    requested = decided is not None and is_a(decided, Retry)
    return failure_of(error, handler.name, handler.function, requested=requested)
