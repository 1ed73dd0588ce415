"""Renders the pages with Jinja2.

Guarantees: any value is rendered as text: autoescape is on for every template, no template switches it off, and an
undefined name is an error. No page has a script in it, an inline style or an event handler, or loads anything from
another host; the headers of `firstclaim.admin.page` forbid all of these too. The only script is the file `admin.js`.
"""

from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse, Response

from firstclaim.formatting import age, ago, duration, instant, number_of_events, percent, rate, thousands
from firstclaim.status import Status

STATIC_TYPES: Final = {"admin.css": "text/css", "admin.js": "text/javascript", "icon.svg": "image/svg+xml"}


class Templates:
    """The templates of the pages."""

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
            age=age,
            ago=ago,
            duration=duration,
            percent=percent,
            rate=rate,
            instant=instant,
            iso=datetime.isoformat,
            thousands=thousands,
            number_of_events=number_of_events,
            printable=printable,
        )

    def render(self, template: str, values: Mapping[str, Any], status: int = 200) -> Response:
        """The rendered page."""
        return HTMLResponse(self._environment.get_template(template).render(values), status)


def static(name: str) -> Response | None:
    """The static file of that name, or None if there is none."""
    media_type = STATIC_TYPES.get(name)
    if media_type is None:
        return None
    return Response(files("firstclaim.admin").joinpath("static", name).read_bytes(), media_type=media_type)


# -- filters ------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The text with escapes for characters that are invisible or change the direction of the text."""
    return "".join(each if each.isprintable() or each in "\n \u2009" else f"\\u{ord(each):04x}" for each in text)
