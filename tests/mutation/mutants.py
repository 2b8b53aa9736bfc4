"""Mutants: the source of a module with one small fault planted in the body of one function.

A fault is another comparison, operator, constant or aggregate (``min`` for ``max``), two exchanged
branches, a dropped ``not`` or sign, or a call that is left out. Nothing is planted in annotations,
decorators, defaults, docstrings, assertions and the texts of errors: what changes there is no
behaviour that a test of the function should hold. The condition that leads to an error is planted in
like any other.
"""

import ast
import functools
import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OTHER = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Add,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
"""What an operator is exchanged for."""

PAIRS = (
    ("all", "any"),
    ("min", "max"),
    ("amin", "amax"),
    ("argmin", "argmax"),
    ("sum", "mean"),
    ("floor", "ceil"),
    ("triu", "tril"),
)
OTHER_NAME = dict(PAIRS) | {right: left for left, right in PAIRS}
"""What a function or method is exchanged for."""

UNTOUCHED = ("annotation", "returns", "decorator_list", "type_params", "defaults", "kw_defaults")
"""Parts of a function that are no part of its code: they are worked out where it is defined."""
SETTLED = (ast.Raise, ast.Assert)
"""Statements in which nothing is planted."""
ALIKE = ("strict",)
"""Arguments that check a call without changing what a right one returns."""


@dataclass(frozen=True)
class Mutant:
    """One fault in one function."""

    path: Path
    number: int
    """Its place in the order of all faults of the file."""
    function: str
    """Qualified name of the outermost function around it, as in a code object's ``co_qualname``."""
    first_line: int
    last_line: int
    change: str
    """What stood there and what stands there now."""

    def source(self) -> str:
        """Return the module's source with the fault in it."""
        tree = ast.parse(self.path.read_text())
        _, _, new, put = next(itertools.islice(_faults(tree), self.number, None))
        put(new)
        return ast.unparse(tree)


def mutants(path: Path) -> list[Mutant]:
    """Return every mutant of a file, in the order of its source."""
    return [
        Mutant(
            path,
            number,
            function,
            old.lineno,
            old.end_lineno,
            f"{_short(old)} -> {_short(new)}",
        )
        for number, (function, old, new, _) in enumerate(_faults(ast.parse(path.read_text())))
    ]


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in the place of a node; the node is left as it is."""
    match node:
        case ast.Compare(left, ops, comparators):
            for index, op in enumerate(ops):
                other = [*ops[:index], OTHER[type(op)](), *ops[index + 1 :]]
                yield ast.Compare(left, other, comparators)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(OTHER[type(op)](), values)
        case ast.BinOp(left, op, right) if type(op) in OTHER and not _is_text(left):
            yield ast.BinOp(left, OTHER[type(op)](), right)
        case ast.AugAssign(target, op, value) if type(op) in OTHER:
            yield ast.AugAssign(target, OTHER[type(op)](), value)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(float(value)):
            yield ast.Constant(2 * value if value else 1.0)
        case ast.Name(name, context) if name in OTHER_NAME:
            yield ast.Name(OTHER_NAME[name], context)
        case ast.Attribute(value, name, context) if name in OTHER_NAME:
            yield ast.Attribute(value, OTHER_NAME[name], context)
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Expr(ast.Call()):
            yield ast.Pass()


def _is_text(node):
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _short(node):
    return ast.unparse(node).split("\n")[0][:80]


def _children(node):
    """A node's children, each with a call that puts another node in its place."""
    for name, value in ast.iter_fields(node):
        if name in UNTOUCHED:
            continue
        if isinstance(value, list):
            for index, child in enumerate(value):
                yield child, functools.partial(operator.setitem, value, index)
        else:
            yield value, functools.partial(setattr, node, name)


def _faults(tree):
    """Every fault of a module: the function, the node, what may stand there, how to put it there."""

    def visit(node, scope, function):
        for child, put in _children(node):
            if not isinstance(child, ast.AST) or isinstance(child, SETTLED):
                continue
            if isinstance(child, ast.keyword) and child.arg in ALIKE:
                continue
            scoped = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            inner = [*scope, child.name] if scoped else scope
            within = function
            if function:
                yield from ((function, child, new, put) for new in variants(child))
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                within = ".".join(inner)
            yield from visit(child, inner, within)

    return visit(tree, [], None)
