"""The progress bar: what it shows on a terminal, and nothing elsewhere."""

import io

from rich.console import Console

from firstclaim.progress import progress_bar


def test_the_bar_is_silent_where_there_is_no_terminal() -> None:
    """Piped output has no trace of a progress bar."""
    out = io.StringIO()
    with progress_bar(Console(file=out), "sending", 2) as bar:
        bar.advance()
        bar.update(2, "sent")
    assert out.getvalue() == ""


def test_the_bar_counts_on_a_terminal() -> None:
    """On a terminal the bar shows the description, and how many of how many are completed."""
    out = io.StringIO()
    with progress_bar(Console(file=out, force_terminal=True, width=80), "sending", 2) as bar:
        bar.advance()
        bar.advance()
    assert "2/2" in out.getvalue()
    assert "sending" in out.getvalue()


def test_the_text_beside_the_bar_can_change() -> None:
    """A bar that is not counted shows the newest text alone."""
    out = io.StringIO()
    with progress_bar(Console(file=out, force_terminal=True, width=80), "starting", 10, counted=False) as bar:
        bar.update(5, "5 s, 400/s")
    assert "5 s, 400/s" in out.getvalue()
    assert "5/10" not in out.getvalue()
