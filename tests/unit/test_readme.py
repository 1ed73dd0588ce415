"""The README and the other pages agree with the code, as far as a test can check."""

import ast
import re
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from firstclaim.observability import metrics
from firstclaim.operations.queries import Backlog
from firstclaim.settings import Settings, environment_name
from firstclaim.status import Status
from firstclaim.web.answers import STATUS
from firstclaim.web.health import Health
from firstclaim.web.metrics import _Gauges

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "explanation" / "architecture.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "tests").rglob("*.md")),
]
# The paths on our pages are relative to the repository, the package (architecture.md), or the page's own folder.
PACKAGE = ROOT / "service" / "firstclaim"


def settings_table() -> str:
    """The table of settings, generated from their definitions."""
    rows = ["| variable | default | what for |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default
        if default in (None, (), ""):
            shown = ""
        elif isinstance(default, tuple):
            shown = f"`{','.join(default)}`"
        else:
            shown = f"`{default}`"
        rows.append(f"| `{environment_name(name)}` | {shown} | {field.description} |")
    return "\n".join(rows)


def test_settings_table() -> None:
    """The README's table of settings is the one that is generated from the code, including defaults."""
    found = re.search(r"<!-- settings -->\n(.*?)\n<!-- /settings -->", README.read_text(), flags=re.DOTALL)
    assert found
    assert found.group(1) == settings_table()


def test_answers_table() -> None:
    """The README's table of answers has the status code of every outcome."""
    answers = README.read_text().partition("## Answers")[2].partition("## Settings")[0]
    for status, processed in STATUS.values():
        assert re.search(rf"\| {status} \| {str(processed).lower()} \|", answers), (status, processed)


def test_test_command_is_what_ci_runs() -> None:
    """The README has exactly one command under its test marker, which CI runs."""
    block = re.search(r"<!-- test -->\n```sh\n(.*?)\n```", README.read_text(), flags=re.DOTALL)
    assert block
    assert block.group(1).count("\n") == 0
    assert block.group(1).endswith("-m pytest -n 2 --dist worksteal")


def test_every_alert_has_its_paragraph() -> None:
    """The runbook names every alert."""
    alerts = re.findall(
        r"- alert: (\w+)", resources.files("firstclaim").joinpath("observability", "alerts.yaml").read_text()
    )
    runbook = README.read_text().partition("### Runbook")[2].partition("\n## ")[0]
    assert alerts
    assert [name for name in alerts if f"**{name}**" not in runbook] == []


# -- the metrics --------------------------------------------------------------------------------------

METRICS = ROOT / "docs" / "reference" / "metrics.md"


def metrics_table() -> str:
    """The table of metrics, generated from their definitions, by name as Prometheus stores it."""
    gauges = _Gauges(20, {"redis": Health.OK}, Backlog(0, 0.0, 0, 0), dict.fromkeys(Status, 0))
    rows = []
    for metric in [*metrics.REGISTRY.collect(), *gauges.collect()]:
        labels: dict[str, list[str]] = {}
        for sample in metric.samples:
            for name, value in sample.labels.items():
                labels.setdefault(name, []).append(value)
        if metric.type == "histogram":
            labels = {"handler": ["the handlers' patterns"]}
        elif metric.name == "firstclaim_up":
            labels = {"part": ["the checks of `/readyz`"]}
        shown = "; ".join(f"`{name}`: {', '.join(sorted(set(values)))}" for name, values in labels.items())
        suffix = {"counter": "_total", "histogram": "_bucket, _sum, _count"}.get(metric.type, "")
        full = ", ".join(f"`{metric.name}{each}`" for each in suffix.split(", "))
        rows.append(f"| {full} | {metric.type} | {shown} | {metric.documentation} |")
    return "\n".join(["| metric | type | labels | meaning |", "| --- | --- | --- | --- |", *sorted(rows)])


def test_metrics_table() -> None:
    """The table of metrics is the one that is generated from the code."""
    found = re.search(r"<!-- metrics -->\n(.*?)\n<!-- /metrics -->", METRICS.read_text(), flags=re.DOTALL)
    assert found
    assert found.group(1) == metrics_table()


# -- the log ------------------------------------------------------------------------------------------

LOG_EVENTS = ROOT / "docs" / "reference" / "log-events.md"
LEVELS = ("debug", "info", "warning", "error")


def log_calls() -> dict[str, tuple[str, set[str] | None]]:
    """Name, level and fields of every call of a logger; the fields are None where a call passes a mapping."""
    calls: dict[str, tuple[str, set[str] | None]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name("log"), attr=level)) if level in LEVELS:
                    fields = {keyword.arg for keyword in node.keywords}
                    known = {field for field in fields if field is not None} if None not in fields else None
                    names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else VARIABLE_NAMES
                    calls.update({str(name): (level, known) for name in names})
    return calls


VARIABLE_NAMES = ["delivery_broke", "recovery_broke"]  # of the one call whose name is an argument


def test_every_log_event_is_documented() -> None:
    """The reference lists each log event with its level and its fields, and none that is not there."""
    table = LOG_EVENTS.read_text().partition("<!-- log events -->")[2].partition("<!-- /log events -->")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|(.*?)\| ", table, flags=re.MULTILINE)
    documented = {name: (level, set(re.findall(r"`(\w+)`", fields))) for name, level, fields in rows}
    assert list(documented) == sorted(documented)
    calls = log_calls()
    assert documented.keys() == calls.keys()
    for name, (level, fields) in calls.items():
        assert documented[name][0] == level, name
        assert fields is None or documented[name][1] == fields, name


# -- all pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link leads to a file, and its fragment to a heading of that file."""
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
            assert fragment in {heading.lower().replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page: Path) -> None:
    """Every path with a slash in backticks is a file or a folder of this repository."""
    paths = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", page.read_text())
    assert [path for path in paths if not any((base / path).exists() for base in (ROOT, PACKAGE, page.parent))] == []


def test_the_diagram_of_the_layers_is_the_contract() -> None:
    """architecture.md draws the layers that import-linter checks, from top to bottom."""
    [contract] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    diagram = ARCHITECTURE.read_text().partition("<!-- layers -->")[2].partition("\n```\n")[0]
    assert re.findall(r'L\d+\["([^"]+)"\]', diagram) == contract["layers"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_are_called_by_their_names(page: Path) -> None:
    """No page names a variable that the service does not read."""
    known = {environment_name(name) for name in Settings.model_fields}
    assert set(re.findall(r"\bFIRSTCLAIM_[A-Z_]+\b", page.read_text())) <= known
