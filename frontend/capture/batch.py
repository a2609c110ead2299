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
    same_rows,
    unrefuted,
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
    fold: bool = False,
) -> None:
    """The inputs and outputs of `program` say where their samples are, as far as it can be shown. `real`: the
    model may be run for real. `fold`: a block that the model repeats runs once for all on fake tensors.
    """
    _mark_numbers(program)
    varying = varying_sizes(program, exported)
    example: Example | None = None
    if module is not None:
        example = Example.of(call, args, kwargs)
        if example is not None and len(example.flat) != len(program.inputs):
            example = None
    if module is None or example is None:
        _mark(program, unrefuted(varying), None)
        return
    inputs = (tuple(args), dict(kwargs))
    runs = Runs(module, inputs, real, fold)
    if not _mark_by_runs(program, runs, example, varying):
        _mark_by_runs(program, Runs(module, inputs, False, fold), example, varying)


def _mark_by_runs(
    program: Program, runs: Runs, example: Example, varying: Sequence[Together]
) -> bool:
    """Inputs and outputs say where their samples are, as far as these runs show it. False for a model of a
    GPU that does not run on the CPU.
    """
    with runs.unchanged():
        search = Search(example, runs, program)
        if runs.moved and not search.values:
            return False
        _mark(program, search.chosen(varying), search)
    return True


# --- sizes that vary --------------------------------------------------------------------------------------


def varying_sizes(program: Program, exported: ExportedProgram | None) -> list[Together]:
    """For each size that was declared to vary, the dims of the inputs that are a multiple of it."""
    axes_by_symbol: dict[str, Axes] = {}
    for key, value in enumerate(program.inputs):
        for dim, size in enumerate(_sizes(value)):
            _, symbol = multiple(size)
            if symbol:
                axes = axes_by_symbol.setdefault(symbol, {})
                axes.setdefault(key, dim)
    if not axes_by_symbol:
        return []
    mixed: set[str] = set()
    if exported is not None:
        mixed = _mixed_symbols(exported)
    classes: list[Together] = []
    for symbol, axes in axes_by_symbol.items():
        state = NEVER if symbol in mixed else UNKNOWN
        classes.append(Together(axes, state, varies=symbol))
    return classes


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
    symbol = symbols[0]
    factor = parsed / symbol
    if not factor.is_Integer:
        return 0, ""
    return int(factor), str(symbol)


def names_in(size: int | str) -> set[str]:
    """The symbols in a size."""
    if isinstance(size, int):
        return set()
    parsed = expression(size, {})
    return {str(symbol) for symbol in parsed.free_symbols}


def _mixed_symbols(exported: ExportedProgram) -> set[str]:
    """The sizes along which an op of the trace surely mixes."""
    mixed: set[str] = set()
    for module in exported.graph_module.modules():
        graph = getattr(module, "graph", None)
        if not isinstance(graph, fx.Graph):
            continue
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            values = [_value(argument) for argument in node.args]
            for size in sizes_mixed_by(node.target, values):
                mixed.update(_symbols(size))
    return mixed


def _value(argument: Any) -> Any:
    if not isinstance(argument, fx.Node):
        return argument
    return argument.meta.get("val")


def _symbols(size: Any) -> set[str]:
    node = getattr(size, "node", None)
    expr = getattr(node, "expr", None)
    symbols = getattr(expr, "free_symbols", ())
    return {str(symbol) for symbol in symbols}


# --- marks ------------------------------------------------------------------------------------------------


def _mark_numbers(program: Program) -> None:
    """Outputs that are numbers say whether they are means or sums."""
    for value in program.outputs:
        if not isinstance(value, Value) or _sizes(value):
            continue
        kind = over_samples(value)
        if kind:
            _set(value, Batch(kind))


def _mark(program: Program, classes: Sequence[Together], search: Search | None) -> None:
    """Inputs and outputs say where the samples of the classes are."""
    units: dict[str, int] = {}
    for number, together in enumerate(classes):
        together.symbol = f"b{number or ''}"
        units[together.symbol] = _mark_inputs(program, together, search)
    declared: set[str] = set()
    for value in program.inputs:
        declared |= _sizes_named(value)
    for number, value in enumerate(program.outputs):
        if not isinstance(value, Value) or value.owner is None:
            continue
        if _sizes_named(value) <= declared:
            batch = _of_output(value, number, classes, units, search)
        else:
            batch = _of_data(number, classes, search)
        if batch is not None:
            _set(value, batch)


def _mark_inputs(program: Program, together: Together, search: Search | None) -> int:
    """The inputs say where the samples of a class are. Returns how many rows are its unit: as many as divide
    the rows along every axis.
    """
    axes = together.axes
    rows: dict[int, int] = {}
    for key, dim in axes.items():
        rows[key] = _rows(program, key, dim, search)
    unit = math.gcd(*rows.values())
    for key, dim in axes.items():
        factor = rows[key] // unit
        batch = Batch(dim, _product(factor, together.symbol))
        for place in _inputs_of(key, search):
            _set(program.inputs[place], batch)
    return unit


