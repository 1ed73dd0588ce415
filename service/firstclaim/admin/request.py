"""One request to the page, and what every part of it wants to know: who, from where, with which form.

Guarantees: a form is read only up to `FORM_MOST_BYTES` and only as what a form of ours is. That a request came from
one of our own pages is asked twice: the form has to bring the session's token, and what the browser says of where it
comes from (`Origin`, `Sec-Fetch-Site`) has to be this very address.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from firstclaim.admin.rendering import Pages
from firstclaim.admin.session import Cookie, Session, Signer

PATH: Final = "/admin"
FORM_MOST_BYTES: Final = 512 * 1024  # a thousand events that are named by the longest ids there are
LOGIN_MOST_BYTES: Final = 8 * 1024
FIELDS_MOST: Final = 1100
_NOTICE_SECONDS = 60
_FORM = "application/x-www-form-urlencoded"


class Refused(Exception):
    """The request ends here: a page that says why."""

    def __init__(self, status: int, title: str, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(title)
        self.status = status
        self.title = title
        self.text = text
        self.headers = dict(headers or {})


@dataclass(slots=True)
class AdminRequest:
    """One request. `address` is the client's, `secure` whether the browser keeps cookies for TLS alone."""

    request: Request
    pages: Pages
    signer: Signer
    address: str
    secure: bool
    session: Session | None = None
    form: dict[str, list[str]] = field(default_factory=dict)
    set_cookies: list[str] = field(default_factory=list)

    # -- cookies --------------------------------------------------------------------------------------

    def cookie(self, name: str) -> Cookie:
        """Of that name, for this way of coming here."""
        return Cookie(name, self.secure)

    def brought(self, name: str) -> str | None:
        """The value of a cookie of ours."""
        return self.request.cookies.get(self.cookie(name).full_name)

    @property
    def known(self) -> Session:
        """The session; only for what is behind the login."""
        if self.session is None:
            raise Refused(403, "You are not logged in", "Log in, and do it again.")
        return self.session

    @property
    def path(self) -> str:
        """What was asked for. Not from `request.url`: that rests on the header Host, which may hold anything."""
        path: str = self.request.scope["path"]
        return path

    def notice(self, text: str, *, good: bool = True) -> None:
        """Have the next page say this, once."""
        packed = self.signer.pack(self.known, "notice", [text, good])
        self.set_cookies.append(self.cookie("notice").set(packed, _NOTICE_SECONDS))

    def _take_notice(self) -> tuple[str, bool] | None:
        if self.session is None or (packed := self.brought("notice")) is None:
            return None
        self.set_cookies.append(self.cookie("notice").drop())
        found = self.signer.unpack(self.session, "notice", packed, _NOTICE_SECONDS)
        return None if found is None else (str(found[0]), bool(found[1]))

    # -- what was asked -------------------------------------------------------------------------------

    def word(self, name: str) -> str | None:
        """A parameter of the address, if it says something; `Refused` if it is nothing that the ledger could hold."""
        return _word(self.request.query_params.get(name, ""))

    def words(self, name: str) -> list[str]:
        """All that are given of it."""
        return [word for text in self.request.query_params.getlist(name) if (word := _word(text)) is not None]

    def field(self, name: str) -> str:
        """A form's field; empty if it has none of that name."""
        return self.form.get(name, [""])[0]

    # -- what is answered -----------------------------------------------------------------------------

    def page(self, template: str, status_code: int = 200, **values: Any) -> Response:
        """A page, with what all of them show."""
        session = self.session
        shared = {
            "path": PATH,
            "here": self.path,
            "token": None if session is None else self.signer.token(session),
            "notice": self._take_notice(),
        }
        return self.pages.render(template, {**shared, **values}, status_code)

    def go(self, where: str) -> Response:
        """After a form: the page that follows, which can be loaded again without sending the form again."""
        return RedirectResponse(where, 303)

    # -- where it comes from --------------------------------------------------------------------------

    async def read_form(self, most_bytes: int = FORM_MOST_BYTES) -> None:
        """Fill `form`. Raises `Refused`, and starlette's ClientDisconnect."""
        self._check_origin()
        if self.request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
            raise Refused(415, "Not a form", f"Forms come as {_FORM}.")
        body = bytearray()
        async for chunk in self.request.stream():
            body += chunk
            if len(body) > most_bytes:
                raise Refused(413, "Too much", f"A form has at most {most_bytes} bytes.", {"Connection": "close"})
        try:
            pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=FIELDS_MOST, errors="strict")
        except ValueError:  # also what is no UTF-8
            raise Refused(400, "Not a form", "It cannot be read.") from None
        for name, value in pairs:
            self.form.setdefault(name, []).append(value)

    def check_token(self) -> None:
        """Raise `Refused` unless the form is from a page of this session."""
        if not self.signer.token_holds(self.known, self.field("token")):
            raise Refused(403, "Not from this page", "The form is of another login, or of none. Load the page again.")

    def _check_origin(self) -> None:
        fetch_site = self.request.headers.get("sec-fetch-site", "same-origin")
        origin = self.request.headers.get("origin")
        if fetch_site != "same-origin" or (origin is not None and not self._is_ours(origin)):
            text = "Your browser says that another site sent this. A proxy before this page has to leave Host as it is."
            raise Refused(403, "Not from this page", text)

    def _is_ours(self, origin: str) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        is_host = parts.netloc.lower() == self.request.headers.get("host", "").lower()
        return is_host and (parts.scheme == "https" or not self.secure)


def is_loopback(host: str) -> bool:
    """Whether a header `Host` names the very machine that the browser runs on."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    name = name.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def client_address(peer: str | None, forwarded: Sequence[str], proxies: int) -> str:
    """Who is behind `proxies` of ours: of `X-Forwarded-For` (all its headers), counted from the end, that entry."""
    entries = [entry.strip() for header in forwarded for entry in header.split(",")]
    if 0 < proxies <= len(entries):
        with_port = entries[-proxies].rpartition(":")
        for text in (entries[-proxies], with_port[0]):  # some proxies write a port behind it
            try:
                return str(ipaddress.ip_address(text.strip("[]")))
            except ValueError:
                continue
    return peer or "unknown"


def _word(text: str) -> str | None:
    text = text.strip()
    if len(text) > 255 or not text.isprintable():
        raise Refused(400, "Nothing can be found by this", "Search for up to 255 printable characters.")
    return text or None
