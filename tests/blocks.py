"""The code blocks of our pages. Each is run by a test under its name, or says in its first line that it is not run.

A comment above a block gives it a name: `<!-- run: NAME -->`. A test gets the block by its page and this name, and runs
it. A block that no test can run begins with a comment in its own language that readers see: `# not run: REASON`.
`tests/unit/test_blocks.py` checks that each block is one or the other, and that each name is asked for by a test.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A diagram is no code, and a `toctree` is Sphinx' table of contents.
_NO_CODE: Final = ("mermaid", "{toctree}")
_BLOCK: Final = re.compile(
    r"(?:^ *<!-- run: (?P<name>[^\n]+?) -->\n)?^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^ *```$",
    flags=re.MULTILINE | re.DOTALL,
)
_NOT_RUN: Final = re.compile(r"(#|--) not run: \S")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: its page relative to the repository, its name (None without one), language and text."""

    page: str
    name: str | None
    language: str
    text: str

    @property
    def is_marked(self) -> bool:
        """Whether its first line says that it is not run, and why."""
        return _NOT_RUN.match(self.text) is not None


def blocks_of(page: Path) -> list[Block]:
    """All code blocks of a page, in order, without the indentation of their list items."""
    return [
        Block(
            str(page.relative_to(ROOT)),
            found["name"],
            found["language"],
            re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE),
        )
        for found in _BLOCK.finditer(page.read_text())
        if found["language"] not in _NO_CODE
    ]


def block(page: str, name: str) -> str:
    """The text of the block with that name. Raises `ValueError` if the page does not have exactly one."""
    [text] = [each.text for each in blocks_of(ROOT / page) if each.name == name]
    return text
