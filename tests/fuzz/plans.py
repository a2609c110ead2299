"""What the fuzzer draws: a model as a plan, with two back ends, one that builds it and one that writes its source.

A plan is plain frozen data. Every step holds the very line of Python it stands for, with its operands left open, so
that the interpreter (`build`) and the printer (`source`) cannot disagree on what an op does.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from fuzz.graphs import symbolic
from torch import fx, nn
from torch.export import Dim
from torch.nn import functional as F

from stagecut.frontend.markers import SplitPoint, pipe_split
from stagecut.passes import recompute

EXAMPLE_BATCH, OTHER_BATCH = 7, 5
"""The batch size of the example inputs, and the one a model with a dynamic batch is also called with."""


@dataclass(frozen=True)
class Plan:
    """Plans are constants: modules that hold one are copied, the plan is not."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self


@dataclass(frozen=True)
class Step(Plan):
    """One line of a forward: `code` with operands `args` put in, giving `outs`. With a body, `code` is what `with` enters.

    An operand is the name of a value or an attribute, as in `self.p0`.
    """

    code: str
    args: tuple[str, ...] = ()
    outs: tuple[str, ...] = ()
    body: tuple[Step, ...] = ()

    @property
    def line(self) -> str:
        """The line as Python."""
        call = self.code.format(*self.args)
        if self.body:
            return f"with {call}:"
        return f"{', '.join(self.outs)} = {call}" if self.outs else call


@dataclass(frozen=True)
class Member(Plan):
    """An attribute of a module, and the expression that makes it. Members with one `share` key are one object.

    `kind` is `param`, `listed` (in a ParameterList), `buffer`, `transient` (a non-persistent buffer), `plain` (an attribute
    that is no state) or `module`.
    """

    attr: str
    kind: str
    code: str
    share: str = ""


@dataclass(frozen=True)
class Block(Plan):
    """A module class: what `__init__` makes and ties, and the steps of its forward."""

    name: str
    inputs: tuple[str, ...] = ()
    members: tuple[Member, ...] = ()
    ties: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Node(Plan):
    """A tuple, list or dict of trees."""

    kind: str
    items: tuple[Tree, ...]
    keys: tuple[str, ...] = ()


Tree = str | Node
"""A leaf is the name of a value, or a literal."""


@dataclass(frozen=True)
class Given(Plan):
    """A leaf of the inputs: the expression that makes it (`batch` and earlier leaves may occur in it), and its dynamic dimensions."""

    name: str
    code: str
    dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class Input(Plan):
    """A parameter of the model's forward, and the given leaves that it holds."""

    name: str
    tree: Tree
    keyword: bool = False


@dataclass(frozen=True)
class ModelPlan(Plan):
    """A model with its call, and where it is cut. `blocks[0]` is the root; its outputs are the leaves of `output`.

    spec: (module path, side) pairs for `split_spec`; cuts: positions for a policy, modulo the number of ops; whole:
    paths for `leaf_modules`; after: lines that set up the model once it is built; sent: tied parameters are transmitted; again: all that
    can be is computed again instead of sent; graph: what is cut is its symbolic trace, in which the paths of `whole` are one node each.
    """

    blocks: tuple[Block, ...]
    given: tuple[Given, ...]
    inputs: tuple[Input, ...]
    output: Tree
    after: tuple[str, ...] = ()
    spec: tuple[tuple[str, str], ...] = ()
    cuts: tuple[int, ...] = ()
    whole: tuple[str, ...] = ()
    training: bool = True
    dynamic: bool = False
    sent: bool = False
    again: bool = False
    graph: bool = False


# --- reading a plan -----------------------------------------------------------------------------------


def leaves(tree: Tree) -> Iterator[str]:
    """The leaves of a tree, left to right."""
    if isinstance(tree, Node):
        for item in tree.items:
            yield from leaves(item)
    else:
        yield tree


def steps_of(steps: tuple[Step, ...]) -> Iterator[Step]:
    """Every step, those inside of others included."""
    for step in steps:
        yield step
        yield from steps_of(step.body)


def codes(plan: ModelPlan) -> Iterator[str]:
    """Every piece of Python in a plan."""
    for block in plan.blocks:
        yield from (m.code for m in block.members)
        yield from (s.code for s in steps_of(block.steps))
    yield from (g.code for g in plan.given)


def tolerance(plan: ModelPlan) -> float:
    """How far gradients may differ, whose uses are summed in another order: by the least precise dtype of the plan."""
    everything = " ".join(codes(plan))
    if "bfloat16" in everything:
        return 0.1
    return 1e-4 if "float32" in everything or ".float()" in everything else 1e-9


