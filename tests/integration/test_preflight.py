"""The checks of Postgres before the start, on a server that seems to be set otherwise."""

import asyncpg
import pytest
from pydantic import SecretStr

from firstclaim.server.preflight import Verdict, check_postgres
from firstclaim.settings import Settings

# The checks call `current_setting()` by its bare name, and this database's search_path names `public` first.
PRETEND = """
CREATE FUNCTION current_setting(name text) RETURNS text LANGUAGE sql AS
    $$ SELECT CASE name WHEN '{name}' THEN 'off' ELSE pg_catalog.current_setting(name) END $$;
DO $$ BEGIN
    EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database());
END $$;
"""


@pytest.mark.parametrize("name", ["fsync", "full_page_writes"])
async def test_a_server_that_can_lose_events_is_reported(database_url: str, name: str) -> None:
    """A setting with which a crash loses events that were answered with 200 is a warning that names it."""
    connection = await asyncpg.connect(database_url)
    await connection.execute(PRETEND.format(name=name))
    await connection.close()
    settings = Settings(database_url=SecretStr(database_url), stripe_webhook_secrets=(SecretStr("whsec_test"),))
    found = {check.name: check async for check in check_postgres(settings)}
    assert found[name].verdict is Verdict.WARN
    assert f"{name} = off" in found[name].detail
