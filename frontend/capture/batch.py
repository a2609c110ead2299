"""Where the batch is in a model's inputs and outputs: shown by runs of the model on more samples.

A copy of the model is run with some inputs three times as long along some dims. Where it runs, these dims go
together, and an output that is three times as long has the samples too. A model that is cheap to run is run
for real. Then the values tell more: whether a sample's rows depend on other samples, and in which order the
rows lie. Another model is run on fake tensors, which have sizes and no values. Sizes that were declared to
vary are known by their symbols.

A run that fails shows that its dims do not go together, and nothing else. The model is not changed, and
neither is what it draws from or refers to. Where nothing was shown, nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from stagecut.frontend.capture.samples import (
    Axes,
    Example,
    Runs,
    sizes_mixed_by,
)
from stagecut.frontend.capture.together import (
    NEVER,
    UNKNOWN,
    Rows,
    Search,
    Together,
    rows_of,
)
from stagecut.ir.graph import Program, Value
from stagecut.ir.over_samples import over_samples
from stagecut.ir.run.call import CallSpec
from stagecut.ir.sizes import expression
from stagecut.ir.types import ANY, Batch, TensorType


def mark_batches(
    program: Program,
    module: nn.Module | None,
    call: CallSpec | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    exported: ExportedProgram | None,
    real: bool,
) -> None:
    """The inputs and outputs of `program` say where their samples are, as far as it can be shown. `real`: the
    model may be run for real.
    """
    _mark_numbers(program)
    inputs = (tuple(args), dict(kwargs))
    runs = Runs(module, inputs, real) if module is not None else None
    example = Example.of(call, args, kwargs) if runs is not None else None
    varying = varying_sizes(program, exported)
    if example is None or runs is None or len(example.flat) != len(program.inputs):
        _mark(program, [c for c in varying if c.state == UNKNOWN and c.leads], None)
        return
    with runs.unchanged():
        search = Search(example, runs, program)
        _mark(program, search.chosen(varying), search)


# --- sizes that vary --------------------------------------------------------------------------------------


def varying_sizes(program: Program, exported: ExportedProgram | None) -> list[Together]:
    """For each size that was declared to vary, the dims of the inputs that are a multiple of it."""
    classes: dict[str, Axes] = {}
    for key, value in enumerate(program.inputs):
        if isinstance(value.type, TensorType):
            for dim, size in enumerate(value.type.shape):
                symbol = multiple(size)[1]
                if symbol:
                    classes.setdefault(symbol, {}).setdefault(key, dim)
    mixed = _mixed_symbols(exported) if classes and exported is not None else set()
    return [
        Together(axes, NEVER if symbol in mixed else UNKNOWN, varies=symbol)
        for symbol, axes in classes.items()
        if axes
    ]


def multiple(size: int | str) -> tuple[int, str]:
    """The factor and the symbol of a size such as `4*s0`; (0, '') for another one."""
    if isinstance(size, int):
        return 0, ""
    if size.isidentifier():
        return 1, size
    parsed = expression(size, {})
    symbols = list(parsed.free_symbols)
    if len(symbols) != 1:
        return 0, ""
    factor = parsed / symbols[0]
    return (int(factor), str(symbols[0])) if factor.is_Integer else (0, "")


def names_in(size: int | str) -> set[str]:
    """The symbols in a size."""
    if isinstance(size, int):
        return set()
    return {str(symbol) for symbol in expression(size, {}).free_symbols}


def _mixed_symbols(exported: ExportedProgram) -> set[str]:
    """The sizes along which an op of the trace surely mixes."""
    found: set[str] = set()
    for module in exported.graph_module.modules():
        graph = getattr(module, "graph", None)
        for node in graph.nodes if isinstance(graph, fx.Graph) else ():
            if node.op == "call_function":
                values = [_value(item) for item in node.args]
                found.update(*map(_symbols, sizes_mixed_by(node.target, values)))
    return found


def _value(item: Any) -> Any:
    return item.meta.get("val") if isinstance(item, fx.Node) else item


def _symbols(size: Any) -> set[str]:
    expr = getattr(getattr(size, "node", None), "expr", None)
    return {str(symbol) for symbol in getattr(expr, "free_symbols", ())}


# --- marks ------------------------------------------------------------------------------------------------


def _mark_numbers(program: Program) -> None:
    """Outputs that are numbers say whether they are means or sums."""
    for value in program.outputs:
        kind = over_samples(value) if isinstance(value, Value) else ""
        if kind and not getattr(value.type, "shape", ()):
            _set(value, Batch(kind))


def _mark(program: Program, classes: Sequence[Together], search: Search | None) -> None:
    """Inputs and outputs say where the samples of the classes are."""
    units: dict[str, int] = {}
    for number, one in enumerate(classes):
        symbol = f"b{number or ''}"
        one.symbol = symbol
        rows = {key: _rows(program, key, dim, search) for key, dim in one.axes.items()}
        units[symbol] = math.gcd(*rows.values())
        for key, dim in one.axes.items():
            factor = rows[key] // units[symbol]
            keys = (key,) if key >= 0 or search is None else search.example.lists[key]
            for place in keys:
                _set(program.inputs[place], Batch(dim, _product(factor, symbol)))
    declared = {name for v in program.inputs for name in _sizes_named(v)}
    for number, value in enumerate(program.outputs):
        if isinstance(value, Value) and value.owner is not None:
            batch = (
                _of_data(number, classes, search)
                if _sizes_named(value) - declared
                else _of_output(value, number, classes, units, search)
            )
            if batch is not None:
                _set(value, batch)


def _rows(program: Program, key: int, dim: int | str, search: Search | None) -> int:
    """How many rows of the example lie along a dim; without an example, for one unit of the size."""
    if search is not None:
        return search.example.size(key, dim)
    kind = program.inputs[key].type
    assert isinstance(kind, TensorType)
    assert isinstance(dim, int)
    return multiple(kind.shape[dim])[0]


def _set(value: Value, batch: Batch) -> None:
    if isinstance(value.type, TensorType):
        value.type = replace(value.type, batch=batch)


def _product(factor: int, symbol: str) -> str:
    return symbol if factor == 1 else f"{factor}*{symbol}"


def _sizes_named(value: Value) -> set[str]:
    """The symbols in the sizes of a value."""
    shape = value.type.shape if isinstance(value.type, TensorType) else ()
    return {name for size in shape for name in names_in(size)}


def _of_data(
    number: int, classes: Sequence[Together], search: Search | None
) -> Batch | None:
    """Where the samples are in an output whose size depends on data: it has the rows of one sample after
    those of the other.
    """
    if search is None or len(classes) != 1:
        return None
    for base, other, whole in search.on_other_data(classes[0]):
        place = rows_of(base[number], other[number], whole[number])
        if place is not None and base[number].numel():
            return Batch(place.dim, ANY) if place.blocks == 1 else None
    return None


def _of_output(
    value: Value,
    number: int,
    classes: Sequence[Together],
    units: Mapping[str, int],
    search: Search | None,
) -> Batch | None:
    """Where the samples are in an output; None where that is not known."""
    if not isinstance(value.type, TensorType) or not value.type.shape:
        return None
    places: list[tuple[Rows, str]] = []
    for one in classes:
        shape = _shape(value.type, number, search)
        grown = _grown_dims(value.type, shape, number, one)
        if not grown:
            continue
        place = _place_of(shape, grown, number, one, units[one.symbol], search)
        if place is None:
            return None
        places.append((place, one.symbol))
    return _written(places, units, value.type) if places else None


def _shape(kind: TensorType, number: int, search: Search | None) -> list[int]:
    """The sizes of an output on the example; 0 where a size varies and no run has shown it."""
    if search is not None and search.base is not None:
        return list(search.base[number].shape)
    return [size if isinstance(size, int) else 0 for size in kind.shape]


def _grown_dims(
    kind: TensorType, shape: Sequence[int], number: int, one: Together
) -> list[int]:
    """The dims of an output whose size depends on the size of a class."""
    if one.whole is None:
        return [d for d, size in enumerate(kind.shape) if one.varies in names_in(size)]
    whole = one.whole[number].shape
    return [d for d, size in enumerate(shape) if whole[d] != size]


def _place_of(
    shape: Sequence[int],
    grown: Sequence[int],
    number: int,
    one: Together,
    unit: int,
    search: Search | None,
) -> Rows | None:
    """Where the rows of a class are in an output. Where sizes are all that is known, only one row for each
    sample tells the order of the rows.
    """
    if len(grown) != 1:
        return None
    dim = grown[0]
    if one.whole is None or search is None:
        return Rows(dim, 0, unit, 1)
    if search.base is not None and one.other is not None:
        base, other = search.base[number], one.other[number]
        place = rows_of(base, other, one.whole[number])
        if place is not None:
            return None if _is_ambiguous(base, other, place, unit) else place
    rows = shape[dim]
    fits = rows == unit and one.whole[number].shape[dim] == search.runs.parts * rows
    return Rows(dim, 0, rows, 1) if fits else None


def _is_ambiguous(base: torch.Tensor, other: torch.Tensor, at: Rows, unit: int) -> bool:
    """True when several rows of a sample are the same in all calls, so that their order cannot be told."""
    if at.rows <= unit or not torch.equal(base, other):
        return False
    rows = base.narrow(at.dim, at.start, at.rows).split(unit, at.dim)
    return any(torch.equal(one, two) for one, two in combinations(rows, 2))


def _written(
    places: Sequence[tuple[Rows, str]], units: Mapping[str, int], kind: TensorType
) -> Batch | None:
    """The places of all classes in one output as a size. None where there are rows of no class."""
    dims = {place.dim for place, _ in places}
    if len(dims) != 1:
        return None
    dim = dims.pop()
    terms: list[str] = []
    end = 0
    for place, symbol in sorted(places, key=lambda item: item[0].start):
        factor, odd = divmod(place.rows, units[symbol] * place.blocks)
        if odd or place.start != end:
            return None
        terms += [_product(factor, symbol)] * place.blocks
        end = place.start + place.rows
    fixed = kind.shape[dim]
    return (
        None
        if isinstance(fixed, int) and fixed != end
        else Batch(dim, " + ".join(terms))
    )
