"""The lock on a data folder: which process runs the embedded servers there, and where they listen.

Guarantees: at most one process holds it. (It is a flock: the kernel releases it whenever the process ends, so it is
never stale.) The process that holds it has written to the file where its servers listen, for the commands that share
them. A command that holds it keeps its servers until no other command shares them; a service ends when it wants to.
"""

import fcntl
import json
import os
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import structlog

from firstclaim.embedded.processes import POLL_SECONDS, START_SECONDS
from firstclaim.errors import OperatorError

_WAITING = "waiting for another command that uses the embedded servers"
_TOLD_SECONDS = 1.0  # who waits longer for a command says so

log = structlog.get_logger(__name__)


def open_lock(data: Path, name: str = "lock", *, create: bool = True) -> IO[str]:
    """Open a lock's file. Closing it releases the lock, and so does the end of the process."""
    # Close-on-exec, as Python opens every file: a server that inherited the lock would hold it after us.
    # The file is never deleted: otherwise two services could each lock a file of this name.
    path, flags = data / name, os.O_RDWR | os.O_NOFOLLOW
    if create:
        with suppress(FileExistsError):
            new = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            if os.geteuid() == 0:  # a command of root's must not lock out the user whose service this is
                owner = data.stat()
                os.fchown(new, owner.st_uid, owner.st_gid)
            return os.fdopen(new, "r+")
    return os.fdopen(os.open(path, flags), "r+")


def _locked(file: IO[str], kind: int) -> bool:
    """Whether we have the lock now, shared or exclusive. Does not wait."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _guarded(data: Path) -> Iterator[None]:
    """Take the lock on the folder, or read who holds it, in the block. Nothing in the block waits.

    After a kill -9 the file still has the addresses of the dead process. The next one has the lock for a moment before
    it has cleared them; without the guard, a third one that looks at that moment sees a lock that is held and the
    addresses of servers that are gone. In the same way, the look of `running_addresses` at the lock would be taken for
    a service that runs.
    """
    with open_lock(data, "lock.guard") as guard:
        while not _locked(guard, fcntl.LOCK_EX):
            time.sleep(POLL_SECONDS)
        yield


class _Holder(NamedTuple):
    """What the process that holds the lock has written: others share its servers as soon as it has addresses."""

    pid: int
    addresses: dict[str, str]
    is_command: bool


def write_lock(lock: IO[str], addresses: dict[str, str], *, is_command: bool) -> None:
    """Write where our servers listen; nowhere, as long as they do not. The caller must hold the lock."""
    lock.seek(0)
    lock.truncate()
    lock.write(json.dumps(_Holder(os.getpid(), addresses, is_command)._asdict()))
    lock.flush()


def _read_lock(lock: IO[str]) -> _Holder | None:
    """None between the truncate and the write of the process that holds the lock."""
    lock.seek(0)
    try:
        content = json.loads(lock.read())
    except ValueError:
        return None
    return _Holder(content["pid"], content["addresses"], content.get("is_command", False))


def running_addresses(data: Path) -> dict[str, str]:
    """Where the servers listen that a process runs on this data folder right now; empty if there is none."""
    try:
        with open_lock(data, create=False) as lock, _guarded(data):
            if _locked(lock, fcntl.LOCK_SH):  # no process runs here, or it was killed
                fcntl.flock(lock, fcntl.LOCK_UN)  # before the guard is released
                return {}
            holder = _read_lock(lock)
    except OSError:
        return {}
    return holder.addresses if holder else {}


def lock_or_share(
    lock: IO[str], users: IO[str], data: Path, missing: Collection[str], *, share: bool
) -> dict[str, str] | None:
    """None if we hold the lock now, else the addresses of the servers of the process that holds it.

    A command holds it for a moment, where no service runs: a service that starts beside one waits for its end. `users`:
    as long as it is open, the servers of another command that we share keep running.
    """
    began, told = time.monotonic(), False
    while True:
        with _guarded(data):
            if _locked(lock, fcntl.LOCK_EX):
                write_lock(lock, {}, is_command=share)
                return None
            holder = _read_lock(lock)
            if share and holder and holder.is_command and holder.addresses:
                holder = _count_in(users, lock, holder)
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


def _count_in(users: IO[str], lock: IO[str], holder: _Holder) -> _Holder:
    """Become a user of that command's servers; without addresses if it is about to stop them.

    It may have begun to stop them since we have read the addresses. So we lock first, and read again: if the addresses
    are still there, it waits for us. (It clears them while it has this lock for itself: `end_sharing`.)
    """
    if _locked(users, fcntl.LOCK_SH):
        if (again := _read_lock(lock)) and again.addresses:
            return again
        fcntl.flock(users, fcntl.LOCK_UN)
    return holder._replace(addresses={})


def end_sharing(lock: IO[str], users: IO[str]) -> None:
    """For a command that is about to stop its servers: wait until no other command uses them, and let none join.

    Ctrl-C ends the wait, and nothing else: the command has had its result.
    """
    began = time.monotonic()
    try:
        while not _locked(users, fcntl.LOCK_EX):
            if time.monotonic() - began > _TOLD_SECONDS:
                print(f"firstclaim: {_WAITING}", file=sys.stderr)
                fcntl.flock(users, fcntl.LOCK_EX)
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        pass
    finally:
        write_lock(lock, {}, is_command=True)
