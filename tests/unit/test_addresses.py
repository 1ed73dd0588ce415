"""The addresses that platforms and other clients write: what becomes of each parameter, and what is refused by name."""

import re
from pathlib import Path

import pytest
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import SSLConnection

from firstclaim.inbox.redis_server import connect, sentinels
from firstclaim.urls.postgres import _DRIVER, _IGNORED, _REFUSED, PostgresAddress, postgres_dsn
from firstclaim.urls.redis import _ACCEPTED, _SENTINEL_LOGIN, _SERVICE, RedisAddress, RedisKind, redis_url
from firstclaim.urls.redis import _IGNORED as _REDIS_IGNORED
from firstclaim.urls.stripe import check_signing_secrets, secrets_by_endpoint

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "addresses.md"
CANARY = "c4n4rypw"


# -- Postgres -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "converted"),
    [
        # Heroku, Render, Railway, Fly, DigitalOcean, Aiven
        ("postgres://u:p@ec2-1-2-3-4.compute-1.amazonaws.com:5432/d1", None),
        ("postgresql://u:p@dpg-abc-a.frankfurt-postgres.render.com/shop", None),
        ("postgresql://postgres:p@postgres.railway.internal:5432/railway", None),
        ("postgres://u:p@shop-db.flycast:5432/shop?sslmode=disable", "sslmode=disable"),
        ("postgresql://doadmin:p@db-1.db.ondigitalocean.com:25060/defaultdb?sslmode=require", "sslmode=require"),
        # Neon, Supabase, Vercel
        ("postgresql://u:p@ep-1.eu.aws.neon.tech/neondb?sslmode=require&channel_binding=require", "sslmode=require"),
        ("postgresql://u:p@h/db?options=endpoint%3Dep-cool-1", "options=endpoint%3Dep-cool-1"),
        ("postgresql://u:p@h/db?options=reference%3Dx%20-c%20search_path%3Dy", "search_path=y&options=reference%3Dx"),
        ("postgresql://postgres.ref:p@aws-0-eu.pooler.supabase.com:5432/postgres?pgbouncer=false", None),
        ("postgres://u:p@h:5432/postgres?sslmode=require&supa=base-pooler.x", "sslmode=require"),
        # RDS, Azure, Cloud SQL
        (
            "postgresql://u:p@db.abc.eu.rds.amazonaws.com/shop?sslmode=verify-full&sslrootcert=/etc/rds/global-bundle.pem",
            "sslmode=verify-full&sslrootcert=/etc/rds/global-bundle.pem",
        ),
        ("postgresql://u%40server:p@server.postgres.database.azure.com/shop?sslmode=require", "sslmode=require"),
        ("postgresql+asyncpg://u:p@/shop?host=/cloudsql/project:region:name", "host=/cloudsql/project:region:name"),
        ("postgresql+pg8000://u:p@/shop?unix_sock=/cloudsql/p:r:n/.s.PGSQL.5432", "host=/cloudsql/p:r:n/.s.PGSQL.5432"),
        # SQLAlchemy and asyncpg
        ("postgresql+asyncpg://u:p@h/db?ssl=require", "sslmode=require"),
        ("postgresql+asyncpg://u:p@h/db?ssl=verify_full", "sslmode=verify-full"),
        ("postgresql+asyncpg://u:p@h/db?prepared_statement_cache_size=0&statement_cache_size=0", None),
        ("postgresql+asyncpg://u:p@h/db?command_timeout=60&timeout=10&async_fallback=true", None),
        ("postgresql+psycopg://u:p@h/db", None),
        # Prisma
        ("postgresql://u:p@h/db?schema=public", "search_path=%22public%22"),
        ("postgresql://u:p@h/db?schema=a%22b", "search_path=%22a%22%22b%22"),
        ("postgresql://u:p@h/db?connection_limit=5&pool_timeout=0&socket_timeout=9&connect_timeout=15", None),
        ("postgresql://u:p@h/db?sslmode=require&sslaccept=strict", "sslmode=require"),
        ("postgresql://u:p@h/db?sslaccept=accept_invalid_certs", "sslmode=require"),
        # node-postgres, postgres.js, Django, Rails, pgx, lib/pq
        ("postgres://u:p@h/db?sslmode=no-verify", "sslmode=require"),
        ("postgres://u:p@h/db?ssl=true", "sslmode=verify-full"),
        ("postgres://u:p@h/db?ssl=0", "sslmode=disable"),
        ("postgres://u:p@h/db?sslmode=require&uselibpqcompat=true", "sslmode=require"),
        ("postgres://u:p@h/db?max=5&idle_timeout=20&prepare=false", None),
        ("postgres://u:p@h/db?conn_max_age=600&conn_health_checks=true", None),
        ("postgresql://u:p@h/db?pool=5&prepared_statements=false&schema_search_path=a,b", "search_path=a,b"),
        ("postgresql://u:p@h/db?currentSchema=shop", "search_path=%22shop%22"),
        ("postgres://u:p@h/db?pool_max_conns=10&default_query_exec_mode=simple_protocol", None),
        # libpq
        ("postgresql://u:p@h/db?keepalives=1&keepalives_idle=9&keepalives_interval=3&keepalives_count=2", None),
        ("postgresql://u:p@h/db?require_auth=scram-sha-256&tcp_user_timeout=9&load_balance_hosts=random", None),
        ("postgresql://u:p@h/db?gssencmode=disable&sslcertmode=allow&sslsni=1&client_encoding=utf8", None),
        ("postgresql://u:p@h/db?sslrootcert=system", "sslrootcert=system&sslmode=verify-full"),
        ("postgresql://u:p@h/db?sslmode=require&sslrootcert=system", "sslmode=verify-full&sslrootcert=system"),
        ("postgresql://u:p@h/db?sslmode=require&sslnegotiation=direct", "sslmode=require&sslnegotiation=direct"),
        ("postgresql://u:p@h1:5432,h2:5433/db", "target_session_attrs=read-write"),
        ("postgresql://u:p@h1,h2/db?target_session_attrs=any", "target_session_attrs=read-write"),
        ("postgresql://u:p@h1,h2/db?target_session_attrs=primary", "target_session_attrs=primary"),
        ("postgresql://u:p@/db?host=h1,h2&port=5432,5433", "host=h1,h2&port=5432,5433&target_session_attrs=read-write"),
        ("postgresql://u:p@h/db?target_session_attrs=read-write", "target_session_attrs=read-write"),
        ("postgresql://u:p@h/db?target_session_attrs=prefer-standby", None),
        ("postgresql:///db?hostaddr=10.0.0.7&user=u", "host=10.0.0.7&user=u"),
        ("postgresql://u@%2Frun%2Fpostgresql/db", None),
        ("postgresql://u:p@[fd00::1]:5432/db", None),
        ("postgresql://u:p@h/db?options=-csearch_path%3Dshop%20--work-mem%3D8MB", "search_path=shop&work_mem=8MB"),
        ("postgresql://u:p@h/db?statement_timeout=5000&shop.tenant=7", "statement_timeout=5000&shop.tenant=7"),
        # Values and passwords as people paste them
        ("postgresql://u:p@h/db?sslmode=&application_name=&", None),
        ("postgresql://u:p%23%2F%3F%20@h/db", None),
        ("  postgresql://u:p@h/db\n", None),
    ],
)  # fmt: skip
def test_postgres_as_platforms_write_it(given: str, converted: str | None) -> None:
    """Each parameter is kept, translated or left out; the rest of the address stays as it is."""
    base = re.sub(r"^[a-z0-9+]+:", "postgresql:", given.strip().partition("?")[0])
    assert postgres_dsn(given) == base + (f"?{converted}" if converted else "")
    assert postgres_dsn(postgres_dsn(given)) == postgres_dsn(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (f"'postgresql://u:{CANARY}@h/db'", "remove the quotes"),
        (f'"postgresql://u:{CANARY}@h/db"', "remove the quotes"),
        (f"psql 'postgresql://u:{CANARY}@h/db", "expected the URL alone"),
        (f"DATABASE_URL=postgresql://u:{CANARY}@h/db", "expected the URL alone"),
        (f"postgresql://u:{CANARY}\n@h/db", "white space"),
        (f"postgresql://u:{CANARY} x@h/db", "white space"),
        (f"jdbc:postgresql://u:{CANARY}@h/db", "not PostgreSQL"),
        (f"host=h user=u password={CANARY}", "not a URL"),
        (f"postgresql://u:{CANARY}@h/db?pgbouncer=true", "transaction-mode pooler"),
        (f"postgresql://u:{CANARY}@h1,,h2/db", "not a URL"),
        (f"postgresql://u:{CANARY}@h1,h2:port/db", "not a URL"),
        (f"postgresql://u:{CANARY}@h:0/db", "not a URL"),
        (f"postgresql://u:{CANARY}@/db?host=h1,h2&port=1,2,3", "port: expected one"),
        (f"postgresql://u:{CANARY}@h/db?port={CANARY}", "port: expected a number"),
        (f"postgresql://u:{CANARY}@h/db?sslmode={CANARY}", "sslmode: expected one of"),
        (f"postgresql://u:{CANARY}@h/db?ssl={CANARY}", "ssl: expected one of"),
        (f"postgresql://u:{CANARY}@h/db?gssencmode=require", "gssencmode: expected one of"),
        (f"postgresql://u:{CANARY}@h/db?sslcertmode=require", "sslcertmode: expected one of"),
        (f"postgresql://u:{CANARY}@h/db?target_session_attrs=standby", "the ledger is written to"),
        (f"postgresql://u:{CANARY}@h/db?target_session_attrs={CANARY}", "target_session_attrs: expected one of"),
        (f"postgresql://u:{CANARY}@h/db?host=a&hostaddr=10.0.0.7", "hostaddr: give it or host"),
        (f"postgresql://u:{CANARY}@h/db?sslmod=require", "unknown parameter 'sslmod'"),
        (f"postgresql://u:{CANARY}@h/db?a%20b=1", "unknown parameter 'a b'"),
        *((f"postgresql://u:{CANARY}@h/db?{name}={CANARY}", f"{name}: {reason}") for name, reason in _REFUSED.items()),
    ],
)  # fmt: skip
def test_postgres_that_is_refused_by_name(given: str, said: str) -> None:
    """What cannot be kept, or protects the connection and is unknown, is refused by its name, without its value."""
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        postgres_dsn(given)
    assert CANARY not in str(error.value)


