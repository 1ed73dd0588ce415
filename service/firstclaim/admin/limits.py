"""Rate limits of the login.

Guarantees: an address has 5 attempts and gets one more each minute; all addresses together have 20 and get one more
every 3 seconds. An attempt is counted before the password is compared, so that concurrent attempts do not help. Memory
is bounded: if there are more addresses than are kept, the one without an attempt for the longest time is forgotten. An
attacker with many addresses gains nothing by that, because the common limit still holds. Each worker counts for
itself: with N workers the limits are up to N times as high.

The price: a flood of attempts locks you out of the login too, while it lasts. Put the page where an attacker cannot
reach it. `firstclaim events` does not need the page.
"""

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

ADDRESS_ATTEMPTS, ADDRESS_SECONDS = 5, 60.0
ALL_ATTEMPTS, ALL_SECONDS = 20, 3.0
ADDRESSES_MOST = 1024
_IPV6_NETWORK_BITS = 64  # one household or one server: anyone can have a /64


@dataclass(slots=True)
class _Bucket:
    """A token bucket: attempts that are left, and one more every `seconds`."""

    attempts: float
    seconds: float
    left: float
    at: float

    def wait_seconds(self, now: float) -> float:
        """The seconds until an attempt is left; 0 if one is left now."""
        self.left = min(self.attempts, self.left + (now - self.at) / self.seconds)
        self.at = now
        return max(0.0, (1 - self.left) * self.seconds)


class LoginLimit:
    """The limits in one process. `now` is a monotonic clock, in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._all = _Bucket(ALL_ATTEMPTS, ALL_SECONDS, ALL_ATTEMPTS, now())
        self._addresses: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, address: str) -> int:
        """Take one attempt. Returns 0, or the seconds to wait if none is left; then nothing is taken."""
        network, now = _network(address), self._now()
        own = self._addresses.pop(network, None) or _Bucket(ADDRESS_ATTEMPTS, ADDRESS_SECONDS, ADDRESS_ATTEMPTS, now)
        self._addresses[network] = own
        while len(self._addresses) > ADDRESSES_MOST:
            self._addresses.popitem(last=False)
        wait = max(own.wait_seconds(now), self._all.wait_seconds(now))
        if wait:
            return math.ceil(wait)
        own.left -= 1
        self._all.left -= 1
        return 0

    def reset(self, address: str) -> None:
        """Reset the address's limit after a successful login."""
        self._addresses.pop(_network(address), None)
        self._all.left = min(self._all.attempts, self._all.left + 1)


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
