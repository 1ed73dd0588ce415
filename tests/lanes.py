"""The order of the tests in a run of several lanes, so that no lane still has the longest ones when the others end.

`--dist worksteal` gives each lane one piece of the list. A lane that has finished takes tests from the end of another's
piece. So each piece begins with long modules.
"""

from collections.abc import Hashable, Sequence
from itertools import islice
from typing import Any, NamedTuple


class Placed(NamedTuple):
    """A test, its module, and the seconds of its timeout; 0: the default."""

    item: Any
    module: Hashable
    seconds: float


def in_lanes(tests: Sequence[Placed], lanes: int) -> list[Any]:
    """All items. The modules with a timeout of their own are dealt out, the longest first; the others fill the pieces.

    The order within a module stays.
    """
    modules: dict[Hashable, list[Placed]] = {}
    for test in tests:
        modules.setdefault(test.module, []).append(test)
    longest = {module: max(test.seconds for test in placed) for module, placed in modules.items()}
    pieces: list[list[Placed]] = [[] for _ in range(lanes)]
    for module in sorted((module for module in modules if longest[module]), key=lambda module: -longest[module]):
        min(pieces, key=len).extend(modules[module])
    others = iter([test for test in tests if not longest[test.module]])
    left = len(tests)
    for number, piece in enumerate(pieces):
        size = left // (lanes - number)  # as xdist cuts them
        piece.extend(islice(others, max(0, size - len(piece))))
        left -= size
    return [test.item for test in [*(test for piece in pieces for test in piece), *others]]
