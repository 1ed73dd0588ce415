"""A payload as text that can be folded, and what an event says has changed.

Guarantees: the text has the payload's own tokens, so that no number is rounded and no duplicate name is dropped.
Nothing here uses recursion on the payload's depth: a signed body can have a hundred thousand levels.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

_INDENT_MOST: Final = 32  # a payload can have a hundred thousand levels, and each would be indented by its depth
_FOLDS_MOST: Final = 2000  # levels and elements that a browser still shows quickly
# Each value has a tag: without these limits, 600 kB of short values were a page of 10 MB.
_LINES_MOST: Final = 5000
_CHARACTERS_MOST: Final = 200_000
_LINE_CHARACTERS_MOST: Final = 20_000
_CHANGES_MOST: Final = 200
_VALUE_CHARACTERS_MOST: Final = 2000
_CUT: Final = "…"
_LEXEME = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)
_PART = re.compile(r'("(?:[^"\\]|\\.)*")(: )?|(-?\d[\d.eE+-]*)|(true|false|null)|([^"\-\dtfn]+|.)', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Line:
    """One line: parts of text with their class (`key`, `string`, `number`, `word`, or none).

    `kind` is `open` if the lines up to the matching `close` can be folded.
    """

    kind: str
    parts: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Change:
    """A field of `previous_attributes`: its path, and its value before and after, as JSON. None: it was not there."""

    path: str
    before: str
    after: str | None


def pretty_json(body: str) -> str:
    """JSON with one item per line. The tokens are unchanged: no number is rounded, and no duplicate name is dropped."""
    lines: list[str] = []
    line, depth, before = "", 0, ""
    for lexeme in _LEXEME.findall(body):
        if lexeme in ("}", "]"):
            depth -= 1
            if before not in ("{", "["):
                lines.append(line)
                line = "  " * min(depth, _INDENT_MOST)
        elif before in ("{", "[", ","):
            lines.append(line)
            line = "  " * min(depth, _INDENT_MOST)
        line += ": " if lexeme == ":" else lexeme
        depth += lexeme in ("{", "[")
        before = lexeme
    return "\n".join([*lines, line])


def first_lines(pretty: str) -> tuple[str, int]:
    """As much of `pretty_json` as a page has, and how many of its lines are not in it or are cut."""
    lines = pretty.split("\n")
    kept: list[str] = []
    left, cut = _CHARACTERS_MOST, 0
    for line in lines[:_LINES_MOST]:
        if left <= 0:
            break
        most = min(left, _LINE_CHARACTERS_MOST)
        cut += len(line) > most
        kept.append(line if len(line) <= most else line[:most] + _CUT)
        left -= len(kept[-1])
    return "\n".join(kept), len(lines) - len(kept) + cut


def fold(pretty: str) -> list[Line]:
    """The lines of `pretty_json`, those between two brackets to be folded, up to a depth and a number."""
    lines: list[Line] = []
    folds = 0
    open_kinds: list[bool] = []  # of each open bracket: whether it can be folded
    for text in pretty.split("\n"):
        kind = "line"
        if text.lstrip()[:1] in ("}", "]") and open_kinds and open_kinds.pop():
            kind = "close"
        if text[-1:] in ("{", "["):
            can_fold = kind == "line" and len(open_kinds) < _INDENT_MOST and folds < _FOLDS_MOST
            open_kinds.append(can_fold)
            folds += can_fold
            kind = "open" if can_fold else kind
        lines.append(Line(kind, [("", text)] if text[-1:] == _CUT else list(_coloured(text))))
    # A truncated payload leaves brackets open.
    return lines + [Line("close", []) for can_fold in open_kinds if can_fold]


def _coloured(text: str) -> Iterator[tuple[str, str]]:
    for found in _PART.finditer(text):
        quoted, colon, number, word, _ = found.groups()
        css = ("key" if colon else "string") if quoted else "number" if number else "word" if word else ""
        yield css, found.group()


def changes(body: str) -> list[Change]:
    """What `data.previous_attributes` of the event says has changed, at most `_CHANGES_MOST` fields of it.

    Stripe repeats the whole of a list in which one field changed: fields that are equal are left out.
    """
    try:
        data = json.loads(body)["data"]
        before, after = data["previous_attributes"], data["object"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    found: list[Change] = []
    waiting = [("", before, after)]
    while waiting and len(found) < _CHANGES_MOST:
        path, old, new = waiting.pop(0)
        if isinstance(old, dict) and old and isinstance(new, dict):
            waiting = [(f"{path}.{name}".lstrip("."), old[name], new.get(name, _MISSING)) for name in old] + waiting
        elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            waiting = [(f"{path}[{n}]", *pair) for n, pair in enumerate(zip(old, new, strict=True))] + waiting
        elif path and (texts := (_text(old), _text(new)))[0] != texts[1]:
            found.append(Change(path, _cut(texts[0]), None if new is _MISSING else _cut(texts[1])))
    return found


_MISSING: Final = object()


def _text(value: Any) -> str:
    if value is _MISSING:
        return ""
    try:
        return json.dumps(value, ensure_ascii=False, indent=2)
    except RecursionError:
        return _CUT


def _cut(text: str) -> str:
    return text if len(text) <= _VALUE_CHARACTERS_MOST else text[:_VALUE_CHARACTERS_MOST] + _CUT
