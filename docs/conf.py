"""How Sphinx builds these pages: `sphinx-build -W -q docs build/docs`.

Guarantees: the pages are plain Markdown that reads as well without a build. A link to nowhere is a warning, and `-W`
makes every warning an error. The site needs nothing from another host: no font, no script, no style.

Sphinx with furo and MyST, because all three are released and maintained. mkdocs had its last release in 2024, and the
support of its theme, mkdocs-material, ends at the end of 2026.
"""

import re
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]

project = "firstclaim"
author = "The firstclaim maintainers"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser"]
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]  # a Mermaid diagram is shown as its source, in plain text

html_theme = "furo"
html_title = f"firstclaim {release}"
html_copy_source = False
html_show_copyright = False

_LINK_OUT = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(?:#[^)]*)?\)")


def name_files_of_the_repository(app: Sphinx, page: str, source: list[str]) -> None:
    """A link to a file outside docs/ becomes its text and the file's path, because the site has no such page."""
    folder = (app.srcdir / page).parent

    def replaced(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        inside = target.is_relative_to(app.srcdir) or not target.exists()
        return link[0] if inside else f"{link[1]} (`{target.relative_to(ROOT)}`)"

    source[0] = _LINK_OUT.sub(replaced, source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", name_files_of_the_repository)
