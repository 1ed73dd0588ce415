"""Passwords and payloads where stores are away, refuse or break: what is said of it holds none of them."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.acceptance.command import Command
from tests.acceptance.harness import PYTHON_PATH, Sample, Service, post, sample
from tests.canaries import (
    DATABASE_PASSWORD,
    REDIS_PASSWORD,
    SIGNING_SECRET,
    STORY,
    TEXT,
    assert_silent,
    metadata,
)
from tests.chaos.actions import retried
from tests.chaos.own import Own
from tests.fixtures import SECRET
from tests.proxy import Mode, Proxy, before_postgres, before_redis

pytestmark = pytest.mark.timeout(600)

OTHER_PASSWORD = "another-one"


def command(folder: Path, database_url: str, redis_url: str) -> Command:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{PYTHON_PATH}:{folder}",
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "STRIPE_WEBHOOK_SECRETS": SIGNING_SECRET,
        "FIRSTCLAIM_LOG_LEVEL": "debug",
    }
    return Command(folder, environment)


async def test_what_the_command_is_given_it_does_not_show(tmp_path: Path) -> None:
    """Each command that meets stores that are away, a bad event, place or module: it says why, and no more."""
    run = command(
        tmp_path,
        f"postgresql://shop:{DATABASE_PASSWORD}@127.0.0.1:1/shop",
        f"redis://:{REDIS_PASSWORD}@127.0.0.1:1/0",
    )
    (tmp_path / "shop_broken.py").write_text(f"raise RuntimeError({STORY!r})\n")
    (tmp_path / "event.json").write_text(f"{{{STORY}")
    (tmp_path / "list.json").write_text(f'["{TEXT}"]')
    place = f"http://user:{DATABASE_PASSWORD}@127.0.0.1:1/{TEXT}"
    stores_away = [["check"], ["serve", "--port", "0"], ["migrate"], ["epoch", "rotate"]]
    bad = [
        ["send", "--file", "event.json"],
        ["send", "--file", "list.json"],
        ["send", "invoice.paid", "--url", place],
        ["send", "invoice.paid", "--url", f"ftp://user:{DATABASE_PASSWORD}@h/"],
        ["send", "invoice.paid", "--url", f"http://user:{DATABASE_PASSWORD}@h:port/"],
    ]
    *runs, broken = await asyncio.gather(
        *(run(*arguments) for arguments in (*stores_away, *bad)), run("check", FIRSTCLAIM_HANDLERS="shop_broken")
    )
    assert [each.code for each in runs] == [3, 3, 3, 3, 2, 2, 1, 2, 2]
    for each in runs:
        assert_silent(each.output)
    assert broken.code == 2
    broken.shows("cannot import shop_broken", "RuntimeError", TEXT)  # why is for the operator to know
    assert_silent(broken.output, allowed=(TEXT,))


# -- stores that want a password ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guarded:
    """Both stores let nobody in without a password, and a proxy stands before each."""

    own: Own
    postgres: Proxy
    redis: Proxy
    database_url: str
    redis_url: str

    @classmethod
    @asynccontextmanager
    async def stores(cls, own: Own) -> AsyncIterator["Guarded"]:
        """With the passwords that nobody may say."""
        await own.postgres.execute(f"CREATE ROLE shop LOGIN SUPERUSER PASSWORD '{DATABASE_PASSWORD}'")
        rules = own.postgres.data / "pg_hba.conf"
        rules.write_text("local all shop scram-sha-256\n" + rules.read_text())
        await own.postgres.execute("SELECT pg_reload_conf()")
        await own.redis.call("CONFIG", "SET", "requirepass", REDIS_PASSWORD)
        async with AsyncExitStack() as stack:
            address = own.postgres.url.replace("postgres@", f"shop:{DATABASE_PASSWORD}@")
            postgres, database_url = await stack.enter_async_context(before_postgres(address))
            address = own.redis.url.replace("//", f"//:{REDIS_PASSWORD}@")
            redis, redis_url = await stack.enter_async_context(before_redis(address))
            yield cls(own, postgres, redis, database_url, redis_url)

    async def lock_out(self) -> None:
        """Both have another password from now on, and nobody is in."""
        await self.own.redis.call("CONFIG", "SET", "requirepass", OTHER_PASSWORD)
        await self.own.redis.call("CLIENT", "KILL", "USER", "default")
        await self.own.postgres.execute(f"ALTER ROLE shop PASSWORD '{OTHER_PASSWORD}'")
        self.postgres.cut()

    async def let_in(self) -> None:
        """By the password that the service has."""
        await self.own.redis.call("CONFIG", "SET", "requirepass", REDIS_PASSWORD)
        await self.own.postgres.execute(f"ALTER ROLE shop PASSWORD '{DATABASE_PASSWORD}'")

    async def refuse(self) -> None:
        self._switch(Mode.REFUSE)

    async def mute(self) -> None:
        self._switch(Mode.MUTE)

    async def freeze(self) -> None:
        self._switch(Mode.FROZEN)

    async def mend(self) -> None:
        self._switch(Mode.OPEN)

    def _switch(self, mode: Mode) -> None:
        self.postgres.switch(mode)
        self.redis.switch(mode)
        if mode is Mode.OPEN:  # what was sent into the silence has no answer to come
            self.postgres.cut()
            self.redis.cut()


async def test_what_is_said_of_stores_that_let_nobody_in(own: Own) -> None:
    """Refused, frozen, mute, or with another password: no log, answer, probe or command holds a password or payload."""
    async with Guarded.stores(own) as guarded:
        service = await own.history.service(
            {
                "DATABASE_URL": guarded.database_url,
                "REDIS_URL": guarded.redis_url,
                "STRIPE_WEBHOOK_SECRETS": f"{SIGNING_SECRET},{SECRET}",
                "log_level": "debug",
                "postgres_timeout_seconds": 1,
            }
        ).start()
        run = command(own.history.sandbox.folder, guarded.database_url, guarded.redis_url)
        assert (await run("check")).code == 0
        for breaks, mends, commands in (
            (guarded.refuse, guarded.mend, ["check"]),
            (guarded.freeze, guarded.mend, ["check"]),
            (guarded.mute, guarded.mend, []),
            (guarded.lock_out, guarded.let_in, ["check", "serve --port 0", "migrate"]),
        ):
            event = telling()
            await breaks()
            with own.history.postgres_unreachable():
                said = [await said_of(service, event)]
                runs = await asyncio.gather(*(run(*each.split()) for each in commands))
            await mends()
            assert {each.code for each in runs} <= {3}
            for each in (*said, *(each.output for each in runs)):
                assert_silent(each)
            assert (await retried(own.history, service, event)).status in (200, 202)
            await own.history.sandbox.settled(event)
        await service.stop()
        assert_silent(service.output)
        assert "ledger_unavailable" in service.output
        assert "redis_away" in service.output


def telling() -> Sample:
    """An event that holds all that must not be said."""
    return sample(**metadata())


async def said_of(service: Service, event: Sample) -> str:
    """An answer, and the probe's."""
    answer = await post(service.url, event.body)
    assert answer.status == 503
    return f"{answer.content} {answer.headers} {(await service.get('/readyz')).text}"
