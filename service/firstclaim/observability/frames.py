"""Where an error was raised: its frames and those of its causes, without any value.

Guarantees: a line holds a file, a line number and a function, or the class of an error; no message and no local
variable. It is redacted like an error's message, because generated code may have any name. Nothing here raises,
whatever the class of an exception overrides, and the result is bounded.

Frames of the user's code come first, the innermost on top: the first line is the place to look at. Then those of
libraries. Frames of this package, which called the handler, are left out. The user's code may be installed among the
libraries: it is the handler's package, or else what the traceback begins with, and the rest of that package. An error
that no line of the user's raised, such as a broken rule, has the definition of the handler as its first line.
"""

import inspect
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

from firstclaim.observability.redaction import class_name, is_a, redact, redacted_error
from firstclaim.observability.source_path import source_path

_MAX_LINES = 60
_MAX_USER_FRAMES = 20  # of one error: a recursion has a thousand
_MAX_LIBRARY_FRAMES = 5
_MAX_ERRORS = 12  # causes and members of groups, together

_PACKAGE = os.path.join(Path(__file__).resolve().parents[1], "")
_SHIPPED_HANDLERS = os.path.join(_PACKAGE, "handlers", "")
_SITE_PACKAGES = tuple(os.path.join(sysconfig.get_path(name), "") for name in ("purelib", "platlib"))
_STANDARD = os.path.join(sysconfig.get_path("stdlib"), "")  # it may contain the folder of installed packages


def failure_report(error: BaseException, handler: Callable[..., Any] | None = None) -> str:
    """For the operator: the redacted error, and a line for each of its frames."""
    return "\n".join([redacted_error(error), *frames(error, handler)])


def frames(error: BaseException, handler: Callable[..., Any] | None = None) -> list[str]:
    """The frames of `error`, then those of its causes and of the members of its groups, each under its class.

    `handler`: the function that failed with it.
    """
    code = _code_of(handler)
    own = None if code is None else _folder(code.co_filename)
    lines = [line for relation, each in _related(error) for line in _described(relation, each, own)]
    if code is not None and not _frames_of(error, own)[0]:
        lines.insert(0, describe_frame(code, code.co_firstlineno))
    return [redact(line) for line in lines[:_MAX_LINES]]


def innermost(errors: Sequence[BaseException], handler: Callable[..., Any] | None = None) -> str | None:
    """The innermost frame of the user's code of the first of `errors` that has one; else the handler's definition."""
    code = _code_of(handler)
    own = None if code is None else _folder(code.co_filename)
    found = [user[0] for user, _ in (_frames_of(error, own) for error in errors) if user]
    if not found and code is not None:
        found.append(describe_frame(code, code.co_firstlineno))
    return redact(found[0]) if found else None


def place(error: BaseException) -> str | None:
    """The file and line in the user's code that an error came from; None: no such frame."""
    if is_a(error, SyntaxError):
        filename, line = (vars(SyntaxError)[name].__get__(error) for name in ("filename", "lineno"))
        if isinstance(filename, str) and isinstance(line, int):
            return redact(f"{source_path(filename)}:{line}")
    user, _ = _frames_of(error)
    return redact(user[0].partition(" in ")[0]) if user else None


def running_place(frame: FrameType) -> str | None:
    """The innermost frame of the user's code of a thread that runs; else the innermost frame that is not ours."""
    found: list[str] = []
    left: FrameType | None = frame
    while left is not None:
        if is_users(left.f_code):
            return redact(describe_frame(left.f_code, left.f_lineno))
        if not is_service(left.f_code):
            found.append(describe_frame(left.f_code, left.f_lineno))
        left = left.f_back
    return redact(found[0]) if found else None


def _code_of(handler: Callable[..., Any] | None) -> CodeType | None:
    return None if handler is None else getattr(inspect.unwrap(handler), "__code__", None)


def _related(error: BaseException) -> Iterator[tuple[str, BaseException]]:
    """`error`, its causes, and the members of groups, each once, with its relation to the one before."""
    left: list[tuple[str, BaseException]] = [("", error)]
    seen: set[int] = set()
    while left and len(seen) < _MAX_ERRORS:
        relation, each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield relation, each
        following: list[tuple[str, BaseException]] = []
        if is_a(each, BaseExceptionGroup):
            members = vars(BaseExceptionGroup)["exceptions"].__get__(each)
            following += [(f"member {number} of {len(members)}", member) for number, member in enumerate(members, 1)]
        if (cause := _attribute(each, "__cause__")) is not None:
            following.append(("caused by", cause))
        elif (context := _attribute(each, "__context__")) is not None and not _attribute(each, "__suppress_context__"):
            following.append(("while handling", context))
        left += reversed(following)


def _described(relation: str, error: BaseException, own: str | None) -> list[str]:
    user, libraries = _frames_of(error, own)
    shown = user[:_MAX_USER_FRAMES] + libraries[:_MAX_LIBRARY_FRAMES]
    return [f"{relation}: {class_name(error)}", *shown] if relation else shown


def _frames_of(error: BaseException, own: str | None = None) -> tuple[list[str], list[str]]:
    """The frames of the user's code and of libraries, the innermost first. `own`: the user's package, if known."""
    user: list[str] = []
    libraries: list[str] = []
    trace: TracebackType | None = _attribute(error, "__traceback__")
    while trace is not None:
        code = trace.tb_frame.f_code
        if not is_service(code):
            if own is None and not _is_standard(code.co_filename):
                own = _folder(code.co_filename)
            group = user if is_users(code) or _folder(code.co_filename) == own else libraries
            group.append(describe_frame(code, trace.tb_lineno))
        trace = trace.tb_next
    return user[::-1], libraries[::-1]


def is_service(code: CodeType) -> bool:
    """Whether it belongs to this package, or to the interpreter. The shipped handlers are written as users' are."""
    return code.co_filename.startswith((_PACKAGE, "<")) and not code.co_filename.startswith(_SHIPPED_HANDLERS)


def is_users(code: CodeType) -> bool:
    """Whether it belongs to no library."""
    return (
        not is_service(code) and not _is_standard(code.co_filename) and not code.co_filename.startswith(_SITE_PACKAGES)
    )


def describe_frame(code: CodeType, line: int | None) -> str:
    """`shop/handlers.py:12 in grant_access`."""
    return f"{source_path(code.co_filename)}:{line} in {code.co_qualname}"


def _is_standard(path: str) -> bool:
    return path.startswith(_STANDARD) and not path.startswith(_SITE_PACKAGES)


def _folder(path: str) -> str:
    """The package that a file belongs to."""
    return source_path(path).partition(os.sep)[0]


def _attribute(error: BaseException, name: str) -> Any:
    return vars(BaseException)[name].__get__(error)