# --- the interpreter ----------------------------------------------------------------------------------

_GLOBALS: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "pipe_split": pipe_split}


@lru_cache(maxsize=50_000)
def _function(code: str, args: tuple[str, ...], gives: bool) -> Callable[..., Any]:
    """The line of a step as a function of the module and of those operands that are values."""
    names = [a if a.startswith("self.") else f"a{i}" for i, a in enumerate(args)]
    given = dict.fromkeys(n for n in names if not n.startswith("self."))
    scope = dict(_GLOBALS)
    exec(f"def step({', '.join(['self', *given])}):\n    {'return ' if gives else ''}{code.format(*names)}", scope)
    return scope["step"]  # type: ignore[no-any-return]


def do(step: Step, module: nn.Module, env: dict[str, Any]) -> None:
    """Runs one step: `env` gains its results."""
    function = _function(step.code, step.args, bool(step.outs or step.body))
    result: Any = function(module, *[env[a] for a in step.args if not a.startswith("self.")])
    if step.body:
        with result:
            for inner in step.body:
                do(inner, module, env)
    elif len(step.outs) == 1:
        env[step.outs[0]] = result
    else:
        items: Any = result
        if isinstance(items, fx.Proxy):  # it cannot be iterated over
            items = [result[place] for place in range(len(step.outs))]
        env.update(zip(step.outs, items if step.outs else (), strict=True))


@lru_cache(maxsize=10_000)
def _forward(positional: tuple[str, ...], keywords: tuple[str, ...]) -> Callable[..., Any]:
    signature = ["self", *positional, *(["*"] if keywords else []), *keywords]
    known = ", ".join(f"{name!r}: {name}" for name in (*positional, *keywords))
    scope: dict[str, Any] = {}
    exec(f"def forward({', '.join(signature)}):\n    return self.interpret({{{known}}})", scope)
    return scope["forward"]  # type: ignore[no-any-return]


class DrawnModule(nn.Module):
    """A module that interprets a block. Subclasses differ in the signature of forward only."""

    def __init__(self, block: Block, maker: Maker) -> None:
        super().__init__()
        self.block = block
        if any(m.kind == "listed" for m in block.members):
            self.listed = nn.ParameterList()
        for member in block.members:
            _attach(self, member, maker.make(member))
        for tie in block.ties:
            _function(tie, (), False)(self)

    def interpret(self, env: dict[str, Any]) -> Any:
        """What forward returns on the inputs in `env`."""
        for step in self.block.steps:
            do(step, self, env)
        results = tuple(env[name] for name in self.block.outputs)
        return results[0] if len(results) == 1 else results


class DrawnModel(DrawnModule):
    """The root module: it takes its inputs apart and gives its outputs their structure."""

    def __init__(self, plan: ModelPlan, maker: Maker) -> None:
        super().__init__(plan.blocks[0], maker)
        self.plan = plan

    def interpret(self, env: dict[str, Any]) -> Any:
        """What forward returns on the inputs in `env`."""
        for item in self.plan.inputs:
            _unpack(item.tree, env[item.name], env)
        for step in self.block.steps:
            do(step, self, env)
        env.update((leaf, read(self, leaf)) for leaf in leaves(self.plan.output) if leaf.startswith("self."))
        return _tree(self.plan.output, env)


def read(module: nn.Module, name: str) -> Any:
    """What `name`, as in `self.p0` or `self.listed[1]`, is in `module`."""
    return _function(name, (), True)(module)


class Maker:
    """Makes the members of modules. One of them makes all of a model, for the sake of what is shared."""

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        self._shared: dict[str, Any] = {}
        self._scope = dict(_GLOBALS)
        for block in blocks:
            self._scope[block.name] = lambda block=block: self.module(block)

    def module(self, block: Block) -> DrawnModule:
        """A module of the class that `block` describes."""
        kind = type(block.name, (DrawnModule,), {"forward": _forward(block.inputs, ())})
        return kind(block, self)  # type: ignore[no-any-return]

    def make(self, member: Member) -> Any:
        """The object of a member."""
        if not member.share:
            return eval(_compiled(member.code), self._scope)
        if member.share not in self._shared:
            self._shared[member.share] = eval(_compiled(member.code), self._scope)
        return self._shared[member.share]


@lru_cache(maxsize=10_000)
def _compiled(code: str) -> Any:
    return compile(code, "<plan>", "eval")


