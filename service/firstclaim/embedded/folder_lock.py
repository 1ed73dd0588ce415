"""The lock on a data folder: which process runs the embedded servers there, and where they listen.

Guarantees: at most one process holds it. (It is a flock: the kernel releases it whenever the process ends, so it is
never stale.) The process that holds it has written to the file where its servers listen, for the commands that share
them.
"""

import fcntl
import json
import os
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import structlog

from firstclaim.embedded.processes import POLL_SECONDS, START_SECONDS
from firstclaim.errors import OperatorError

_TOLD_SECONDS = 1.0  # a service that waits longer for a command says so

log = structlog.get_logger(__name__)


def open_lock(data: Path, *, create: bool = True) -> IO[str]:
    # Close-on-exec, as Python opens every file: a server that inherited the lock would hold it after us.
    # The file is never deleted: otherwise two services could each lock a file of this name.
    flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    return os.fdopen(os.open(data / "lock", flags, 0o600), "r+")


class Holder(NamedTuple):
    """What the process that holds the lock has written: others share its servers as soon as it has addresses."""

    pid: int
    addresses: dict[str, str]
    is_command: bool


def write_lock(lock: IO[str], addresses: dict[str, str], *, is_command: bool) -> None:
    lock.seek(0)
    lock.truncate()
    lock.write(json.dumps(Holder(os.getpid(), addresses, is_command)._asdict()))
    lock.flush()


def read_lock(lock: IO[str]) -> Holder | None:
    """None between the truncate and the write of the process that holds the lock."""
    lock.seek(0)
    try:
        content = json.loads(lock.read())
    except ValueError:
        return None
    return Holder(content["pid"], content["addresses"], content.get("is_command", False))


def running_addresses(data: Path) -> dict[str, str]:
    """Where the servers listen that a process runs on this data folder right now; empty if there is none."""
    try:
        with open_lock(data, create=False) as lock:
            holder = read_lock(lock)
            if holder is None or not holder.addresses:
                return {}
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # succeeds if the addresses are of a killed service
            except BlockingIOError:
                return holder.addresses
    except OSError:
        return {}
    return {}


def lock_or_share(lock: IO[str], data: Path, missing: Collection[str], *, share: bool) -> dict[str, str] | None:
    """None if we hold the lock now, else the addresses of the servers of the process that holds it.

    A command holds it for a moment, where no service runs: a service that starts beside one waits for its end.
    """
    began, told = time.monotonic(), False
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_lock(lock, {}, is_command=share)
            return None
        holder = read_lock(lock)
        busy = f"The data folder {data} is in use by process {holder.pid if holder else '(unknown)'}"
        if holder and not share and not holder.is_command:
            raise OperatorError(f"{busy}. Stop that process, or set FIRSTCLAIM_DATA_DIR to another folder.")
        if holder and share and holder.addresses:
            if absent := [name.upper() for name in missing if name not in holder.addresses]:
                raise OperatorError(f"{busy}, which has {' and '.join(absent)} set. Set the same here.")
            return holder.addresses
        waited_seconds = time.monotonic() - began
        if waited_seconds > _TOLD_SECONDS and not (share or told):
            told = True
            log.info("waiting_for_command", pid=holder.pid if holder else None, data_dir=str(data))
        if waited_seconds > START_SECONDS:
            waited_for = "whose servers are not ready" if share else "a command that has not ended"
            raise OperatorError(f"{busy}, {waited_for} after {START_SECONDS} s. Stop that process.")
        time.sleep(POLL_SECONDS)
