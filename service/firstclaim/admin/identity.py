"""Who a visitor is, if a proxy in front of the page logs them in.

Guarantees: the header counts only if the connection comes from a proxy that is named, by the address of the peer and
not by anything that the request says. A request with two such headers, or with one that no name can be, has no user.
A user who is not named as an operator can read and not change.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from firstclaim.operations.limits import is_storable


class Role(StrEnum):
    """What a visitor may do."""

    VIEWER = "viewer"  # reads, payloads too, which the log records
    OPERATOR = "operator"  # replays


@dataclass(frozen=True, slots=True)
class ProxyLogin:
    """The settings of the same names. `header` is None if no proxy logs visitors in."""

    header: str | None
    proxies: Sequence[str]
    operators: Sequence[str]

    def user(self, peer: str | None, named: Sequence[str]) -> str | None:
        """The user that the header's values name, if `peer` is one of the proxies."""
        if self.header is None or len(named) != 1 or not self._is_proxy(peer):
            return None
        name = named[0].strip()
        return name if is_storable(name) else None

    def role(self, user: str) -> Role:
        """The role of a user."""
        return Role.OPERATOR if "*" in self.operators or user in self.operators else Role.VIEWER

    def _is_proxy(self, peer: str | None) -> bool:
        try:
            address = ipaddress.ip_address((peer or "").partition("%")[0])
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in ipaddress.ip_network(each) for each in self.proxies)
