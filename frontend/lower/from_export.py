"""ExportedProgram -> Program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import TreeSpec, tree_leaves

from stagecut.frontend.lower.lower import (
    Lowering,
    Seen,
    state_entries,
    written_in_place,
)
from stagecut.frontend.lower.order import settle
from stagecut.frontend.lower.subclasses import access_where_used
from stagecut.frontend.lower.types import specialised, type_of
from stagecut.frontend.marks import ASSIGNED, CHOICES, FIXED, SYMBOLS, LeafCall
from stagecut.frontend.watch.training import switches
from stagecut.ir.aliases import Aliases
from stagecut.ir.errors import CaptureError
from stagecut.ir.graph import Effects, Lane, Op, Program, StateEntry, Value
from stagecut.ir.lanes import goes_on
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.call import ABSENT, CallSpec, parameters_of, signature_of
from stagecut.ir.types import TensorType


def lower_export(
    exported: ExportedProgram,
    module: torch.nn.Module | None = None,
    leaf_calls: dict[str, LeafCall] | None = None,
) -> tuple[Program, Bindings]:
    """The traced program of `exported`. With `module`, state is the module's own tensors; without, the
    exported ones.
    """
    access_where_used(exported.graph)
    program = Program(
        type(module).__name__ if module is not None else "ExportedProgram"
    )
    bindings = Bindings(sources=True)
    lowering = Lowering(program, bindings)
    if module is not None:
        if leaf_calls:
            lowering.leaf_calls = leaf_calls
            lowering.leaf_owners = dict(module.named_modules(remove_duplicate=False))
        program.state = state_entries(module, bindings, lowering.note_storage)
    else:
        program.state = _exported_state(exported, bindings)
    env = _placeholders(exported, program, bindings, lowering)
    if module is not None and CHOICES in exported.graph_module.meta:
        whole = tuple(f"{call.path}." for call in (leaf_calls or {}).values())
        _learn_modes(exported, module, whole, lowering)
    reassigned = _reassignments(exported)
    for node in reassigned:
        # readers of the old tensor keep it, and do not read the copy
        if node.target is torch.ops.aten.copy_.default:
            node.replace_all_uses_with(node.args[0])
    outputs = lowering.run(
        [node for node in exported.graph.nodes if node not in reassigned],
        env,
        program.ops,
        (),
    )
    _finish(exported, program, list(outputs))
    for node in reassigned:
        _reassign(node, env, lowering)
    settle(program)
    bindings.call = _call_spec(exported, module)
    program.output_names = bindings.call.output_names()
    program.lanes = [*_lanes(program, bindings.call)]
    return program, bindings


def _lanes(program: Program, call: CallSpec) -> Iterator[Lane]:
    for place, left in call.lanes().items():
        given = program.inputs[place]
        after = program.outputs[left] if left is not None else given
        if isinstance(after, Value) and goes_on(given, after):
            yield Lane(given, left)


def _learn_modes(
    exported: ExportedProgram,
    module: torch.nn.Module,
    whole: tuple[str, ...],
    lowering: Lowering,
) -> None:
    """The bindings say where the model's code depends on its mode, and what train() does in the model.
    `whole` has the beginnings of paths inside modules kept whole.
    """
    bindings = lowering.bindings
    switched, places = switches(module)
    lowering.fixed = exported.graph_module.meta[FIXED]
    set_inside = {
        path: where
        for path, where in lowering.fixed.items()
        if f"{path}.".startswith(whole)
    }
    bindings.choices = dict(exported.graph_module.meta[CHOICES])
    for path, where in (places | set_inside).items():
        bindings.learn(path, branch=where)
    for path, modes in switched.items():
        bindings.learn(path, switches=modes)


def _reassign(node: fx.Node, env: dict[Any, Any], lowering: Lowering) -> None:
    """The program gains the op of a node that stands for `self.buffer = new`."""
    program = lowering.program
    # the clone of a buffer whose tensor is assigned to another buffer
    if node.target is torch.ops.aten.clone.default:
        seen = Seen(node.meta.get("val"))
        env[node] = lowering.call(node, env, program.ops, (), seen)
        clone = program.ops.pop()
        program.ops.insert(lowering.end_of_writes(clone.operands[0]), clone)
        return
    target, source = lowering.tree(node.args, env)
    _write_back(program, target, source, lowering.end_of_writes(source))


def _exported_state(exported: ExportedProgram, bindings: Bindings) -> list[StateEntry]:
    signature = exported.graph_signature
    parameters = set(signature.parameters)
    transient = frozenset(signature.non_persistent_buffers)
    tensors: dict[str, Any] = dict(exported.state_dict)
    tensors |= {
        name: exported.constants[name] for name in signature.non_persistent_buffers
    }
    entries = []
    numbers: dict[int, int] = {}
    for name, tensor in tensors.items():
        kind = (
            "param"
            if name in parameters or isinstance(tensor, torch.nn.Parameter)
            else "buffer"
        )
        entry = StateEntry((name,), kind, type_of(tensor), transient & {name})
        entry.tensor = numbers.setdefault(id(tensor), len(numbers))
        entry.storage = entry.tensor
        bindings.tensors[name] = tensor
        entries.append(entry)
    return entries


def _placeholders(
    exported: ExportedProgram, program: Program, bindings: Bindings, lowering: Lowering
) -> dict[Any, Any]:
    owners = program.name_owners()
    nodes = list(exported.graph.find_nodes(op="placeholder"))
    env: dict[Any, Any] = {}
    examples = iter(tree_leaves(exported.example_inputs))
    for node, spec in zip(nodes, exported.graph_signature.input_specs, strict=True):
        value = node.meta.get("val")
        if spec.kind is InputKind.USER_INPUT:
            symbolic = isinstance(value, SYMBOLS)
            env[node] = program.add_input(
                type_of(value) if symbolic else specialised(value), node.name
            )
            _as_given(env[node], next(examples, None))
        elif (
            spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
            and spec.target in owners
        ):
            env[node] = owners[spec.target].value
        elif spec.kind is InputKind.CONSTANT_TENSOR and spec.target is not None:
            env[node] = _constant(
                spec.target, exported.constants[spec.target], program, bindings, owners
            )
        else:
            raise _foreign_object(node, spec, lowering)
        lowering.note_storage(env[node], value)
    return env


def _as_given(value: Value, example: Any) -> None:
    """The input carries gradient when the example does. The traced input cannot tell, because forward may
    have changed it.
    """
    if isinstance(example, torch.Tensor) and isinstance(value.type, TensorType):
        value.type = replace(value.type, grad=example.requires_grad)


def _foreign_object(node: Any, spec: Any, lowering: Lowering) -> CaptureError:
    """The error for an object that is no tensor and no number, but has state of its own, such as a generator
    of random numbers.
    """
    class_name = str(getattr(spec.arg, "class_fqn", "") or spec.kind.name)
    hint = "keep objects with state out of forward"
    if class_name.endswith("Generator"):
        hint = (
            "draw from the default generator (torch.manual_seed): every process would go on with a copy of "
            "this one"
        )
    place = next((str(loc) for loc in map(lowering.loc, node.users) if loc), "")
    return CaptureError(
        f"the model uses a {class_name}, which stages in different processes cannot share",
        where=place,
        hint=hint,
    )


def _constant(
    name: str,
    tensor: Any,
    program: Program,
    bindings: Bindings,
    owners: dict[str, StateEntry],
) -> Value:
    if name in owners:
        return owners[name].value
    entry = StateEntry((name,), "const", type_of(tensor))
    entry.tensor = entry.storage = len(program.state)
    program.state.append(entry)
    owners[name] = entry
    bindings.tensors[name] = tensor
    return entry.value


def _finish(exported: ExportedProgram, program: Program, outputs: list[Any]) -> None:
    owners = program.name_owners()
    inputs = {value.hint: value for value in program.inputs}
    returned: list[Any] = []
    for spec, value in zip(exported.graph_signature.output_specs, outputs, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            returned.append(value)
        elif spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            _write_back(program, owners[str(spec.target)].value, value)
        elif spec.kind is OutputKind.USER_INPUT_MUTATION:
            _write_back(program, inputs[str(spec.target)], value)
        else:
            raise CaptureError(
                f"output of kind {spec.kind.name} is not supported",
                hint="export for inference or training without a joint backward graph",
            )
    program.set_outputs(returned)


def _reassignments(exported: ExportedProgram) -> list[Any]:
    """The nodes that stand for `self.buffer = new`: those that our watch marked; else the copies, last in the
    graph, whose names torch's tracer gives to no other node.
    """
    marked = [node for node in exported.graph.nodes if ASSIGNED in node.meta]
    copies: list[Any] = []
    node = exported.graph.output_node().prev
    while (
        node.target is torch.ops.aten.copy_.default
        and node.name.startswith("copy__default")
        and not node.users
    ):
        copies.insert(0, node)
        node = node.prev
    return marked or copies


def _write_back(
    program: Program, target: Value, source: Value, earliest: int = 0
) -> None:
    """A new value `source` of state or of an input becomes a copy into `target`. The copy stands as early as
    both exist, but not before position `earliest`.

    The model gave the name a new tensor and kept the old one, so ops that read the old one read a clone,
    taken before the copy.
    """
    if written_in_place(source, target):
        return
    ops = program.ops
    positions = {op: position for position, op in enumerate(ops)}
    position = max(earliest, *(_born(value, positions) for value in (source, target)))
    if isinstance(target.owner, Op):
        _refuse_older_views(program, target, target.owner, position)
    copy = Op(
        "aten.copy_.default",
        (target, source),
        effects=Effects(writes=(target,), views=(target,)),
    )
    if isinstance(source.owner, Op):
        copy.place = source.owner.place._replace(context=())
    readers = [op for op in target.uses if op is not copy]
    ops.insert(position, copy)
    if readers:
        first = min(readers, key=lambda op: positions.get(op, len(positions)))
        place = first.place._replace(context=())
        old = Op("aten.clone.default", (target,), place=place)
        old.add_result(target.type, f"{target.hint}_old")
        target.replace_uses(old.results[0], lambda user: user not in (copy, old))
        ops.insert(min(position, positions.get(first, len(positions))), old)
    copy.add_result(target.type, f"{target.hint}_new")


def _refuse_older_views(
    program: Program, target: Value, writer: Op, position: int
) -> None:
    """Returns when nothing from `position` on reads the storage of `target`, which `writer` has written, but
    `target` and its views: only these can be views of a clone. Raises CaptureError.
    """
    aliases = Aliases(program.ops, program.state)
    root = aliases.root(target)
    younger = Aliases(program.ops, roots=[target])
    for op in (*program.ops[position:], program.output):
        for value in op.operands:
            if aliases.root(value) is not root or younger.root(value) is target:
                continue
            raise CaptureError(
                f"'{root.hint}' is written in place and then assigned, and {value!r}, a view from before, is "
                "used after that",
                where=(writer if op is program.output else op).where(),
                hint="clone the view, or write in place only: self.buffer.copy_(new)",
            )


def _born(value: Value, positions: dict[Op, int]) -> int:
    """The first position at which a value exists."""
    return positions[value.owner] + 1 if isinstance(value.owner, Op) else 0


def _call_spec(exported: ExportedProgram, module: torch.nn.Module | None) -> CallSpec:
    signature = exported.module_call_graph[0].signature
    if signature is None:
        raise CaptureError("the exported program has no call signature")
    args_spec, kwargs_spec = _children(signature.in_spec)
    keywords = tuple(kwargs_spec.context or ())
    names = list(signature.forward_arg_names or ())
    count = len(_children(args_spec))
    if len(names) >= count:
        positional = tuple(names[:count])
    else:
        positional = tuple(f"arg{number}" for number in range(count))
    if module is not None:
        parameters = parameters_of(module.forward)
    else:
        parameters = dict.fromkeys([*positional, *keywords], ABSENT)
    ranges = {
        str(symbol): (_bound(bounds.lower), _bound(bounds.upper))
        for symbol, bounds in exported.range_constraints.items()
    }
    return CallSpec(
        positional,
        keywords,
        parameters,
        signature.in_spec,
        signature.out_spec,
        ranges,
        signature_of(module.forward) if module is not None else None,
    )


def _bound(limit: Any) -> int | None:
    """The bound of a size as a number; None for infinity."""
    return int(limit) if getattr(limit, "is_Integer", True) else None


def _children(spec: TreeSpec) -> list[TreeSpec]:
    children = getattr(spec, "children", None)
    return list(children() if callable(children) else spec.children_specs)
