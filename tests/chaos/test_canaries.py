"""Stores that are unreachable, refuse or break: no message about them holds a password or a payload."""

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


async def test_no_command_shows_its_secrets(tmp_path: Path) -> None:
    """Each command with unreachable stores, a bad event, URL or module: it names the reason, and no secret."""
    run = command(
        tmp_path,
        f"postgresql://shop:{DATABASE_PASSWORD}@127.0.0.1:1/shop",
        f"redis://:{REDIS_PASSWORD}@127.0.0.1:1/0",
    )
    (tmp_path / "shop_broken.py").write_text(f"raise RuntimeError({STORY!r})\n")
    (tmp_path / "event.json").write_text(f"{{{STORY}")
    (tmp_path / "list.json").write_text(f'["{TEXT}"]')
    place = f"http://user:{DATABASE_PASSWORD}@127.0.0.1:1/{TEXT}"
    unreachable = [["check"], ["serve", "--port", "0"], ["migrate"], ["epoch", "rotate"]]
    bad = [
        ["send", "--file", "event.json"],
        ["send", "--file", "list.json"],
        ["send", "invoice.paid", "--url", place],
        ["send", "invoice.paid", "--url", f"ftp://user:{DATABASE_PASSWORD}@h/"],
        ["send", "invoice.paid", "--url", f"http://user:{DATABASE_PASSWORD}@h:port/"],
    ]
    *runs, broken = await asyncio.gather(
        *(run(*arguments) for arguments in (*unreachable, *bad)), run("check", FIRSTCLAIM_HANDLERS="shop_broken")
    )
    assert [each.code for each in runs] == [3, 3, 3, 3, 2, 2, 1, 2, 2]
    for each in runs:
        assert_silent(each.output)
    assert broken.code == 2
    broken.shows("cannot import shop_broken", "RuntimeError", TEXT)  # the operator needs the reason
    assert_silent(broken.output, allowed=(TEXT,))


# -- stores that require a password -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guarded:
    """Both stores require a password, and there is a proxy in front of each."""

    own: Own
    postgres: Proxy
    redis: Proxy
    database_url: str
    redis_url: str

    @classmethod
    @asynccontextmanager
    async def stores(cls, own: Own) -> AsyncIterator["Guarded"]:
        """Set the passwords that must never be shown."""
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
        """Change both passwords, and end all connections."""
        await self.own.redis.call("CONFIG", "SET", "requirepass", OTHER_PASSWORD)
        await self.own.redis.call("CLIENT", "KILL", "USER", "default")
        await self.own.postgres.execute(f"ALTER ROLE shop PASSWORD '{OTHER_PASSWORD}'")
        self.postgres.cut()

    async def let_in(self) -> None:
        """Restore the passwords that the service has."""
        await self.own.redis.call("CONFIG", "SET", "requirepass", REDIS_PASSWORD)
        await self.own.postgres.execute(f"ALTER ROLE shop PASSWORD '{DATABASE_PASSWORD}'")

    async def refuse(self) -> None:
        self._switch(Mode.REFUSE)

    async def mute(self) -> None:
        self._switch(Mode.MUTE)

    async def freeze(self) -> None:
        self._switch(Mode.FROZEN)

    async def restore(self) -> None:
        self._switch(Mode.OPEN)

    def _switch(self, mode: Mode) -> None:
        self.postgres.switch(mode)
        self.redis.switch(mode)
        if mode is Mode.OPEN:  # requests that were sent meanwhile get no answer
            self.postgres.cut()
            self.redis.cut()


async def test_no_message_about_unreachable_stores_shows_a_secret(own: Own) -> None:
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
        for inject, remove, commands in (
            (guarded.refuse, guarded.restore, ["check"]),
            (guarded.freeze, guarded.restore, ["check"]),
            (guarded.mute, guarded.restore, []),
            (guarded.lock_out, guarded.let_in, ["check", "serve --port 0", "migrate"]),
        ):
            event = event_with_secrets()
            await inject()
            with own.history.postgres_unreachable():
                seen = [await answer_and_readiness(service, event)]
                runs = await asyncio.gather(*(run(*each.split()) for each in commands))
            await remove()
            assert {each.code for each in runs} <= {3}
            for each in (*seen, *(each.output for each in runs)):
                assert_silent(each)
            assert (await retried(own.history, service, event)).status in (200, 202)
            await own.history.sandbox.settled(event)
        await service.stop()
        assert_silent(service.output)
        assert "ledger_unavailable" in service.output
        assert "redis_away" in service.output


def event_with_secrets() -> Sample:
    """An event that holds everything that must not be shown."""
    return sample(**metadata())


async def answer_and_readiness(service: Service, event: Sample) -> str:
    """The answer to a delivery, and that of `/readyz`."""
    answer = await post(service.url, event.body)
    assert answer.status == 503
    return f"{answer.content} {answer.headers} {(await service.get('/readyz')).text}"