@pytest.mark.parametrize("variables", [(), ("PGUSER",), ("USER",)])
def test_a_uid_without_a_name_needs_a_user(monkeypatch: pytest.MonkeyPatch, variables: tuple[str, ...]) -> None:
    """Without a user in the address or the environment, a uid without a name is an error that says what is expected."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "PGUSER"):
        monkeypatch.delenv(name, raising=False)
    for name in variables:
        monkeypatch.setenv(name, "shop")
    monkeypatch.setattr("os.getuid", lambda: 3_999_999_999)
    if variables:
        assert postgres_dsn("postgresql://h/db") == "postgresql://h/db"
    else:
        with pytest.raises(ValueError, match="names no user, and this process's uid has no name"):
            postgres_dsn("postgresql://h/db")
    for named in ("postgresql://u@h/db", "postgresql://h/db?user=u", "postgresql://h/db?service=shop"):
        assert postgres_dsn(named) == named


def test_an_unescaped_at_sign_in_a_password() -> None:
    """The last `@` ends the password, as in every client but the driver, which would take the first."""
    assert postgres_dsn("postgresql://me@corp:p@ss@h/db") == "postgresql://me%40corp:p%40ss@h/db"


def test_brackets_in_a_password() -> None:
    """A password may have brackets, as in every client of Postgres; the libraries get them escaped."""
    assert postgres_dsn("postgresql://u:p[1]@[::1]/db") == "postgresql://u:p%5B1%5D@[::1]/db"
    assert redis_url("redis://:p[1@h:6379/0") == "redis://:p%5B1@h:6379/0"
    assert ConnectionPool.from_url("redis://:p%5B1@h:6379/0").connection_kwargs["password"] == "p[1"


def test_an_address_taken_apart() -> None:
    """Hosts, the driver's parameters and the settings of the session are told apart."""
    address = PostgresAddress.of(
        postgres_dsn("postgres://u:p@[::1]:5433,h/db?sslmode=require&work_mem=8MB&options=endpoint%3De")
    )
    assert address.hosts == (("::1", 5433), ("h", None))
    assert address.parameters == {"sslmode": "require", "target_session_attrs": "read-write"}
    assert address.settings == {"work_mem": "8MB", "options": "endpoint=e"}
    assert address.driver_url == "postgresql://u:p@/db?sslmode=require&target_session_attrs=read-write"
    assert PostgresAddress.of("postgresql://u@%2Frun%2Fpg/db").hosts == (("/run/pg", None),)
    assert PostgresAddress.of("postgresql://u@/db?host=a,b&port=1").hosts == (("a", 1), ("b", 1))
    assert PostgresAddress.of("postgresql://u@/db").hosts == ()


