"""How pages are written: Jinja2, every value escaped, every time and age and payload in one form.

Guarantees: what comes from outside is text and nothing else, whatever it holds: autoescape is on for every template,
no template turns it off, and a name that is missing is an error, not an empty place. No page has a script, a style or
an event handler of its own, or names another host; the headers of `firstclaim.admin.page` forbid all of that besides.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse, Response

from firstclaim.formatting import age, ago, instant
from firstclaim.status import Status

STATIC_TYPES: Final = {"admin.css": "text/css", "icon.svg": "image/svg+xml"}

_INDENT_MOST = 32  # a payload may be a hundred thousand levels deep, and each would be indented by all the others
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)


class Pages:
    """The templates."""

    def __init__(self) -> None:
        self._environment = Environment(
            loader=PackageLoader("firstclaim.admin"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.globals.update(statuses=list(Status), version=version("firstclaim"))
        self._environment.filters.update(
            age=age, ago=ago, instant=instant, iso=datetime.isoformat, thousands=thousands, printable=printable
        )

    def render(self, template: str, values: Mapping[str, Any], status: int = 200) -> Response:
        """The page."""
        return HTMLResponse(self._environment.get_template(template).render(values), status)


def static(name: str) -> Response | None:
    """A file that pages refer to; None: there is none of that name."""
    media_type = STATIC_TYPES.get(name)
    if media_type is None:
        return None
    return Response(files("firstclaim.admin").joinpath("static", name).read_bytes(), media_type=media_type)


# -- filters ------------------------------------------------------------------------------------------


def thousands(number: int) -> str:
    """With a thin space between thousands, which a copied number does not keep in most places."""
    return f"{number:,}".replace(",", "\u2009")


def printable(text: str) -> str:
    """What would not show, or would turn the direction of what follows, as an escape."""
    return "".join(each if each.isprintable() or each in "\n " else f"\\u{ord(each):04x}" for each in text)


def laid_out(body: str) -> str:
    """JSON with an item a line. Its tokens are kept as they are: no number is rounded, no name dropped."""
    lines: list[str] = []
    line, depth, before = "", 0, ""
    for piece in _TOKEN.findall(body):
        if piece in ("}", "]"):
            depth -= 1
            if before not in ("{", "["):
                lines.append(line)
                line = "  " * min(depth, _INDENT_MOST)
        elif before in ("{", "[", ","):
            lines.append(line)
            line = "  " * min(depth, _INDENT_MOST)
        line += ": " if piece == ":" else piece
        depth += piece in ("{", "[")
        before = piece
    return "\n".join([*lines, line])
