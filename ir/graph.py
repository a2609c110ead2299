"""The IR: programs, values, ops, state, stages and transfers. No torch here.

A program rises through four phases. `traced`: one list of ops. `partitioned`: every op sits in one
stage. `linked`: stages know their inputs, outputs and state, and transfers carry what crosses.
`differentiated`: beside its ops, which are its forward, each stage has blocks that compute gradients.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

from stagecut.ir.errors import StagecutError
from stagecut.ir.types import Type, carries_grad

PHASES = ("traced", "partitioned", "linked", "differentiated")
LINKED = PHASES[2:]
"""The phases in which stages know what crosses."""
ROLES = ("forward", "backward_input", "backward_weight")
SPLIT = "stagecut.split"
"""Target of the op that marks a boundary between two stages."""
BY_MODE = "stagecut.by_mode"
"""Target of the op that does one thing in training and another in evaluation, with a region for each: (flag,
<0>, <1>, [operands]).
"""

CALL = "stagecut.call"
"""Target of the op that calls a function, its one region: ([operands], [state])."""

CAUSAL, OPEN = "causal", "open"
"""Kinds of attention masks: one that hides just the future, one that hides nothing."""


class Kind(Enum):
    """The kind of a target: whose code the op calls."""

    ATEN = "an overload of torch.ops.aten"
    LIBRARY = "an op that a library registered, torch.ops.NAMESPACE.NAME"
    TORCH = "a function of torch or of one of its modules"
    METHOD = "a method of a tensor or a container"
    PYTHON = "a function of operator, math or builtins"
    MODULE = "a module of the user's, called as a whole"
    EXTERN = "a function of the user's"
    OWN = "ours"


class Target(str):
    """The thing that an op calls, as text: `aten.add.Tensor`, `method.view`, `module.layers.0`.

    kind: whose code it is. name: the name without namespace and overload; the path of a module. overload:
    `Tensor`, '' for none.
    """

    __slots__ = ("kind", "name", "overload")
    kind: Kind
    name: str
    overload: str

    def __new__(cls, text: str) -> Target:
        target = super().__new__(cls, text)
        target.kind, target.name, target.overload = _parts(text)
        return target


def _parts(text: str) -> tuple[Kind, str, str]:
    head, _, rest = text.partition(".")
    if text.startswith("torch.ops."):
        _, name, overload = (*rest.split(".", 3)[1:], "", "", "")[:3]
        return Kind.LIBRARY, name, overload
    if head == "aten":
        name, _, overload = rest.partition(".")
        return Kind.ATEN, name, overload
    if head == "torch":
        return Kind.TORCH, rest.rpartition(".")[2], ""
    return _HEADS.get(head, Kind.PYTHON), rest, ""


_HEADS = {
    "method": Kind.METHOD,
    "module": Kind.MODULE,
    "extern": Kind.EXTERN,
    "stagecut": Kind.OWN,
}
target_of = cache(Target)
"""The target of a text, parsed once."""


class Loc(NamedTuple):
    """The user's source line an op comes from."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Frame(NamedTuple):
    """One module call on the way to an op: the module's path below the frame before, and which call it is."""

    name: str
    call: int = 0


Scope = tuple[Frame, ...]


def scope_fqn(scope: Scope) -> str:
    """The fully qualified name of the innermost module of a scope ('' for the root)."""
    return ".".join(frame.name for frame in scope)


@dataclass(frozen=True, slots=True)
class Token:
    """A literal only torch can build: `torch.float32`, `torch.strided`, `device("cuda:0")`."""

    text: str


@dataclass(frozen=True, slots=True)
class Mode:
    """A literal that follows the `training` flag of the module it stands in: it has one value in training,
    another in evaluation.

    captured: the flag in the trace. others: paths of modules whose flags decide as well, so that all must be
    switched together.
    """

    captured: bool
    training: Any = True
    evaluating: Any = False
    others: tuple[str, ...] = ()

    @property
    def in_trace(self) -> Any:
        """The value of the literal in the trace."""
        return self.training if self.captured else self.evaluating

    @property
    def is_flag(self) -> bool:
        """True for the flag itself."""
        return self.training is True and self.evaluating is False


@dataclass(frozen=True, slots=True)
class Context:
    """A dynamic context an op runs under: a mode, or a region that is one piece.

    Regions are `checkpoint(number, preserve_rng_state)`, which backward computes again, and
    `transform(number)`, a vmap.
    """

    kind: str
    args: tuple[Any, ...] = ()