@pytest.mark.parametrize(
    ("given", "for_libpq"),
    [
        ("postgresql://u:p@h/db?sslmode=require", "postgresql://u:p@h/db?sslmode=require"),
        ("postgresql://u@h,[::1]:7/db", "postgresql://u@h,[::1]:7/db?target_session_attrs=read-write"),
        ("postgresql://u:p@h/db?schema=shop", "postgresql://u:p@h/db?options=-c%20search_path%3D%22shop%22"),
        (
            "postgresql://u@/db?host=/run/pg&a.b=c%20d&options=endpoint%3De",
            "postgresql://u@/db?host=/run/pg&options=-c%20a.b%3Dc%5C%20d%20endpoint%3De",
        ),
    ],
)
def test_an_address_for_psql(given: str, for_libpq: str) -> None:
    """psql knows no setting of the session as a parameter, so it gets them in `options`."""
    assert PostgresAddress.of(postgres_dsn(given)).libpq_url == for_libpq


# -- Redis --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "converted"),
    [
        # Heroku, Render, Railway, Upstash, ElastiCache, Azure
        ("rediss://:p@ec2-1-2-3-4.compute-1.amazonaws.com:6379", None),
        ("redis://red-abc:6379", None),
        ("redis://default:p@redis.railway.internal:6379?family=0", "redis://default:p@redis.railway.internal:6379"),
        ("rediss://default:p@eu1-cool-1.upstash.io:6379", None),
        ("rediss://master.shop.abc.euw1.cache.amazonaws.com:6379/0", None),
        ("rediss://:abc%3D@shop.redis.cache.windows.net:6380", None),
        ("redis://default:p@h:6379?tls=true", "rediss://default:p@h:6379"),
        ("redis://default:p@h:6379?ssl=false", "redis://default:p@h:6379"),
        # redis-py, Celery, Django
        ("rediss://h?ssl_cert_reqs=CERT_NONE", "rediss://h?ssl_cert_reqs=none"),
        ("rediss://h?ssl_cert_reqs=CERT_OPTIONAL", "rediss://h?ssl_cert_reqs=optional"),
        ("rediss://h?ssl_cert_reqs=required&ssl_ca_certs=/ca.pem", "rediss://h?ssl_ca_certs=/ca.pem&ssl_cert_reqs=required"),
        ("rediss://h?ssl_check_hostname=False", "rediss://h?ssl_check_hostname=false"),
        ("rediss://h?ssl_min_version=TLSv1.3", "rediss://h?ssl_min_version=772"),
        ("redis://h/0?socket_timeout=5&retry_on_timeout=1&health_check_interval=30&max_connections=9", "redis://h/0"),
        ("redis://h/0?protocol=3&decode_responses=true&client_name=shop", "redis://h/0"),
        ("redis://user:pass@h:6379/0?protocol=3", "redis://user:pass@h:6379/0"),
        ("redis://h?db=3", "redis://h?db=3"),
        ("redis://h/1?db=3", "redis://h/1?db=3"),
        ("redis://h?username=u&password=p%40", "redis://u:p%40@h"),
        # go-redis, ioredis, Lettuce, Jedis
        ("rediss://u:p@h:6379/1?skip_verify=true&dial_timeout=3s&pool_size=9", "rediss://u:p@h:6379/1?ssl_cert_reqs=none"),
        ("redis://h?maxRetriesPerRequest=0&enableReadyCheck=false&lazyConnect=true", "redis://h"),
        ("redis://h?database=2&timeout=10s&clientName=x", "redis://h?db=2"),
        # others
        ("valkey://h/2", "redis://h/2"),
        ("valkeys://h", "rediss://h"),
        ("unix:///run/redis.sock?db=3", None),
        ("unix://u:p@/run/redis.sock", None),
        ("redis://[fd00::1]:6379/0", None),
        ("redis://:p@ss@h", "redis://:p%40ss@h"),
        ("redis://h/", None),
        ("redis://h?db=&ssl_cert_reqs=", "redis://h"),
        # Clusters: limits, redis-py, go-redis, ElastiCache
        ("redis+cluster://h1:7000,h2:7001,h3", None),
        ("rediss+cluster://:p@clustercfg.shop.abc.euw1.cache.amazonaws.com:6379", None),
        ("redis+cluster://u:p@h1,h2/0?read_from_replicas=true&require_full_coverage=0", "redis+cluster://u:p@h1,h2/0"),
        ("valkeys-cluster://h1?ssl_cert_reqs=CERT_NONE", "rediss+cluster://h1?ssl_cert_reqs=none"),
        ("redis+cluster://h1,h2?tls=true", "rediss+cluster://h1,h2"),
        # Sentinels: Redis-Sentinel-Url, limits, RedisVL, Prefect, Lettuce, and the form with the service as the user
        ("redis+sentinel://u:p@h1:26379,h2:26380/main/1", None),
        ("redis+sentinel://:p@h1,h2/main", None),
        ("rediss+sentinel://h/main?sentinel_username=w&sentinel_password=p%40", None),
        ("redis-sentinel://:p@h1,h2/2?sentinelMasterId=main", "redis+sentinel://:p@h1,h2/main/2"),
        ("redis+sentinel://main@h1,h2,h3", "redis+sentinel://h1,h2,h3/main"),
        ("redis+sentinel://main@h1,h2/3", "redis+sentinel://h1,h2/main/3"),
        ("redis+sentinel://h/?service_name=a%2Fb&db=4", "redis+sentinel://h/a%2Fb?db=4"),
        ("redis+sentinel://h?master_name=7", "redis+sentinel://h/7/0"),
        ("valkey+sentinel://h/main?ssl=true&ssl_ca_certs=/ca.pem", "rediss+sentinel://h/main?ssl_ca_certs=/ca.pem"),
    ],
)  # fmt: skip
def test_redis_as_platforms_write_it(given: str, converted: str | None) -> None:
    """Each parameter is kept, translated or left out; the client takes the result."""
    assert redis_url(given) == (converted or given)
    assert redis_url(redis_url(given)) == redis_url(given)
    pool: ConnectionPool = ConnectionPool.from_url(RedisAddress.parse(redis_url(given)).server)
    pool.make_connection()  # type: ignore[no-untyped-call]


