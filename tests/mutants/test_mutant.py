"""How a mutant is found and applied.

Guarantees: the layout of the code does not matter, and a mutant that does not fit says what is there instead.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutants import mutant
from tests.mutants.mutant import DoesNotFitError, Mutant, TextMutant

FIRST = '''
LIMIT = 1 + 2
FIND = statement(f"""
SELECT id FROM events
 WHERE id = :id
   AND attempt = :attempt
""")

class Lock:
    def acquire(self, key):
        if self.closed:  # a comment
            raise Closed("for good")
        return self.call(
            "SET", key, self.ttl,
        )

    def release(self, key):
        self.call("DEL", key)
        return key
'''
SECOND = """
def acquire(key):
    def inner():
        return key + 1
    return inner
"""
Apply = Callable[..., str]


@pytest.fixture
def apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Apply:
    """Applies a mutant to a package of two files; returns the source that it makes."""
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox" / "first.py").write_text(FIRST)
    (tmp_path / "second.py").write_text(SECOND)
    monkeypatch.setattr(mutant, "PACKAGE", tmp_path)

    def apply(scope: str, old: str, new: str, kind: type[Mutant] = Mutant) -> str:
        return kind("a-name", "A rule.", scope, old, new, "unit/test_it.py::test_it").applied()[1]

    return apply


@pytest.mark.parametrize(
    ("scope", "old", "new", "expected"),
    [
        ("Lock.acquire", "self.call('SET', key, self.ttl)", "None", "        return None\n"),
        ("Lock.acquire", "self.ttl", "0", "self.call('SET', key, 0)"),
        ("Lock.release", "self.call('DEL', key)", "", "        pass\n        return key"),
        ("Lock.release", "self.call('DEL', key)\nreturn key", "return None", "key):\n        return None"),
        ("Lock.acquire", "if self.closed: ...", "if False: ...", "if False:\n            raise Closed('for good')\n"),
        ("Lock.acquire", "Closed(...)", "Other(0, ...)", "raise Other(0, 'for good')"),
        ("Lock", "self.closed", "True", "        if True:"),
        ("LIMIT", "1 + 2", "3", "LIMIT = 3\n"),
        ("second.acquire", "key + 1", "key", "return key\n"),
        ("acquire.inner", "return key + 1", "return 0", "return 0\n"),
    ],
)
def test_code_is_found_by_its_syntax(apply: Apply, scope: str, old: str, new: str, expected: str) -> None:
    """An expression, a statement, several, and what `...` stands for are replaced, and nothing else."""
    assert expected in apply(scope, old, new)


def test_text_is_found_by_its_words(apply: Apply) -> None:
    """In a string the line breaks do not matter."""
    assert "WHERE true" in apply("FIND", "WHERE id = :id AND attempt = :attempt", "WHERE true", TextMutant)


@pytest.mark.parametrize(
    ("kind", "scope", "old", "reasons"),
    [
        (Mutant, "Lock.acquired", "self.ttl", ("Lock.acquired is not found", "Lock.acquire")),
        (Mutant, "acquire", "key", ("inbox.first.Lock.acquire", "second.acquire")),
        (Mutant, "Lock.acquire", "self.time_to_live", ("0 times", "self.time_to_live", "is\n\nself.ttl\n", "A rule.")),
        (Mutant, "Lock.release", "return keys", ("is\n\nreturn key\n",)),
        (Mutant, "Lock.acquire", "self", ("3 times",)),
        (Mutant, "Lock.release", "pass", ("0 times",)),
        (TextMutant, "FIND", "attempts = :attempt", ("0 times", "is\n\nAND attempt = :attempt\n")),
        (TextMutant, "FIND", "=", ("2 times",)),
    ],
)
def test_a_mutant_that_does_not_fit_says_why(
    apply: Apply, kind: type[Mutant], scope: str, old: str, reasons: tuple[str, ...]
) -> None:
    """The error names what was looked for, and the nearest code that is there."""
    with pytest.raises(DoesNotFitError) as raised:
        apply(scope, old, "0", kind)
    for reason in reasons:
        assert reason in str(raised.value)