def _attach(module: nn.Module, member: Member, made: Any) -> None:
    if member.kind in ("buffer", "transient"):
        module.register_buffer(member.attr, made, persistent=member.kind == "buffer")
    elif member.kind == "listed":
        module.listed.append(made)  # type: ignore[operator, union-attr]
    else:
        setattr(module, member.attr, made)


def build(plan: ModelPlan) -> nn.Module:
    """The model of `plan`, the same one every time."""
    torch.default_generator.manual_seed(0)
    positional = tuple(i.name for i in plan.inputs if not i.keyword)
    forward = _forward(positional, tuple(i.name for i in plan.inputs if i.keyword))
    kind = type(plan.blocks[0].name, (DrawnModel,), {"forward": forward})
    model: nn.Module = kind(plan, Maker(plan.blocks)).train(plan.training)
    for line in plan.after:
        exec(_after(line), {"model": model})
    return symbolic(model, plan.whole) if plan.graph else model


@lru_cache(maxsize=10_000)
def _after(line: str) -> Any:
    return compile(line, "<plan>", "exec")


def inputs(plan: ModelPlan, batch: int = EXAMPLE_BATCH, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for the model of `plan`, by position and by keyword."""
    torch.default_generator.manual_seed(seed)
    env: dict[str, Any] = {"torch": torch, "batch": batch}
    for given in plan.given:
        env[given.name] = eval(_compiled(given.code), env)
    values = [(i, _tree(i.tree, env)) for i in plan.inputs]
    return tuple(v for i, v in values if not i.keyword), {i.name: v for i, v in values if i.keyword}


def _unpack(tree: Tree, value: Any, env: dict[str, Any]) -> None:
    if not isinstance(tree, Node):
        env[tree] = value
        return
    for key, item in _keyed(tree):
        _unpack(item, value[key], env)


def _keyed(tree: Node) -> Iterator[tuple[Any, Tree]]:
    yield from zip(tree.keys if tree.kind == "dict" else range(len(tree.items)), tree.items, strict=True)


def _tree(tree: Tree, env: dict[str, Any]) -> Any:
    if not isinstance(tree, Node):
        return env[tree] if tree in env else ast.literal_eval(tree)
    items = [_tree(item, env) for item in tree.items]
    if tree.kind == "dict":
        return dict(zip(tree.keys, items, strict=True))
    return tuple(items) if tree.kind == "tuple" else items


def options(plan: ModelPlan) -> dict[str, Any]:
    """The keyword arguments of `pipeline` that say where and how to cut."""
    found: dict[str, Any] = {"check": None}
    if plan.spec:
        found["split_spec"] = {path: SplitPoint[side] for path, side in plan.spec}
    if plan.cuts:
        found["split_policy"] = _policy(plan.cuts)
    if plan.whole and not plan.graph:
        found["leaf_modules"] = list(plan.whole)
    if plan.dynamic:
        found["dynamic_shapes"] = dynamic_shapes(plan)
    if plan.sent:
        found["tied"] = "transmit"
    return found


def route_costs(plan: ModelPlan) -> Any:
    """While open, computing again costs what the plan says: nothing where it wants all that to happen."""
    return patch.multiple(recompute, START=0, MEMORY=1 << 40) if plan.again else nullcontext()


def _policy(cuts: tuple[int, ...]) -> Callable[[Any], list[int]]:
    def policy(program: Any) -> list[int]:
        count = sum(not op.is_split for op in program.ops)
        return [cut % (count + 1) for cut in cuts]

    return policy


def dynamic_shapes(plan: ModelPlan) -> dict[str, Any]:
    """The batch is free, wherever it occurs in the inputs."""
    batch = Dim("batch", min=4, max=64)
    dims = {given.name: dict.fromkeys(given.dims, batch) or None for given in plan.given}
    return {i.name: _tree(i.tree, dims) for i in plan.inputs}


# --- the source back end ------------------------------------------------------------------------------


_SHARED = """MADE = {}


def shared(key, make):
    if key not in MADE:
        MADE[key] = make()
    return MADE[key]"""


def source(plan: ModelPlan) -> str:
    """Python that defines the classes of `plan`, and `make()`, `inputs(batch, seed)` and `options` as functions and a dict."""
    parts = [_SHARED] if any(m.share for b in plan.blocks for m in b.members) else []
    for block in reversed(plan.blocks):
        parts.append("\n".join(_class(block, plan if block is plan.blocks[0] else None)))
    parts += ["\n".join(_make(plan)), "\n".join(_inputs(plan)), _options(plan)]
    return "\n\n\n".join(parts) + "\n"


def _class(block: Block, root: ModelPlan | None) -> Iterator[str]:
    yield f"class {block.name}(nn.Module):"
    yield "    def __init__(self):"
    yield "        super().__init__()"
    if any(m.kind == "listed" for m in block.members):
        yield "        self.listed = nn.ParameterList()"
    for member in block.members:
        yield f"        {_member(member)}"
    yield from (f"        {tie}" for tie in block.ties)
    yield ""
    if root is None:
        yield f"    def forward({', '.join(['self', *block.inputs])}):"
    else:
        keywords = [i.name for i in root.inputs if i.keyword]
        names = ["self", *(i.name for i in root.inputs if not i.keyword), *(["*"] if keywords else []), *keywords]
        yield f"    def forward({', '.join(names)}):"
        for item in root.inputs:
            yield from (f"        {leaf} = {path}" for leaf, path in _paths(item.tree, item.name) if leaf != path)
    yield from _lines(block.steps, "        ")
    yield f"        return {_tree_source(root.output) if root is not None else ', '.join(block.outputs)}"


def _member(member: Member) -> str:
    code = f"shared({member.share!r}, lambda: {member.code})" if member.share else member.code
    if member.kind in ("buffer", "transient"):
        return f'self.register_buffer("{member.attr}", {code}{", persistent=False" * (member.kind == "transient")})'
    return f"self.listed.append({code})" if member.kind == "listed" else f"self.{member.attr} = {code}"


def _paths(tree: Tree, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, Node):
        for key, item in _keyed(tree):
            yield from _paths(item, f"{path}[{key!r}]")
    else:
        yield tree, path


def _lines(steps: tuple[Step, ...], indent: str) -> Iterator[str]:
    for step in steps:
        yield indent + step.line
        yield from _lines(step.body, indent + "    ")


def _tree_source(tree: Tree) -> str:
    if not isinstance(tree, Node):
        return tree
    items = [_tree_source(item) for item in tree.items]
    if tree.kind == "dict":
        return "{" + ", ".join(f'"{k}": {v}' for k, v in zip(tree.keys, items, strict=True)) + "}"
    if tree.kind == "list":
        return f"[{', '.join(items)}]"
    return f"({', '.join(items)}{',' * (len(items) == 1)})"


def _make(plan: ModelPlan) -> Iterator[str]:
    yield "def make():"
    yield "    torch.manual_seed(0)"
    yield f"    model = {plan.blocks[0].name}().train({plan.training})"
    yield from (f"    {line}" for line in plan.after)
    yield f"    return symbolic(model, {plan.whole})" if plan.graph else "    return model"


def _inputs(plan: ModelPlan) -> Iterator[str]:
    yield "def inputs(batch, seed=0):"
    yield "    torch.manual_seed(seed)"
    yield from (f"    {given.name} = {given.code}" for given in plan.given)
    positional = [_tree_source(i.tree) for i in plan.inputs if not i.keyword]
    keywords = [f'"{i.name}": {_tree_source(i.tree)}' for i in plan.inputs if i.keyword]
    yield f"    return ({', '.join(positional)}{',' * (len(positional) == 1)}), {{{', '.join(keywords)}}}"


def _options(plan: ModelPlan) -> str:
    lines = ['options = {"check": None}']
    if plan.spec:
        sides = ", ".join(f'"{path}": SplitPoint.{side}' for path, side in plan.spec)
        lines.append(f'options["split_spec"] = {{{sides}}}')
    if plan.cuts:
        count = "(sum(not op.is_split for op in program.ops) + 1)"
        lines.append(f'options["split_policy"] = lambda program: [cut % {count} for cut in {list(plan.cuts)}]')
    if plan.whole and not plan.graph:
        lines.append(f'options["leaf_modules"] = {list(plan.whole)}')
    if plan.dynamic:
        dims = {g.name: "{" + ", ".join(f"{d}: batch" for d in g.dims) + "}" if g.dims else "None" for g in plan.given}
        entries = ", ".join(f'"{i.name}": {_tree_source(_renamed(i.tree, dims))}' for i in plan.inputs)
        lines += ['batch = Dim("batch", min=4, max=64)', f'options["dynamic_shapes"] = {{{entries}}}']
    if plan.sent:
        lines.append('options["tied"] = "transmit"')
    return "\n".join(lines)


def _renamed(tree: Tree, names: dict[str, str]) -> Tree:
    if isinstance(tree, Node):
        return Node(tree.kind, tuple(_renamed(item, names) for item in tree.items), tree.keys)
    return names[tree]