def test_an_address_of_several_servers_taken_apart() -> None:
    """The hosts with their ports, and what is sent to which of them: one login for the servers, one for Sentinels."""
    cluster = RedisAddress.parse("rediss+cluster://u:p%40@h1,[fd00::1]:7/0?ssl_cert_reqs=none")
    assert cluster == RedisAddress(
        RedisKind.CLUSTER, (("h1", 6379), ("fd00::1", 7)), "rediss://u:p%40@h1:6379/0?ssl_cert_reqs=none"
    )
    given = "redis+sentinel://u:p@h1,h2:5/a%2Fb/1?sentinel_username=w&sentinel_password=x"
    assert RedisAddress.parse(given) == RedisAddress(
        RedisKind.SENTINEL, (("h1", 26379), ("h2", 5)), "redis://u:p@h1:26379/1", "a/b", "w", "x"
    )
    assert RedisAddress.parse("unix:///run/redis.sock") == RedisAddress(RedisKind.SINGLE, (), "unix:///run/redis.sock")


def test_each_client_has_the_login_and_tls_that_are_its_own() -> None:
    """A Cluster's node and the Sentinels' master have the servers' login and TLS; Sentinels have theirs, and TLS."""
    node = connect("rediss+cluster://u:p@h1/0?ssl_cert_reqs=none", timeout_seconds=1, host=("h9", 7))
    kwargs = node.connection_pool.connection_kwargs
    assert (kwargs["host"], kwargs["port"], kwargs["username"], kwargs["password"]) == ("h9", 7, "u", "p")
    assert node.connection_pool.connection_class is SSLConnection
    url = "rediss+sentinel://u:p@h1,h2/main/3?ssl_cert_reqs=none&sentinel_password=x"
    pool = connect(url, timeout_seconds=1).connection_pool
    assert issubclass(pool.connection_class, SSLConnection)
    assert (pool.connection_kwargs["password"], pool.connection_kwargs["db"]) == ("p", 3)
    for sentinel in sentinels(RedisAddress.parse(url), timeout_seconds=1):
        assert sentinel.connection_pool.connection_class is SSLConnection
        kwargs = sentinel.connection_pool.connection_kwargs
        assert (kwargs["password"], kwargs["username"], kwargs["ssl_cert_reqs"]) == ("x", None, "none")


