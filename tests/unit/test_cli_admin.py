"""`firstclaim admin-password` and `firstclaim dashboard`: what they print."""

from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from firstclaim.cli.commands import app
from firstclaim.passwords import Password
from tests.pages import PASSWORD


def test_the_command_makes_a_hash() -> None:
    """Both prompts hide the password; the last line is its hash, and the password matches it."""
    done = CliRunner().invoke(app, ["admin-password"], input=f"{PASSWORD}\n{PASSWORD}\n")
    assert done.exit_code == 0, done.output
    assert Password.read(done.stdout.splitlines()[-1]).matches(PASSWORD)
    assert PASSWORD not in done.output


def test_a_weak_password_gets_no_hash() -> None:
    """A password that is too short: exit 2, and it is not shown."""
    short = CliRunner().invoke(app, ["admin-password"], input="hunter2\nhunter2\n")
    assert short.exit_code == 2
    assert "too short" in short.output
    assert "hunter2" not in short.output


def printed(*options: str) -> str:
    """What `firstclaim dashboard --print` writes to standard output."""
    done = CliRunner().invoke(app, ["dashboard", "--print", *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def queries_of(board: str) -> list[str]:
    """Every query of the dashboard's panels."""
    return [target["expr"] for panel in orjson.loads(board)["panels"] for target in panel["targets"]]


@pytest.fixture
def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = orjson.loads(printed())["panels"]
    return found


def test_the_dashboard_can_be_imported(panels: list[dict[str, Any]]) -> None:
    """Every panel has a place of its own, a title and a unique number."""
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["title"]
        assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_alerts_link_to_a_published_runbook() -> None:
    """`--runbook` puts the address of your copy into each alert's `runbook_url`; without it, it is the file's path."""
    alerts = printed("--alerts")
    assert alerts.count("runbook_url: docs/runbook/Firstclaim") == alerts.count("- alert: ") > 10
    published = printed("--alerts", "--runbook", "https://docs.shop.example/runbook/")
    assert published == alerts.replace("docs/runbook/", "https://docs.shop.example/runbook/")
