"""The alert rules and the dashboard against real scrapes: each alert fires in its own state, and in no other.

A service is brought into a bad state, and scraped before and after. promtool then evaluates the rules over a period in
which the state lasts. Needs promtool (Debian's package prometheus).
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from firstclaim.status import Status
from tests.acceptance.harness import (
    DEAD,
    DEFERRED,
    FAILED,
    SHORT_LEASE,
    Overrides,
    Sandbox,
    Service,
    eventually,
    post,
    sample,
)
from tests.fixtures import signed
from tests.proxy import Mode, Proxy, before_postgres, before_redis
from tests.unit.test_cli_admin import printed, queries_of

MONITORING = resources.files("firstclaim").joinpath("observability")
ALERTS = set(re.findall(r"- alert: (\w+)", MONITORING.joinpath("alerts.yaml").read_text()))
HEALTHY_MINUTES, BAD_MINUTES = 5, 40

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None and not os.environ.get("CI"), reason="promtool is not installed"
)

Scrape = dict[str, float]


async def scraped(service: Service) -> Scrape:
    """The value of each series in Prometheus' notation, with the instance label `a`."""
    text = (await service.get("/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in {**each.labels, "instance": "a"}.items())
            found[f"{each.name}{{{labels}}}"] = each.value
    return found


def promtool(*arguments: str) -> str:
    """The output of promtool. Fails if promtool fails."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(folder: Path, before: Scrape, after: Scrape, expected: set[str]) -> None:
    """Exactly the `expected` alerts fire after some minutes in the first state and more in the second.

    A series that is missing in a scrape has no value in that state. A counter that rose continues to rise.
    """
    series = []
    for name in before | after:
        healthy, bad = before.get(name), after.get(name)
        counter = re.match(r"\w+_(?:total|count|sum|bucket)\{", name) is not None
        step = max(0, bad - healthy) if counter and healthy is not None and bad is not None else 0  # it may be reset
        values = [
            f"_x{HEALTHY_MINUTES}" if healthy is None else f"{healthy:g}x{HEALTHY_MINUTES}",
            f"_x{BAD_MINUTES}" if bad is None else f"{bad:g}+{step:g}x{BAD_MINUTES}",
        ]
        series.append({"series": name, "values": " ".join(values)})
    expectations = [
        {
            "expr": f'count(ALERTS{{alertstate="firing",alertname="{alert}"}}) > bool 0 or vector(0)',
            "eval_time": f"{BAD_MINUTES}m",
            "exp_samples": [{"labels": "{}", "value": int(alert in expected)}],
        }
        for alert in sorted(ALERTS)
    ]
    (folder / "alerts.yaml").write_text(MONITORING.joinpath("alerts.yaml").read_text())
    test = {"interval": "1m", "input_series": series, "promql_expr_test": expectations}
    content = {"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": [test]}
    (folder / "test.yaml").write_text(json.dumps(content))
    promtool("test", "rules", str(folder / "test.yaml"))


@dataclass(slots=True)
class Scene:
    """A service that reaches both stores through proxies."""

    sandbox: Sandbox
    postgres: Proxy
    redis: Proxy
    overrides: Overrides
    service: Service = field(init=False)

    async def another(self) -> Service:
        """Another service, started."""
        return await self.sandbox.service(self.overrides).start()

    async def seen(self, condition: Callable[[Scrape], object]) -> Scrape:
        """The first scrape that meets the condition."""
        return await eventually(lambda: scraped(self.service), condition)


def up(scrape: Scrape, check_name: str) -> float:
    """Whether that health check passes."""
    return scrape[f'firstclaim_up{{part="{check_name}",instance="a"}}']


# -- the bad states -----------------------------------------------------------------------------------


async def healthy(scene: Scene) -> Scrape:
    await scene.sandbox.deliver(scene.service, sample())
    return await scraped(scene.service)


async def postgres_unreachable(scene: Scene) -> Scrape:
    scene.postgres.switch(Mode.REFUSE)
    await scene.seen(lambda scrape: not up(scrape, "postgres"))
    for _ in range(3):
        await post(scene.service.url, sample().body)
    return await scraped(scene.service)


async def redis_unreachable(scene: Scene) -> Scrape:
    scene.redis.switch(Mode.REFUSE)
    assert (await scene.sandbox.deliver(scene.service, sample())).result == DEFERRED
    return await scene.seen(lambda scrape: not up(scrape, "redis"))


async def overdue(scene: Scene) -> Scrape:
    scene.redis.switch(Mode.REFUSE)  # so that recovery does not take it over
    event = sample()
    assert (await scene.sandbox.deliver(scene.service, event)).result == DEFERRED
    await scene.sandbox.fetch("UPDATE firstclaim.stripe_events SET due_at = due_at - interval '1 hour'")
    return await scene.seen(lambda scrape: scrape['firstclaim_oldest_due_seconds{instance="a"}'] > 3000)


async def recovery_stopped(scene: Scene) -> Scrape:
    await scene.sandbox.fetch(
        "ALTER TABLE firstclaim.stripe_events RENAME abandoned TO renamed"
    )  # only recovery reads this column
    return await scene.seen(lambda scrape: not up(scrape, "recovery"))


async def schema_outdated(scene: Scene) -> Scrape:
    await scene.sandbox.fetch("UPDATE firstclaim.ledger_revision SET version_num = '0001'")
    return await scene.seen(lambda scrape: not up(scrape, "schema"))


async def secret_rolled(scene: Scene) -> Scrape:
    for _ in range(5):
        body = sample().body
        await post(scene.service.url, body, list(signed(body, "whsec_another").items()))
    return await scraped(scene.service)


async def handlers_failing(scene: Scene) -> Scrape:
    for _ in range(3):
        assert (await scene.sandbox.deliver(scene.service, sample("fail", until=1))).result == FAILED
    return await scraped(scene.service)


async def dead(scene: Scene) -> Scrape:
    assert (await scene.sandbox.deliver(scene.service, sample("permanent"))).result == DEAD
    scene.service = await scene.another()  # its first scrape counts all rows
    return await scene.seen(lambda scrape: scrape.get('firstclaim_events{status="dead",instance="a"}'))


async def abandoned(scene: Scene) -> Scrape:
    event = sample("hold", gate=str(scene.sandbox.folder / "gate"))
    delivering = asyncio.create_task(post(scene.service.url, event.body))
    await scene.sandbox.settled(event, Status.PROCESSING)
    await scene.service.kill()
    with suppress(httpx.HTTPError):
        await delivering
    scene.service = await scene.another()
    return await scene.seen(lambda scrape: scrape['firstclaim_abandoned_total{instance="a"}'])


async def stopped(scene: Scene) -> Scrape:
    await scene.service.stop()
    return {}


STATES: dict[Callable[[Scene], Awaitable[Scrape]], set[str]] = {
    healthy: set(),
    stopped: {"Absent"},
    postgres_unreachable: {"PostgresAway", "Refusing"},
    redis_unreachable: {"RedisAway"},
    overdue: {"RedisAway", "Overdue"},
    recovery_stopped: {"RecoveryStopped"},
    schema_outdated: {"SchemaOutdated"},
    secret_rolled: {"SignatureMismatch"},
    handlers_failing: {"HandlersFailing"},
    dead: {"Dead"},
    abandoned: {"Abandoned"},
}


def test_each_alert_has_a_state() -> None:
    """Every shipped alert has a state in which it is seen to fire."""
    assert {f"Firstclaim{name}" for names in STATES.values() for name in names} == ALERTS


@needs_promtool
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
async def test_an_alert_fires_in_its_state_and_no_other(
    sandbox: Sandbox, tmp_path: Path, state: Callable[[Scene], Awaitable[Scrape]]
) -> None:
    """On real scrapes of a service before and in a bad state, exactly that state's alerts fire."""
    async with (
        before_postgres(sandbox.database_url) as (postgres, database_url),
        before_redis(sandbox.redis_url) as (redis, redis_url),
    ):
        scene = Scene(sandbox, postgres, redis, SHORT_LEASE | {"DATABASE_URL": database_url, "REDIS_URL": redis_url})
        scene.service = await scene.another()
        before = await scraped(scene.service)
        after = await state(scene)
        sandbox.waived.update(
            row["event_id"] for row in await sandbox.fetch("SELECT event_id FROM firstclaim.stripe_events")
        )
        check(tmp_path, before, after, {f"Firstclaim{name}" for name in STATES[state]})


@needs_promtool
def test_prometheus_accepts_the_rules_and_the_dashboard(tmp_path: Path) -> None:
    """Prometheus can load the printed rules, and can run each query of the dashboard."""
    rules = tmp_path / "alerts.yaml"
    rules.write_text(printed("--alerts"))
    promtool("check", "rules", str(rules))
    queries = [query.replace("$__rate_interval", "5m").replace("$job", "a") for query in queries_of(printed())]
    recording = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "queries.yaml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": recording}]}))
    promtool("check", "rules", str(tmp_path / "queries.yaml"))


async def test_every_queried_metric_exists(sandbox: Sandbox) -> None:
    """The rules and the dashboard query only series that a service reports."""
    service = await sandbox.service().start()
    reported = {name.partition("{")[0] for name in await scraped(service)}
    for text in (printed(), printed("--alerts")):
        queried = set(re.findall(r"\bfirstclaim_\w+", text))
        assert queried
        assert queried <= reported
