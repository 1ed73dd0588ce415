"""Faults at a named message, on the connections between one process and its stores.

Guarantees: a fault happens once, at the first message of its name, either before the server receives it or when the
server has answered it, at the latest before it receives the next message. (Two messages may be one round trip: then the
first has no answer of its own.) A cut affects that one connection. The service is unchanged: the text of the statement
identifies a message, so that "the insert" is found however the client sends it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from tests.proxy import Tap

Messages = Mapping[str, re.Pattern[bytes]]

REDIS: Final[Messages] = {
    "lock": re.compile(rb"\r\nSET\r\n"),
    "lock taken over": re.compile(rb"(claimed|recorded):\w+\r\n\$\d+\r\nclaimed:"),
    "marker": re.compile(rb"claimed:\w+\r\n\$\d+\r\nrecorded:"),
    "forget": re.compile(rb"'DEL'"),
}
POSTGRES: Final[Messages] = {
    "insert": re.compile(rb"INSERT INTO firstclaim.stripe_events"),
    "take over": re.compile(rb"attempt = attempt \+ 1"),
    "hold": re.compile(rb"pg_current_xact_id\(\)::text AS xid"),
    "effect": re.compile(rb"INSERT INTO effects"),
    "mark": re.compile(rb"SET status = 'completed'"),
    "commit": re.compile(rb"^COMMIT"),
    "renew": re.compile(rb"coalesce\(CAST\(\S+ AS text\), last_error\)"),
    "fail": re.compile(rb"failures = failures \+ 1"),
    "return abandoned": re.compile(rb"abandoned = abandoned \+ 1"),
}


class Effect(Enum):
    """What a fault does."""

    CUT = auto()  # the one connection is lost
    DIE = auto()  # the whole process vanishes
    FREEZE = auto()  # the whole process stands still


@dataclass(frozen=True, slots=True)
class Fault:
    """The message, whether the server receives it (then its reply is lost), and the effect."""

    message: str
    heard: bool
    effect: Effect


class Switch:
    """At most one fault armed, for one process; `happen` is called with it, and ends or freezes the process."""

    def __init__(self, happen: Callable[[Fault], None]) -> None:
        self.armed: Fault | None = None
        self._happen = happen

    def due(self, said: bytes, messages: Messages) -> Fault | None:
        """The armed fault, if this is its message; it is armed no longer."""
        fault = self.armed
        if fault is None or fault.message not in messages or not messages[fault.message].search(said):
            return None
        self.armed = None
        return fault

    def meet(self, fault: Fault) -> None:
        """Now. Raises ConnectionResetError where the connection does not survive it."""
        self._happen(fault)
        if fault.effect is not Effect.FREEZE:
            raise ConnectionResetError(f"{fault}")


class FaultyTap(Tap):
    """One connection, on which the armed fault may happen."""

    def __init__(self, switch: Switch, messages: Messages) -> None:
        self._switch = switch
        self._messages = messages
        self._heard: Fault | None = None  # happens when the answer comes

    def sent(self, chunk: bytes) -> None:
        self._meet_heard()
        if fault := self._switch.due(self.asked(chunk), self._messages):
            if not fault.heard:
                self._switch.meet(fault)
            else:
                self._heard = fault

    def replied(self, chunk: bytes) -> None:
        self._meet_heard()

    def asked(self, piece: bytes) -> bytes:
        """What the client asks for with this piece."""
        return piece

    def _meet_heard(self) -> None:
        if self._heard is not None:
            fault, self._heard = self._heard, None
            self._switch.meet(fault)


class PostgresTap(FaultyTap):
    """Finds statements by their text where they are executed: what was prepared before is sent by its name only."""

    def __init__(self, switch: Switch) -> None:
        super().__init__(switch, POSTGRES)
        self._begun = False  # the startup message, and what comes before it, has no letter for its kind
        self._rest = b""
        self._texts: dict[bytes, bytes] = {}

    def pieces(self, chunk: bytes) -> list[bytes]:
        """Whole messages; those that execute a statement begin a new piece."""
        self._rest += chunk
        pieces = [b""]
        while len(self._rest) >= (head := 5 if self._begun else 4):
            end = head - 4 + int.from_bytes(self._rest[head - 4 : head])
            if len(self._rest) < end:
                break
            message, self._rest = self._rest[:end], self._rest[end:]
            if not self._begun:
                self._begun = message[4:].startswith(b"\0\3\0\0")  # protocol 3.0; else it requested TLS
            elif message[:1] in b"BQ":
                pieces.append(b"")
            elif message[:1] == b"P":
                name, text, _ = message[5:].split(b"\0", 2)
                self._texts[name] = text
            pieces[-1] += message
        return [piece for piece in pieces if piece]

    def asked(self, piece: bytes) -> bytes:
        """The statement that it executes."""
        match piece[:1]:
            case b"B":
                return self._texts.get(piece[5:].split(b"\0", 2)[1], b"")
            case b"Q":
                return piece[5:]
            case _:
                return b""


def redis_tap(switch: Switch) -> Tap:
    """For a connection to Redis: its commands come whole, those of one pipeline together."""
    return FaultyTap(switch, REDIS)


def postgres_tap(switch: Switch) -> Tap:
    """For a connection to Postgres."""
    return PostgresTap(switch)
