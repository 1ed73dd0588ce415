"""How many events of a handler may begin in a second, in all processes together.

Guarantees: the count is one key in Redis, and one script both reads and changes it. The events are spread evenly: at
most a tenth of a second's worth begin together, and one at least. No clock is compared: the key's own TTL is how far
the events that were let through reach into the future.

If the count cannot be read, nothing begins (`take` grants nothing). No promise rests on it: what does not begin is
recorded, and due. If Redis loses it, it starts anew, and a tenth of a second's worth more may begin.
"""

from dataclasses import dataclass

from firstclaim.errors import LockUnavailable
from firstclaim.inbox.lock import LockServers

_EVEN_SECONDS = 0.1
_UNREACHABLE_SECONDS = 1.0  # until it is asked again
_MICROSECONDS = 1_000_000

# KEYS: the count. ARGV, in microseconds: the time of one event, and how far events may reach ahead; and the number that
# is wanted. Replies with the number that may begin, or with the microseconds until one may, as a negative number.
# The TTL has whole milliseconds, so the value is what it has too much. A value that is no number, or one that another
# build's slower rate has left behind, does not count.
ADMIT = """
local step, reach, wanted = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local ttl, excess = redis.call('PTTL', KEYS[1]), redis.pcall('GET', KEYS[1])
excess = type(excess) == 'string' and tonumber(excess) or 0
local ahead = math.min(math.max(ttl * 1000 - excess, 0), reach)
local granted = math.min(math.floor((reach - ahead) / step), wanted)
if granted < 1 then return -math.ceil(step - (reach - ahead)) end
ahead = ahead + granted * step
local ms = math.ceil(ahead / 1000)
redis.call('SET', KEYS[1], string.format('%d', ms * 1000 - ahead), 'PX', ms)
return granted"""


@dataclass(frozen=True, slots=True)
class Grant:
    """How many events may begin; if none may: how many seconds until one may."""

    events: int
    wait_seconds: float = 0.0


class Rate:
    """The rate of the handlers called `name`."""

    def __init__(self, servers: LockServers, prefix: str, name: str, per_second: float) -> None:
        self._servers = servers
        self._key = f"{prefix}rate/{name}"  # no event's id has a slash
        self._step = round(_MICROSECONDS / per_second)
        self._reach = max(self._step, round(_MICROSECONDS * _EVEN_SECONDS))

    async def take(self, wanted: int) -> Grant:
        """How many of `wanted` events may begin now. Those that then do not begin count all the same. Never raises."""
        try:
            reply = int(await self._servers.call("EVAL", ADMIT, 1, self._key, self._step, self._reach, wanted))
        except LockUnavailable:
            return Grant(0, _UNREACHABLE_SECONDS)
        return Grant(reply) if reply > 0 else Grant(0, max(-reply, 1000) / _MICROSECONDS)
