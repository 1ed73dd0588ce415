"""The frames of an error: the place to look at comes first, and no value is among them."""

import sys
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from firstclaim.errors import HandlerRuleBroken
from firstclaim.observability.frames import failure_report, frames, place
from tests.unit.test_redaction import HostileError

CANARY = "c4n4rypw"
Load = Callable[..., object]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Runs code as the module `shop/handlers.py` of a folder that is imported from, and returns its `run`."""
    monkeypatch.syspath_prepend(tmp_path)

    def load(code: str, folder: Path = tmp_path) -> object:
        path = folder / "shop" / "handlers.py"
        names: dict[str, object] = {}
        exec(compile(textwrap.dedent(code), str(path), "exec"), names)  # noqa: S102
        return names["run"]

    return load


def raised(run: object) -> BaseException:
    assert callable(run)
    try:
        run()
    except BaseException as error:  # noqa: BLE001
        return error
    raise AssertionError("nothing was raised")


NESTED = f"""
def run():
    secret = "{CANARY}"
    inner(secret)
def inner(value):
    raise ValueError(value)
"""


def test_the_innermost_frame_of_the_user_comes_first(load: Load) -> None:
    """File, line and function, below the folder that the module is imported from; no value and no message."""
    found = frames(raised(load(NESTED)))
    assert found[:2] == ["shop/handlers.py:6 in inner", "shop/handlers.py:4 in run"]
    assert CANARY not in "".join(found)


def test_frames_of_libraries_come_after(load: Load) -> None:
    """An error that a library raises leads to the line of the user that called it."""
    found = frames(raised(load("def run():\n    import json\n    json.loads('{')\n")))
    assert found[0] == "shop/handlers.py:3 in run"
    assert any(line.startswith("json/decoder.py:") for line in found[1:])
    assert len(found) <= 7


def test_installed_code_of_the_user_is_the_users(load: Load) -> None:
    """A package of handlers that is installed among the libraries counts as the user's: the traceback begins in it."""
    installed = Path(sysconfig.get_path("purelib"))
    error = raised(load("def run():\n    import json\n    json.loads('{')\n", installed))
    trace = error.__traceback__
    assert trace is not None
    error.__traceback__ = trace.tb_next  # without the frame of this test
    assert frames(error)[0] == "shop/handlers.py:3 in run"


def test_causes_and_members_are_named(load: Load) -> None:
    """Each cause, context and member of a group has its class and its own frames."""
    code = """
    def run():
        errors = []
        for each in (one, two):
            try:
                each()
            except Exception as error:
                errors.append(error)
        raise ExceptionGroup("both", errors)
    def one():
        try:
            {}["c4n4rypw"]
        except KeyError as error:
            raise ValueError("c4n4rypw") from error
    def two():
        try:
            int("c4n4rypw")
        except ValueError:
            raise TypeError
    """
    found = [line for line in frames(raised(load(code))) if not line.startswith("tests/")]
    assert found == [
        "shop/handlers.py:9 in run",
        "member 1 of 2: ValueError",
        "shop/handlers.py:14 in one",
        "shop/handlers.py:6 in run",
        "caused by: KeyError",
        "shop/handlers.py:12 in one",
        "member 2 of 2: TypeError",
        "shop/handlers.py:19 in two",
        "shop/handlers.py:6 in run",
        "while handling: ValueError",
        "shop/handlers.py:17 in two",
    ]


def test_a_report_is_the_error_and_its_frames(load: Load) -> None:
    """The first line is what `last_error` keeps."""
    lines = failure_report(raised(load("def run():\n    raise RuntimeError('boom\\nmore')\n"))).split("\n")
    assert lines[:2] == ["RuntimeError: boom", "shop/handlers.py:2 in run"]
    assert failure_report(HandlerRuleBroken("rule")) == "HandlerRuleBroken: rule"


def test_a_broken_rule_leads_to_the_handler(load: Load) -> None:
    """An error without a frame of the user's has the handler's definition first; another keeps the better place."""
    handler = load(NESTED)
    assert callable(handler)
    assert frames(HandlerRuleBroken("rule"), handler) == ["shop/handlers.py:2 in run"]
    assert frames(raised(handler), handler)[0] == "shop/handlers.py:6 in inner"


def test_a_cause_from_a_library_is_not_taken_for_the_users(load: Load) -> None:
    """What the handler did comes first, even if the error's cause begins in a library."""
    handler = load(NESTED)
    assert callable(handler)
    error = HandlerRuleBroken("rule")
    error.__cause__ = raised(lambda: orjson.dumps(object()))
    found = frames(error, handler)
    assert found[:2] == ["shop/handlers.py:2 in run", "caused by: TypeError"]


def test_the_result_is_bounded(load: Load) -> None:
    """Neither a deep recursion nor a circle nor a long chain of causes makes a long list."""
    recursion = raised(load("def run():\n    run()\n"))
    assert len(frames(recursion)) <= 25
    circle = ValueError()
    circle.__cause__ = TypeError()
    circle.__cause__.__cause__ = circle
    assert frames(circle) == ["caused by: TypeError"]
    chain: BaseException = ValueError()
    for _ in range(1000):
        following = ValueError()
        following.__cause__ = chain
        chain = following
    assert len(frames(chain)) <= 60
    wide = ExceptionGroup("", [ValueError() for _ in range(1000)])
    assert len(frames(wide)) <= 60


def test_a_generated_name_is_redacted() -> None:
    """Code that was generated may have any name: it is masked like a message, on one line."""
    names: dict[str, object] = {}
    exec(compile("def run():\n    raise ValueError\n", "sk_live_1 jo@example.com\n\x1b[2J", "exec"), names)  # noqa: S102
    [line, *_] = frames(raised(names["run"]))
    assert line.startswith("[redacted] [redacted]")
    assert line.isprintable()


def test_a_hostile_error_has_frames() -> None:
    """An exception each of whose attributes raises is described like any other."""
    error: BaseException | None = None
    try:
        raise HostileError
    except HostileError as found:
        error = found
    assert frames(error)[0].startswith("tests/unit/test_frames.py:")
    assert failure_report(error).startswith("HostileError: its message cannot be read\n")


def test_the_place_of_an_error(load: Load, tmp_path: Path) -> None:
    """The user's innermost line; of a syntax error, the line that cannot be read; else None."""
    assert place(raised(load(NESTED))) == "shop/handlers.py:6"
    assert place(ValueError()) is None
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ndef f(:\n")
    assert place(raised(lambda: __import__("broken"))) == "broken.py:2"


def test_frames_are_json(load: Load) -> None:
    """As the log and `events show --json` print them."""
    assert orjson.loads(orjson.dumps(frames(raised(load(NESTED)))))
    assert sys.exc_info() == (None, None, None)
