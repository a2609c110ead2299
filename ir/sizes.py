"""Builds sympy expressions over sizes node by node: nothing in the text is ever evaluated as Python."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

from stagecut.ir.errors import StagecutError

MAX_POWER = 64
"""Greatest exponent, so that no number grows beyond reason."""
MAX_BITS = 10_000
"""Longest number."""
MAX_DEPTH = 100
"""Deepest nesting of an expression."""

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS = {
    "Max": "Max",
    "Min": "Min",
    "Mod": "Mod",
    "PythonMod": "Mod",
    "floor": "floor",
    "ceiling": "ceiling",
    "Abs": "Abs",
    "sqrt": "sqrt",
}
_OWN: dict[str, Callable[..., Any]] = {
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "IntTrueDiv": operator.truediv,
    "ToFloat": lambda a: a,
}
"""Functions of torch's own that sympy does not have."""


def expression(text: str, symbols: Mapping[str, Any]) -> Any:
    """`text` as an expression of sympy; names are `symbols`, or symbols of that name.

    Raises StagecutError for anything but numbers, names, operators and calls of known functions.
    """
    try:
        return _build(ast.parse(text.strip(), mode="eval").body, symbols, 0)
    except (
        SyntaxError,
        ValueError,
        TypeError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ):
        raise StagecutError(
            f"'{text[:80]}' is no expression over sizes",
            hint="numbers, names, + - * / // % and Max, Min, floor",
        ) from None


def _build(node: ast.expr, symbols: Mapping[str, Any], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    built = _node(node, symbols, lambda child: _build(child, symbols, depth + 1))
    if built.is_Integer and abs(int(built)) >> MAX_BITS:
        raise ValueError("too great")
    return built


def _node(
    node: ast.expr, symbols: Mapping[str, Any], inner: Callable[[ast.expr], Any]
) -> Any:
    import sympy

    match node:
        case ast.Constant(value=int() as number) if type(number) is int:
            return sympy.Integer(number)
        case ast.Constant(value=float() as number):
            return sympy.Float(number)
        case ast.Name(id=name):
            return symbols[name] if name in symbols else sympy.Symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -inner(operand)
        case ast.BinOp(
            op=ast.Pow(), left=base, right=ast.Constant(value=int() as power)
        ) if 0 <= power <= MAX_POWER:
            return inner(base) ** power
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](inner(left), inner(right))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if (
            name in _functions()
        ):
            return _functions()[name](*map(inner, args))
    raise ValueError("not in the language of sizes")


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    import sympy

    return _OWN | {name: getattr(sympy, own) for name, own in _FUNCTIONS.items()}


@lru_cache(2**12)
def evaluate(text: str, sizes: tuple[tuple[str, int], ...]) -> int | None:
    """The number that an expression over sizes stands for; None when it is open or unknown."""
    import sympy

    symbols = {name: sympy.Symbol(name) for name, _ in sizes}
    try:
        result = expression(text, symbols).subs(
            {symbols[name]: number for name, number in sizes}
        )
    except StagecutError:
        return None
    return int(result) if result.is_Integer else None
