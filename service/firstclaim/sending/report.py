"""The report of `firstclaim send`: the answers, their latency, and whether the guarantee held.

Guarantees: of all copies of one event, at most one may be processed; otherwise the exit code is 1.
"""

import math
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from firstclaim.sending.client import Answer


def exit_code(answers: Sequence[Answer]) -> int:
    """1 if more than one copy was processed, or if none was answered with a 2xx; else 0."""
    return _verdict(answers)[0]


def report(answers: Sequence[Answer], console: Console, event_id: str = "") -> None:
    """Print the event's id, how often each answer came, the reasons, the latency, and the verdict in a line."""
    if event_id:
        console.print(Text.assemble("event ", _cell(event_id)), soft_wrap=True)
    table = Table()
    for name in ("status", "action", "processed"):
        table.add_column(name, overflow="fold")  # where the terminal is narrow, nothing is left out
    table.add_column("count", justify="right")
    for (status, action, processed), count in _tally(answers).most_common():
        table.add_row(_cell(status), _cell(action), _cell(processed), str(count))
    console.print(table)
    answered = any(each.status is not None for each in answers)  # else the verdict names the error
    reasons = (each.reason or (each.error if answered else None) for each in answers)
    for reason in dict.fromkeys(each for each in reasons if each):
        console.print(Text.assemble("reason: ", _cell(reason)), soft_wrap=True)
    if latencies := sorted(answer.seconds for answer in answers if answer.status is not None):
        line = f"latency p50 {_milliseconds(latencies, 0.5)} ms, p99 {_milliseconds(latencies, 0.99)} ms"
        console.print(line, markup=False, highlight=False)
    failed, verdict = _verdict(answers)
    console.print(Text(verdict, style="bold red" if failed else "bold green"), soft_wrap=True)


def _tally(answers: Sequence[Answer]) -> Counter[tuple[int | None, str | None, bool | None]]:
    names = ((each, each.action or (each.error and each.error.partition(":")[0])) for each in answers)
    return Counter((each.status, name, each.processed) for each, name in names)


def _verdict(answers: Sequence[Answer]) -> tuple[int, str]:
    """The exit code, and the sentence that explains it."""
    answered = [each for each in answers if each.status is not None]
    if not answered:
        return 1, f"No copy was answered: {answers[0].error if answers else 'none was sent'}"
    processed = sum(each.processed is True for each in answered)
    of = f"{len(answers)} {'copy' if len(answers) == 1 else 'copies'}"
    lost = f" {len(answers) - len(answered)} had no answer." if len(answered) < len(answers) else ""
    if processed > 1:
        return 1, f"Processed {processed} times: of {of} of one event, at most one may be processed.{lost}"
    if processed == 1:
        return 0, f"Processed once, of {of}.{lost}"
    accepted = any(each.status is not None and each.status < 300 for each in answered)
    status, action, _ = _tally(answered).most_common(1)[0][0]
    return (
        0 if accepted else 1,
        f"Not processed, of {of}. Most frequent answer: {status} {_cell(action or 'without an action')}.{lost}",
    )


def _cell(value: int | str | bool | None) -> Text:
    """What an unknown server answered is printed as text: no markup, no control characters."""
    if value is None:
        return Text("-")
    text = ("no", "yes")[value] if isinstance(value, bool) else str(value)
    return Text(text if text.isprintable() else ascii(text))


def _milliseconds(sorted_seconds: Sequence[float], quantile: float) -> str:
    """The nearest-rank quantile: the latency of a copy that exists."""
    return f"{sorted_seconds[math.ceil(quantile * len(sorted_seconds)) - 1] * 1000:.1f}"
