"""The README says what the code does, where the code can tell."""

import re
from importlib import resources
from pathlib import Path

from firstclaim.settings import Settings, environment_name
from firstclaim.web.webhook import STATUS

README = Path(__file__).parents[2] / "README.md"


def settings_table() -> str:
    """The table of settings, from their definitions."""
    rows = ["| variable | default | what for |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default
        if default is None or default == ():
            shown = ""
        elif isinstance(default, tuple):
            shown = f"`{','.join(default)}`"
        else:
            shown = f"`{default}`"
        rows.append(f"| `{environment_name(name)}` | {shown} | {field.description} |")
    return "\n".join(rows)


def test_settings_table() -> None:
    """The README's table of settings is the one in the code, default by default."""
    found = re.search(r"<!-- settings -->\n(.*?)\n<!-- /settings -->", README.read_text(), flags=re.DOTALL)
    assert found
    assert found.group(1) == settings_table()


def test_answers_table() -> None:
    """Every status code that an outcome can become stands in the README's table of answers."""
    answers = README.read_text().partition("## Answers")[2].partition("## Settings")[0]
    for status, processed in STATUS.values():
        assert re.search(rf"\| {status} \| {str(processed).lower()} \|", answers), (status, processed)


def test_test_command_is_what_ci_runs() -> None:
    """CI finds exactly one line to run under the README's test marker."""
    block = re.search(r"<!-- test -->\n```sh\n(.*?)\n```", README.read_text(), flags=re.DOTALL)
    assert block
    assert block.group(1).count("\n") == 0
    assert block.group(1).endswith("-m pytest -n 2 --dist worksteal")


def test_every_alert_has_its_paragraph() -> None:
    """Whoever is woken finds what to do under the alert's name."""
    alerts = re.findall(
        r"- alert: (\w+)", resources.files("firstclaim").joinpath("observability", "alerts.yaml").read_text()
    )
    runbook = README.read_text().partition("### Runbook")[2].partition("\n## ")[0]
    assert alerts
    assert [name for name in alerts if f"**{name}**" not in runbook] == []


def test_settings_are_called_by_their_names() -> None:
    """No variable stands anywhere in the README that the service does not read."""
    known = {environment_name(name) for name in Settings.model_fields}
    assert set(re.findall(r"\bFIRSTCLAIM_[A-Z_]+\b", README.read_text())) <= known
