"""The settings of the admin page: its password, and whom it believes who a visitor is.

Guarantees: a header names a visitor only if the proxies that may set it are named too, because anyone can send one. A
header that every request has, proxies that could be anybody, and a setting without the one that gives it an effect are
refused: each looks like a login by the proxy, and is none.
"""

import ipaddress
import re
from typing import Annotated, Self

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode

from firstclaim.passwords import check

_HEADER = re.compile(r"[A-Za-z0-9-]{1,100}")
_NAME = re.compile(r"(?!.*//)\S{1,255}")  # not an address, which may hold a password


# Headers that say something else, and that clients send.
_OTHER_HEADERS = re.compile(
    r"(?:accept|content|sec|if|stripe|access-control|transfer|proxy)(?:-.*)?|"
    r"authorization|connection|cookie|date|expect|forwarded|from|host|keep-alive|origin|range|referer|te|traceparent|"
    r"upgrade|user-agent|via|x-forwarded-(?:for|host|port|proto|prefix)|x-real-ip|x-request-id",
    re.IGNORECASE,
)
# The largest private networks: 10.0.0.0/8 and fc00::/7. A larger one has addresses that anybody can have.
_SHORTEST_PREFIX = {4: 8, 6: 7}


def _header(name: str) -> str:
    if not _HEADER.fullmatch(name):
        raise ValueError("expected the name of a header, e.g. X-Forwarded-Email")
    if _OTHER_HEADERS.fullmatch(name):
        raise ValueError(f"{name} has another meaning, and clients send it: name one of the proxy's own, which it sets")
    return name


def _network(text: str) -> str:
    """An address or a network, as `ipaddress` takes it. Raises ValueError."""
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(
            "expected addresses or networks with commas between, e.g. 10.0.0.0/8,::1; a prefix is at most 32, or 128 "
            "for IPv6"
        ) from None
    address = text.partition("/")[0]
    if network.prefixlen < _SHORTEST_PREFIX[network.version]:
        raise ValueError(f"{network} is not a network of proxies: whoever connects could name a visitor")
    if ipaddress.ip_address(address) != network.network_address:
        raise ValueError(f"{text} is an address with the prefix of its network: write {address} or {network}")
    return text


class AdminSettings(BaseSettings):
    """The page's settings. A part of `firstclaim.settings.Settings`."""

    admin_password: SecretStr | None = Field(
        None,
        description="Enables the page at `/admin`: a hash from `firstclaim admin-password`, or a plain value.",
    )
    admin_proxies: int = Field(
        0, ge=0, le=9, description="Number of your proxies: it says which entry of `X-Forwarded-For` is the client's."
    )
    admin_user_header: Annotated[str | None, AfterValidator(lambda name: None if name is None else _header(name))] = (
        Field(None, description="Header in which a proxy that logs visitors in names them, e.g. `X-Forwarded-Email`.")
    )
    admin_user_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Addresses or networks of the proxies that may name visitors, comma separated. "
        "The header of any other peer is ignored.",
    )
    admin_operators: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Named visitors who may replay, comma separated, or `*`. The others only read. "
        "The password makes an operator.",
    )

    @field_validator("admin_user_proxies", "admin_operators", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("admin_user_proxies")
    @classmethod
    def _networks(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_network, proxies))

    @field_validator("admin_operators")
    @classmethod
    def _names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not all(_NAME.fullmatch(name) for name in names):
            raise ValueError("expected names as the header has them, with commas between, e.g. ada@example.com")
        return names

    @field_validator("admin_password")
    @classmethod
    def _strong_password(cls, password: SecretStr | None) -> SecretStr | None:
        if password is not None:
            check(password.get_secret_value())
        return password

    @model_validator(mode="after")
    def _a_proxy_names_visitors(self) -> Self:
        header = self.admin_user_header is not None
        faults = {
            "FIRSTCLAIM_ADMIN_USER_HEADER needs FIRSTCLAIM_ADMIN_USER_PROXIES: anyone can send a header": (
                header and not self.admin_user_proxies
            ),
            "FIRSTCLAIM_ADMIN_USER_HEADER needs FIRSTCLAIM_ADMIN_PASSWORD: it enables the page, and signs its forms": (
                header and self.admin_password is None
            ),
            "FIRSTCLAIM_ADMIN_USER_PROXIES has no effect without FIRSTCLAIM_ADMIN_USER_HEADER: no header would name "
            "a visitor": bool(self.admin_user_proxies) and not header,
            "FIRSTCLAIM_ADMIN_OPERATORS has no effect without FIRSTCLAIM_ADMIN_USER_HEADER: no visitor would have a "
            "name, and whoever has the password is an operator": bool(self.admin_operators) and not header,
        }
        if found := [fault for fault, holds in faults.items() if holds]:
            raise ValueError("\n".join(found))
        return self
