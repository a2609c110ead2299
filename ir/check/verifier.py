"""The invariants of a program, numbered, per phase. `verify` finds every violation, not only the first.

In every phase
  V1  an operand is a user input, a state entry of the program, or defined by an earlier op
  V2  use lists are exact: a value lists the ops that read it, and no other
  V3  a value has one definition, and its owner is the op that lists it
  V4  a state name belongs to one entry
  V5  effects fit the op: written and viewed values are operands, one view slot a result
  V6  a region sees only its own parameters, and every region reference is an operand and names a region of
      its op
  V7  a value that was written is not read again under its old version
  V17 a form names each result of its op once
  V18 an op that is another in each mode has a flag, two regions and the operands that are their parameters;
      each yields its results
  V19 the samples of a batch lie along a dim that the input or output has
  V27 a call gives its function operands and state of the types that it declares, the state from below the
      module of the call, and has its results; a function sees only its inputs and its state, and no two have
      one name
  V25 a lane is an input and an output of one dtype, neither of them in another lane
Until `partitioned`
  V8  a traced program has no stages and no transfers
From `partitioned` on
  V9  every op is in exactly one stage, and no split marker is left
  V10 stages are numbered 0, 1, 2, ... and none is empty, unless the program has no op at all
From `linked` on
  V11 what a stage reads is its own, an input it lists, or state it holds; what it lists it reads
  V12 a stage's outputs are its own definitions or its own state, and something after it needs each of them
  V13 every input of a stage has one transfer, with a route, from the stage that outputs it
  V14 every state name is held by a stage, under its own entry, and owners agree with holders
  V15 every returned value is an input or an output of a stage
  V16 both ends of a boundary list its values in one order; user inputs stand first, returned values as the
      model returns them
  V26 a lane lists the stages that touch it
In `differentiated`
  V20 every stage has a backward for its inputs and one for its weights; before, none
  V21 a block of a backward lists what it reads, but for state that the stage holds: saved values, gradients
      that arrive, and for weights, outputs of the backward for inputs; it writes and draws nothing
  V22 a stage saves what it defines or receives and its backward reads
  V23 the gradients that a block returns are its own, of inputs or weights of its stage (the backward for
      weights: of weights), and of their types
  V24 a gradient of another stage's value has one transfer, back to that stage
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from stagecut.ir.check.backward import backward_faults
from stagecut.ir.errors import VerifyError
from stagecut.ir.graph import (
    BY_MODE,
    CALL,
    LINKED,
    ROLES,
    SPLIT,
    Block,
    Function,
    Mode,
    Op,
    Program,
    RegionRef,
    Stage,
    StateEntry,
    Transfer,
    Value,
    function_of,
    functions_of,
    leaves,
    literals,
    nested_ops,
    scope_fqn,
)
from stagecut.ir.lanes import goes_on, touching
from stagecut.ir.text.printer import line_printer
from stagecut.ir.types import TensorType


def verify(program: Program, *, after: str = "") -> None:
    """Raises VerifyError, listing every violation, unless `program` is valid for its phase."""
    _lines.cache_clear()  # the program may have changed since
    violations = [f"{rule}: {what}" for rule, what in _violations(program)]
    _lines.cache_clear()
    if violations:
        raise VerifyError(violations, after=after)


def _violations(program: Program) -> Iterator[tuple[str, str]]:
    yield from _ops(program)
    yield from _uses(program)
    yield from _state_names(program)
    yield from _stale_reads(program)
    yield from _lanes(program)
    if program.phase == "traced":
        if program.stages or program.transfers:
            yield "V8", "a traced program has stages or transfers"
        return
    yield from _stages(program)
    if program.phase in LINKED:
        yield from _linked(program)
    yield from backward_faults(program)


_lines = lru_cache(1)(line_printer)
"""Names are made once for all violations, because a damaged program breaks many rules."""


def _show(program: Program, op: Op) -> str:
    return f"`{_lines(program)(op)}` ({op.where()})"


def _ops(program: Program) -> Iterator[tuple[str, str]]:
    defined: set[Value] = set(program.inputs) | {entry.value for entry in program.state}
    repeated = len(set(program.inputs)) < len(program.inputs)
    if repeated or any(value.owner is not None for value in program.inputs):
        yield "V3", "an input is listed twice, or defined by an op or a state entry"
    yield from _functions(program)
    yield from _block(program, program, defined)
    defined.update(program.cotangents)
    for _, block in program.backward_blocks():
        yield from _block(program, block, defined)
    for value in (*program.inputs, *program.output.operands):
        kind = value.type
        if not isinstance(kind, TensorType) or kind.batch is None:
            continue
        dim = kind.batch.dim
        if isinstance(dim, int) and dim >= len(kind.shape):
            yield "V19", f"{value!r} has no dim {dim}, where its samples should lie"


def _block(
    program: Program, block: Block, defined: set[Value]
) -> Iterator[tuple[str, str]]:
    """The faults of the ops of the program or of a region. `defined` gains the values that they define."""
    rule, name = (
        ("V1", "the program")
        if block is program
        else ("V1", f"a {block.name}")
        if block.name in ROLES
        else ("V6", f"region {block.name}")
    )
    for op in program.all_ops() if block is program else block.ops:
        for value in op.reads:
            if value not in defined:
                yield (
                    rule,
                    f"{value!r} is read, but not defined before in {name}, in {_show(program, op)}",
                )
        yield from _definitions(program, op, defined)
        yield from _effects(program, op)
        yield from _form(program, op)
        yield from _regions(program, op)
        if op.target == BY_MODE and not _is_by_mode(op):
            yield (
                "V18",
                "not a flag, two regions and their operands, or other results than they yield, in "
                f"{_show(program, op)}",
            )
    for value in block.output.operands:
        if value not in defined:
            yield rule, f"{name} returns {value!r}, which is not defined there"
    if any(isinstance(literal, RegionRef) for literal in literals(block.outputs)):
        yield "V6", f"{name} returns a region"


def _is_by_mode(op: Op) -> bool:
    types = [*map(type, op.args)]
    if types != [Mode, RegionRef, RegionRef, list] or op.kwargs or op.form is not None:
        return False
    flag, training, evaluating, operands = op.args
    fits = (
        len(region.inputs) == len(operands) and _yields(region) == len(op.results)
        for region in op.regions
    )
    return (
        flag.is_flag
        and (training.index, evaluating.index, len(op.regions)) == (0, 1, 2)
        and all(fits)
    )


def _yields(region: Block) -> int:
    """The number of values a region yields, where a single one is not in a tuple. -1 for anything else."""
    tree = region.outputs
    if isinstance(tree, Value):
        return 1
    if not isinstance(tree, tuple) or len(tree) == 1:
        return -1
    return len(tree) if all(isinstance(part, Value) for part in tree) else -1


def _form(program: Program, op: Op) -> Iterator[tuple[str, str]]:
    if op.form is not None and op.returned is None and not _names_each_result(op):
        yield (
            "V17",
            f"the form does not name each result once, in order, in {_show(program, op)}",
        )


def _names_each_result(op: Op) -> bool:
    """True when the form of an op has the number of each result once, in order, and no odd keys."""
    leaves = list(op.form.paths()) if op.form is not None else []
    keys = {type(key) for _, path in leaves for key in path}
    numbers = [number if type(number) is int else None for number, _ in leaves]
    return keys <= {int, str} and numbers == list(range(len(op.results)))


def _definitions(
    program: Program, op: Op, defined: set[Value]
) -> Iterator[tuple[str, str]]:
    for value in op.definitions():
        if value in defined or value.owner is not op:
            yield (
                "V3",
                f"{value!r} is defined more than once, or by another op than {_show(program, op)}",
            )
        defined.add(value)


def _effects(program: Program, op: Op) -> Iterator[tuple[str, str]]:
    writes, views = op.effects.writes, op.effects.views
    named = {*writes, *(value for value in views if value is not None)}
    if not named <= {*op.operands}:
        yield (
            "V5",
            f"an effect names an operand that is not there in {_show(program, op)}",
        )
    if views and len(views) != len(op.results):
        yield (
            "V5",
            f"{len(views)} view slots for {len(op.results)} results in {_show(program, op)}",
        )
    if op.versions and not writes:
        yield "V5", f"new versions without a write in {_show(program, op)}"


def _regions(program: Program, op: Op) -> Iterator[tuple[str, str]]:
    for ref in literals((op.args, op.kwargs)):
        if isinstance(ref, RegionRef) and not 0 <= ref.index < len(op.regions):
            yield "V6", f"region <{ref.index}> does not exist in {_show(program, op)}"
    if op.target == CALL:
        yield from _call(program, op)
        return
    for region in op.regions:
        yield from _block(program, region, set(region.inputs))


def _functions(program: Program) -> Iterator[tuple[str, str]]:
    """The faults in functions, each looked at once."""
    functions = functions_of(program.all_ops())
    count = Counter(function.name for function in functions)
    for function in functions:
        if count[function.name] > 1:
            yield "V27", f"two functions are named '{function.name}'"
        yield from _block(program, function, set(function.sees))


def _call(program: Program, op: Op) -> Iterator[tuple[str, str]]:
    function = function_of(op)
    if function is None or [*map(type, op.args)] != [list, list] or op.kwargs:
        yield "V27", f"not a call of one function in {_show(program, op)}"
        return
    given = [value.type for value in op.operands]
    if given != [value.type for value in function.sees]:
        yield "V27", f"other operands than the function takes in {_show(program, op)}"
        return
    results = [value.type for value in leaves(function.outputs)]
    if [value.type for value in op.results] != results:
        yield "V27", f"other results than the function has in {_show(program, op)}"
    path = scope_fqn(op.scope)
    for value, entry in zip(op.args[1], function.state, strict=True):
        if f"{path}.{entry.name}" not in _names(value):
            yield (
                "V27",
                f"{value!r} is not '{entry.name}' of the module, in {_show(program, op)}",
            )


def _names(value: Value) -> tuple[str, ...]:
    """The names of a state entry, given by its value; none for another value."""
    return value.owner.names if isinstance(value.owner, StateEntry) else ()


def _every_op(program: Program) -> Iterator[Op]:
    """All ops, those of regions, and the outputs of every block."""
    for op in nested_ops(program.all_ops()):
        yield op
        yield from (region.output for region in op.regions)
    yield from (stage.output for stage in program.stages)
    for _, block in program.backward_blocks():
        yield from nested_ops(block.ops)
        yield block.output
    yield program.output


def _uses(program: Program) -> Iterator[tuple[str, str]]:
    real: dict[Value, set[Op]] = {}
    values: list[Value] = [*program.inputs, *(entry.value for entry in program.state)]
    values += program.cotangents
    for op in _every_op(program):
        values.extend(op.definitions())
        for region in op.regions:
            values.extend(
                region.sees if isinstance(region, Function) else region.inputs
            )
        for value in op.reads:
            real.setdefault(value, set()).add(op)
    for value in values:
        if set(value.uses) != real.get(value, set()):
            yield "V2", f"the use list of {value!r} is not what the ops read"


def _state_names(program: Program) -> Iterator[tuple[str, str]]:
    count = Counter(name for entry in program.state for name in entry.names)
    for name, times in count.items():
        if times > 1:
            yield "V4", f"state name '{name}' belongs to {times} entries"


def _stale_reads(program: Program) -> Iterator[tuple[str, str]]:
    stale: set[Value] = set()
    for op in [*program.all_ops(), program.output]:
        for value in op.reads:
            if value in stale:
                yield (
                    "V7",
                    f"{value!r} was written earlier; {_show(program, op)} reads the old version",
                )
        stale.update(op.versions)


def _lanes(program: Program) -> Iterator[tuple[str, str]]:
    count = len(program.outputs)
    given = Counter(lane.given for lane in program.lanes)
    left = Counter(lane.left for lane in program.lanes)
    known = {*program.inputs}
    for lane in program.lanes:
        if lane.given not in known or given[lane.given] > 1:
            yield "V25", f"{lane.given!r} is no input, or in two lanes"
        if lane.left is None:
            continue
        value = program.outputs[lane.left] if lane.left < count else None
        if left[lane.left] > 1 or not goes_on(lane.given, value):
            yield (
                "V25",
                f"output {lane.left} does not go on where {lane.given!r} was, or is in two lanes",
            )


def _lane_stages(program: Program) -> Iterator[tuple[str, str]]:
    for lane, stages in touching(program).items():
        if lane.stages and lane.stages != stages:
            yield (
                "V26",
                f"the lane of {lane.given!r} is in stages {lane.stages}, and stages {stages} touch it",
            )


def _stages(program: Program) -> Iterator[tuple[str, str]]:
    placed: set[Op] = set()
    if program.ops:
        yield "V9", f"{len(program.ops)} op(s) are in no stage"
    for index, stage in enumerate(program.stages):
        if stage.index != index:
            yield "V10", f"stage {stage.index} stands at position {index}"
        if not stage.ops and len(program.stages) > 1:
            yield "V10", f"stage {index} is empty"
        for op in stage.ops:
            if op in placed:
                yield "V9", f"in two stages: {_show(program, op)}"
            if op.target == SPLIT:
                yield "V9", f"a split marker is left in stage {index}"
            placed.add(op)


def _linked(program: Program) -> Iterator[tuple[str, str]]:
    homes: dict[Value, int] = {}
    for stage in program.stages:
        for op in stage.ops:
            homes.update(dict.fromkeys(op.definitions(), stage.index))
    needed: dict[Value, int] = dict.fromkeys(
        program.output.operands, len(program.stages)
    )
    for stage in reversed(program.stages):
        yield from _stage_inputs(stage, homes)
        yield from _stage_outputs(stage, homes, needed)
        for value in stage.inputs:
            needed.setdefault(value, stage.index)
    yield from _transfers(program)
    yield from _port_order(program, homes)
    if program.lanes and not [*_lanes(program)]:
        yield from _lane_stages(program)
    yield from _holders(program)
    listed = {value for stage in program.stages for value in stage.outputs} | set(
        program.inputs
    )
    for value in program.output.operands:
        if value not in listed:
            yield "V15", f"{value!r} is returned, but no stage outputs it"


def _stage_inputs(stage: Stage, homes: dict[Value, int]) -> Iterator[tuple[str, str]]:
    listed, read = dict.fromkeys(stage.inputs), set()
    for op in stage.ops:
        for value in op.reads:
            read.add(value)
            if value not in listed and not _is_its_own(value, stage, homes):
                yield (
                    "V11",
                    f"stage {stage.index} reads {value!r}, which it neither defines, receives nor holds",
                )
    for value in listed:
        if value not in read:
            yield (
                "V11",
                f"stage {stage.index} lists input {value!r}, which it never reads",
            )
    if len(listed) != len(stage.inputs):
        yield "V11", f"stage {stage.index} lists an input twice"


def _is_its_own(value: Value, stage: Stage, homes: dict[Value, int]) -> bool:
    """True for a value that the stage defines, and for state that it holds."""
    if isinstance(value.owner, StateEntry) and value.owner in stage.state:
        return True
    return homes.get(value) == stage.index


def _stage_outputs(
    stage: Stage, homes: dict[Value, int], needed: dict[Value, int]
) -> Iterator[tuple[str, str]]:
    if len(set(stage.outputs)) != len(stage.outputs):
        yield "V12", f"stage {stage.index} lists an output twice"
    for value in stage.outputs:
        if not _is_its_own(value, stage, homes):
            yield (
                "V12",
                f"stage {stage.index} outputs {value!r}, which it does not define",
            )
        if value not in needed:
            yield "V12", f"stage {stage.index} outputs {value!r}, which nothing needs"


def _transfers(program: Program) -> Iterator[tuple[str, str]]:
    listed = dict.fromkeys(
        (value, stage.index) for stage in program.stages for value in stage.inputs
    )
    count = Counter(
        (transfer.value, transfer.target)
        for transfer in program.transfers
        if transfer.recomputed is None
    )
    for value, target in listed:
        if count[value, target] != 1:
            yield (
                "V13",
                f"{count[value, target]} transfers of {value!r} to stage {target}, not one",
            )
    inputs = set(program.inputs)
    outputs = {stage.index: stage.outputs for stage in program.stages}
    for transfer in program.transfers:
        if transfer.recomputed is not None or transfer.route == "recompute":
            yield from _recomputed(program, transfer)
            continue
        value, source, target = transfer.value, transfer.source, transfer.target
        if (value, target) not in listed:
            yield (
                "V13",
                f"a transfer of {value!r} to stage {target}, which does not list it",
            )
        yield from _route(transfer)
        if source is None and value not in inputs:
            yield "V13", f"{value!r} is fed to stage {target} but is no user input"
        if source is None or (source < target and value in outputs.get(source, ())):
            continue
        yield (
            "V13",
            f"stage {source} does not send {value!r} forward to stage {target}",
        )


def _route(transfer: Transfer) -> Iterator[tuple[str, str]]:
    """A user input is fed or relayed. Anything else goes to the next stage by send, farther by relay."""
    value, source, target = transfer.value, transfer.source, transfer.target
    route = transfer.route
    if route is None:
        yield "V13", f"the transfer of {value!r} to stage {target} has no route"
    elif route not in (("feed", "relay") if source is None else ("send", "relay")):
        yield (
            "V13",
            f"{value!r} goes to stage {target} by '{route}': user inputs are fed or relayed, and nothing "
            "else is fed",
        )
    elif source is not None and (route == "send") != (target == source + 1):
        yield (
            "V13",
            f"{value!r} goes from stage {source} to {target} by '{route}': to the next by send, farther by "
            "relay",
        )


def _recomputed(program: Program, transfer: Transfer) -> Iterator[tuple[str, str]]:
    """A stage that computes a value itself holds a copy of the op that defines the value."""
    if not _is_recomputed(program, transfer):
        yield (
            "V13",
            f"stage {transfer.target} does not compute {transfer.value!r} of stage {transfer.source} anew",
        )


def _is_recomputed(program: Program, transfer: Transfer) -> bool:
    if (
        transfer.route != "recompute"
        or transfer.recomputed is None
        or transfer.source is None
    ):
        return False
    target = transfer.target
    if not 0 <= target < len(program.stages) or transfer.source >= target:
        return False
    op, copy = transfer.value.owner, transfer.recomputed.owner
    if not isinstance(op, Op) or not isinstance(copy, Op) or op.has_effect:
        return False
    if copy not in program.stages[target].ops:
        return False
    return op.target == copy.target or CALL in (op.target, copy.target)


def _port_order(program: Program, homes: dict[Value, int]) -> Iterator[tuple[str, str]]:
    """Both ends of a boundary name its values in one order: both can then bind them by position."""
    ranks = {value: (-1, place) for place, value in enumerate(program.inputs)}
    for stage in program.stages:
        ranks |= {
            value: (stage.index, place)
            for place, value in enumerate(stage.outputs)
            if homes.get(value) == stage.index
        }
        last = (-1, -1)
        for value in stage.inputs:
            rank = ranks.get(value, last)
            if rank < last:
                yield (
                    "V16",
                    f"stage {stage.index} receives {value!r} in another order than it is sent",
                )
            last = rank
    if program.stages:
        listed = dict.fromkeys(program.stages[-1].outputs)
        returned = dict.fromkeys(program.output.operands)
        in_listed_order = [value for value in listed if value in returned]
        if in_listed_order != [value for value in returned if value in listed]:
            yield (
                "V16",
                "the last stage lists its outputs in another order than the model returns them",
            )


def _holders(program: Program) -> Iterator[tuple[str, str]]:
    holders: Counter[str] = Counter()
    owners: dict[StateEntry, set[int]] = {}
    for stage in program.stages:
        for entry, names in stage.state.items():
            holders.update(names)
            owners.setdefault(entry, set()).add(stage.index)
            if not set(names) <= set(entry.names):
                yield (
                    "V14",
                    f"stage {stage.index} holds '{entry.name}' under a foreign name",
                )
    for entry in program.state:
        if entry.kind != "const" and any(not holders[name] for name in entry.names):
            yield "V14", f"no stage holds every name of '{entry.name}'"
        if set(entry.stages) != owners.get(entry, set()):
            yield "V14", f"the owners of '{entry.name}' are not the stages that hold it"
