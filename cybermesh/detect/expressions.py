"""The rules' language: a Python expression over named columns, compiled once to numpy, with nothing else reachable.

Allowed: numbers, the names the caller lists, ``and or not``, comparisons (also chained), ``in`` a list of numbers,
``+ - * /``, and the functions ``min max abs log2 clip``. Division by zero and the logarithm of what is not positive are 0.
There are no attributes, subscripts, strings or calls of anything else, and the size is bounded: a rule file is data, not code.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

LENGTH_MAX = 2000
NODES_MAX = 300

Column: TypeAlias = npt.NDArray[np.float64]
Columns: TypeAlias = Mapping[str, Column]
_Step: TypeAlias = Callable[[Columns], Column]
_Test: TypeAlias = Callable[[Columns], npt.NDArray[np.bool_]]


class ExpressionError(Exception):
    """An expression is not of the language; the text says what is wrong and where in it."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled expression; truth is 1 and 0. ``names`` are the columns it reads."""

    text: str
    names: frozenset[str]
    ranges: Mapping[str, str]  # of names compared with a plain number: the comparison, as "> 20"
    floors: Mapping[str, float]  # least values of names without which it is never true
    _step: _Step

    def __call__(self, columns: Columns) -> Column:
        """Return float64[n] for columns of float64[n]."""
        return self._step(columns)


def _divide(left: Column, right: Column) -> Column:
    zero = right == 0
    return np.where(zero, 0.0, left / np.where(zero, 1.0, right))


def _log2(value: Column) -> Column:
    positive = value > 0
    return np.where(positive, np.log2(np.where(positive, value, 1.0)), 0.0)


_OPERATORS: Mapping[type[ast.operator], Callable[[Column, Column], Column]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: _divide,
}
_COMPARISONS: Mapping[type[ast.cmpop], tuple[str, Callable[[Column, Column], npt.NDArray[np.bool_]]]] = {
    ast.Lt: ("<", np.less),
    ast.LtE: ("<=", np.less_equal),
    ast.Gt: (">", np.greater),
    ast.GtE: (">=", np.greater_equal),
    ast.Eq: ("=", np.equal),
    ast.NotEq: ("!=", np.not_equal),
}
_FUNCTIONS: Mapping[str, tuple[int, Callable[..., Column]]] = {
    "min": (2, np.minimum),
    "max": (2, np.maximum),
    "abs": (1, np.abs),
    "log2": (1, _log2),
    "clip": (3, np.clip),
}


def compile_expression(text: str, names: frozenset[str], constants: Mapping[str, float]) -> Expression:
    """Compile ``text`` over the columns ``names``; ``constants`` are further names that stand for numbers.

    Raises:
        ExpressionError: What is not of the language.
    """
    if len(text) > LENGTH_MAX:
        raise ExpressionError(f"longer than {LENGTH_MAX} characters")
    try:
        tree = ast.parse(f"({text})", mode="eval")  # in parentheses, so that it may span lines
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ExpressionError(f"not an expression: {getattr(error, 'msg', error)}") from None
    if sum(1 for _ in ast.walk(tree)) > NODES_MAX:
        raise ExpressionError(f"more than {NODES_MAX} parts")
    compiler = _Compiler(names, constants)
    step = compiler.step(tree.body)
    return Expression(" ".join(text.split()), frozenset(compiler.used), compiler.ranges, _floors(tree.body, names), step)


def _floors(node: ast.expr, names: frozenset[str]) -> dict[str, float]:
    """Return what ``name >= number`` terms at the top of a conjunction demand."""
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        parts = [_floors(value, names) for value in node.values]
        return {name: max(part.get(name, -math.inf) for part in parts) for part in parts for name in part}
    match node:
        case ast.Compare(
            left=ast.Name(id=name), ops=[ast.GtE() | ast.Gt()], comparators=[ast.Constant(value=int() | float() as least)]
        ):
            return {name: float(least)} if name in names else {}
        case _:
            return {}


def _joined(conjunction: bool, tests: list[_Test]) -> _Test:
    def run(columns: Columns) -> npt.NDArray[np.bool_]:
        joined = tests[0](columns)
        for test in tests[1:]:
            # Most conditions fail on their first comparison for every row, so the rest need not be looked at.
            if conjunction and not joined.any():
                break
            joined = joined & test(columns) if conjunction else joined | test(columns)
        return joined

    return run


