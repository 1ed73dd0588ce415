"""The progress bar of every command that takes a while. There is none where the output is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class Bar:
    """A bar that is shown until its block ends."""

    def __init__(self, progress: Progress, description: str, total: float | None) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total)

    def advance(self, steps: int = 1) -> None:
        """Add `steps` to what is completed."""
        self._progress.advance(self._task, steps)

    def update(self, completed: float, description: str | None = None) -> None:
        """Set what is completed of the total, and the text beside the bar."""
        self._progress.update(self._task, completed=completed, description=description)


@contextmanager
def progress_bar(console: Console, description: str, total: float | None, *, counted: bool = True) -> Iterator[Bar]:
    """A bar with its description; `counted` shows how many of how many too. Without a `total` it only counts."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    count = [MofNCompleteColumn()] if counted else []
    # The text comes last: its length may change, and the bar must not move.
    columns = (BarColumn(bar_width=20), *count, TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bar(progress, description, total)
