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
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from firstclaim.status import Status
from tests.acceptance.harness import (
    DEAD,
    DEFERRED,
    FAILED,
    HANDLERS,
    PROCESSED,
    SHORT_LEASE,
    Overrides,
    Sandbox,
    Service,
    eventually,
    post,
    sample,
)
from tests.fixtures import SECRET, signed
from tests.proxy import Mode, Proxy, before_postgres, before_redis
from tests.unit.test_cli_admin import printed, queries_of

MONITORING = resources.files("firstclaim").joinpath("observability")
ALERTS = set(re.findall(r"- alert: (\w+)", MONITORING.joinpath("alerts.yaml").read_text()))
HEALTHY_MINUTES, BAD_MINUTES = 5, 40
QUICK_MINUTES = 6
LIMITED: Overrides = {"handlers": f"{HANDLERS},tests.chaos.limited_handlers"}
SECRETS = f"{SECRET},eu=whsec_eu"  # two endpoints, of which `eu` has no request in most states

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


def check(folder: Path, before: Scrape, after: Scrape, expected: set[str], named: dict[str, str]) -> None:
    """Exactly the `expected` alerts fire after some minutes in the first state and more in the second.

    `named`: of these alerts, the label with the one handler or endpoint that they name. They fire within
    `QUICK_MINUTES`.
    """
    expectations = [
        {
            "expr": f'count(ALERTS{{alertstate="firing",alertname="{alert}"}}) > bool 0 or vector(0)',
            "eval_time": f"{BAD_MINUTES}m",
            "exp_samples": [{"labels": "{}", "value": int(alert in expected)}],
        }
        for alert in sorted(ALERTS)
    ]
    expectations += [
        {
            "expr": f'count by (handler, endpoint) (ALERTS{{alertstate="firing",alertname="{alert}"}})',
            "eval_time": f"{HEALTHY_MINUTES + 1 + QUICK_MINUTES}m",
            "exp_samples": [{"labels": f"{{{label}}}", "value": 1}],
        }
        for alert, label in named.items()
    ]
    evaluate(folder, before, after, expectations)


def evaluate(folder: Path, before: Scrape, after: Scrape, expectations: list[dict[str, Any]]) -> None:
    """Evaluate expressions over some minutes in the first state and more in the second, with the rules loaded.

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


async def unwanted(scene: Scene) -> Scrape:
    scene.redis.switch(Mode.REFUSE)  # so that recovery does not take it over before it has another type
    assert (await scene.sandbox.deliver(scene.service, sample())).result == DEFERRED
    await scene.sandbox.fetch(
        "UPDATE firstclaim.stripe_events SET due_at = due_at - interval '1 hour', type = 'charge.refunded'"
    )
    scene.redis.switch(Mode.OPEN)
    return await scene.seen(
        lambda scrape: up(scrape, "redis") and scrape['firstclaim_unwanted_due_seconds{instance="a"}'] > 3000
    )


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


async def endpoint_rolled(scene: Scene) -> Scrape:
    """The secret of a named endpoint with less than one request in twenty."""
    body = sample().body
    for _ in range(70):
        await post(scene.service.url, body)
    for _ in range(3):
        await post(f"{scene.service.url}/eu", body, list(signed(body, "whsec_another").items()))
    return await scraped(scene.service)


async def clock_wrong(scene: Scene) -> Scrape:
    for _ in range(3):
        body = sample().body
        await post(scene.service.url, body, list(signed(body, at=int(time.time()) - 3600).items()))
    return await scraped(scene.service)


# The last of many events came an hour ago; before that, there was one every second.
QUIET_FOR_AN_HOUR = """
INSERT INTO firstclaim.stripe_events
       (event_id, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at, settled_at)
SELECT 'evt_x' || n, 'invoice.paid', true, now(), 'ignored', 1,
       now() - interval '1 hour' - make_interval(secs => n), now(), now(), now()
  FROM generate_series(1, 200) AS n