def _inputs_of(key: int, search: Search | None) -> Sequence[int]:
    """The flat input of this number, or those in the list of this number."""
    if key >= 0 or search is None:
        return [key]
    return search.example.lists[key]


def _rows(program: Program, key: int, dim: int | str, search: Search | None) -> int:
    """How many rows of the example lie along a dim; without an example, for one unit of the size."""
    if search is not None:
        return search.example.size(key, dim)
    assert isinstance(dim, int)
    sizes = _sizes(program.inputs[key])
    factor, _ = multiple(sizes[dim])
    return factor


def _set(value: Value, batch: Batch) -> None:
    if isinstance(value.type, TensorType):
        value.type = replace(value.type, batch=batch)


def _product(factor: int, symbol: str) -> str:
    if factor == 1:
        return symbol
    return f"{factor}*{symbol}"


def _sizes_named(value: Value) -> set[str]:
    """The symbols in the sizes of a value."""
    names: set[str] = set()
    for size in _sizes(value):
        names |= names_in(size)
    return names


def _sizes(value: Value) -> Sequence[int | str]:
    if not isinstance(value.type, TensorType):
        return ()
    return value.type.shape


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
        if place is None or not base[number].numel():
            continue
        if place.blocks != 1:
            return None
        return Batch(place.dim, ANY)
    return None


def _of_output(
    value: Value,
    number: int,
    classes: Sequence[Together],
    units: Mapping[str, int],
    search: Search | None,
) -> Batch | None:
    """Where the samples are in an output; None where that is not known."""
    if not isinstance(value.type, TensorType):
        return None
    if not value.type.shape:
        return None
    places: list[tuple[Rows, str]] = []
    shape = _shape(value.type, number, search)
    for together in classes:
        grown = _grown_dims(value.type, shape, number, together)
        if not grown:
            continue
        unit = units[together.symbol]
        place = _place_of(shape, grown, number, together, unit, search)
        if place is None:
            return None
        places.append((place, together.symbol))
    if not places:
        return None
    return _all_rows(places, units, value.type)


def _shape(kind: TensorType, number: int, search: Search | None) -> list[int]:
    """The sizes of an output on the example; 0 where a size varies and no run has shown it."""
    if search is not None and search.base is not None:
        shape = search.base[number].shape
        return list(shape)
    sizes: list[int] = []
    for size in kind.shape:
        if isinstance(size, int):
            sizes.append(size)
        else:
            sizes.append(0)
    return sizes


def _grown_dims(
    kind: TensorType, shape: Sequence[int], number: int, together: Together
) -> list[int]:
    """The dims of an output whose size depends on the size of a class."""
    grown: list[int] = []
    if together.whole is None:
        for dim, size in enumerate(kind.shape):
            if together.varies in names_in(size):
                grown.append(dim)
        return grown
    whole = together.whole[number].shape
    for dim, size in enumerate(shape):
        if whole[dim] != size:
            grown.append(dim)
    return grown


def _place_of(
    shape: Sequence[int],
    grown: Sequence[int],
    number: int,
    together: Together,
    unit: int,
    search: Search | None,
) -> Rows | None:
    """Where the rows of a class are in an output. Where sizes are all that is known, only one row for each
    sample tells the order of the rows.
    """
    if len(grown) != 1:
        return None
    dim = grown[0]
    if together.whole is None or search is None:
        return Rows(dim, 0, unit, 1)
    whole = together.whole[number]
    if search.base is not None and together.other is not None:
        base = search.base[number]
        other = together.other[number]
        place = rows_of(base, other, whole)
        if place is not None:
            if _is_ambiguous(base, other, place, unit):
                return None
            return place
        if same_rows(base, other, whole):
            return None  # in another order
    if shape[dim] != unit:
        return None
    if whole.shape[dim] != search.runs.parts * unit:
        return None
    return Rows(dim, 0, unit, 1)


def _is_ambiguous(
    base: torch.Tensor, other: torch.Tensor, place: Rows, unit: int
) -> bool:
    """True when several rows of a sample are the same in all calls, so that their order cannot be told."""
    if place.rows <= unit:
        return False
    if not torch.equal(base, other):
        return False
    rows = base.narrow(place.dim, place.start, place.rows)
    units = rows.split(unit, place.dim)
    return any(torch.equal(*pair) for pair in combinations(units, 2))


def _all_rows(
    places: Sequence[tuple[Rows, str]], units: Mapping[str, int], kind: TensorType
) -> Batch | None:
    """The places of all classes in one output as a size. None where there are rows of no class."""
    dims = {place.dim for place, _ in places}
    if len(dims) != 1:
        return None
    dim = dims.pop()
    terms: list[str] = []
    end = 0
    for place, symbol in sorted(places, key=_start):
        unit = units[symbol] * place.blocks
        factor, odd = divmod(place.rows, unit)
        if odd or place.start != end:
            return None
        terms += [_product(factor, symbol)] * place.blocks
        end = place.start + place.rows
    size = kind.shape[dim]
    if isinstance(size, int) and size != end:
        return None
    return Batch(dim, " + ".join(terms))


def _start(located: tuple[Rows, str]) -> int:
    place, _ = located
    return place.start