def test_both_names_of_a_database() -> None:
    """The parameter counts before the path, as in the client."""
    assert ConnectionPool.from_url(redis_url("redis://h/1?db=3")).connection_kwargs["db"] == 3
    assert ConnectionPool.from_url(redis_url("redis://h/7")).connection_kwargs["db"] == 7


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (f'"redis://:{CANARY}@h"', "remove the quotes"),
        (f"redis-cli --tls -u redis://:{CANARY}@h:6379", "expected the URL alone"),
        (f"REDIS_URL=redis://:{CANARY}@h", "expected the URL alone"),
        (f"redis://:{CANARY}\t@h", "white space"),
        (f"h:6380,password={CANARY},ssl=True", "not a URL"),
        (f"redis://:{CANARY}@h/abc", "the path is the number of the database"),
        (f"redis://:{CANARY}@h/1/2", "the path is the number of the database"),
        (f"redis://:{CANARY}@h/-1", "the path is the number of the database"),
        (f"redis://:{CANARY}@h?db=abc", "db: expected the number of a database"),
        (f"redis://:{CANARY}@h?db=-1", "db: expected the number of a database"),
        (f"unix://:{CANARY}@/run/redis.sock?db=abc", "db: expected the number of a database"),
        (f"rediss://:{CANARY}@h?ssl_cert_reqs={CANARY}", "ssl_cert_reqs: expected one of"),
        (f"rediss://:{CANARY}@h?ssl_min_version={CANARY}", "ssl_min_version: expected one of"),
        (f"rediss://:{CANARY}@h?ssl_check_hostname={CANARY}", "ssl_check_hostname: expected one of"),
        (f"redis://:{CANARY}@h?ssl_cert_reqs=none", "ssl_cert_reqs: only TLS has a use for it; expected rediss://"),
        (f"unix://:{CANARY}@/run/redis.sock?ssl_ca_certs=x", "ssl_ca_certs: only TLS has a use for it"),
        (f"redis://:{CANARY}@h?keyPrefix=shop", "unknown parameter keyPrefix"),
        (f"redis://:{CANARY}@h?sentinelMasterId=main", "a parameter is Sentinel's; expected e.g. redis+sentinel://"),
        (f"redis+cluster://:{CANARY}@h?sentinel_password={CANARY}", "a parameter is Sentinel's"),
        (f"redis://:{CANARY}@h1,h2", "several hosts: expected e.g. redis+cluster://"),
        (f"redis+cluster://:{CANARY}@h/shop", "the path is the number of the database"),
        (f"redis+cluster://:{CANARY}@h?ssl_cert_reqs=none", "only TLS has a use for it; expected rediss+cluster://"),
        (f"redis+sentinel://:{CANARY}@h", "it names no service of the Sentinels"),
        (f"redis+sentinel://:{CANARY}@h/0", "it names no service of the Sentinels"),
        (f"redis+sentinel://:{CANARY}@h/main/first", "the path is the service and the number of the database"),
        (f"redis+sentinel://:{CANARY}@h/main/1/2", "the path is the service and the number of the database"),
        (f"redis+ring://:{CANARY}@h", "scheme 'redis+ring' is not Redis; expected redis://"),
        (f"redis://:{CANARY}@h:0", "not a URL"),
        (f"redis://:{CANARY}@h#insecure", "%23"),
    ],
)  # fmt: skip
def test_redis_that_is_refused_by_name(given: str, said: str) -> None:
    """A database that is no number, a value without a meaning and an unknown parameter are refused by their names."""
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        redis_url(given)
    assert CANARY not in str(error.value)


