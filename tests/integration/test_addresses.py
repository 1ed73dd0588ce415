"""Addresses whose truth is in the server: TLS, logins, databases, settings, several hosts, poolers, ACL users."""

import asyncio
import os
import secrets
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from pydantic import SecretStr

from firstclaim.errors import ConfigurationError, LedgerRefused, StoreUnsuitable
from firstclaim.postgres import tls
from firstclaim.postgres.connect import connect
from firstclaim.server.check import Check, Verdict
from firstclaim.server.preflight import check_postgres, raise_if_fatal
from firstclaim.server.redis_check import check_redis
from firstclaim.settings import Settings
from firstclaim.urls.postgres import postgres_dsn
from tests.proxy import Mode, Proxy, Upstream, before_postgres, before_redis
from tests.stores import Stores, redis_user, with_database
from tests.tls import Authority, postgres_with_tls, redis_with_tls

SECRET = SecretStr("whsec_test")
PROMPT_SECONDS = 4  # `wait` tries for ten


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority of the servers' certificates."""
    return Authority.make(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def files(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files that the rows of the tests name."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "broken").write_text("not a certificate")
    return {
        "ca": str(authority.file),
        "other": str(Authority.make(folder).file),
        "cert": str(authority.client_certificate),
        "key": str(authority.client_key),
        "broken": str(folder / "broken"),
        "missing": str(folder / "missing"),
    }


@pytest.fixture(autouse=True)
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file of this machine's user counts."""
    monkeypatch.setenv("HOME", str(tmp_path))


async def value(url: str, query: str = "SELECT 1", *, seconds: float = 5) -> object:
    """The result of `query` on a connection by this address, as it is given."""
    connection = await connect(postgres_dsn(url), seconds, asyncpg.Connection)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def refused(url: str, *, exit_code: int) -> str:
    """What the check says, which must be fatal and not wait; every part of the service that connects says it too."""
    settings = Settings(database_url=SecretStr(url), stripe_webhook_secrets=(SECRET,))
    async with asyncio.timeout(PROMPT_SECONDS):
        [check] = [check async for check in check_postgres(settings, wait=True)]
    assert (check.verdict, check.fatal, check.exit_code) == (Verdict.FAIL, True, exit_code)
    assert "cannot connect" not in check.detail
    with pytest.raises(LedgerRefused) as error:
        await value(url)
    assert error.value.exit_code == exit_code
    assert error.value.explained == check.detail
    return check.detail


# -- Postgres: TLS ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres_url(stores: Stores) -> str:
    """The database of these tests, which only connect."""
    return stores.postgres_url


@pytest.fixture
async def tls_url(postgres_url: str, authority: Authority) -> AsyncIterator[str]:
    """A Postgres that can be reached by TLS alone."""
    async with postgres_with_tls(postgres_url, authority.server()) as url:
        yield url


@pytest.mark.parametrize(
    "query",
    [
        "",
        "sslmode=require",
        "sslmode=require&channel_binding=require",
        "sslmode=no-verify",
        "sslmode=verify-ca&sslrootcert={ca}",
        "sslmode=verify-full&sslrootcert={ca}",
        "sslmode=verify-full&sslrootcert={ca}&ssl_min_protocol_version=TLSv1.3",
        "sslmode=require&sslrootcert={ca}",
        "ssl=require",
        "ssl=true&sslrootcert={ca}",
        "ssl=verify-full&sslrootcert={ca}",
        "sslaccept=strict&sslrootcert={ca}",
        "sslaccept=accept_invalid_certs",
    ],
)
async def test_postgres_by_tls(tls_url: str, files: dict[str, str], query: str) -> None:
    """Each way to write that TLS is wanted, and how it is verified, connects to a server that has nothing else."""
    assert await value(f"{tls_url}?{query.format_map(files)}") == 1


@pytest.mark.parametrize("query", ["", "&sslmode=verify-full", "&sslmode=require", "&ssl=true"])
async def test_postgres_by_the_systems_authorities(
    tls_url: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    """`sslrootcert=system` verifies by the authorities that the system trusts, and by no others."""
    url = f"{tls_url}?sslrootcert=system{query}"
    assert "certificate is refused" in await refused(url, exit_code=3)
    monkeypatch.setenv("SSL_CERT_FILE", files["ca"])
    assert await value(url) == 1


@pytest.mark.parametrize(
    ("query", "exit_code", "said"),
    [
        ("sslmode=verify-full&sslrootcert={other}", 3, "the server's certificate is refused, see sslrootcert"),
        ("sslmode=require&sslrootcert={other}", 3, "the server's certificate is refused, see sslrootcert"),
        ("sslmode=verify-full", 2, "sslmode=verify-full needs a root certificate"),
        ("ssl=true", 2, "sslmode=verify-full needs a root certificate"),
        ("sslmode=verify-full&sslrootcert={missing}", 2, "sslrootcert: its file cannot be read (No such file"),
        ("sslmode=verify-full&sslrootcert={broken}", 2, "TLS cannot be set up"),
        ("sslmode=require&sslcert={missing}", 2, "sslcert: its file cannot be read (No such file"),
        ("sslmode=require&sslcert={cert}&sslkey={missing}", 2, "sslkey: its file cannot be read (No such file"),
        ("sslmode=require&sslcert={cert}&sslkey={broken}", 2, "TLS cannot be set up"),
        ("sslcrl={missing}", 2, "sslcrl: its file cannot be read (No such file"),
        ("sslmode=require&ssl_min_protocol_version=9", 2, "ssl_min_protocol_version: expected TLSv1.2 or TLSv1.3"),
    ],
)
async def test_postgres_tls_that_is_refused(
    tls_url: str, files: dict[str, str], query: str, exit_code: int, said: str
) -> None:
    """A certificate that is not trusted, and a file that cannot be used, stop at once, by the parameter's name."""
    assert said in await refused(f"{tls_url}?{query.format_map(files)}", exit_code=exit_code)


async def test_a_postgres_of_another_name_is_refused(postgres_url: str, authority: Authority) -> None:
    """With verify-full a trusted certificate for another host is refused; verify-ca does not look at the name."""
    async with postgres_with_tls(postgres_url, authority.server("elsewhere.example.com")) as url:
        full = await refused(f"{url}?sslmode=verify-full&sslrootcert={authority.file}", exit_code=3)
        assert "certificate is refused" in full
        assert await value(f"{url}?sslmode=verify-ca&sslrootcert={authority.file}") == 1


async def test_a_clients_certificate(postgres_url: str, authority: Authority, files: dict[str, str]) -> None:
    """A server that asks for a certificate gets the one of sslcert and sslkey."""
    async with postgres_with_tls(postgres_url, authority.server(clients=True)) as url:
        mine = "sslmode=verify-full&sslrootcert={ca}&sslcert={cert}&sslkey={key}".format_map(files)
        assert await value(f"{url}?{mine}") == 1


async def test_a_postgres_without_tls_is_refused_where_it_is_required(postgres_url: str) -> None:
    """A mode that requires TLS never continues without it; `prefer`, `allow` and none do."""
    async with before_postgres(postgres_url) as (_, url):
        assert "the server has no TLS" in await refused(f"{url}?sslmode=require", exit_code=3)
        for query in ("sslmode=disable", "ssl=false", "sslmode=prefer", "sslmode=allow", ""):
            assert await value(f"{url}?{query}") == 1


async def test_a_socket_has_no_tls(stores: Stores) -> None:
    """On a Unix socket the mode does not count, as in libpq."""
    if "host=/" not in stores.postgres_url:
        pytest.skip("this server is reached by TCP")
    assert await value(f"{stores.postgres_url}&sslmode=verify-full") == 1


@pytest.mark.parametrize("query", ["", "sslmode=prefer", "sslmode=allow", "sslmode=require"])
async def test_a_home_that_cannot_be_used(
    postgres_url: str, tls_url: str, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    """No file of a home folder is needed, so one that cannot be looked into is no error, where the driver fails."""
    monkeypatch.setenv("HOME", "/" + "x" * 300)  # no system looks into it, whoever asks, as into one without rights
    async with before_postgres(postgres_url) as (_, plain):
        with pytest.raises(OSError, match="File name too long"):
            await asyncpg.connect(f"{plain}?{query}")
        assert await value(f"{tls_url}?{query}") == 1
        if "require" not in query:
            assert await value(f"{plain}?{query}") == 1


def test_a_home_without_rights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home that this process may not look into, as a container's under another uid, is left to no driver."""
    assert tls.attempts({}) == (None,)
    tmp_path.chmod(0o000)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            (tmp_path / ".postgresql").stat()
        context, plain = tls.attempts({})
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)
    assert isinstance(context, ssl.SSLContext)
    assert plain is False


# -- Postgres: login, settings, hosts -----------------------------------------------------------------


async def test_a_login_that_is_refused(postgres_url: str) -> None:
    """An unknown database or user is never called unreachable, and not waited for."""
    assert 'database "nowhere" does not exist' in await refused(with_database(postgres_url, "nowhere"), exit_code=3)
    unknown = postgres_url.replace(f"://{urlsplit(postgres_url).username}@", "://nobody@")
    assert 'role "nobody" does not exist' in await refused(unknown, exit_code=3)


@pytest.mark.parametrize("query", ["unheard_of=1", "options=-c%20unheard_of%3D1", "options=--unheard-of%3D1"])
async def test_an_unknown_parameter_is_named(postgres_url: str, query: str) -> None:
    """A parameter that no client and no server knows is refused by its name: it may be a misspelt one."""
    said = await refused(f"{postgres_url}&{query}", exit_code=2)
    assert said == "DATABASE_URL: the server refuses the parameter unheard_of, UndefinedObjectError"


async def test_options_that_the_server_cannot_read(postgres_url: str) -> None:
    """Options for a pooler, at a server without one, are at fault: one line, without the value."""
    said = await refused(f"{postgres_url}&options=endpoint%3Dc4n4ry", exit_code=2)
    assert said == (
        "DATABASE_URL: the server refuses options, PostgresSyntaxError; expected e.g. options=-c%20work_mem%3D8MB"
    )


async def test_a_wrong_setting_is_named_without_its_value(postgres_url: str) -> None:
    """A setting that the server refuses is named, and its value is not repeated."""
    said = await refused(f"{postgres_url}&work_mem=c4n4ry", exit_code=2)
    assert said == "DATABASE_URL: the server refuses the parameter work_mem, InvalidParameterValueError"


@pytest.mark.parametrize(
    ("query", "name", "set_to"),
    [
        ("search_path=shop", "search_path", "shop"),
        ("schema=shop", "search_path", '"shop"'),
        ("currentSchema=My%20Shop", "search_path", '"My Shop"'),
        ("options=-c%20search_path%3Dshop,public%20-cwork_mem%3D8MB", "search_path", "shop,public"),
        ("options=-c+search_path%3Dshop,public+-cwork_mem%3D8MB", "work_mem", "8MB"),
        ("options=--statement-timeout%3D9s", "statement_timeout", "9s"),
        ("options=-c%20shop.name%3Da%5C%20b", "shop.name", "a b"),
        ("TimeZone=UTC&statement_timeout=7000", "statement_timeout", "7s"),
        ("shop.tenant=7", "shop.tenant", "7"),
        ("application_name=shop", "application_name", "firstclaim"),
        ("connection_limit=5&pool_timeout=0&schema=public&connect_timeout=15", "search_path", '"public"'),
    ],
)
async def test_settings_of_the_session(postgres_url: str, query: str, name: str, set_to: str) -> None:
    """Settings of the session are set as given, also in `options` and under the names of other clients."""
    assert await value(f"{postgres_url}&{query}", f"SELECT current_setting('{name}')") == set_to


async def test_the_first_host_that_answers(postgres_url: str, unused_tcp_port: int) -> None:
    """Of several hosts, one that refuses and one that swallows every packet leave time for the next."""
    async with before_postgres(postgres_url) as (_, url), Proxy(Upstream("127.0.0.1", 9)) as hole:
        hole.switch(Mode.HOLE)
        parts = urlsplit(url)
        real = parts.netloc.rpartition("@")[2]
        for first in (f"127.0.0.1:{unused_tcp_port}", f"127.0.0.1:{hole.port}"):
            both = parts._replace(netloc=f"{parts.username}@{first},{real}")
            assert await value(urlunsplit(both), seconds=1) == 1


async def test_a_standby_is_passed_over(database_url: str) -> None:
    """Of several hosts, one that takes no writes is passed over, though the address does not say so."""
    user = f"reader_{secrets.token_hex(4)}"
    connection = await asyncpg.connect(database_url)
    await connection.execute(f"CREATE ROLE {user} LOGIN")
    await connection.execute(f"ALTER ROLE {user} SET default_transaction_read_only = on")
    try:
        async with before_postgres(database_url) as (_, url):
            parts = urlsplit(url)
            host = parts.netloc.rpartition("@")[2]
            address = urlunsplit(parts._replace(netloc=f"{user}@{host},{host}"))
            with pytest.raises(asyncpg.TargetServerAttributeNotMatched):
                await value(address)
            assert await value(address + "?default_transaction_read_only=off") == 1
    finally:
        await connection.execute(f"DROP ROLE {user}")
        await connection.close()


# -- Redis --------------------------------------------------------------------------------------------


async def checks(url: str) -> list[Check]:
    """The checks of this address, as it is given."""
    settings = Settings(redis_url=SecretStr(url), stripe_webhook_secrets=(SECRET,))
    return [check async for check in check_redis(settings)]


async def refused_redis(url: str, *, exit_code: int = 3) -> str:
    """What the only check says, which must stop `serve`."""
    [check] = await checks(url)
    with pytest.raises(ConfigurationError if exit_code == 2 else StoreUnsuitable):
        raise_if_fatal([check])
    assert check.exit_code == exit_code
    assert "cannot be reached" not in check.detail
    return check.detail


async def accepts(url: str) -> bool:
    return [check.verdict for check in await checks(url)] == [Verdict.OK]


@pytest.fixture
async def tls_host(stores: Stores, authority: Authority) -> AsyncIterator[str]:
    """A Redis that can be reached by TLS alone."""
    async with redis_with_tls(stores.redis_url, authority.server()) as host:
        yield host


@pytest.mark.parametrize(
    "url",
    [
        "rediss://{host}?ssl_ca_certs={ca}",
        "rediss://{host}/0?ssl_ca_certs={ca}&ssl_check_hostname=true&ssl_min_version=TLSv1.2",
        "rediss://{host}?ssl_cert_reqs=none",
        "rediss://{host}?ssl_cert_reqs=CERT_NONE",
        "rediss://{host}?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={ca}",
        "rediss://{host}?skip_verify=true",
        "valkeys://{host}?ssl_ca_certs={ca}&protocol=3",
        "redis://{host}?ssl=true&ssl_ca_certs={ca}",
        "redis://{host}?tls=1&ssl_cert_reqs=none",
    ],
)
async def test_redis_by_tls(tls_host: str, files: dict[str, str], url: str) -> None:
    """Each way to write that TLS is wanted, and how it is verified, reaches a server that has nothing else."""
    assert await accepts(url.format(host=tls_host, **files))


@pytest.mark.parametrize(
    ("query", "exit_code", "said"),
    [
        ("", 3, "its certificate is refused"),
        ("?ssl_ca_certs={other}", 3, "its certificate is refused"),
        ("?ssl_ca_certs={missing}", 2, "REDIS_URL: ssl_ca_certs: its file cannot be read (No such file"),
        ("?ssl_certfile={missing}", 2, "REDIS_URL: ssl_certfile: its file cannot be read (No such file"),
        ("?ssl_ca_certs={broken}", 3, "TLS fails"),
    ],
)
async def test_redis_tls_that_is_refused(
    tls_host: str, files: dict[str, str], query: str, exit_code: int, said: str
) -> None:
    """A certificate that is not trusted, and a file that cannot be used, stop the start: no dispatch would happen."""
    assert said in await refused_redis(f"rediss://{tls_host}{query.format_map(files)}", exit_code=exit_code)


async def test_tls_on_one_side_only(stores: Stores, tls_host: str) -> None:
    """TLS that only the address or only the server has looks like silence, and stops the start all the same."""
    async with before_redis(stores.redis_url) as (proxy, _):
        assert "the server has no TLS" in await refused_redis(f"rediss://127.0.0.1:{proxy.port}")
    assert "the server expects TLS" in await refused_redis(f"redis://{tls_host}")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://:c4n4ry@127.0.0.1:{port}", "connection refused at 127.0.0.1:{port}: check the address in REDIS_URL"),
        ("redis://:c4n4ry@nobody.invalid", "the host name nobody.invalid in REDIS_URL cannot be resolved"),
        ("unix://{folder}/redis.sock", "there is no socket {folder}/redis.sock"),
        ("unix://{folder}/run/redis.sock", "there is no folder {folder}/run"),
        ("unix://{folder}/file", "connection refused at {folder}/file: check"),
    ],
    ids=["port", "name", "socket", "folder", "no-socket"],
)
async def test_redis_that_is_silent_does_not_stop(unused_tcp_port: int, tmp_path: Path, url: str, said: str) -> None:
    """A Redis that nobody listens for is a failed check, which says what is missing, and does not stop the start."""
    (tmp_path / "file").touch()
    names = {"port": unused_tcp_port, "folder": tmp_path}
    [check] = await checks(url.format_map(names))
    assert (check.verdict, check.fatal) == (Verdict.FAIL, False)
    assert f"cannot be reached: {said.format_map(names)}" in check.detail
    assert "c4n4ry" not in check.detail
    raise_if_fatal([check])


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_a_postgres_in_place_of_redis(postgres_url: str, scheme: str) -> None:
    """Postgres ends a connection that it does not understand without a word: it is asked in its own words."""
    async with before_postgres(postgres_url) as (proxy, _):
        assert "answers, but not as a Redis" in await refused_redis(f"{scheme}://127.0.0.1:{proxy.port}")


async def test_a_web_server_in_place_of_redis() -> None:
    """A server that answers in another protocol stops the start."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert "answers, but not as a Redis" in await refused_redis(f"redis://127.0.0.1:{port}")


def at_database(url: str, number: int) -> str:
    return f"{url}?db={number}" if url.startswith("unix:") else urlunsplit(urlsplit(url)._replace(path=f"/{number}"))


async def test_a_database_that_does_not_exist(stores: Stores) -> None:
    """The number of a database that the server does not have stops the start."""
    assert "has no database of this number" in await refused_redis(at_database(stores.redis_url, 99))


async def test_a_login_to_redis_that_is_refused(stores: Stores) -> None:
    """A wrong password, an unknown user, and a missing password stop the start."""
    async with redis_user(stores) as (name, url):
        assert await accepts(url)
        assert "refuses the login" in await refused_redis(url.replace(":right@", ":wrong@"))
        assert "refuses the login" in await refused_redis(url.replace(name, "nobody"))


MINIMAL = ("-@all", "+set", "+get", "+pttl", "+eval", "+del", "+ping")


async def test_a_user_with_the_documented_rights_only(stores: Stores) -> None:
    """A user with no more than the lock's commands is enough: without INFO, and without CLIENT SETNAME."""
    async with redis_user(stores, *MINIMAL) as (_, url):
        found = await checks(url)
        assert [check.verdict for check in found] == [Verdict.WARN, Verdict.OK]
        assert "may not run INFO" in found[0].detail


async def test_a_user_who_may_not_select(stores: Stores) -> None:
    """A user without SELECT, at a database that is not 0, is refused, and the command is named."""
    async with redis_user(stores, *MINIMAL) as (_, url):
        assert "'select'" in await refused_redis(at_database(url, 1))
