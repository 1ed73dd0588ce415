"""The parts of docs/ that are generated from the code: `python -m tests.reference` writes them.

`tests/unit/test_reference.py` fails until the pages are what this makes. So nothing is missing on them, and nothing on
them is out of date.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Final

import typer
import yaml
from sqlalchemy import CheckConstraint, Table
from sqlalchemy.dialects import postgresql

import firstclaim
from firstclaim.cli.commands import app
from firstclaim.context import RowContext, TransactionContext
from firstclaim.inbox import model
from firstclaim.inbox.pauses import Pauses
from firstclaim.inbox.routes import Routes
from firstclaim.observability import metrics
from firstclaim.observability.handler_metrics import handler_metrics, limit_metrics
from firstclaim.operations.queries import Backlog, Gaps
from firstclaim.registry import Handler, Registry
from firstclaim.settings import Settings, environment_name
from firstclaim.status import Status
from firstclaim.web.gauges import Gauges, LedgerReading, Unfinished
from firstclaim.web.health import Health

DOCS: Final = Path(__file__).parents[1] / "docs"


def table(heads: str, rows: list[str]) -> str:
    """A Markdown table. `heads` and each row are cells, joined with ` | `."""
    return "\n".join(f"| {row} |" for row in [heads, " | ".join("---" for _ in heads.split(" | ")), *rows])


# -- settings -----------------------------------------------------------------------------------------


def settings() -> str:
    """Every setting, with its default and its description."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = field.default
        if default in (None, (), ""):
            shown = ""
        elif isinstance(default, tuple):
            shown = f"`{','.join(default)}`"
        else:
            shown = f"`{default}`"
        rows.append(f"`{environment_name(name)}` | {shown} | {field.description}")
    return table("variable | default | what for", rows)


# -- commands -----------------------------------------------------------------------------------------


def _leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
    else:
        for name, child in children.items():
            yield from _leaves(child, f"{path} {name}")


def _default(parameter: Any) -> str:
    """As `--help` shows it."""
    if isinstance(parameter.show_default, str):
        return str(parameter.show_default)
    return "" if parameter.default in (None, "", False) else f"`{parameter.default}`"


def commands() -> str:
    """Every command of `firstclaim`: what it does, its arguments and options, with their defaults."""
    sections = []
    for path, command in _leaves(typer.main.get_command(app), "firstclaim"):
        section = [f"### {path}", "", inspect.cleandoc(command.help)]
        rows = []
        for parameter in command.params:
            metavar = f" {parameter.metavar}" if parameter.metavar else ""
            is_option = parameter.param_type_name == "option"
            name = f"{parameter.opts[0]}{metavar}" if is_option else parameter.metavar
            needed = "required" if parameter.required else _default(parameter)
            rows.append(f"`{name}` | {needed} | {parameter.help}".replace("a|b", "a\\|b"))
        if rows:
            rows = [re.sub(r"(?<=\w)\|(?=\w)", r"\\|", row) for row in rows]
            section += ["", table("option | default | what it does", rows)]
        sections.append("\n".join(section))
    return "\n\n".join(sections)


# -- what a handler module imports --------------------------------------------------------------------


def _signature(member: Any) -> str:
    """The parameters, without `self` and without the marks that only a type checker needs."""
    signature = inspect.signature(member)
    kept = [each for each in signature.parameters.values() if each.name != "self"]
    text = re.sub(r"\b(firstclaim\.\w+|collections\.abc|typing)\.|~", "", str(signature.replace(parameters=kept)))
    text = re.sub(r"'([^']+)'", r"\1", text)
    return re.sub(r"\*<class (\w+)>", r"Unpack[\1]", text)  # Python 3.11 writes so what later ones write as Unpack


def _members(cls: type) -> Iterator[str]:
    for name, member in vars(cls).items():
        if name.startswith("_") or not (text := inspect.getdoc(member)):
            continue
        if isinstance(member, property):
            yield f"#### {name}\n\n{text}"
        elif inspect.isfunction(member):
            yield f"#### {name}{_signature(member)}\n\n{text}"


ORDER: Final = (
    "on",
    "task",
    "Event",
    "Context",
    "BatchContext",
    "TaskContext",
    "Retry",
    "Pause",
    "Permanent",
    "asgi",
    "Settings",
)
SHARED: Final = {"row": RowContext, "transaction": TransactionContext}  # what several contexts have


def _section_of(name: str) -> Iterator[str]:
    value = getattr(firstclaim, name)
    is_class = inspect.isclass(value)
    made_by = value if not is_class else value.__init__ if issubclass(value, Exception) else None
    yield f"### {name}" + (_signature(made_by).replace(" -> None", "") if made_by else "")
    yield inspect.getdoc(value) or ""
    if is_class and made_by is None and name != "Settings":
        fields = [each for each in value.__dataclass_fields__ if not each.startswith("_")]
        yield f"Fields: `{'`, `'.join(fields)}`."
        for what, base in SHARED.items():
            if issubclass(value, base):
                members = [each for each, member in vars(base).items() if each[0] != "_" and inspect.getdoc(member)]
                yield f"The {what}: `{'`, `'.join(each for each in members if each not in fields)}`."
        yield from _members(value)


