"""Each code block of our pages is run by a test, or says that it is not."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.blocks import PAGES, ROOT, Block, blocks_of


def asked_for() -> set[tuple[str, str]]:
    """Page and name of every call of `block` in the tests, with both written out."""
    found = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "block(" not in (text := path.read_text()):
            continue
        constants = {
            target.id: node.value.value
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Call(func=ast.Name("block"), args=[page, ast.Constant(str(name))]):
                    where = constants.get(page.id) if isinstance(page, ast.Name) else getattr(page, "value", None)
                    found.add((str(where), name))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_block_is_run_or_marked(page: Path) -> None:
    """A block has a name under which a test runs it, or its first line says why no test does; never both."""
    assert [each for each in blocks_of(page) if (each.name is not None) == each.is_marked] == []
    names = Counter(each.name for each in blocks_of(page) if each.name is not None)
    assert [name for name, count in names.items() if count > 1] == []


def test_each_named_block_is_asked_for() -> None:
    """The blocks with a name are exactly those that a test takes from its page."""
    named = {(each.page, each.name) for page in PAGES for each in blocks_of(page) if each.name is not None}
    assert named == asked_for()


def test_what_a_block_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name above it, the language, and the text without the indentation of a list."""
    page = tmp_path / "page.md"
    page.write_text(
        "1. x\n\n   <!-- run: a b -->\n   ```sh\n   ls\n   ```\n\n```sql\n-- not run: why\n```\n\n```mermaid\n```\n"
    )
    monkeypatch.setattr("tests.blocks.ROOT", tmp_path)
    named, marked = blocks_of(page)
    assert named == Block("page.md", "a b", "sh", "ls\n")
    assert (marked.is_marked, named.is_marked) == (True, False)