class _Compiler:
    """Turns one syntax tree into nested closures."""

    def __init__(self, names: frozenset[str], constants: Mapping[str, float]) -> None:
        self.used: set[str] = set()
        self.ranges: dict[str, str] = {}
        self._names = names
        self._constants = constants

    def step(self, node: ast.expr) -> _Step:
        match node:
            case ast.Constant(value=bool() | int() | float() as value):
                number = np.asarray(value, np.float64)
                return lambda _: number
            case ast.Name(id=name):
                return self._name(name)
            case ast.BoolOp() | ast.Compare() | ast.UnaryOp(op=ast.Not()):
                truth = self._truth(node)
                return lambda columns: np.asarray(truth(columns), np.float64)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                inner = self.step(operand)
                return lambda columns: -inner(columns)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                operator, first, second = _OPERATORS[type(op)], self.step(left), self.step(right)
                return lambda columns: operator(first(columns), second(columns))
            case ast.Call():
                return self._call(node)
            case _:
                raise ExpressionError(f"{ast.unparse(node)!r} is not allowed: {type(node).__name__}")

    def _name(self, name: str) -> _Step:
        if name in self._constants:
            number = np.asarray(self._constants[name], np.float64)
            return lambda _: number
        if name not in self._names:
            raise ExpressionError(f"unknown name {name!r}")
        self.used.add(name)
        return lambda columns: columns[name]

    def _truth(self, node: ast.expr) -> _Test:
        """Compile a node to what is true of each row, without the way over 1 and 0."""
        match node:
            case ast.BoolOp(op=op, values=values):
                return _joined(isinstance(op, ast.And), [self._truth(value) for value in values])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner = self._truth(operand)
                return lambda columns: ~inner(columns)
            case ast.Compare():
                return self._compare(node)
            case _:
                step = self.step(node)
                return lambda columns: step(columns) != 0

    def _compare(self, node: ast.Compare) -> _Test:
        parts: list[_Test] = []
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn):
                parts.append(self._member(left, right, isinstance(op, ast.In)))
            elif type(op) in _COMPARISONS:
                parts.append(self._pair(left, op, right))
            else:
                raise ExpressionError(f"comparison {type(op).__name__} is not allowed")
            left = right
        return parts[0] if len(parts) == 1 else _joined(True, parts)

    def _pair(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> _Test:
        sign, compare = _COMPARISONS[type(op)]
        first, second = self.step(left), self.step(right)
        if isinstance(left, ast.Name) and isinstance(right, ast.Constant):
            shown = f"{sign} {right.value!r}"
            self.ranges[left.id] = f"{self.ranges[left.id]}, {shown}" if left.id in self.ranges else shown
        return lambda columns: compare(first(columns), second(columns))

    def _member(self, left: ast.expr, right: ast.expr, inside: bool) -> _Test:
        if not isinstance(right, ast.Tuple | ast.List):
            raise ExpressionError("'in' needs a list of numbers")
        inner = self.step(left)
        members = np.array([float(self.step(item)({})) if self._is_number(item) else np.nan for item in right.elts])
        if np.isnan(members).any():
            raise ExpressionError("'in' needs a list of numbers")
        return lambda columns: np.isin(inner(columns), members, invert=not inside)

    def _is_number(self, node: ast.expr) -> bool:
        is_constant = isinstance(node, ast.Constant) and isinstance(node.value, int | float)
        return is_constant or (isinstance(node, ast.Name) and node.id in self._constants)

    def _call(self, node: ast.Call) -> _Step:
        if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS or node.keywords:
            raise ExpressionError(f"{ast.unparse(node)!r} is not allowed: only {', '.join(sorted(_FUNCTIONS))} can be called")
        count, function = _FUNCTIONS[node.func.id]
        if len(node.args) != count:
            raise ExpressionError(f"{node.func.id} takes {count} arguments")
        arguments = [self.step(argument) for argument in node.args]
        return lambda columns: function(*(argument(columns) for argument in arguments))