def names() -> str:
    """Every public name of the package, with its docstring and those of its members."""
    assert sorted(ORDER) == sorted(firstclaim.__all__)
    sections = [part for name in ORDER for part in _section_of(name)]
    for what, base in SHARED.items():
        sections += [f"### The {what} of a context", inspect.getdoc(base) or "", *_members(base)]
    return "\n\n".join(sections)


# -- metrics ------------------------------------------------------------------------------------------


def metrics_table() -> str:
    """Every metric with its labels and their values, by name as Prometheus stores it."""
    reading = LedgerReading(Unfinished(Backlog(0, 0.0, 0, 0), {}), dict.fromkeys(Status, 0), Gaps(0.0, 0.0))
    routes = Routes(Registry([Handler("*", print)]), "any")
    gauges = Gauges(20, {"redis": Health.OK}, routes, Pauses(), reading)
    handler_metrics("*", True)  # its series, for their labels
    limit_metrics("*")
    metrics.endpoint_requests("eu")
    rows = []
    for metric in [*metrics.REGISTRY.collect(), *gauges.collect()]:
        assert metric.samples, f"{metric.name} has no series here: its labels would be missing on the page"
        labels: dict[str, list[str]] = {}
        for sample in metric.samples:
            for name, value in sample.labels.items():
                if name != "le":
                    labels.setdefault(name, []).append(value)
        if "handler" in labels:
            labels["handler"] = ["the handlers' patterns"]
        if "endpoint" in labels:
            labels["endpoint"] = ["the names of the endpoints, or -"]
        if metric.name == "firstclaim_up":
            labels = {"part": ["the checks of `/readyz`"]}
        shown = "; ".join(f"`{name}`: {', '.join(sorted(set(values)))}" for name, values in labels.items())
        suffix = {"counter": "_total", "histogram": "_bucket, _sum, _count"}.get(metric.type, "")
        full = ", ".join(f"`{metric.name}{each}`" for each in suffix.split(", "))
        rows.append(f"{full} | {metric.type} | {shown} | {metric.documentation}")
    return table("metric | type | labels | meaning", sorted(rows))


# -- tables -------------------------------------------------------------------------------------------


DIALECT: Final = postgresql.dialect()  # type: ignore[no-untyped-call]


def _section(described: Table) -> str:
    rows = []
    for column in described.columns:
        assert column.doc, f"{described.name}.{column.name} has no doc"
        key = ", key" if column.primary_key else ""
        null = ", may be null" if column.nullable else ""
        kind = column.type.compile(dialect=DIALECT).lower().removesuffix(' collate "c"')
        rows.append(f"`{column.name}` | {kind}{key}{null} | {column.doc}")
    checks = [each for each in described.constraints if isinstance(each, CheckConstraint)]
    section = [
        f"## {described.name}",
        described.info["about"],
        table("column | type | meaning", rows),
    ]
    if checks:
        section.append(
            "\n".join(f"- Always: `{each.sqltext}`." for each in sorted(checks, key=lambda each: str(each.name)))
        )
    return "\n\n".join(section)


def tables() -> str:
    """Every table of the ledger, with its columns and its checks."""
    return "\n\n".join(_section(each) for each in model.metadata.tables.values())


# -- alerts -------------------------------------------------------------------------------------------


def alert_rules() -> list[dict[str, Any]]:
    """The rules that ship with the package."""
    text = resources.files("firstclaim").joinpath("observability", "alerts.yaml").read_text()
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def alerts() -> str:
    """Every alert, with its severity, how long it must hold, and its page."""
    rows = [
        f"[{rule['alert']}]({rule['alert']}.md) | {rule['labels']['severity']} | {rule.get('for', 'at once')}"
        for rule in alert_rules()
    ]
    return table("alert | severity | must hold for", rows)


# -- the pages ----------------------------------------------------------------------------------------

SECTIONS: Final[dict[tuple[str, str], Callable[[], str]]] = {
    ("reference/settings.md", "settings"): settings,
    ("reference/cli.md", "commands"): commands,
    ("reference/handlers.md", "names"): names,
    ("reference/metrics.md", "metrics"): metrics_table,
    ("reference/tables.md", "tables"): tables,
    ("runbook/index.md", "alerts"): alerts,
}


def generated(text: str, marker: str, section: str) -> str:
    """The page's text with this section between its markers. Raises `ValueError` if the page has no such markers."""
    begin, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->"
    made, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}{section}\n{end}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one section between <!-- {marker} --> and <!-- /{marker} -->")
    return made


if __name__ == "__main__":
    for (page, marker), section in SECTIONS.items():
        path = DOCS / page
        path.write_text(generated(path.read_text(), marker, section()))
