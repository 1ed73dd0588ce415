"""The admin page as a browser without JavaScript sees it: pages, forms, cookies. Every response is checked.

Guarantees: a response fails the test if it lacks a header that all must have, or if its page has a script other than
the file of ours, an inline style, an event handler, or the address of another host other than a link to Stripe.
"""

import hashlib
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import structlog
from pydantic import SecretStr
from starlette.applications import Starlette

from firstclaim.admin.page import HEADERS
from firstclaim.admin.stripe_links import DASHBOARD
from firstclaim.app import admin_page
from firstclaim.passwords import _to_base64
from firstclaim.web.health import HealthCheck
from tests.integration.world import World
from tests.unit.test_logging import configured

PASSWORD: Final = "correct horse battery staple"
# The same password at a tenth of its cost: the tests log in a hundred times.
_SALT = b"0123456789abcdef"
_DIGEST = hashlib.scrypt(PASSWORD.encode(), salt=_SALT, n=2**14, r=8, p=1, dklen=32)
HASHED: Final = ":".join(("scrypt", "16384", "8", "1", _to_base64(_SALT), _to_base64(_DIGEST)))
ON: Final[dict[str, Any]] = {"admin_password": SecretStr(HASHED)}
ORIGIN: Final = "https://admin.test"
ADDRESS: Final = "203.0.113.9"

_ADDRESSES = ("href", "src", "action", "formaction", "srcset", "poster", "data", "xlink:href")
_CONTENT_SECURITY = HEADERS["Content-Security-Policy"]


@dataclass
class Form:
    """One form, with the fields that it would send."""

    method: str
    action: str
    fields: list[tuple[str, str]] = field(default_factory=list)
    buttons: list[tuple[str, str]] = field(default_factory=list)
    boxes: list[tuple[str, str]] = field(default_factory=list)

    @property
    def token(self) -> str:
        return dict(self.fields)["token"]


class Page(HTMLParser):
    """A parsed page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.html = text
        self.forms: list[Form] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._form: Form | None = None
        self.feed(text)
        self._check_clean()

    @property
    def text(self) -> str:
        """All text of the page, in one line."""
        return " ".join(" ".join(self.words).split())

    def form(self, action: str) -> Form:
        """The form with that action."""
        [found] = [form for form in self.forms if urlsplit(form.action).path == action]
        return found

    def has_form(self, action: str) -> bool:
        return any(urlsplit(form.action).path == action for form in self.forms)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag == "a":
            self.links.append(given.get("href") or "")
        if tag == "form":
            self._form = Form(given.get("method") or "get", given.get("action") or "")
            self.forms.append(self._form)
        if self._form is not None and (name := given.get("name")) and tag in ("input", "button"):
            pair = (name, given.get("value") or "")
            if tag == "button":
                self._form.buttons.append(pair)
            elif given.get("type") == "checkbox":
                self._form.boxes.append(pair)
                if "checked" in given:
                    self._form.fields.append(pair)
            else:
                self._form.fields.append(pair)

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._form = None

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def _check_clean(self) -> None:
        for tag, given in self.tags:
            assert tag != "script" or re.fullmatch(r"(/pay)?/admin/static/admin\.js", given.get("src") or ""), given
            assert tag not in ("style", "iframe", "object", "embed", "base"), tag
            assert not [name for name in given if name == "style" or name.startswith("on")], (tag, given)
            for name in _ADDRESSES:
                is_stripe = (tag, name) == ("a", "href") and (given.get(name) or "").startswith(f"{DASHBOARD}/")
                assert not (address := given.get(name)) or is_stripe or re.match(r"(/pay)?/admin\b|#", address), address
            if tag == "form":
                assert given.get("method") in ("get", "post")
        for form in self.forms:
            assert form.method == "get" or form.token, form


@dataclass
class Visitor:
    """A browser."""

    client: httpx.AsyncClient

    async def get(self, path: str, **headers: str) -> tuple[httpx.Response, Page]:
        return checked(await self.client.get(path, headers=_given(headers)))

    async def post(self, path: str, fields: Any, **headers: str) -> tuple[httpx.Response, Page]:
        """Send a form as a browser does."""
        given = {"Origin": str(self.client.base_url).rstrip("/"), "Sec-Fetch-Site": "same-origin", **_given(headers)}
        pairs = list(fields.items()) if isinstance(fields, Mapping) else list(fields)
        sent = httpx.QueryParams(pairs)
        content = {"Content-Type": "application/x-www-form-urlencoded", **given}
        return checked(await self.client.post(path, content=str(sent), headers=content))

    async def submit(self, form: Form, *more: tuple[str, str]) -> tuple[httpx.Response, Page]:
        """Send the form's fields and `more`: a button, a selected checkbox, or a field with a value."""
        names = {name for name, _ in more}
        kept = [pair for pair in form.fields if pair[0] not in names or pair in form.boxes]
        return await self.post(form.action, [*kept, *more])

    async def follow(self, response: httpx.Response) -> tuple[httpx.Response, Page]:
        assert response.status_code == 303, response.text
        return await self.get(response.headers["location"])

    async def log_in(self, password: str = PASSWORD, path: str = "/admin/login") -> httpx.Response:
        _, page = await self.get(path)
        response, _ = await self.submit(page.form("/admin/login"), ("password", password))
        return response


@contextmanager
def logging_as_served() -> Iterator[None]:
    """One JSON object a line on standard error, as a service writes them, from everything that logs in the block."""
    with configured():
        structlog.configure(**{**structlog.get_config(), "cache_logger_on_first_use": False})
        yield


def _given(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def checked(response: httpx.Response) -> tuple[httpx.Response, Page]:
    """Check what must hold for every response."""
    for name, value in HEADERS.items():
        assert response.headers.get_list(name) == [value], (response.request.url, name)
    directives = {words[0]: words[1:] for each in _CONTENT_SECURITY.split(";") if (words := each.split())}
    assert directives["default-src"] == ["'none'"]
    assert directives["script-src"] == directives["connect-src"] == ["'self'"]
    assert "unsafe" not in _CONTENT_SECURITY
    for cookie in response.headers.get_list("set-cookie"):
        flags = {part.strip() for part in cookie.split(";")[1:]}
        assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= flags, cookie
        is_secure = not response.request.url.host.startswith(("127.", "localhost"))
        assert ("Secure" in flags) == cookie.startswith("__Host-") == is_secure, cookie
    is_page = response.headers.get("content-type", "").startswith("text/html")
    return response, Page(response.text if is_page else "")


def site_of(world: World, probes: list[HealthCheck] | None = None) -> Starlette:
    """An application with the admin page of the world, and nothing else."""
    site = admin_page(world.settings, world.components, probes or [])
    assert site is not None
    return Starlette(routes=list(site.routes))


@asynccontextmanager
async def logged_in(world: World) -> AsyncIterator[Visitor]:
    """A browser that is logged in on the page of the world."""
    admin = visitor(site_of(world))
    async with admin.client:
        await admin.log_in()
        yield admin


def visitor(app: Starlette, address: str = ADDRESS, origin: str = ORIGIN) -> Visitor:
    """A new browser; it does not follow redirects by itself."""
    transport = httpx.ASGITransport(app, client=(address, 40_000))
    return Visitor(httpx.AsyncClient(transport=transport, base_url=origin))
