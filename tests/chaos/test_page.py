"""The page of the fault matrix has every row, and names every test that there is for one, in its own words."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = (*range(1, 38), 41)
PAGE = (HERE / "README.md").read_text()


def row_tests() -> dict[str, tuple[bool, str]]:
    """Of each test of a row: whether it is of the long part, and its sentence."""
    found: dict[str, tuple[bool, str]] = {}
    for path in sorted(HERE.glob("test_*.py")):
        module = ast.parse(path.read_text())
        for node in module.body:
            if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef) and node.name.startswith("test_row_"):
                long = not any("mark.smoke" in ast.unparse(each) for each in node.decorator_list)
                found[node.name] = long, (ast.get_docstring(node) or "").partition("\n")[0]
    return found


TESTS = row_tests()


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_its_tests(row: int) -> None:
    """A row without a test, or one that the page does not show under its number, would be a promise only."""
    tests = [name for name in TESTS if name.startswith(f"test_row_{row:02}_")]
    assert tests
    assert re.search(
        rf"^\| {row} \| [^|]+ \| `{tests[0]}`|^\| {row} \| [^|]+ \| `test_row_{row:02}_", PAGE, re.MULTILINE
    )


@pytest.mark.parametrize("name", TESTS)
def test_the_page_names_each_test_with_its_sentence(name: str) -> None:
    """What the page says that a test shows is what the test says, and which run it is part of."""
    long, sentence = TESTS[name]
    assert f"| `{name}`{' ⏳' if long else ''} | {sentence.replace('|', chr(92) + '|')}" in PAGE


def test_the_page_names_no_other_test() -> None:
    """A test that has gone is gone from the page."""
    assert set(re.findall(r"`(test_row_\w+)`", PAGE)) == set(TESTS)
