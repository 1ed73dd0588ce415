"""Rendering on the admin page: escaping, payloads, the chart, client addresses, filters."""

import json
import re
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path

import pytest

from firstclaim.admin.chart import HEIGHT, ORDER, draw
from firstclaim.admin.events import Filters, _parse_cursor
from firstclaim.admin.json_view import changes, first_lines, fold, pretty_json
from firstclaim.admin.rendering import STATIC_TYPES, Templates, printable, static
from firstclaim.admin.request import client_address, is_loopback
from firstclaim.operations.traffic import Counts
from firstclaim.status import Status

TEMPLATES = Path(str(files("firstclaim.admin"))) / "templates"
NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)


# -- text ---------------------------------------------------------------------------------------------


def test_every_template_escapes() -> None:
    """No template marks a value as safe, switches escaping off, or has an inline script or style."""
    found = sorted(TEMPLATES.glob("*.html"))
    assert len(found) >= 9
    for path in found:
        text = path.read_text()
        assert not re.search(r"\|\s*safe|autoescape|Markup|<script>|<style|\sstyle=|\son\w+=|javascript:|https?:", text)
        assert re.findall(r"<script[^>]*>", text) in ([], ['<script src="{{ path }}/static/admin.js" defer>']), path
        for tag in re.findall(r'<form[^>]*method="post"[^>]*>.*?</form>', text, flags=re.DOTALL):
            assert 'm.hidden("token"' in tag, path


def test_text_is_escaped_and_undefined_names_are_errors() -> None:
    """The environment of all templates escapes text and rejects undefined names."""
    environment = Templates()._environment
    assert environment.from_string("{{ x }}").render(x="<img onerror=1>'\"") == "&lt;img onerror=1&gt;&#39;&#34;"
    with pytest.raises(Exception, match="undefined"):
        environment.from_string("{{ missing }}").render()


def test_invisible_characters_are_escaped() -> None:
    """Control characters and overrides of the text direction become escapes; lines and letters stay."""
    assert printable("a\u202eb\x00c\x1b\nü€") == "a\\u202eb\\u0000c\\u001b\nü€"


@pytest.mark.parametrize(
    "body",
    [
        '{"a":1,"b":[1,2,{"c":null}],"d":{},"e":[],"f":"x, {y}: [\\"z\\"]"}',
        '[[],[[]],{"a":{"b":{}}}]',
        '{ "n" : 1.10 , "big" : 123456789012345678901234567890 , "e":1E400 }',
        '"alone"',
        "17",
    ],
)
def test_a_payload_is_only_formatted(body: str) -> None:
    """Without white space the formatted payload is the original text: no number is rounded."""
    shown = pretty_json(body)

    def packed(text: str) -> str:
        return re.sub(r'("(?:[^"\\]|\\.)*")|\s+', r"\1", text)

    assert packed(shown) == packed(body)
    if "1E400" not in body:
        assert shown == json.dumps(json.loads(body, parse_float=_Kept), indent=2).replace("1.1,", "1.10,")


class _Kept(float):
    """A number that is compared with two digits, as in the sample."""


@pytest.mark.parametrize("body", ["[" * 200_000, '{"a":' * 100_000, "]" * 100_000, '"' * 100_001, "{]" * 50_000])
def test_a_hostile_payload_is_formatted(body: str) -> None:
    """A deep, truncated or unbalanced payload needs no recursion, and its indentation is limited."""
    assert len(pretty_json(body)) < 100 * len(body)


def test_a_payload_is_folded() -> None:
    """What is between two brackets can be folded; the text of all lines is the formatted payload."""
    pretty = pretty_json('{"a":{"b":[1,true],"c":{}},"d":"x: {"}')
    lines = fold(pretty)
    assert [line.kind for line in lines] == [
        "open",
        "open",
        "open",
        "line",
        "line",
        "close",
        "line",
        "close",
        "line",
        "close",
    ]
    assert "\n".join("".join(text for _, text in line.parts) for line in lines) == pretty
    colours = {text.strip(): css for line in lines for css, text in line.parts if css}
    keys = dict.fromkeys(['"a":', '"b":', '"c":', '"d":'], "key")
    assert colours == {**keys, "1": "number", "true": "word", '"x: {"': "string"}


