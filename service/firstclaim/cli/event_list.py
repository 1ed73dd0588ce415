"""The list of `firstclaim events list`: a table where there is room for one, else a few lines for each event.

Guarantees: an id, a type and a status are never cut, and never broken unless they are longer than a line: they are what
one copies. In a pipe or a file it is the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from firstclaim.cli.terminal import COLUMN_LEAST, STATUS_COLOURS, out, print_text, printable
from firstclaim.formatting import ago

if TYPE_CHECKING:
    from collections.abc import Sequence

    from firstclaim.operations.queries import EventRow

_COLUMNS = ("event", "type", "status", "attempts", "received", "result")
_GAP = "  "


def print_events(events: Sequence[EventRow]) -> None:
    """Print the events, as wide as the terminal is."""
    if not events:
        print_text("no events")
        return
    rows = [_cells(event) for event in events]
    widths = [max(len(row[column].plain) for row in rows) for column in range(len(_COLUMNS) - 1)]
    needed = sum(map(max, zip(widths, map(len, _COLUMNS[:-1]), strict=True))) + len(_GAP) * len(widths)
    if needed + COLUMN_LEAST <= out.width:
        print_text(_table(rows))
    else:
        for row in rows:
            for line in _lines(row, out.width):
                print_text(line)


def _cells(event: EventRow) -> list[Text]:
    result = event.last_error or event.action or ""
    plain = (event.event_id, event.type, event.status, str(event.attempt), ago(event.received_at), result)
    colours = ("", "", STATUS_COLOURS[event.status], "", "", "")
    return [Text(printable(cell), colour) for cell, colour in zip(plain, colours, strict=True)]


def _table(rows: list[list[Text]]) -> Table:
    table = Table(*_COLUMNS, box=None, pad_edge=False, padding=(0, len(_GAP), 0, 0))
    for column in table.columns[:-1]:
        column.no_wrap = True
    table.columns[-1].overflow = "fold"
    for row in rows:
        table.add_row(*row)
    return table


def _lines(row: list[Text], width: int) -> list[Text]:
    """One event: what fits on a line is on it, and all lines but the first are indented."""
    event_id, event_type, status, attempts, received, result = row
    attempts = Text(f"{attempts} attempt{'' if attempts.plain == '1' else 's'}")
    lines = [event_id]
    for cell in (status, received, event_type, attempts, result):
        if not cell:
            continue
        if len(lines[-1]) + len(_GAP) + len(cell) <= width and cell is not result:
            lines[-1] = Text.assemble(lines[-1], _GAP, cell)
        else:
            lines.append(Text.assemble(_GAP, cell))
    *kept, last = lines
    wrapped = last.wrap(out, width - len(_GAP)) if len(last) > width else [last]
    return [*kept, *(line if index == 0 else Text.assemble(_GAP, line) for index, line in enumerate(wrapped))]