WHOLE = ("checkpoint", "transform")
"""The kinds of contexts that no boundary may cut through."""

CONTEXTS = ("no_grad", "enable_grad", "inference_mode", "autocast", *WHOLE)


class Place(NamedTuple):
    """The place of an op in the model: its module calls, its contexts, its source line."""

    scope: Scope = ()
    context: tuple[Context, ...] = ()
    loc: Loc | None = None


NOWHERE = Place()


class Value:
    """One definition. `owner` is the op or state entry that defines it, None for a user input.

    `index` is its place among the results of its op. A version has no index: it stands for `version_of` after
    a write of its op. `gradient_of` is the value that it is the gradient of. `hint` is only a wish for a
    printed name; nothing keys on it. `uses` maps each user op to None, in order.
    """

    __slots__ = (
        "gradient_of",
        "hint",
        "index",
        "owner",
        "type",
        "uses",
        "version_of",
    )

    def __init__(
        self, value_type: Type, hint: str = "", owner: Op | StateEntry | None = None
    ) -> None:
        self.type = value_type
        self.hint = hint
        self.owner = owner
        self.index = 0
        self.version_of: Value | None = None
        self.gradient_of: Value | None = None
        self.uses: dict[Op, None] = {}

    def __repr__(self) -> str:
        return f"%{self.hint or '?'}"

    def replace_uses(
        self, new: Value, where: Callable[[Op], bool] = lambda op: True
    ) -> None:
        """Every op that uses this value, and for which `where` holds, names `new` instead.

        An op that wrote both made a version of each; they are one from here on.
        """
        pending = [(self, new, [op for op in self.uses if where(op)])]
        while pending:
            old, into, users = pending.pop()
            for op in users:
                if old in op.versions and into in op.versions:
                    merged = op.versions.pop(old)
                    pending.append((merged, op.versions[into], list(merged.uses)))
                    old.uses.pop(op, None)
                op.replace_operand(old, into)


@dataclass(frozen=True, slots=True)
class Effects:
    """The effects of an op besides computing its results.

    writes: the operands that it mutates. views: per result, the operand that it shares storage with, or None.
    random: it draws random numbers. effect: it must run even when nothing uses its results.
    """

    writes: tuple[Value, ...] = ()
    views: tuple[Value | None, ...] = ()
    random: bool = False
    effect: bool = False

    def viewed_by(self, result: int) -> Value | None:
        """The operand that a result shares storage with; None when there is none."""
        return self.views[result] if self.views else None

    def substitute(self, swap: dict[Value, Value]) -> Effects:
        """The same effects on other operands: each value for which `swap` has a new one is replaced."""
        if not self.writes and not self.views:
            return self
        writes = tuple(dict.fromkeys(swap.get(value, value) for value in self.writes))
        views = tuple(
            None if value is None else swap.get(value, value) for value in self.views
        )
        return replace(self, writes=writes, views=views)


PURE = Effects()


@dataclass(frozen=True, slots=True)
class ResultForm:
    """The arrangement of an op's results in what its target returns.

    tree: nested tuples, lists and dicts with the number of a result at each leaf. A call of the user's code
    may return tensors in any structure: it has no tree, its results are the tensors in order of their
    appearance, and `rest` holds their paths and the numbers and texts beside them, () for nothing but
    tensors in a row.
    """

    tree: Any = None
    rest: tuple[Any, ...] | None = None

    def paths(self) -> Iterator[tuple[object, tuple[Any, ...]]]:
        """Each leaf of the tree, the number of a result, with the keys that lead to it."""
        yield from _paths(self.tree, ())


def _paths(
    tree: Any, path: tuple[Any, ...]
) -> Iterator[tuple[object, tuple[Any, ...]]]:
    if not isinstance(tree, (tuple, list, dict)):
        yield tree, path
        return
    for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _paths(part, (*path, key))


