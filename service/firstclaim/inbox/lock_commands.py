"""The scripts of the lock, and an attempt of every command that it needs.

Each script has one key, except `SWAP_MANY`. Lua on every server: `SET ... IFEQ` exists on Valkey 8.1 and Redis 8.4
only. Scripts are sent whole: a server that has just taken over knows none by its digest.
"""

from collections.abc import Awaitable, Callable
from typing import Any

SWAP = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
  return 1
end
return 0"""
# The same for many keys, each with its own value. A key of another type is left alone.
SWAP_MANY = """
for i, key in ipairs(KEYS) do
  if redis.pcall('GET', key) == ARGV[i] then redis.call('SET', key, ARGV[#ARGV - 1], 'PX', ARGV[#ARGV]) end
end
return #KEYS"""
DROP = """
local current = redis.call('GET', KEYS[1])
if current == ARGV[1] or current == ARGV[2] then return redis.call('DEL', KEYS[1]) end
return 0"""

REPLIES: dict[str, tuple[type, ...]] = {
    "SET": (bytes, type(None)),
    "GET": (bytes, type(None)),
    "PTTL": (int,),
    "DEL": (int,),
    "EVAL": (int,),
}

_TTL_MS = 1000  # of a key that is left behind because a command failed
_OURS, _MARKER = b"claimed:check", b"recorded:check"


def key_of(name: str, arguments: tuple[str | bytes | int, ...]) -> bytes:
    """The first key of a command of the lock."""
    key = arguments[2] if name == "EVAL" else arguments[0]
    return key if isinstance(key, bytes) else str(key).encode()


async def try_commands(execute: Callable[..., Awaitable[Any]], key: str) -> None:
    """Send every command on `key`, which must be no event's. Raises what `execute` raises."""
    await execute("SET", key, _OURS, "NX", "GET", "PX", _TTL_MS)
    await execute("GET", key)  # for the scripts, which run with the user's rights
    await execute("PTTL", key)
    await execute("DEL", key)
    await execute("SET", key, _OURS, "NX", "GET", "PX", _TTL_MS)
    await execute("EVAL", SWAP, 1, key, _OURS, _MARKER, _TTL_MS)
    await execute("EVAL", DROP, 1, key, _OURS, _MARKER)
