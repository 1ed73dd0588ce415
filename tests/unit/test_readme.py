"""The README and the other pages agree with the code, as far as a test can check."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from firstclaim.settings import Settings, environment_name
from firstclaim.web.answers import STATUS
from tests.blocks import block
from tests.reference import alert_rules

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


def test_the_readme_is_short() -> None:
    """The README has 400 to 600 words beside its code: everything else is in docs/."""
    prose = re.sub(r"```.*?```|<!--.*?-->|\]\([^)]*\)", " ", README.read_text(), flags=re.DOTALL)
    assert 400 <= len(prose.split()) <= 600


def test_the_index_has_every_how_to() -> None:
    """A reader of the plain Markdown, who has no menu, finds each how-to page."""
    index = (ROOT / "docs" / "index.md").read_text()
    assert [path.name for path in (ROOT / "docs" / "how-to").glob("*.md") if f"(how-to/{path.name})" not in index] == []


def test_answers_table() -> None:
    """The table of answers has the status code of every outcome."""
    answers = (ROOT / "docs" / "reference" / "answers.md").read_text()
    for status, processed in STATUS.values():
        assert re.search(rf"\| {status} \| {str(processed).lower()} \|", answers), (status, processed)


def test_test_command_is_what_ci_runs() -> None:
    """The README has exactly one command under its test marker, which CI runs."""
    command = block("README.md", "test")
    assert command.count("\n") == 1
    assert command.endswith("-m pytest -n 3 --dist worksteal\n")
    assert f"<!-- test -->\n<!-- run: test -->\n```sh\n{command}```\n" in README.read_text()
    assert "'/<!-- test -->/,/```$/p' README.md" in (ROOT / ".ci" / "run").read_text()


RUNBOOK = ROOT / "docs" / "runbook"


def test_every_alert_links_to_its_page() -> None:
    """The `runbook_url` of each alert is a page under its name, and the runbook has no other page."""
    links = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in alert_rules()}
    assert links == {alert: f"docs/runbook/{alert}.md" for alert in links}
    assert {path.stem for path in RUNBOOK.glob("*.md")} == {*links, "index"}
    for alert, link in links.items():
        page = (ROOT / link).read_text()
        assert page.startswith(f"# {alert}\n"), link
        assert "\n## Do\n" in page or "| do |" in page, link


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