class Op:
    """One operation: a target applied to nested operands, with flat results.

    `versions` maps each value this op writes (directly or through an alias) to its version afterwards;
    `origin` is the op this one is a copy of; `form` is None where the target returns its results as a flat
    row. Operands change only through `set_operands`, `substitute` and `replace_operand`, so use lists cannot
    go stale.
    """

    __slots__ = (
        "args",
        "effects",
        "form",
        "kwargs",
        "operands",
        "origin",
        "place",
        "regions",
        "results",
        "target",
        "versions",
    )

    def __init__(
        self,
        target: str,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        effects: Effects = PURE,
        place: Place = NOWHERE,
        form: ResultForm | None = None,
        regions: tuple[Block, ...] = (),
    ) -> None:
        self.target = target_of(target)
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.operands: list[Value] = []
        self.results: list[Value] = []
        self.form = form
        self.effects = effects
        self.versions: dict[Value, Value] = {}
        self.origin: Op | None = None
        self.place = place
        self.regions = regions
        self.set_operands(args, kwargs or {})

    def __repr__(self) -> str:
        return f"<{self.target} -> {self.results}>"

    @property
    def scope(self) -> Scope:
        """The module calls around the op, outermost first."""
        return self.place.scope

    @property
    def context(self) -> tuple[Context, ...]:
        """The contexts that the op runs under, outermost first."""
        return self.place.context

    @property
    def loc(self) -> Loc | None:
        """The user's source line."""
        return self.place.loc

    def add_result(self, value_type: Type, hint: str = "") -> Value:
        """A new result value, after those already there."""
        value = Value(value_type, hint, self)
        value.index = len(self.results)
        self.results.append(value)
        return value

    def add_version(self, old: Value, hint: str) -> Value:
        """A new version of `old`, which this op writes; it stands for the same storage after the write."""
        new = Value(old.type, hint, self)
        new.version_of = old
        self.versions[old] = new
        old.uses[self] = None
        return new

    @property
    def reads(self) -> list[Value]:
        """The values the op needs: its operands, then the aliases it renews without naming them."""
        if not self.versions:
            return self.operands
        return self.operands + [
            old for old in self.versions if old not in self.operands
        ]

    def definitions(self) -> Iterator[Value]:
        """Results, then versions."""
        yield from self.results
        yield from self.versions.values()

    def set_operands(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The op applies its target to `args` and `kwargs`; uses are updated. The effects stay: operands
        that they name must stay too.
        """
        for value in self.reads:
            value.uses.pop(self, None)
        self.args, self.kwargs = args, kwargs
        self.operands = list(leaves((args, kwargs))) if kwargs else list(leaves(args))
        for value in self.reads:
            value.uses[self] = None

    def replace_operand(self, old: Value, new: Value) -> None:
        """Every occurrence of `old` among the operands becomes `new`."""
        swap = {old: new}
        if old in self.versions:
            old.uses.pop(self, None)
            self.versions = {
                swap.get(key, key): version for key, version in self.versions.items()
            }
            self.versions[new].version_of = new
        self.substitute(swap)

    def substitute(self, swap: dict[Value, Value]) -> None:
        """Every operand for which `swap` has a new value is replaced by it, in the effects too."""
        self.effects = self.effects.substitute(swap)
        self.set_operands(substitute(self.args, swap), substitute(self.kwargs, swap))

    def copy(self, swap: dict[Value, Value]) -> Op:
        """A twin of this op that reads `swap[v]` in place of `v`, with results of its own and this op as its
        origin. Raises StagecutError for an op that made versions: two ops cannot do one write.
        """
        if self.versions:
            raise StagecutError("an op that writes has no twin", where=self.where())
        return self._twin(swap)

    def elsewhere(self, swap: dict[Value, Value]) -> Op:
        """A twin of this op for another program, which makes versions of its own. `swap` learns what it
        defines.
        """
        twin = self._twin(swap)
        for old, new in self.versions.items():
            if old in swap:
                swap[new] = twin.add_version(swap[old], new.hint)
        swap |= zip(self.results, twin.results, strict=True)
        return twin

    def _twin(self, swap: dict[Value, Value]) -> Op:
        twin = Op(
            self.target,
            substitute(self.args, swap) if swap else self.args,
            substitute(self.kwargs, swap) if swap else self.kwargs,
            effects=self.effects.substitute(swap),
            place=self.place,
            form=self.form,
            regions=tuple(map(_of_twin, self.regions)),
        )
        twin.origin = self.origin or self
        for result in self.results:
            twin.add_result(result.type, result.hint)
        return twin

    def drop(self) -> None:
        """The op uses nothing any more. Its results must have no use left."""
        self.effects = PURE
        self.set_operands((), {})
        for old in self.versions:
            old.uses.pop(self, None)

    @property
    def is_split(self) -> bool:
        """True for a split marker."""
        return self.target == SPLIT

    @property
    def has_effect(self) -> bool:
        """True when the op must stay even if no result is used."""
        effects = self.effects
        return effects.effect or effects.random or bool(effects.writes)

    @property
    def is_users(self) -> bool:
        """True for a call of the user's own code: of a module kept whole, or of a function."""
        return self.target.kind in (Kind.MODULE, Kind.EXTERN)

    @property
    def returned(self) -> tuple[Any, ...] | None:
        """For an op that returns tensors anywhere in a structure: the `rest` of its form. None for other
        ops.
        """
        return self.form.rest if self.form is not None else None

    @property
    def is_view(self) -> bool:
        """True when the op does nothing but take views of its operands. A dropout that returns its operand
        when it is off does more, so it is no view.
        """
        does_more = self.effects.writes or self.effects.random
        return (
            bool(self.effects.views)
            and None not in self.effects.views
            and not does_more
        )

    def where(self) -> str:
        """The place of the op for an error message: source line and module path."""
        parts = [str(self.loc)] if self.loc else []
        if self.scope:
            parts.append(f"module '{scope_fqn(self.scope)}'")
        parts.append(f"op {self.target}")
        return ", ".join(parts)


class Block:
    """Values in, ops, values out: a program, a stage of it, a region of an op such as a branch.

    `output` is an op that reads the results, `outputs` the results themselves, a tree of values and literals.
    """

    def __init__(
        self,
        name: str = "",
        inputs: Iterable[Value] = (),
        ops: Iterable[Op] = (),
        outputs: Any = (),
    ) -> None:
        self.name = name
        self.inputs = list(inputs)
        self.ops = list(ops)
        self.output = Op("output", (outputs,))

    @property
    def outputs(self) -> Any:
        """The values and literals that the block returns."""
        return self.output.args[0]

    def set_outputs(self, outputs: Any) -> None:
        """The block returns `outputs`."""
        self.output.set_operands((outputs,), {})

    def copy(self) -> Block:
        """A twin of this block, with values of its own."""
        swap = {value: Value(value.type, value.hint) for value in self.inputs}
        ops: list[Op] = []
        for op in self.ops:
            twin = op.copy(swap)
            twin.origin = None
            ops.append(twin)
            swap |= zip(op.results, twin.results, strict=True)
        inputs = [swap[value] for value in self.inputs]
        return Block(self.name, inputs, ops, substitute(self.outputs, swap))


def nested_ops(
    ops: Iterable[Op], known: dict[Block, None] | None = None
) -> Iterator[Op]:
    """The ops, each followed by the ops of its regions; those of a function once. `known` are the functions
    that are left out, and learns the others, each behind those that it calls.
    """
    known = {} if known is None else known
    for op in ops:
        yield op
        for region in op.regions:
            if region in known:
                continue
            yield from nested_ops(region.ops, known)
            if isinstance(region, Function):
                known[region] = None


@dataclass(frozen=True, slots=True)
class RegionRef:
    """A literal operand that stands for the op's region of that index."""

    index: int


KINDS = ("param", "buffer", "const")


@dataclass(eq=False)
class StateEntry:
    """One distinct tensor of the model: all its names, and which storage it lives in.

    `transient` are the names that stay out of the state_dict. `tensor` and `storage` are identities: entries
    with equal `tensor` are one tensor under two names (merged by resolve-aliases), with equal `storage`
    overlap in memory.
    """

    names: tuple[str, ...]
    kind: str
    type: Type
    transient: frozenset[str] = frozenset()
    tensor: int = -1
    storage: int = -1
    stages: tuple[int, ...] = ()
    share: str | None = None
    value: Value = field(init=False)

    def __post_init__(self) -> None:
        self.value = Value(self.type, self.names[0], self)

    @property
    def name(self) -> str:
        """The first name, in state_dict order."""
        return self.names[0]

    @property
    def requires_grad(self) -> bool:
        """True when the tensor is trained."""
        return carries_grad(self.type)


class Function(Block):
    """A block that many ops call, each with operands of its own. It sees its inputs and its state.

    state: what it reads of the module that a call stands in, under its names below that module. The ops have
    places below that call.
    """

    def __init__(
        self,
        name: str,
        inputs: Iterable[Value] = (),
        ops: Iterable[Op] = (),
        outputs: Any = (),
        state: Iterable[StateEntry] = (),
    ) -> None:
        super().__init__(name, inputs, ops, outputs)
        self.state = list(state)

    @property
    def sees(self) -> list[Value]:
        """What the ops may read besides what they define: the inputs, then the state."""
        return [*self.inputs, *(entry.value for entry in self.state)]


def _of_twin(region: Block) -> Block:
    """The region of an op's twin: a function is called by both."""
    return region if isinstance(region, Function) else region.copy()


def function_of(op: Op) -> Function | None:
    """The function that an op calls; None for an op that is no call."""
    if op.target != CALL or len(op.regions) != 1:
        return None
    (function,) = op.regions
    return function if isinstance(function, Function) else None


def functions_of(ops: Iterable[Op]) -> list[Function]:
    """The functions that ops call, each behind those that it calls."""
    known: dict[Block, None] = {}
    for _ in nested_ops(ops, known):
        pass
    return [block for block in known if isinstance(block, Function)]


class Stage(Block):
    """A block of ops with a number and, for each state entry that it holds, the names it holds it under.

    Its inputs and outputs are values: what it receives, and what it passes on or returns.

    In `differentiated`, its ops are its forward. `saved` are the values that lie in memory until its
    backward. `backward` has the blocks of the two other roles: the gradients of its inputs, and those of its
    weights, which also reads what the first leaves it.
    """

    def __init__(self, index: int, ops: Iterable[Op] = ()) -> None:
        super().__init__(ops=ops, outputs=[])
        self.index = index
        self.state: dict[StateEntry, tuple[str, ...]] = {}
        self.saved: list[Value] = []
        self.backward: list[Block] = []


SHARES = ("replicate", "feedback", "transmit")
ROUTES = ("send", "relay", "feed", "recompute")


@dataclass(eq=False)
class Transfer:
    """A value on its way to a stage. `source` is None for a user input, which is fed to the stage, or relayed
    from the first one.

    Nothing travels by the route `recompute`: the stage computes the value itself, as `recomputed`. A gradient
    travels backward.
    """

    value: Value
    source: int | None
    target: int
    route: str | None = None
    recomputed: Value | None = None

    @property
    def via_count(self) -> int:
        """The number of stages a relayed value passes through."""
        between = self._between
        return max(0, (between.stop - between.start) * between.step)

    @property
    def via(self) -> tuple[int, ...]:
        """The stages a relayed value passes through."""
        return tuple(self._between)

    @property
    def _between(self) -> range:
        if self.route != "relay":
            return range(0)
        if self.source is not None and self.source > self.target:
            return range(self.source - 1, self.target, -1)
        return range(0 if self.source is None else self.source + 1, self.target)


@dataclass(eq=False)
class Lane:
    """A tensor in an object that forward is given, such as a cache: state of the caller's.

    given: the input. left: the place among the program's outputs of what the object holds afterwards; None
    where it holds the same tensor still, which may be written. stages: those that touch it, in a linked
    program.
    """

    given: Value
    left: int | None = None
    stages: tuple[int, ...] = ()


class Program(Block):
    """A model as the compiler sees it, called `name`: a block with state and a phase. From `partitioned` on
    its ops are in its stages. Its outputs are a flat list of values and literals.

    cotangents: from `differentiated` on, the gradients of what the model returns, which the loss gives.
    backward_transfers: the gradients that cross. output_names: for people, the place of each output in the
    model's result (`logits`, `hidden[1]`), where that is known. Like hints of values, they mean nothing; they
    are not in the text.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, outputs=[])
        self.phase = "traced"
        self.state: list[StateEntry] = []
        self.stages: list[Stage] = []
        self.transfers: list[Transfer] = []
        self.lanes: list[Lane] = []
        self.cotangents: list[Value] = []
        self.backward_transfers: list[Transfer] = []
        self.output_names: tuple[str, ...] = ()

    def add_input(self, value_type: Type, hint: str) -> Value:
        """A new user input of `value_type`, after those already there. `hint` is its name."""
        value = Value(value_type, hint)
        self.inputs.append(value)
        return value

    def all_ops(self) -> Iterator[Op]:
        """Every op of the program in program order, the output and nested regions excluded."""
        if self.phase == "traced":
            yield from self.ops
        for stage in self.stages:
            yield from stage.ops

    def backward_blocks(self) -> Iterator[tuple[Stage, Block]]:
        """The blocks of the backward with their stages, in the order in which they run."""
        for stage in reversed(self.stages):
            for block in stage.backward:
                yield stage, block

    def raise_phase(self, phase: str) -> None:
        """The program is in `phase`, which must not lie before the present one."""
        if PHASES.index(phase) < PHASES.index(self.phase):
            raise StagecutError(
                f"a program's phase only rises: it is '{self.phase}', not yet '{phase}'"
            )
        self.phase = phase

    def remove_ops(self, dead: set[Op]) -> None:
        """The `dead` ops are gone, and the transfers of the values that they define. Nothing outside them may
        use these values.
        """
        removed = [op for op in self.all_ops() if op in dead]
        for op in removed:
            _refuse_use(op, dead)
        for op in removed:
            op.drop()
        self.ops = [op for op in self.ops if op not in dead]
        self.transfers = [
            transfer
            for transfer in self.transfers
            if transfer.value.owner not in dead
            and (transfer.recomputed is None or transfer.recomputed.owner not in dead)
        ]
        for stage in self.stages:
            stage.ops = [op for op in stage.ops if op not in dead]

    def name_owners(self) -> dict[str, StateEntry]:
        """Every state name -> its entry."""
        return {name: entry for entry in self.state for name in entry.names}


def _refuse_use(op: Op, dead: set[Op]) -> None:
    """Raises StagecutError when an op that is not in `dead` uses what `op` defines."""
    for value in op.definitions():
        if any(user not in dead for user in value.uses):
            raise StagecutError(
                f"{op.target} cannot be removed: its result is still used",
                where=op.where(),
            )


_CONTAINERS = (tuple, list, dict, slice)


def leaves(tree: Any) -> Iterator[Value]:
    """The values in a nested operand structure, left to right, repeated ones included."""
    if type(tree) is Value:
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            if type(part) is Value:
                yield part
            elif isinstance(part, _CONTAINERS):
                yield from leaves(part)
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from leaves(part)
    elif isinstance(tree, slice):
        yield from leaves((tree.start, tree.stop, tree.step))


def literals(tree: Any) -> Iterator[Any]:
    """The literals in a nested operand structure, left to right: everything that is no value."""
    if isinstance(tree, (tuple, list)):
        for part in tree:
            yield from literals(part)
    elif isinstance(tree, dict):
        yield from literals(list(tree.values()))
    elif isinstance(tree, slice):
        yield from literals((tree.start, tree.stop, tree.step))
    elif type(tree) is not Value:
        yield tree


def transform(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """`tree` with `leaf` applied to every part that is no tuple, list, dict or slice."""
    if isinstance(tree, tuple):
        return tuple(transform(part, leaf) for part in tree)
    if isinstance(tree, list):
        return [transform(part, leaf) for part in tree]
    if isinstance(tree, dict):
        return {key: transform(part, leaf) for key, part in tree.items()}
    if isinstance(tree, slice):
        return slice(
            transform(tree.start, leaf),
            transform(tree.stop, leaf),
            transform(tree.step, leaf),
        )
    return leaf(tree)


def substitute(tree: Any, swap: dict[Value, Value]) -> Any:
    """`tree` with every value replaced for which `swap` has a new one."""
    return transform(
        tree, lambda leaf: swap.get(leaf, leaf) if type(leaf) is Value else leaf
    )


def closest_name(names: tuple[str, ...], path: str) -> str:
    """The name of a tied tensor that lies nearest to the module at `path`: the longest common module path
    wins.
    """
    if len(names) == 1:
        return names[0]
    parts = path.split(".")
    return max(names, key=lambda name: _common_parts(name.split("."), parts))


def _common_parts(one: list[str], other: list[str]) -> int:
    """The number of parts that two paths begin with in common."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


_BAD = re.compile(r"[^A-Za-z0-9_.]+")


class Namer:
    """Gives each thing a name of its own: the wish itself where free, else the wish with a number."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self._next: dict[str, int] = {}

    def __call__(self, wish: str, default: str = "v") -> str:
        base = _BAD.sub("_", wish) or default
        if base not in self._taken:
            self._taken.add(base)
            return base
        number = self._next.get(base, 1)
        while f"{base}_{number}" in self._taken:
            number += 1
        self._next[base] = number + 1
        self._taken.add(f"{base}_{number}")
        return f"{base}_{number}"