# -- signing secrets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("secrets", "said"),
    [
        (['"whsec_a"'], "remove the quotes; expected whsec_... values, comma separated"),
        (["'whsec_a", "whsec_b'"], "remove the quotes"),
        (["\u201cwhsec_a\u201d"], "remove the quotes"),
        (["sk_live_a"], "one of them is an API key (sk_...), not a signing secret; expected whsec_... values"),
        (["whsec_a", "rk_live_a"], "one of them is a restricted API key (rk_...)"),
        (["pk_live_a"], "one of them is a publishable key (pk_...)"),
        (["we_1abc"], "one of them is the endpoint's id (we_...)"),
        (["whsec_a;whsec_b"], "separated by a semicolon; expected whsec_... values, comma separated"),
        (["whsec_a; whsec_b"], "separated by a semicolon"),
        (["whsec_a whsec_b"], "a space or a non-ASCII character"),
        (["whsec_a\nwhsec_b"], "a space or a non-ASCII character"),
        (["whsec_a\x00"], "a space or a non-ASCII character"),
        (["WHSEC_a"], "does not begin with whsec_"),
        (["whsec_"], "does not begin with whsec_"),
        (["STRIPE_WEBHOOK_SECRETS=whsec_a"], "the name of an endpoint, before the =, is malformed; expected"),
        (["connect=sk_live_a"], "one of them is an API key (sk_...)"),
        (["connect="], "one of the secrets is blank"),
        (["=whsec_a"], "the name of an endpoint, before the =, is malformed"),
        (["a/b=whsec_a"], "the name of an endpoint, before the =, is malformed"),
        (["1st=whsec_a"], "the name of an endpoint, before the =, is malformed"),
        (["connect =whsec_a"], "the name of an endpoint, before the =, is malformed"),
        (["connect= whsec_a"], "a space or a non-ASCII character"),
        ([f"{'a' * 33}=whsec_a"], "the name of an endpoint, before the =, is malformed"),
        (["whsec_a", ""], "one of the secrets is blank"),
    ],
)
def test_what_is_no_signing_secret_is_refused(secrets: list[str], said: str) -> None:
    """What Stripe issues for another purpose, quotes and another separator are refused with what is expected."""
    with pytest.raises(ValueError, match=re.escape(said)):
        check_signing_secrets(secrets)


