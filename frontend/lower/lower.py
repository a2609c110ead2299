"""fx graph -> ops. The part of lowering that ExportedProgram and GraphModule share.

Values of the IR are leaves: a node that returns a tuple, list or dict becomes an op with several results,
and `getitem` on it disappears. Contexts such as no_grad arrive as wrapped subgraphs and leave as a mark on
every op inside them, so that a cut through one needs no special case.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, zip_longest
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_unflatten

from stagecut.frontend.lower.contexts import SWITCHES, switched
from stagecut.frontend.lower.folded import Again, Folded, Made
from stagecut.frontend.lower.types import as_literal, type_of
from stagecut.frontend.markers import is_marker
from stagecut.frontend.marks import (
    AGAIN,
    BEGINS,
    CALL,
    CHECKPOINT,
    FOLLOWS,
    FUNCTION,
    LEAF,
    SAME,
    SYMBOLIC,
    SYMBOLS,
    LeafCall,
)
from stagecut.frontend.source import user_loc
from stagecut.ir.aliases import is_what_it_wrote, storage_root, viewed_value
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import CaptureError
from stagecut.ir.graph import (
    PURE,
    SPLIT,
    WHOLE,
    Block,
    Context,
    Effects,
    Frame,
    Kind,
    Loc,
    Mode,
    Namer,
    Op,
    Place,
    Program,
    RegionRef,
    ResultForm,
    Scope,
    StateEntry,
    Target,
    Value,
    leaves,
    scope_fqn,
    target_of,
    transform,
)
from stagecut.ir.ops import facts, facts_of, flag, flag_position, out_of_place
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.objects import numbers_and_texts, opened, tensor_paths
from stagecut.ir.run.storage import storage_of, undeclared_writes
from stagecut.ir.run.targets import name_of, resolve
from stagecut.ir.types import NONE, same_layout

_VMAP = "torch._functorch.predispatch"
"""The module of the functions that open and close a vmap. None of them may be left out or moved."""

_OPENING = ("_vmap_increment_nesting", "_jvp_increment_nesting")
_CLOSING = ("_vmap_decrement_nesting", "_jvp_decrement_nesting")
"""The functions with which a transform begins and ends."""

COUNT = "aten.add_.Tensor"
"""The op by which a batch norm counts its batches."""

_MADE_UP = "_empty_nn_module_stack_from_metadata_hook"
"""The module stack of a node that the tracer added, such as the size of an input."""


@dataclass(slots=True)
class Seen:
    """The findings from running a node once: its value, the operands it wrote, whether it drew random
    numbers.
    """

    value: Any
    writes: tuple[Value, ...] | None = None
    random: bool = False
    effect: bool = False


@dataclass(frozen=True, slots=True)
class _Site:
    """The node that is lowered, the ops that its op joins, and the place of that op."""

    node: fx.Node
    ops: list[Op]
    place: Place


class Lowering:
    """Turns fx nodes into ops of one program. `env` maps each node to a tree of values and literals."""

    def __init__(self, program: Program, bindings: Bindings) -> None:
        self.program = program
        self.bindings = bindings
        self._storage: dict[Value, int] = {}
        self._twins: set[Value] = set()
        self._scopes: dict[tuple[str, ...], Scope] = {}
        self._locs: dict[str, Loc | None] = {}
        self._targets: dict[Any, str] = {}
        self._schemas: dict[Any, _SchemaEffects] = {}
        self._literals: dict[Any, Any] = {}
        self._extern = Namer()
        self._regions: list[Context] = []
        self._transforms = count()
        self._place = Place()
        self._folded = Folded(self._storage)
        self.leaf_calls: dict[str, LeafCall] = {}
        self.leaf_owners: dict[str, torch.nn.Module] = {}
        self.fixed: dict[str, str] = {}
        self.whole_paths: frozenset[str] = frozenset()
        """Paths of modules kept whole: nothing inside them is a module of ours."""

    def note_storage(self, value: Value, tensor: Any) -> None:
        """The value lives in the storage of `tensor`."""
        storage = storage_of(tensor)
        if storage is not None:
            self._storage[value] = storage

    def end_of_writes(self, value: Value) -> int:
        """The first position in the program from which on nothing writes into the storage of `value`."""
        storage = self._storage.get(value, -1)
        end = 0
        for position, op in enumerate(self.program.ops, 1):
            written = [self._storage.get(operand) for operand in op.effects.writes]
            if storage in written:
                end = position
        return end

    def run(
        self,
        nodes: Iterable[fx.Node],
        env: dict[fx.Node, Any],
        ops: list[Op],
        context: tuple[Context, ...],
    ) -> Any:
        """`ops` gains the ops of all `nodes`; the result is the tree the output node returns."""
        outer = context
        for node in nodes:
            start = len(ops)
            operands: Any = None
            if node.op == "output":
                return self.tree(node.args[0], env)
            if node.op == "get_attr":
                env[node] = _attribute(node)
            elif BEGINS in node.meta:
                self._folded.begin(node, self.tree(node.args[1], env))
            elif AGAIN in node.meta:
                again = self._folded.again(node, self.tree(node.args[1], env))
                context = self._take(again, ops, context, outer)
                env[node] = again.results()
            elif node.target in SWITCHES:
                operands = self.tree(node.args[:4], env)
                context = switched(node, operands, context, outer)
                env[node] = None
            elif node.meta.get(SAME) or _detaches_a_constant(node):
                env[node] = self.tree(node.args[0], env)
            elif node.op != "placeholder":
                env[node] = self.call(
                    node, env, ops, context, Seen(node.meta.get("val"))
                )
            if self._folded.is_noting and ops is self.program.ops:
                made = Made(node, ops[start:], env.get(node), operands)
                self._folded.note(made)
        raise CaptureError(
            "the graph has no output node",
            hint="call graph.output(...) before handing it over",
        )

    def _take(
        self,
        again: Again,
        ops: list[Op],
        context: tuple[Context, ...],
        outer: tuple[Context, ...],
    ) -> tuple[Context, ...]:
        """`ops` gains those of a call that is like an earlier one; the result is the contexts after it."""
        for made in again.first.made:
            if made.node.target in SWITCHES:
                context = switched(made.node, made.operands, context, outer)
                continue
            if not made.ops:
                continue
            place = Place(
                self._scope_in(again.stack(made.node)),
                (*self._regions, *context),
                self._loc_of(again.trace(made.node)),
            )
            for op in made.ops:
                twin = again.twin(op, made, place)
                if _identity_views(op) and op.results[0].type is op.operands[0].type:
                    twin.results[0].type = twin.operands[0].type
                ops.append(twin)
        return context

    def call(
        self,
        node: fx.Node,
        env: dict[fx.Node, Any],
        ops: list[Op],
        context: tuple[Context, ...],
        seen: Seen,
    ) -> Any:
        """`ops` gains the op of one call node; the result is the tree of its results."""
        target: Any = node.target
        if target is operator.getitem:
            container = env[node.args[0]] if isinstance(node.args[0], fx.Node) else None
            if isinstance(container, (tuple, list, dict)):
                return container[node.args[1]]  # type: ignore[index]
        name = self.target(node)
        if name == CHECKPOINT:
            return self._checkpoint(*node.args)  # type: ignore[arg-type]
        step = target.__name__ if getattr(target, "__module__", "") == _VMAP else ""
        self._begin_transform(node, step)
        marks = (*self._regions, *context)
        site = _Site(node, ops, Place(self.scope(node), marks, self.loc(node)))
        self._place = site.place
        if name == SPLIT:
            ops.append(Op(SPLIT, place=site.place))
            return None
        args, kwargs = self.tree(node.args, env), self.tree(node.kwargs, env)
        if name == LEAF:
            return self._leaf(site, self.leaf_calls[args[0]], args[1], args[2])
        if name == FUNCTION:
            return self._function(site, node.meta[CALL], args[1], args[2])
        wrapped = _wrapped_context(name, args)
        if wrapped is not None:
            inner, graph, operands = wrapped
            return self._inline(graph, operands, ops, (*context, inner))
        tree = self._append(site, name, args, dict(kwargs), seen)
        # an operand that has that shape already is returned as it is
        if isinstance(tree, list) and facts(ops[-1]).returns_operand:
            tree = [
                operand if same_layout(result.type, operand.type) else result
                for result, operand in zip(tree, args[0], strict=True)
            ]
        if step in _CLOSING:
            self._regions = self._regions[:-1]
        return tree

    def _begin_transform(self, node: fx.Node, step: str) -> None:
        """The ops that come next are in a transform, where `step` begins one."""
        if step in _OPENING:
            mark = Context("transform", (next(self._transforms),))
            self._regions = [*self._regions, mark]
        elif step == "_add_batch_dim" and not any(
            mark.kind == "transform" for mark in self._regions
        ):
            raise CaptureError(
                "a vmap lies inside a control-flow branch, where torch.export loses its beginning",
                where=str(self.loc(node) or ""),
                hint="call torch.vmap outside of the conditional or loop",
            )

    def _checkpoint(self, number: int, begins: bool, preserve_rng_state: bool) -> None:
        """The ops between the begin and the end of a checkpoint are in that checkpoint."""
        region = Context("checkpoint", (number, preserve_rng_state))
        if begins:
            self._regions = [*self._regions, region]
        else:
            self._regions = [mark for mark in self._regions if mark != region]

    def _append(
        self, site: _Site, name: str, args: Any, kwargs: dict[str, Any], seen: Seen
    ) -> Any:
        """The ops gain one that calls a function; the result is the tree of its results."""
        called, target = _out_of_place(target_of(name), site.node.target, args)
        regions: list[Block] = []

        def operand(leaf: Any) -> Any:
            if isinstance(leaf, fx.GraphModule):
                return self._region(leaf, regions, site.place.loc)
            return leaf

        args = self._with_mode(site, called, target, transform(args, operand))
        op = Op(called, tuple(args), kwargs, place=site.place, regions=tuple(regions))
        tree = self._results(op, seen.value, site.node.name)
        op.effects = self._effects(op, target, seen)
        _refuse_resized_views(op)
        self.refuse_written_twins(op)
        if _identity_views(op) and not (
            isinstance(flag(op), Mode) and _is_expanded(op.operands[0].type)
        ):
            op.results[0].type = op.operands[0].type
        site.ops.append(op)
        return tree

    def _with_mode(self, site: _Site, called: Target, target: Any, args: Any) -> Any:
        """The operands of an op, whose training flag follows its module. A BatchNorm counts its batches in
        training only.
        """
        place = site.place
        if called == COUNT and self._is_batch_count(args, place.scope):
            return args[0], Mode(True)
        position = flag_position(called)
        if position is None:
            return args
        statistics = facts_of(called.name).statistics
        # a norm without statistics knows no modes
        if not statistics or args[statistics[0]] is not None:
            args = _with_defaults(target, args, position)
            args = self._follow_mode(args, position, place, site.node)
        if statistics and args[position : position + 1] == (Mode(False),):
            self._count_batch(site.ops, place)
        return args

    def _is_batch_count(self, args: Any, scope: Scope) -> bool:
        """True for the line of a BatchNorm in training that counts batches, which must add nothing in eval
        mode.
        """
        counter = self._batch_count(scope)
        if counter is None or not isinstance(args[0], Value) or args[1:] != (1,):
            return False
        # a module may have several names
        names = [
            entry.value
            for entry in self.program.state
            if entry.tensor == counter.tensor
        ]
        return (
            any(written_in_place(args[0], value) for value in names)
            and self.bindings.flag(scope_fqn(scope)) is True
        )

    def _batch_count(self, scope: Scope) -> StateEntry | None:
        path = scope_fqn(scope)
        if "BatchNorm" not in self.bindings.facts_of(path).kind or path in self.fixed:
            return None
        return self.program.name_owners().get(f"{path}.num_batches_tracked")

    def _count_batch(self, ops: list[Op], place: Place) -> None:
        """A BatchNorm captured in eval mode also counts batches once it is switched to training."""
        counter = self._batch_count(place.scope)
        if counter is None:
            return
        op = Op(
            COUNT,
            (counter.value, Mode(False)),
            effects=Effects(writes=(counter.value,), views=(counter.value,)),
            place=place._replace(loc=None),
        )
        op.add_result(counter.type, "count")
        ops.append(op)

    def _leaf(
        self, site: _Site, call: LeafCall, tensors: list[Any], numbers: list[Any]
    ) -> list[Value]:
        """The ops gain the call of a module kept whole; its results are the tensors the module returns."""
        args, kwargs = self._arguments(call, tensors, numbers, site.place.loc)
        scope, owner = site.place.scope, self.leaf_owners[call.path]
        inside = self.leaf_owners.get(scope_fqn(scope)) is owner
        # a shared module goes by the name it is called by
        path = scope_fqn(scope) if inside else call.path
        state = {
            name: entry.value
            for name, entry in self.program.name_owners().items()
            if name.startswith(path + ".")
        }
        scope = scope[:-1] if inside else scope
        # a module may be no child of its caller
        while scope and not path.startswith(scope_fqn(scope) + "."):
            scope = scope[:-1]
        op = Op(
            f"module.{path}",
            (args, kwargs, list(dict.fromkeys(state.values()))),
            place=site.place._replace(scope=scope),
        )
        written = [tensors[position] for position in call.written_inputs]
        written += [state[f"{path}.{name}"] for name in call.written_state]
        self.bindings.modules[path] = owner
        return self._append_whole(site, op, call, tensors, written)

    def _function(
        self, site: _Site, call: LeafCall, tensors: list[Any], numbers: list[Any]
    ) -> list[Value]:
        """The ops gain the call of a user's function; its results are the tensors the function returns."""
        name = self._targets.get(call.function)
        if name is None:
            name = "extern." + self._extern(call.path, "function")
            self._targets[call.function] = name
            self.bindings.functions[name] = call.function
        args, kwargs = self._arguments(call, tensors, numbers, site.place.loc)
        op = Op(name, args, kwargs, place=site.place)
        written = [tensors[position] for position in call.written_inputs]
        return self._append_whole(site, op, call, tensors, written)

    def _arguments(
        self, call: LeafCall, tensors: list[Any], numbers: list[Any], loc: Loc | None
    ) -> Any:
        """The arguments of a call of a module or function kept whole, as operands."""
        next_tensor, next_number = iter(tensors), iter(numbers)

        def traced(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return next(next_tensor)
            return next(next_number) if isinstance(leaf, SYMBOLIC) else leaf

        def operand(leaf: Any) -> Any:
            return leaf if isinstance(leaf, Value) else self._literal_operand(leaf)

        flat = [traced(leaf) for leaf in call.in_flat]
        try:
            return transform(tree_unflatten(flat, call.in_spec), operand)
        except CaptureError:
            raise
        except Exception as error:
            # a class that looks at the tensors it is made of, such as a PackedSequence
            raise_ours(error)
            raise CaptureError(
                f"'{call.path}' is kept whole and is given an object of a class that no operand can be: "
                f"{call.in_spec}: {error}",
                where=str(loc or ""),
                hint=(
                    "give it tensors, lists, tuples and dicts, or keep the module around it whole: "
                    "leaf_modules=[...]"
                ),
            ) from error

    def _append_whole(
        self,
        site: _Site,
        op: Op,
        call: LeafCall,
        tensors: list[Any],
        written: list[Any],
    ) -> list[Value]:
        op.form = ResultForm(rest=())
        if not any(isinstance(leaf, SYMBOLIC) for leaf in call.out_flat):
            returned = [
                tensor_paths(opened(tree_unflatten(call.out_flat, call.out_spec))),
                *numbers_and_texts(call.out_flat),
            ]
            op.form = ResultForm(rest=() if returned == [""] else tuple(returned))
        for traced in site.node.meta["val"]:
            self._result(op, traced.detach(), site.node.name)
        views = tuple(None if view is None else tensors[view] for view in call.views)
        op.effects = Effects(
            tuple(dict.fromkeys(written)),
            views if any(view is not None for view in views) else (),
            call.random,
            effect=True,
        )
        self.refuse_written_twins(op)
        returned_tensors = [
            leaf for leaf in call.out_flat if isinstance(leaf, torch.Tensor)
        ]
        self.note_twins(op, [storage_of(tensor) for tensor in returned_tensors])
        site.ops.append(op)
        return list(op.results)

    def note_twins(self, op: Op, homes: Sequence[int | None]) -> None:
        """The results that share memory with one another are noted. `homes` says where each lies."""
        for position, (result, home) in enumerate(zip(op.results, homes, strict=True)):
            if (
                home is not None
                and op.effects.viewed_by(position) is None
                and homes.count(home) > 1
            ):
                self._twins.add(result)

    def refuse_written_twins(self, op: Op) -> None:
        """Raises CaptureError for a write into a result of a module kept whole that shares memory with
        another of its results, because neither is a view of the other.
        """
        for value in op.effects.writes if self._twins else ():
            root = storage_root(value)
            if root in self._twins and isinstance(root.owner, Op):
                raise CaptureError(
                    "what a module kept whole returned is written, and it shares memory with something else "
                    "that it returned",
                    where=f"{op.where()}; {root.owner.where()}",
                    hint="write a clone: x = x.clone()",
                )

    def _inline(
        self,
        graph: fx.Graph,
        operands: tuple[Any, ...],
        ops: list[Op],
        context: tuple[Context, ...],
    ) -> Any:
        parameters = [node for node in graph.nodes if node.op == "placeholder"]
        env = dict(zip(parameters, operands, strict=True))
        return self.run(graph.nodes, env, ops, context)

    def _region(
        self, module: fx.GraphModule, regions: list[Block], loc: Loc | None
    ) -> RegionRef:
        env: dict[fx.Node, Any] = {}
        inputs: list[Value] = []
        for node in module.graph.nodes:
            if node.op == "placeholder":
                value = Value(type_of(node.meta.get("val")), node.name)
                self.note_storage(value, node.meta.get("val"))
                inputs.append(value)
                env[node] = value
        ops: list[Op] = []
        outer, self._regions = self._regions, []
        output = self.run(module.graph.nodes, env, ops, ())
        self._regions = outer
        for op in ops:
            if op.target == SPLIT:
                raise CaptureError(
                    "a split point lies inside a control-flow branch, which runs as a whole",
                    where=Op(SPLIT, place=Place(op.scope, loc=op.loc or loc)).where(),
                    hint="move pipe_split() before or after the conditional or loop",
                )
            # the branch itself runs as a whole
            context = tuple(mark for mark in op.context if mark.kind not in WHOLE)
            op.place = op.place._replace(context=context)
        regions.append(Block(f"body_{len(regions)}", inputs, ops, output))
        return RegionRef(len(regions) - 1)

    # --- operands and results ---------------------------------------------------------------------

    def tree(self, operand: Any, env: dict[fx.Node, Any]) -> Any:
        """fx operands -> operands of the IR."""
        if isinstance(operand, fx.Node):
            return env[operand]
        if isinstance(operand, tuple):
            return tuple([self.tree(part, env) for part in operand])
        if isinstance(operand, list):
            return [self.tree(part, env) for part in operand]
        if isinstance(operand, dict):
            return {key: self.tree(part, env) for key, part in operand.items()}
        if isinstance(operand, slice):
            return slice(
                self.tree(operand.start, env),
                self.tree(operand.stop, env),
                self.tree(operand.step, env),
            )
        if (
            operand is None
            or operand is True
            or operand is False
            or type(operand) in (int, float, str)
        ):
            return operand
        return self._literal_operand(operand)

    def _literal_operand(self, operand: Any) -> Any:
        if operand is None or type(operand) in (bool, int, float, complex, str):
            return operand  # equal ones may be of different types: True, 1 and 1.0
        if operand not in self._literals:
            try:
                self._literals[operand] = as_literal(operand)
            except TypeError:
                what = f"an operand of type {type(operand).__name__} cannot be written as a literal"
                raise CaptureError(
                    f"{what}: {operand!r:.80}",
                    where=f"module '{scope_fqn(self._place.scope)}', {self._place.loc or 'line unknown'}",
                    hint="keep that module whole: leaf_modules=[...]; or pass the object to the model as an "
                    "input",
                ) from None
        return self._literals[operand]

    def _results(self, op: Op, value: Any, name: str) -> Any:
        if not isinstance(value, (tuple, list, dict)):
            if value is None:
                return None
            return self._result(op, value, name)
        if not _holds_values(value):
            return self._result(op, value, name)
        tree = self._result_tree(op, value, name)
        flat = (
            isinstance(value, (tuple, list))
            and len(value) > 1
            and len(op.results) == len(value)
        )
        if not flat:
            index = {result: i for i, result in enumerate(op.results)}
            op.form = ResultForm(_map_values(tree, index))
        return tree

    def _result_tree(self, op: Op, value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {
                key: self._result_tree(op, part, name) for key, part in value.items()
            }
        if isinstance(value, (tuple, list)):
            parts = [self._result_tree(op, part, name) for part in value]
            return parts if isinstance(value, list) else tuple(parts)
        return self._result(op, value, name)

    def _result(self, op: Op, value: Any, name: str) -> Value:
        result = op.add_result(type_of(value) if value is not None else NONE, name)
        self.note_storage(result, value)
        return result

    def _follow_mode(
        self, args: tuple[Any, ...], position: int, place: Place, node: fx.Node
    ) -> tuple[Any, ...]:
        if len(args) <= position or not isinstance(args[position], bool):
            return args
        path = scope_fqn(place.scope)
        followed = node.meta.get(FOLLOWS, (path,))
        if path not in followed:
            if followed:
                self.bindings.choices[followed[0]] = (
                    f"{place.loc}, with the flag of '{followed[0]}'"
                )
            return args
        if path in self.fixed or self.bindings.flag(path) not in (None, args[position]):
            return args
        return (*args[:position], Mode(args[position]), *args[position + 1 :])

    # --- effects ----------------------------------------------------------------------------------

    def _effects(self, op: Op, target: Any, seen: Seen) -> Effects:
        schema = self._schemas.get(target)
        if schema is None:
            schema = self._schemas[target] = _SchemaEffects.of(target)
        writes = (
            seen.writes
            if seen.writes is not None
            else (*schema.writes_of(op), *undeclared_writes(op.target, op.args))
        )
        views = (
            () if facts(op).copies else self._views(op, writes) or _identity_views(op)
        )
        random = (schema.random and not _never_draws(op)) or seen.random
        effect = schema.effect or seen.effect
        if not (writes or views or random or effect):
            return PURE
        return Effects(writes, views, random, effect)

    def _views(self, op: Op, writes: tuple[Value, ...]) -> tuple[Value | None, ...]:
        """For each result, the operand whose storage it shares. Where there are several, it is the one in the
        result's place, else one that is written.
        """
        storage = self._storage
        homes: dict[int, Value] = {}
        for operand in (*writes, *op.operands):
            where = storage.get(operand)
            if where is not None:
                homes.setdefault(where, operand)
        if not homes:
            return ()
        views = tuple([homes.get(storage.get(result, -1)) for result in op.results])
        if len(op.results) > 1:
            beside = zip_longest(op.operands[: len(views)], op.results)
            views = tuple(
                operand if storage.get(operand, -1) == storage.get(result) else viewed
                for viewed, (operand, result) in zip(views, beside, strict=True)
            )
        return views if any(v is not None for v in views) else ()

    # --- names and places -------------------------------------------------------------------------

    def target(self, node: fx.Node) -> str:
        if node.op == "call_method":
            return _method_target(str(node.target))
        if node.op == "call_module":
            return f"module.{node.target}"
        target: Any = node.target
        name = self._targets.get(target)
        if name is None:
            name = SPLIT if is_marker(target) else name_of(target)
            if name is None:
                name = "extern." + self._extern(
                    getattr(target, "__name__", "function").replace(".", "_"),
                    "function",
                )
                self.bindings.functions[name] = target
            self._targets[target] = name
        return name

    def scope(self, node: fx.Node) -> Scope:
        """The module calls around a node, outermost first, the root left out."""
        return self._scope_in(node.meta.get("nn_module_stack"))

    def _scope_in(self, stack: dict[str, tuple[str, Any]] | None) -> Scope:
        if not stack or _MADE_UP in stack:
            return ()
        key = tuple(stack)
        scope = self._scopes.get(key)
        if scope is None:
            frames = _scope([(call, module[0]) for call, module in stack.items()])
            scope = self._scopes[key] = _outside(frames, self.whole_paths)
        return scope

    def loc(self, node: fx.Node) -> Loc | None:
        """The user's source line of a node: the innermost frame outside torch."""
        trace = node.meta.get("stack_trace")
        if not trace or _MADE_UP in (node.meta.get("nn_module_stack") or ()):
            return None
        return self._loc_of(trace)

    def _loc_of(self, trace: str) -> Loc | None:
        if not trace:
            return None
        if trace not in self._locs:
            self._locs[trace] = user_loc(trace)
        return self._locs[trace]


@dataclass(frozen=True, slots=True)
class _SchemaEffects:
    """The effects in an op's schema: the names and positions of written operands, randomness, other
    effects.
    """

    written: tuple[tuple[int, str], ...] = ()
    random: bool = False
    effect: bool = False

    @staticmethod
    def of(target: Any) -> _SchemaEffects:
        if not isinstance(target, torch._ops.OpOverload):
            return _SchemaEffects(effect=getattr(target, "__module__", "") == _VMAP)
        arguments = target._schema.arguments
        written = tuple(
            (position, argument.name)
            for position, argument in enumerate(arguments)
            if argument.alias_info and argument.alias_info.is_write
        )
        random = torch.Tag.nondeterministic_seeded in target.tags
        # the backward of attention is given the seed with which its forward drew
        random = random and all(a.name != "philox_seed" for a in arguments)
        effect = not target._schema.returns and not written
        return _SchemaEffects(written, random, effect)

    def writes_of(self, op: Op) -> tuple[Value, ...]:
        """The operands that are written."""
        written: list[Value] = []
        for position, name in self.written:
            if position < len(op.args):
                written += leaves(op.args[position])
            else:
                written += leaves(op.kwargs.get(name))
        return tuple(written)


def _method_target(name: str) -> str:
    """The target of a call of a method. An operator's method goes by the operator."""
    if not name.isidentifier():
        raise CaptureError(
            f"call_method target {name!r} is no identifier",
            hint="rename the method in the graph",
        )
    function = getattr(operator, name, None) if name.startswith("__") else None
    return f"method.{name}" if function is None else str(name_of(function))


def _out_of_place(called: Target, target: Any, args: Any) -> tuple[Target, Any]:
    """The op that returns a view, for one that gives a tensor another shape in place, where nobody else has
    the tensor.
    """
    view = out_of_place(called)
    if not view or not _is_new(args[0]):
        return called, target
    if called.kind is Kind.ATEN:
        return target_of(view), resolve(view)
    return target_of(view), getattr(target, "__name__", target)


def _is_new(value: Any) -> bool:
    """True for a tensor that an op made: not for one of the caller's or of the state, even where an in-place
    op returned it.
    """
    while isinstance(value, Value) and isinstance(value.owner, Op):
        viewed = viewed_value(value)
        if not is_what_it_wrote(value):
            return viewed is None or not value.owner.is_users
        value = viewed
    return False


def _refuse_resized_views(op: Op) -> None:
    """Raises CaptureError for an `out=` that is a view of another size. Torch would make another view of it,
    which extends over the memory after it.
    """
    if len(op.results) != 1 or not op.effects.writes:
        return
    named_out = [value for name, value in op.kwargs.items() if name.startswith("out")]
    for out in leaves(named_out):
        sizes = {getattr(value.type, "shape", ()) for value in (out, op.results[0])}
        if len(sizes) > 1 and viewed_value(out) is not None:
            raise CaptureError(
                "an operation writes its result to out=, a view of another size, which torch would resize "
                "over the tensor it is a view of",
                where=op.where(),
                hint="give out= a tensor of the size of the result, or assign the result: x[:] = ...",
            )


def _with_defaults(
    target: Any, args: tuple[Any, ...], position: int
) -> tuple[Any, ...]:
    """The operands up to `position`; those that were left out have the defaults of the op's schema."""
    if len(args) > position or not isinstance(target, torch._ops.OpOverload):
        return args
    rest = target._schema.arguments[len(args) : position + 1]
    return (
        (*args, *(argument.default_value for argument in rest))
        if all(argument.has_default_value() for argument in rest)
        else args
    )


def _identity_views(op: Op) -> tuple[Value | None, ...]:
    """The views that the schema and the fake result of a dropout do not show. A dropout outside training
    returns the very tensor it is given, and one that follows its module may do so.
    """
    if facts(op).off_is_operand and (flag(op) is False or isinstance(flag(op), Mode)):
        return (op.operands[0],)
    return ()


def returns_what_it_is_given(op: Op) -> bool:
    """True for a dropout that is on in the trace and that, in the other mode, returns the very tensor it is
    given.
    """
    mode = flag(op)
    return (
        facts(op).off_is_operand
        and not op.effects.writes
        and isinstance(mode, Mode)
        and mode.captured
    )


def _is_expanded(value_type: Any) -> bool:
    """True for a tensor in which several elements are one in memory. The result of a dropout that is on is
    never so.
    """
    return 0 in (getattr(value_type, "strides", None) or ())


def _never_draws(op: Op) -> bool:
    """True for a dropout that is off in either mode."""
    return facts(op).off_is_operand and flag(op) is False


def written_in_place(value: Value, target: Value) -> bool:
    """True when `value` is no new tensor, but `target` as in-place ops returned it."""
    while value is not target:
        op = value.owner
        if (
            not isinstance(op, Op)
            or op.target.kind is not Kind.ATEN
            or len(op.results) != 1
        ):
            return False
        viewed = op.effects.viewed_by(0)
        if viewed is None or viewed not in op.effects.writes:
            return False
        value = viewed
    return True


def _holds_values(tree: Any) -> bool:
    if isinstance(tree, dict):
        return any(_holds_values(part) for part in tree.values())
    if isinstance(tree, (tuple, list)):
        return any(_holds_values(part) for part in tree)
    return isinstance(tree, SYMBOLS)


def _map_values(tree: Any, index: dict[Value, int]) -> Any:
    if isinstance(tree, dict):
        return {key: _map_values(part, index) for key, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_map_values(part, index) for part in tree)
    if isinstance(tree, list):
        return [_map_values(part, index) for part in tree]
    return index[tree]


def _detaches_a_constant(node: fx.Node) -> bool:
    """True for the op that torch puts after every tensor made of Python's numbers: it detaches a tensor that
    carries no gradient.
    """
    source = node.args[0] if node.target is torch.ops.aten.detach_.default else None
    return (
        isinstance(source, fx.Node)
        and source.target is torch.ops.aten.lift_fresh_copy.default
    )


def _wrapped_context(
    name: str, args: Any
) -> tuple[Context, fx.Graph, tuple[Any, ...]] | None:
    if name == "torch.ops.higher_order.wrap_with_set_grad_enabled":
        return Context("enable_grad" if args[0] else "no_grad"), args[1].graph, args[2:]
    if name == "torch.ops.higher_order.wrap_with_autocast":
        return Context("autocast", tuple(args[:4])), args[4].graph, args[5:]
    return None


def _attribute(node: fx.Node) -> Any:
    owner: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    if not isinstance(owner, fx.GraphModule):
        raise CaptureError(
            f"the graph reads attribute '{node.target}' of type {type(owner).__name__}",
            hint="only tensors and subgraphs can be read",
        )
    return owner


def _scope(stack: list[tuple[str, str]]) -> Scope:
    frames: list[tuple[str, int]] = []
    for key, raw in stack:
        fqn, _, call_in_path = raw.removeprefix("L['self']").lstrip(".").partition("@")
        number = key.partition("@")[2] or call_in_path
        frames.append((fqn, int(number) if number.isdigit() else 0))
    innermost = frames[-1][0]
    scope: list[Frame] = []
    above = ""
    for fqn, call in frames:
        if (
            fqn
            and (fqn == innermost or innermost.startswith(fqn + "."))
            and len(fqn) > len(above)
        ):
            scope.append(Frame(fqn[len(above) + 1 :] if above else fqn, call))
            above = fqn
    return tuple(scope)


def _outside(scope: Scope, whole: frozenset[str]) -> Scope:
    """The frames of a scope that lie around the first module of `whole`."""
    for depth in range(len(scope) if whole else 0):
        if not whole.isdisjoint(_paths_to(scope_fqn(scope[: depth + 1]))):
            return scope[:depth]
    return scope


def _paths_to(path: str) -> list[str]:
    """A module path and those of the modules around it."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def state_entries(
    module: torch.nn.Module, bindings: Bindings, note: Callable[[Value, Any], None]
) -> list[StateEntry]:
    """One entry for every parameter and buffer name of `module`, in state_dict order, aliases not yet
    merged.
    """
    entries: list[StateEntry] = []
    tensors: dict[int, int] = {}
    storages: dict[int, int] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        bindings.learn(
            prefix,
            training=owner.training,
            kind=type(owner).__name__,
            described=_description(owner),
        )
        for name, tensor, kind, persistent in _own_state(owner):
            path = f"{prefix}.{name}" if prefix else name
            transient = frozenset() if persistent else frozenset({path})
            entry = StateEntry((path,), kind, type_of(tensor), transient)
            entry.tensor = tensors.setdefault(id(tensor), len(tensors))
            entry.storage = storages.setdefault(
                storage_of(tensor) or -id(tensor), len(storages)
            )
            bindings.tensors[path] = tensor
            note(entry.value, tensor)
            entries.append(entry)
    return entries


def _description(owner: torch.nn.Module) -> str:
    """The text that the module's class prints of a module, between its parentheses; '' where it fails."""
    try:
        return str(owner.extra_repr())
    except Exception:
        # a class of the user's may print what this module does not have
        return ""


def _own_state(
    owner: torch.nn.Module,
) -> Iterator[tuple[str, torch.Tensor, str, bool]]:
    """The parameters and then the buffers of one module: name, tensor, kind of state, whether it is in a
    state_dict.
    """
    for name, parameter in owner._parameters.items():
        if parameter is not None:
            yield name, parameter, "param", True
    for name, buffer in owner._buffers.items():
        if buffer is not None:
            persistent = name not in owner._non_persistent_buffers_set
            yield name, buffer, "buffer", persistent
