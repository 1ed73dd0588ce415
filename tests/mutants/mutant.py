"""What a mutant is: one rule of the claim protocol, broken by one small change in one place of the service.

Guarantees: a mutant is found by the name of its function and by its syntax. Moving a function to another file,
reformatting and comments do not affect it. If it is not found exactly once, the error says what was looked for, and
what is there instead.
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
Replacement = Callable[[], None]
_Node = TypeVar("_Node", bound=ast.AST)


class DoesNotFitError(Exception):
    """The service does not have exactly once what the mutant changes."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change of Python code: in `scope`, `old` becomes `new`, and the test `red` must fail.

    `scope` is a function (`Ledger.claim`), a class, or a constant of a module (`STATUS`), in any file of the package.
    If several have that name, it begins with the module's: `webhook.answer`.

    `old` and `new` are source code: an expression, or statements. `...` in `old` stands for any expression, or for all
    statements of a block; in `new` it stands for the same code again. An empty `new` is `pass`.
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
        path = self._file()
        tree = ast.parse((PACKAGE / path).read_text())
        [scope] = (node for name, node in scopes(tree, module_of(path)) if is_called(name, self.scope))
        places = list(self._replacements(scope))
        if len(places) != 1:
            raise DoesNotFitError(self._explanation(path, scope, len(places)))
        places[0]()
        return path, ast.unparse(tree)

    def _file(self) -> Path:
        names = names_in(PACKAGE)
        found = [name for name in names if is_called(name, self.scope)]
        if len(found) == 1:
            return names[found[0]]
        if found:
            reason = f"these have its name: {', '.join(found)}"
        else:
            dots = self.scope.count(".")
            ends = {".".join(name.split(".")[-dots - 1 :]): name for name in names}
            near = difflib.get_close_matches(self.scope, ends, 3, 0)
            reason = f"the nearest names are {', '.join(ends[end] for end in near)}"
        raise DoesNotFitError(f"the mutant {self.name} no longer fits: {self.scope} is not found once: {reason}")

    def _explanation(self, path: Path, scope: ast.AST, count: int) -> str:
        candidates = {each.partition("\n")[0]: each for each in self._candidates(scope)}
        near = difflib.get_close_matches(self._first_line(), candidates, 1, 0)
        instead = f"The nearest code that is there is\n\n{candidates[near[0]]}\n\n" if near and not count else ""
        return (
            f"the mutant {self.name} no longer fits: {self.scope} ({path}) has this {count} times instead of once:\n\n"
            f"{self.old}\n\n{instead}Find where the rule is implemented now, and break it there: {self.rule}"
        )

    def _replacements(self, scope: ast.AST) -> Iterator[Replacement]:
        """A replacement for each place in `scope` that matches `old`."""
        match ast.parse(self.old).body, ast.parse(self.new or "pass").body:
            case [ast.Expr(old)], [ast.Expr(new)]:
                return find_expression(scope, old, new)
            case old, new:
                return find_statements(scope, old, new)

    def _first_line(self) -> str:
        return ast.unparse(ast.parse(self.old)).partition("\n")[0]

    def _candidates(self, scope: ast.AST) -> list[str]:
        match ast.parse(self.old).body:
            case [ast.Expr()]:
                kind: type[ast.AST] = ast.expr
            case _:
                kind = ast.stmt
        return [ast.unparse(node) for node in ast.walk(scope) if isinstance(node, kind)]


@dataclass(frozen=True, slots=True)
class TextMutant(Mutant):
    """A change inside a string of `scope`, which is SQL or Lua. The white space between words does not matter."""

    def _replacements(self, scope: ast.AST) -> Iterator[Replacement]:
        pattern = r"\s+".join(re.escape(word) for word in self.old.split())
        for node, text in strings(scope):
            for found in re.finditer(pattern, text):
                changed = text[: found.start()] + self.new + text[found.end() :]
                yield functools.partial(setattr, node, "value", changed)

    def _first_line(self) -> str:
        return " ".join(self.old.split())

    def _candidates(self, scope: ast.AST) -> list[str]:
        return [line.strip() for _, text in strings(scope) for line in text.splitlines()]


