"""What a mutant is: one rule of the claim protocol, broken by one small change in one place of the service.

Guarantees: a mutant is found by the name of its function and by its syntax, never by how the text is laid out. Moving
a function to another file, reformatting, and comments do not concern it. Where it is not found exactly once the error
says what was looked for, and what is there instead.
"""

import ast
import builtins
import copy
import difflib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

PACKAGE = Path(__file__).parents[2] / "service" / "firstclaim"
_Node = TypeVar("_Node", bound=ast.AST)


class DoesNotFitError(Exception):
    """The service does not have exactly once what the mutant changes."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change of Python code: in `scope`, `old` becomes `new`, and `red` is the test that must fail.

    `scope` is a function (`Ledger._insert`), a class or a constant of a module (`STATUS`), in whichever file of the
    package it is. If several have this name it begins with the module's: `web.health.check`.

    `old` and `new` are source code: an expression, or statements. `...` in `old` is any expression, or all statements
    of a block; in `new` it is the same again. An empty `new` is `pass`.
    """

    name: str
    rule: str
    scope: str
    old: str
    new: str
    red: str

    @property
    def node_id(self) -> str:
        """The test as pytest calls it."""
        return f"tests/{self.red}"

    def applied(self) -> tuple[Path, str]:
        """The file that changes, relative to the package, and its source with the rule broken.

        Raises DoesNotFitError.
        """
        path = self._find_file()
        tree = ast.parse((PACKAGE / path).read_text())
        [scope] = (node for name, node in named(tree, module_of(path)) if is_called(name, self.scope))
        replacements = list(self._find(scope))
        if len(replacements) != 1:
            raise DoesNotFitError(self._explained(path, scope, len(replacements)))
        replacements[0]()
        return path, ast.unparse(ast.fix_missing_locations(tree))

    def _find_file(self) -> Path:
        found = [(name, path) for name, path in names() if is_called(name, self.scope)]
        if len(found) == 1:
            return found[0][1]
        if found:
            reason = f"several have its name: {', '.join(name for name, _ in found)}"
        else:
            parts = self.scope.count(".") + 1
            ends = {".".join(name.split(".")[-parts:]): name for name, _ in names()}
            near = [ends[end] for end in difflib.get_close_matches(self.scope, ends, 3, 0)]
            reason = f"there is none of this name; the nearest are {', '.join(near)}"
        raise DoesNotFitError(f"{self.name}: the service's {self.scope} is not found: {reason}")

    def _explained(self, path: Path, scope: ast.AST, count: int) -> str:
        reason = f"{self.name}: {self.scope} ({path}) has this {count} times instead of once:\n\n{self.old}\n\n"
        if not count:
            near = difflib.get_close_matches(self._normal(self.old), self._candidates(scope), 1, 0)
            reason += f"What comes nearest is\n\n{near[0] if near else ast.unparse(scope)}\n\n"
        return f"{reason}Find where the service keeps the rule now, and break it there: {self.rule}"

    def _find(self, scope: ast.AST) -> Iterator[Callable[[], None]]:
        """A replacement for each place in `scope` that is `old`."""
        old, new = ast.parse(self.old).body, ast.parse(self.new or "pass").body
        match old, new:
            case [ast.Expr(wanted)], [ast.Expr(value)]:
                return find_expression(scope, wanted, value)
            case _:
                return find_statements(scope, old, new)

    def _normal(self, source: str) -> str:
        return ast.unparse(ast.parse(source))

    def _candidates(self, scope: ast.AST) -> list[str]:
        return [ast.unparse(node) for node in ast.walk(scope) if isinstance(node, ast.stmt | ast.expr)]


@dataclass(frozen=True, slots=True)
class TextMutant(Mutant):
    """A change inside of a string of `scope`: of SQL, or of Lua. Only how words are spaced does not count."""

    def _find(self, scope: ast.AST) -> Iterator[Callable[[], None]]:
        pattern = r"\s+".join(re.escape(word) for word in self.old.split())
        for node, text in strings(scope):
            for found in re.finditer(pattern, text):
                changed = text[: found.start()] + self.new + text[found.end() :]
                yield functools.partial(setattr, node, "value", changed)

    def _normal(self, source: str) -> str:
        return " ".join(source.split())

    def _candidates(self, scope: ast.AST) -> list[str]:
        return [line.strip() for _, text in strings(scope) for line in text.splitlines()]


