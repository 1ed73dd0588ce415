"""The generated parts of docs/ are what the code makes, and what is generated is complete."""

import pytest
import typer

import firstclaim
from firstclaim.cli.commands import app
from firstclaim.inbox import model
from firstclaim.settings import Settings, environment_name
from tests.reference import DOCS, SECTIONS, alert_rules, generated

WRITES = "python -m tests.reference writes it"


@pytest.mark.parametrize(("page", "marker"), SECTIONS, ids=[page for page, _ in SECTIONS])
def test_the_page_is_up_to_date(page: str, marker: str) -> None:
    """The committed page has the section that the code makes now."""
    text = (DOCS / page).read_text()
    assert text == generated(text, marker, SECTIONS[page, marker]()), WRITES


def test_nothing_is_missing() -> None:
    """Every setting, command, table, column, public name and alert is on its page."""
    settings, tables, handlers, runbook, commands = (
        (DOCS / page).read_text()
        for page in (
            "reference/settings.md",
            "reference/tables.md",
            "reference/handlers.md",
            "runbook/index.md",
            "reference/cli.md",
        )
    )
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        for name in getattr(command, "commands", [""]):
            assert f"\n### firstclaim {command.name} {name}".rstrip() + "\n" in commands
    assert [name for name in Settings.model_fields if f"`{environment_name(name)}`" not in settings] == []
    for table in model.metadata.tables.values():
        section = tables.partition(f"## {table.name}\n")[2].partition("\n## ")[0]
        assert [column.name for column in table.columns if f"| `{column.name}` |" not in section] == []
    assert [name for name in firstclaim.__all__ if f"### {name}" not in handlers] == []
    assert [rule["alert"] for rule in alert_rules() if rule["alert"] not in runbook] == []


def test_a_page_without_its_markers_is_refused() -> None:
    """A section whose markers are gone is an error, and is not left out in silence."""
    with pytest.raises(ValueError, match="expected one section between"):
        generated("nothing", "settings", "")
