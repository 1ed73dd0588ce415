"""How often a password may be tried.

Guarantees: an address has 5 tries and one more each minute, everybody together 20 and one more every 3 seconds,
counted before a password is looked at, so that trying at once does not help. The memory for it is bounded: of more
addresses than are kept the longest silent is forgotten, which gives a guesser with many addresses nothing, because
everybody's limit holds all the same. Each worker counts for itself: of N workers the limits are up to N times that.

What that costs: whoever floods the login keeps you out of it too, for as long as it lasts. Put the page where they
cannot reach it; `firstclaim events` needs no page.
"""

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

ADDRESS_TRIES, ADDRESS_SECONDS = 5, 60.0
ALL_TRIES, ALL_SECONDS = 20, 3.0
ADDRESSES_MOST = 1024
_IPV6_NETWORK_BITS = 64  # one household's or one server's: a /64 is had by anyone


@dataclass(slots=True)
class _Bucket:
    """Tries that are left, and one more each `seconds`."""

    tries: float
    seconds: float
    left: float
    at: float

    def wait_seconds(self, now: float) -> float:
        """Until a try is left; 0: now."""
        self.left = min(self.tries, self.left + (now - self.at) / self.seconds)
        self.at = now
        return max(0.0, (1 - self.left) * self.seconds)


class LoginLimit:
    """Of one process. `now` is a clock that never goes back, seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._all = _Bucket(ALL_TRIES, ALL_SECONDS, ALL_TRIES, now())
        self._addresses: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, address: str) -> int:
        """One try; 0: go on, else the seconds after which to come again, and nothing was taken."""
        network, now = _network(address), self._now()
        own = self._addresses.pop(network, None) or _Bucket(ADDRESS_TRIES, ADDRESS_SECONDS, ADDRESS_TRIES, now)
        self._addresses[network] = own
        while len(self._addresses) > ADDRESSES_MOST:
            self._addresses.popitem(last=False)
        wait = max(own.wait_seconds(now), self._all.wait_seconds(now))
        if wait:
            return math.ceil(wait)
        own.left -= 1
        self._all.left -= 1
        return 0

    def forgive(self, address: str) -> None:
        """It was the password: what this address tried before is forgotten."""
        self._addresses.pop(_network(address), None)
        self._all.left = min(self._all.tries, self._all.left + 1)


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, _IPV6_NETWORK_BITS), strict=False))
    return str(parsed)