@pytest.mark.parametrize("body", ["[" * 9000, '{"a":' * 9000, "]" * 9000, '{"a":{}}' * 9000])
def test_a_hostile_payload_has_few_folds(body: str) -> None:
    """However deep or unbalanced a payload is, each fold is closed, and there are only so many of them."""
    kinds = [line.kind for line in fold(pretty_json(body))]
    assert kinds.count("open") == kinds.count("close") <= 2000


@pytest.mark.parametrize(
    "body",
    [json.dumps(list(range(100_000))), json.dumps(["x" * 600_000]), json.dumps([["y" * 5000]] * 120), "[" * 600_000],
)
def test_a_large_payload_is_cut(body: str) -> None:
    """A page has so many lines and characters of it, and says how many lines are cut or left out."""
    pretty = pretty_json(body)
    shown, left_out = first_lines(pretty)
    assert len(shown) < 220_000
    lines = shown.split("\n")
    whole = sum(each == line for each, line in zip(lines, pretty.split("\n"), strict=False))
    assert left_out == len(pretty.split("\n")) - whole > 0
    rendered = Templates()._environment.from_string(
        '{% import "_macros.html" as m %}{% for line in lines %}{{ m.json_line(line) }}{% endfor %}'
    )
    assert len(rendered.render(lines=fold(shown))) < 1_000_000
    assert first_lines(pretty_json("[1]")) == ("[\n  1\n]", 0)


def test_a_large_value_of_a_change_is_cut() -> None:
    """Values that differ behind the cut are a change all the same."""
    before, after = "x" * 3000 + "1", "x" * 3000 + "2"
    [change] = changes(json.dumps({"data": {"object": {"a": after}, "previous_attributes": {"a": before}}}))
    assert change.before == change.after == '"' + "x" * 1999 + "…"


def test_changes_are_shown_before_and_after() -> None:
    """Each field of `previous_attributes` is shown with its path, before and after; a removed one says so."""
    body = json.dumps(
        {
            "data": {
                "object": {"status": "active", "items": {"data": [1]}, "metadata": {"b": "2"}, "plan": {"id": "p"}},
                "previous_attributes": {"status": "past_due", "items": {"data": [1, 2]}, "metadata": {"a": None}},
            }
        }
    )
    assert [(each.path, each.before, each.after) for each in changes(body)] == [
        ("status", '"past_due"', '"active"'),
        ("items.data", "[\n  1,\n  2\n]", "[\n  1\n]"),
        ("metadata.a", "null", None),
    ]
    for other in ("{}", "[]", "x", '{"data":{"object":{},"previous_attributes":3}}', "[" * 100_000):
        assert changes(other) == []


def test_only_our_static_files_are_served() -> None:
    """Files are served by name from a list, so no path leads elsewhere; none loads anything from another host."""
    for name in STATIC_TYPES:
        response = static(name)
        assert response is not None
        text = bytes(response.body).decode()
        assert not re.search(r"@import|url\(|https?:(?!//www\.w3\.org/2000/svg)|<script", text)
    for name in ("../site.py", "..", "", "admin.css/", "/etc/passwd", "ADMIN.CSS"):
        assert static(name) is None


# -- the chart ----------------------------------------------------------------------------------------


def hours(*counts: dict[Status, int]) -> Counts:
    hour = timedelta(hours=1)
    return Counts(hour, [(NOW + number * hour, each) for number, each in enumerate(counts)])


def test_a_bar_has_a_segment_per_status() -> None:
    """Segments are stacked without gaps, as high as their number; the scale ends at a round number."""
    chart = draw(hours({}, {Status.COMPLETED: 60, Status.FAILED: 20, Status.DEAD: 20}))
    assert (chart.top, chart.events) == (100, 100)
    empty, full = chart.bars
    assert (empty.segments, empty.events) == ([], 0)
    assert [segment.status for segment in full.segments] == [each for each in ORDER if each in chart.shown]
    assert [segment.height for segment in full.segments] == [HEIGHT * share for share in (0.2, 0.2, 0.6)]
    ground = HEIGHT
    for segment in full.segments:
        assert segment.y + segment.height == pytest.approx(ground, abs=0.02)
        ground = segment.y