# -- names ----------------------------------------------------------------------------------------------


def module_of(path: Path) -> str:
    """The module of a file of the package."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def is_called(name: str, scope: str) -> bool:
    """Whether the full name ends with `scope`."""
    return f".{name}".endswith(f".{scope}")


@functools.cache
def names_in(package: Path) -> dict[str, Path]:
    """The full name of everything in the package that can be a scope, with its file."""
    paths = [path.relative_to(package) for path in sorted(package.rglob("*.py"))]
    trees = ((path, ast.parse((package / path).read_text())) for path in paths)
    return {name: path for path, tree in trees for name, _ in scopes(tree, module_of(path))}


def scopes(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """All functions and classes below `node`, and the constants of modules and classes, with their full names."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield f"{prefix}.{name}", child
                yield from scopes(child, f"{prefix}.{name}")
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                if isinstance(node, ast.Module | ast.ClassDef):
                    yield f"{prefix}.{name}", child
            case _:
                yield from scopes(child, prefix)


# -- places ---------------------------------------------------------------------------------------------


def find_expression(scope: ast.AST, old: ast.expr, new: ast.expr) -> Iterator[Replacement]:
    """A replacement for each expression in `scope` that matches `old`."""
    for node, field, value in fields(scope):
        if isinstance(value, ast.expr) and (kept := match_code(old, value)) is not None:
            yield functools.partial(setattr, node, field, fill(new, kept))
        for number, each in enumerate(value if isinstance(value, list) else ()):
            if isinstance(each, ast.expr) and (kept := match_code(old, each)) is not None:
                yield functools.partial(value.__setitem__, number, fill(new, kept))


def find_statements(scope: ast.AST, old: list[ast.stmt], new: list[ast.stmt]) -> Iterator[Replacement]:
    """A replacement for each sequence of statements in `scope` that matches `old`."""
    for _, _, value in fields(scope):
        if not isinstance(value, list) or not value or not isinstance(value[0], ast.stmt):
            continue
        for number in range(len(value) - len(old) + 1):
            part = slice(number, number + len(old))
            if (kept := match_code(old, value[part])) is not None:
                yield functools.partial(value.__setitem__, part, fill(ast.Module(new, []), kept).body)


def fields(scope: ast.AST) -> Iterator[tuple[ast.AST, str, Any]]:
    """Each field of `scope` and of each node below it."""
    return ((node, field, value) for node in ast.walk(scope) for field, value in ast.iter_fields(node))


def strings(scope: ast.AST) -> Iterator[tuple[ast.Constant, str]]:
    """The strings below `scope`."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node, node.value


def match_code(pattern: object, found: object) -> list[object] | None:
    """The code that each `...` of the pattern stands for, in order; None if `found` does not match."""
    match pattern:
        case ast.Constant(value=builtins.Ellipsis) if isinstance(found, ast.expr):
            return [found]
        case [ast.Expr(ast.Constant(value=builtins.Ellipsis))] if isinstance(found, list):
            return [found]
        case ast.AST() if type(pattern) is type(found):
            pairs = [(value, getattr(found, field)) for field, value in ast.iter_fields(pattern)]
        case list() if isinstance(found, list) and len(found) == len(pattern):
            pairs = list(zip(pattern, found, strict=True))
        case _:
            return [] if pattern == found else None
    kept: list[object] = []
    for pair in pairs:
        if (more := match_code(*pair)) is None:
            return None
        kept += more
    return kept


def fill(code: _Node, kept: list[object]) -> _Node:
    """A copy of `code` with the kept code in place of each `...`, in order."""
    return cast(_Node, _Filling(kept[:]).visit(copy.deepcopy(code)))


class _Filling(ast.NodeTransformer):
    def __init__(self, kept: list[object]) -> None:
        self._kept = kept

    def visit_Constant(self, node: ast.Constant) -> Any:
        return self._kept.pop(0) if node.value is ... else node

    def visit_Expr(self, node: ast.Expr) -> Any:
        new = self.visit(node.value)
        return new if isinstance(new, list) else ast.Expr(new)