"""


async def no_deliveries(scene: Scene) -> Scrape:
    await scene.sandbox.fetch(QUIET_FOR_AN_HOUR)
    return await scene.seen(lambda scrape: 'firstclaim_usual_gap_seconds{instance="a"}' in scrape)


async def handlers_failing(scene: Scene) -> Scrape:
    for _ in range(3):
        assert (await scene.sandbox.deliver(scene.service, sample("fail"))).result == FAILED
    return await scraped(scene.service)


async def rare_type_failing(scene: Scene) -> Scrape:
    """One attempt in fourteen fails: all of a rare type. The backoff is long, so that none is retried meanwhile."""
    await scene.service.stop()
    scene.overrides |= {"backoff_first_seconds": 60, "backoff_most_seconds": 60}
    scene.service = await scene.another()
    for _ in range(40):
        assert (await scene.sandbox.deliver(scene.service, sample())).result == PROCESSED
    for _ in range(3):
        assert (await scene.sandbox.deliver(scene.service, sample("fail", "invoice.paid"))).result == FAILED
    return await scraped(scene.service)


async def asking_for_retries(scene: Scene) -> Scrape:
    for _ in range(3):
        event = sample("retry", after=3600)
        assert (await scene.sandbox.deliver(scene.service, event)).result == FAILED
    return await scraped(scene.service)


async def dead(scene: Scene) -> Scrape:
    assert (await scene.sandbox.deliver(scene.service, sample("permanent"))).result == DEAD
    scene.service = await scene.another()  # its first scrape counts all rows
    return await scene.seen(lambda scrape: scrape.get('firstclaim_events{status="dead",instance="a"}'))


async def thread_hangs(scene: Scene) -> Scrape:
    await scene.service.stop()
    # Recovery must not look in the moment after the deadline, in which the row looks abandoned (`TAKE_BACK`).
    scene.overrides |= {"handler_deadline_seconds": 2, "recovery_interval_seconds": 10}
    scene.service = await scene.another()
    event = sample("hold", "invoice.paid", gate=str(scene.sandbox.folder / "gate"))
    assert (await scene.sandbox.deliver(scene.service, event)).result == FAILED
    return await scraped(scene.service)


async def previously_abandoned_runs(scene: Scene) -> Scrape:
    await abandoned(scene, opens=False)
    held = 'firstclaim_slots_held{by="previously_abandoned",handler="invoice.payment_failed",instance="a"}'
    return await scene.seen(lambda scrape: scrape[held])


async def abandoned(scene: Scene, *, opens: bool = True) -> Scrape:
    gate = scene.sandbox.folder / "gate"
    event = sample("hold", gate=str(gate))
    delivering = asyncio.create_task(post(scene.service.url, event.body))
    await scene.sandbox.settled(event, Status.PROCESSING)
    await scene.service.kill()
    with suppress(httpx.HTTPError):
        await delivering
    if opens:
        gate.touch()
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
    unwanted: {"Unwanted"},
    recovery_stopped: {"RecoveryStopped"},
    schema_outdated: {"SchemaOutdated"},
    secret_rolled: {"SignatureMismatch", "SignaturesRefused"},
    endpoint_rolled: {"SignaturesRefused"},
    clock_wrong: {"SignaturesRefused"},
    no_deliveries: {"NoDeliveries"},
    handlers_failing: {"HandlersFailing", "HandlerFailing"},
    rare_type_failing: {"HandlerFailing"},
    asking_for_retries: set(),
    dead: {"Dead"},
    abandoned: {"Abandoned"},
    thread_hangs: {"SlotHeld", "HandlersFailing", "HandlerFailing"},
    previously_abandoned_runs: {"Abandoned", "SlotHeld"},
}
# The alerts that name the handler or the endpoint, and fire within some minutes.
NAMED: dict[Callable[[Scene], Awaitable[Scrape]], dict[str, str]] = {
    overdue: {"Overdue": 'handler="invoice.payment_failed"'},
    secret_rolled: {"SignaturesRefused": 'endpoint="-"'},
    endpoint_rolled: {"SignaturesRefused": 'endpoint="eu"'},
    handlers_failing: {"HandlerFailing": 'handler="invoice.payment_failed"'},
    rare_type_failing: {"HandlerFailing": 'handler="invoice.paid"'},
    thread_hangs: {"SlotHeld": 'handler="invoice.paid"'},
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
        overrides: Overrides = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "STRIPE_WEBHOOK_SECRETS": SECRETS}
        scene = Scene(sandbox, postgres, redis, SHORT_LEASE | overrides)
        scene.service = await scene.another()
        before = await scraped(scene.service)
        after = await state(scene)
        sandbox.waived.update(
            row["event_id"] for row in await sandbox.fetch("SELECT event_id FROM firstclaim.stripe_events")
        )
        named = {f"Firstclaim{name}": label for name, label in NAMED.get(state, {}).items()}
        check(tmp_path, before, after, {f"Firstclaim{name}" for name in STATES[state]}, named)


@needs_promtool
@pytest.mark.parametrize(("minutes_between", "verified", "fires"), [(10, 0, True), (10, 1, False), (20, 0, False)])
def test_an_endpoint_with_a_request_now_and_then_is_noticed(
    tmp_path: Path, minutes_between: int, verified: int, fires: bool
) -> None:
    """Three refused requests within an hour are enough, if none was verified; two are not. No 5 minutes have three."""
    series = 'firstclaim_endpoint_requests_total{{endpoint="eu",result="{}",instance="a"}}'
    other = 'firstclaim_endpoint_requests_total{endpoint="-",result="verified",instance="a"}'
    before = {series.format("signature_refused"): 0.0, series.format("verified"): 0.0, other: 0.0}
    after = {
        series.format("signature_refused"): 1 / minutes_between,
        series.format("verified"): verified / minutes_between,
        other: 100.0,
    }
    firing = 'count by (endpoint) (ALERTS{alertstate="firing",alertname="FirstclaimSignaturesRefused"})'
    expected = [{"labels": '{endpoint="eu"}', "value": 1}] if fires else []
    at = f"{HEALTHY_MINUTES + BAD_MINUTES}m"
    evaluate(tmp_path, before, after, [{"expr": firing, "eval_time": at, "exp_samples": expected}])


@needs_promtool
def test_prometheus_accepts_the_rules_and_the_dashboard(tmp_path: Path) -> None:
    """Prometheus can load the printed rules, and can run each query of the dashboard."""
    rules = tmp_path / "alerts.yaml"
    rules.write_text(printed("--alerts"))
    promtool("check", "rules", str(rules))
    queries = panel_queries()
    recording = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "queries.yaml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": recording}]}))
    promtool("check", "rules", str(tmp_path / "queries.yaml"))


def panel_queries() -> list[str]:
    """The queries of the dashboard, for all jobs and handlers."""
    filled = {"$__rate_interval": "5m", "$job": ".*", "$handler": ".*"}
    return [reduce(lambda query, each: query.replace(*each), filled.items(), query) for query in queries_of(printed())]


@needs_promtool
async def test_every_panel_shows_a_real_scrape(sandbox: Sandbox, tmp_path: Path) -> None:
    """Each query of the dashboard has a result on real scrapes, and each query by handler has one for every handler.

    Waits for a key or a limit are those of the one handler that has limits.
    """
    await sandbox.fetch(QUIET_FOR_AN_HOUR)
    service = await sandbox.service(LIMITED).start()
    before = await scraped(service)
    for given in (sample(), sample("fail", "invoice.paid")):
        await sandbox.deliver(service, given)
    await post(service.url, b"{}")
    after = await scraped(service)
    patterns = {found[1] for name in after if (found := re.search(r'_attempts_total.*handler="([^"]*)"', name))}
    assert len(patterns) == 6
    expectations = [
        {
            "expr": f"count(count by (handler) ({query}))" if "handler" in by else f"count({query}) > bool 0",
            "eval_time": f"{BAD_MINUTES}m",
            "exp_samples": [{"labels": "{}", "value": len(patterns) if "handler" in by and not waits else 1}],
        }
        for query in panel_queries()
        for by in [re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", query)))]
        for waits in [re.search("_key_waits_|_limited_deliveries_", query)]
    ]
    evaluate(tmp_path, before, after, expectations)


async def test_every_queried_metric_exists(sandbox: Sandbox) -> None:
    """The rules and the dashboard query only series that a service reports."""
    await sandbox.fetch(QUIET_FOR_AN_HOUR)
    service = await sandbox.service(LIMITED).start()
    reported = {name.partition("{")[0] for name in await scraped(service)}
    for text in (printed(), printed("--alerts")):
        queried = set(re.findall(r"\bfirstclaim_\w+", text))
        assert queried
        assert queried <= reported