def test_the_chart_tells_the_truth() -> None:
    """One dead event among a hundred thousand is as high as its share, and is seen by the mark below its bar."""
    [bar, other] = draw(hours({Status.COMPLETED: 99_998, Status.DEAD: 1, Status.FAILED: 1}, {Status.COMPLETED: 9})).bars
    assert [segment.height for segment in bar.segments] == pytest.approx([0.0016, 0.0016, 159.9968], abs=0.002)
    assert sum(segment.height for segment in bar.segments) == pytest.approx(HEIGHT, abs=0.01)
    assert (bar.mark, other.mark) == (Status.DEAD, None)


@pytest.mark.parametrize(("most", "top"), [(0, 1), (1, 1), (2, 2), (3, 5), (6, 10), (101, 200), (4999, 5000)])
def test_the_scale_ends_at_a_round_number(most: int, top: int) -> None:
    """It ends at 1, 2 or 5 with zeros, and never at 0."""
    assert draw(hours({Status.COMPLETED: most} if most else {})).top == top


# -- requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forwarded", "proxies", "address"),
    [
        ([], 0, "10.0.0.1"),
        (["6.6.6.6"], 0, "10.0.0.1"),  # no proxy is configured
        (["6.6.6.6, 192.0.2.1"], 1, "192.0.2.1"),
        (["6.6.6.6", "192.0.2.1, 10.9.9.9"], 2, "192.0.2.1"),
        (["192.0.2.1:4711"], 1, "192.0.2.1"),
        (["[2001:db8::1]:4711"], 1, "2001:db8::1"),
        (["2001:db8::1"], 1, "2001:db8::1"),
        (["192.0.2.1"], 2, "10.0.0.1"),  # did not pass one of them
        (["<script>"], 1, "10.0.0.1"),
    ],
)
def test_the_client_s_address(forwarded: list[str], proxies: int, address: str) -> None:
    """It is the entry that the outermost trusted proxy wrote, whatever the client put before it."""
    assert client_address("10.0.0.1", forwarded, proxies) == address


def test_is_loopback() -> None:
    """Any loopback name or address is accepted, and no name that only begins or ends like one."""
    for host in ("localhost", "localhost:8000", "127.0.0.1:8000", "127.3.2.1", "[::1]:8000", "[::1]", "x.localhost:1"):
        assert is_loopback(host), host
    for host in ("", "admin.test", "localhost.evil.test", "127.0.0.1.evil.test", "10.0.0.1:8000", "evillocalhost", "["):
        assert not is_loopback(host), host


def test_an_unknown_filter_is_left_out() -> None:
    """Unknown statuses and ages are left out and named, and each kind of id is searched where it can be."""
    filters = Filters.of({"status": ["dead", "nonsense", "failed"], "age": ["<b>"], "q": ["cus_1"]})
    assert (filters.statuses, filters.age) == ((Status.FAILED, Status.DEAD), None)
    assert filters.unread == ("status", "age")
    assert filters.search.customer
    assert filters.search.object_id == "cus_1"
    assert Filters(q="evt_1").search.selection.event_ids == ["evt_1"]
    assert not Filters(q="in_1").search.customer
    assert Filters(q="a&b=c", statuses=(Status.DEAD,)).address("/admin") == "/admin/events?q=a%26b%3Dc&status=dead"


def test_an_invalid_cursor_is_the_start() -> None:
    """A malformed cursor in the address is no error."""
    for text in (None, "", "x", "~", "2026-01-01~evt_1", "2026-01-01T00:00:00+00:00~", "9" * 300):
        assert _parse_cursor(text) is None
    cursor = _parse_cursor("2026-01-01T00:00:00.000001+00:00~evt_1")
    assert cursor is not None
    assert cursor.event_id == "evt_1"