# -- names ----------------------------------------------------------------------------------------------


def module_of(path: Path) -> str:
    """A file's module, as the service imports it."""
    return ".".join(("firstclaim", *path.with_suffix("").parts)).removesuffix(".__init__")


def is_called(name: str, scope: str) -> bool:
    """Whether the full name is that of `scope`, which leaves out any beginning."""
    return f".{name}".endswith(f".{scope}")


@functools.cache
def names() -> tuple[tuple[str, Path], ...]:
    """The full names of everything in the package that a mutant may have as its scope, each with its file."""
    paths = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]
    return tuple(
        (name, path) for path in paths for name, _ in named(ast.parse((PACKAGE / path).read_text()), module_of(path))
    )


def named(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """The functions and classes below `node`, however deep, and the constants of a module or class."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield f"{prefix}.{name}", child
                yield from named(child, f"{prefix}.{name}")
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                if isinstance(node, ast.Module | ast.ClassDef):
                    yield f"{prefix}.{name}", child
            case _:
                yield from named(child, prefix)


# -- places ---------------------------------------------------------------------------------------------


def find_expression(scope: ast.AST, wanted: ast.expr, new: ast.expr) -> Iterator[Callable[[], None]]:
    """A replacement for each expression in `scope` that is as wanted."""
    for node, field, value in fields(scope):
        if isinstance(value, ast.expr) and (left := matched(wanted, value)) is not None:
            yield functools.partial(setattr, node, field, filled(new, left))
        for number, each in enumerate(value if isinstance(value, list) else ()):
            if isinstance(each, ast.expr) and (left := matched(wanted, each)) is not None:
                yield functools.partial(value.__setitem__, number, filled(new, left))


def find_statements(scope: ast.AST, wanted: list[ast.stmt], new: list[ast.stmt]) -> Iterator[Callable[[], None]]:
    """A replacement for each run of statements in `scope` that is as wanted."""
    for _, _, value in fields(scope):
        if not isinstance(value, list) or not value or not isinstance(value[0], ast.stmt):
            continue
        for number in range(len(value) - len(wanted) + 1):
            run = slice(number, number + len(wanted))
            if (left := matched(wanted, value[run])) is not None:
                statements = filled(ast.Module(new, []), left).body
                yield functools.partial(value.__setitem__, run, statements)


def fields(scope: ast.AST) -> Iterator[tuple[ast.AST, str, Any]]:
    """Each field of each node below `scope`, and of `scope` itself."""
    return ((node, field, value) for node in ast.walk(scope) for field, value in ast.iter_fields(node))


def matched(wanted: object, found: object) -> list[object] | None:
    """What stands where `wanted` has `...`, in that order; None: `found` is something else."""
    match wanted:
        case ast.Constant(value=builtins.Ellipsis) if isinstance(found, ast.expr):
            return [found]
        case [ast.Expr(ast.Constant(value=builtins.Ellipsis))] if isinstance(found, list):
            return [found]
        case ast.AST():
            if type(wanted) is not type(found):
                return None
            pairs = [(value, getattr(found, field, None)) for field, value in ast.iter_fields(wanted)]
        case list():
            if not isinstance(found, list) or len(found) != len(wanted):
                return None
            pairs = list(zip(wanted, found, strict=True))
        case _:
            return [] if wanted == found else None
    lists = [matched(*pair) for pair in pairs]
    return None if None in lists else [each for some in lists for each in some or ()]


class _Filling(ast.NodeTransformer):
    """Puts back, in their order, what stood where the pattern has `...`."""

    def __init__(self, left: list[object]) -> None:
        self._left = left

    def visit_Constant(self, node: ast.Constant) -> Any:
        return self._left.pop(0) if node.value is ... else node

    def visit_Expr(self, node: ast.Expr) -> Any:
        new = self.visit(node.value)
        return new if isinstance(new, list) else ast.Expr(new)


def filled(new: _Node, left: list[object]) -> _Node:
    """`new`, with what is left put where it has `...`."""
    return cast(_Node, _Filling(left[:]).visit(copy.deepcopy(new)))


def strings(scope: ast.AST) -> Iterator[tuple[ast.Constant, str]]:
    """The strings below `scope`."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node, node.value