def test_signing_secrets() -> None:
    """What Stripe and its command issue is accepted."""
    check_signing_secrets([])
    check_signing_secrets(["whsec_abcDEF0123456789", "whsec_0a1b+/=", "connect=whsec_0a1b+/=", f"{'a' * 32}=whsec_a"])


def test_secrets_by_endpoint() -> None:
    """A name stands before the first =, except in a secret that has none; several secrets of one name are a roll."""
    given = ["whsec_a=", "connect=whsec_b=c", "whsec_d", "eu-2=whsec_e", "connect=whsec_f"]
    assert secrets_by_endpoint(given) == {
        None: ["whsec_a=", "whsec_d"],
        "connect": ["whsec_b=c", "whsec_f"],
        "eu-2": ["whsec_e"],
    }


# -- the page -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("## DATABASE_URL", _DRIVER | _IGNORED | _REFUSED.keys()),
        ("## REDIS_URL", _ACCEPTED | _REDIS_IGNORED | {*_SENTINEL_LOGIN, *_SERVICE}),
    ],
)
def test_the_page_lists_every_parameter(heading: str, names: set[str]) -> None:
    """docs/reference/addresses.md says of every parameter that is known what becomes of it."""
    section = PAGE.read_text().partition(heading)[2].partition("\n## ")[0]
    assert sorted(name for name in names if f"`{name}`" not in section) == []
