"""The trace of one call of a block as steps, which can be taken again for an equal block."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental import proxy_tensor
from torch.fx.node import has_side_effect
from torch.utils._pytree import tree_flatten

from stagecut.frontend.fold.calls import LITERALS, Call, Ref
from stagecut.frontend.fold.results import (
    Memories,
    Odd,
    Result,
    made_again,
    results_of,
    returned,
    sameness,
    strict,
)
from stagecut.frontend.markers import is_marker
from stagecut.frontend.marks import (
    AGAIN,
    BEGINS,
    FOLLOWS,
    GRAD,
    SAME,
    STEP,
    Repeated,
    StepOf,
    Template,
)
from stagecut.frontend.watch.forbidden import Untraceable
from stagecut.frontend.watch.known import depends_on_constants
from stagecut.frontend.watch.training import is_of_dropout

_CONTEXTS = (
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
)
_META = frozenset(
    (
        "val",
        "tensor_meta",
        "nn_module_stack",
        "stack_trace",
        "torch_fn",
        "original_aten",
        FOLLOWS,
        GRAD,
        SAME,
    )
)
"""What a node is known to say about itself."""


@dataclass(frozen=True)
class Frames:
    """The place of a call: the lines that led to it, and the modules around it with its own."""

    trace: str
    stack: tuple[tuple[str, Any], ...]


@dataclass
class Step:
    """One node of the trace of a block."""

    target: Any
    args: Any
    kwargs: Any
    wish: str | None
    value: Any
    meta: dict[str, Any]
    trace: str
    stack: tuple[tuple[str, str, str], ...]

    def sameness(self) -> Any:
        """Equal for steps that do the same."""
        return (
            self.target,
            strict(self.args),
            strict(self.kwargs),
            self.wish,
            strict(self.value),
            sorted((key, repr(value)) for key, value in self.meta.items()),
            self.trace,
            self.stack,
        )


@dataclass
class Body:
    """The steps of a call, what it returns, and what it leaves in the tracer."""

    steps: list[Step]
    results: list[Result]
    spec: Any
    moved: list[tuple[Ref, int]]
    """The arguments and the state that another node stands for afterwards, and its place: an op has returned
    the very tensor that it was given.
    """
    calls: dict[str, int]
    number: int
    reads: list[Any] = field(default_factory=list)

    def equals(self, other: Body) -> bool:
        """True for a call with the same steps and results."""
        return bool(self._sameness() == other._sameness())

    def _sameness(self) -> Any:
        return (
            [step.sameness() for step in self.steps],
            sameness(self.results),
            self.spec,
            self.moved,
            self.calls,
            self.reads,
        )


class Recorder:
    """Notes the nodes that a tracer makes in one call."""

    def __init__(self, tracer: Any, call: Call, frames: Frames, number: int) -> None:
        self._tracer = tracer
        self._call = call
        self._frames = frames
        self._number = number
        self._wishes: dict[fx.Node, str | None] = {}
        self._calls = dict(tracer.num_calls)
        self._refs: dict[fx.Node, Ref] = {}
        self._memories = Memories()
        for ref, tensor in call.given():
            self._know(tensor, ref)
        self._versions = [tensor._version for _, tensor in call.given()]
        self._last = _last(tracer.graph)

    def _know(self, tensor: torch.Tensor, ref: Ref) -> None:
        node = self._call.around.node(tensor)
        assert node is not None
        self._refs.setdefault(node, ref)
        self._memories.know(tensor, ref)

    def __enter__(self) -> Recorder:
        graph = self._tracer.graph
        create = graph.create_node

        def create_node(
            op: str,
            target: Any,
            args: Any = None,
            kwargs: Any = None,
            name: str | None = None,
            *rest: Any,
        ) -> fx.Node:
            node: fx.Node = create(op, target, args, kwargs, name, *rest)
            self._wishes[node] = name
            return node

        graph.create_node = create_node
        return self

    def __exit__(self, *_: Any) -> None:
        del self._tracer.graph.create_node

    def body(self, result: Any) -> Body:
        """The steps between now and then. Raises Odd."""
        if self._versions != [tensor._version for _, tensor in self._call.given()]:
            raise Odd("it writes what it is given, or its state")
        nodes: list[fx.Node] = []
        node = _last(self._tracer.graph) if self._last is None else self._last.next
        while node is not None and node.op != "root":
            nodes.append(node)
            node = node.next
        for place, node in enumerate(nodes):
            self._refs[node] = Ref("step", place)
        steps = [self._step(node) for node in nodes]
        for place, node in enumerate(nodes):
            node.meta[STEP] = StepOf(self._number, place)
        leaves, spec = tree_flatten(result)
        return Body(
            steps,
            results_of(leaves, self._call, self._memories, self._made),
            spec,
            self._moved(),
            self._more(self._tracer.num_calls, self._calls),
            self._number,
        )

    def _moved(self) -> list[tuple[Ref, int]]:
        moved: list[tuple[Ref, int]] = []
        for ref, tensor in self._call.given():
            node = self._call.around.node(tensor)
            now = self._refs.get(node) if node is not None else None
            if now is None:
                raise Odd("nothing stands for what it was given")
            if now.kind != "step":
                continue
            _refuse_questions(tensor)
            moved.append((ref, now.key))
        return moved

    def _more(self, after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
        """How often each module of the block was called, by its path in it."""
        more: dict[str, int] = {}
        for path, count in _more(after, before).items():
            more[self._inside(path)] = count
        return more

    def _inside(self, path: str) -> str:
        """A path in the block. Raises Odd for one outside of it."""
        own = self._call.path
        if path != own and not path.startswith(f"{own}."):
            raise Odd("it calls a module outside of it")
        return path[len(own) :]

    def _step(self, node: fx.Node) -> Step:
        target = node.target
        if node.op != "call_function" or not _is_plain(target):
            raise Odd(f"{node.op} {target}")
        if not set(node.meta) <= _META:
            raise Odd(f"meta {set(node.meta) - _META}")
        if isinstance(target, OpOverload):
            self._refuse_writes(target, node)
        own = {
            key: node.meta[key]
            for key in ("original_aten", "tensor_meta", GRAD, SAME)
            if key in node.meta
        }
        if FOLLOWS in node.meta:
            root = self._call.path.partition(".")[0]
            own[FOLLOWS] = tuple(
                self._inside(f"{root}.{path}") for path in node.meta[FOLLOWS]
            )
            if own[FOLLOWS] and self._inside(innermost(node)) not in own[FOLLOWS]:
                raise Odd("an op follows the flag of another module")
        trace = node.meta.get("stack_trace", "")
        if not trace.startswith(self._frames.trace):
            raise Odd("a line of another place")
        return Step(
            target,
            self._operands(node.args),
            self._operands(node.kwargs),
            self._wishes[node],
            self._value(node.meta.get("val")),
            own,
            trace[len(self._frames.trace) :],
            tuple(self._stack(node)),
        )

    def _refuse_writes(self, target: OpOverload, node: fx.Node) -> None:
        for argument, place in zip(target._schema.arguments, node.args, strict=False):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for written in tree_flatten(place)[0]:
                val = written.meta.get("val") if isinstance(written, fx.Node) else None
                home = self._memories.home(val)
                if home is not None and home.kind != "memory":
                    raise Odd("it writes what it is given, or its state")
        names = [
            argument.name
            for argument in target._schema.arguments
            if argument.alias_info is not None
        ]
        if any(name in node.kwargs for name in names):
            raise Odd("it writes or shares an operand by name")

    def _stack(self, node: fx.Node) -> Iterator[tuple[str, str, str]]:
        """The modules inside of the block, around a node: rest of the key, rest of the path, class."""
        entries = list(node.meta["nn_module_stack"].items())
        around = len(self._frames.stack) - 1
        own, own_key = self._call.path, self._frames.stack[-1][0]
        if entries[:around] != list(self._frames.stack[:-1]):
            raise Odd("it is called through another module")
        for key, (path, cls) in entries[around:]:
            rest = self._inside(path)
            if not key.startswith(own) or (path == own and key != own_key):
                raise Odd("a module of another name")
            yield key[len(own) :] if path != own else "", rest, cls

    def _operands(self, tree: Any) -> Any:
        return fx.node.map_aggregate(tree, self._operand)

    def _operand(self, leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            ref = self._refs.get(leaf)
            if ref is None:
                raise Odd("it reads a tensor from outside")
            return ref
        if leaf is not None and not isinstance(leaf, LITERALS):
            raise Odd(f"an operand of type {type(leaf).__name__}")
        return leaf

    def _value(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._memories.of(value)
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            return type(value)(self._value(part) for part in value)
        if value is not None and type(value) not in (bool, int, float):
            raise Odd(f"a value of type {type(value).__name__}")
        return value

    def _made(self, tensor: torch.Tensor) -> Ref | None:
        """The step that makes a tensor; None for a tensor that none makes. Raises Odd."""
        node = self._call.around.node(tensor)
        ref = self._refs.get(node) if node is not None else None
        if node is None or ref is None or ref.kind != "step":
            return None
        if node.target is torch.ops.aten.detach.default:
            raise Odd("it returns what export leaves out where nothing reads it")
        _refuse_questions(tensor)
        return ref


def _is_plain(target: Any) -> bool:
    """True for an op of torch's dispatcher that is not one of ours, and for a change of the mode."""
    if isinstance(target, OpOverload):
        return target.namespace != "stagecut" and not is_marker(target)
    return target in _CONTEXTS or target is operator.getitem


def _refuse_questions(tensor: torch.Tensor) -> None:
    """Raises Odd for a tensor that code may ask for more than its sizes."""
    if depends_on_constants(tensor) or is_of_dropout(tensor):
        raise Odd(
            "code may ask for the value of a tensor, or for the dropout that made it"
        )


def innermost(node: fx.Node) -> str:
    """The path of the innermost module around a node."""
    path: str = [*node.meta["nn_module_stack"].values()][-1][0]
    return path


def in_model(path: str) -> str:
    """The path in the model of a path of the tracer's, which begins with the name of the whole model."""
    return path.partition(".")[2]


def _more(after: Mapping[Any, int], before: Mapping[Any, int]) -> dict[Any, int]:
    return {
        key: count - before.get(key, 0)
        for key, count in after.items()
        if count != before.get(key, 0)
    }


def _last(graph: fx.Graph) -> fx.Node | None:
    return next(iter(reversed(graph.nodes)), None)


# --- again ------------------------------------------------------------------------------------------------

torch.library.define(
    "stagecut::again",
    "(str key, Tensor[] operands) -> Tensor[]",
    # it has no kernel: the tracer need not note the strides of its operands
    tags=(torch.Tag.flexible_layout,),
)


@torch.library.impl("stagecut::again", "CompositeExplicitAutograd")
def _again(key: str, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    raise Untraceable(
        "stagecut::again stands for a call during capture and cannot be run"
    )


class Replay:
    """Puts one node into a trace for a call that is traced like an earlier one."""

    def __init__(self, body: Body, call: Call, tracer: Any) -> None:
        self._body = body
        self._call = call
        self._tracer = tracer

    def run(self) -> Any:
        """The result of the call."""
        body = self._body
        names = [self._reserved(step) for step in body.steps]
        for path, count in body.calls.items():
            path = self._call.path + path
            self._tracer.num_calls[path] = self._tracer.num_calls.get(path, 0) + count
        made = [result.ref for result in body.results if result.memory is not None]
        tensors = made_again(body.results, self._call)
        places = [ref.key for ref in made if ref is not None]
        given = dict(self._call.given())
        moved = [given[ref] for ref, _ in body.moved]
        places += [place for _, place in body.moved]
        node = _marker(self._tracer, self._call, AGAIN)
        node.meta["val"] = [
            proxy_tensor.extract_val(tensor) for tensor in (*tensors, *moved)
        ]
        node.meta[AGAIN] = Repeated(
            body.number, in_model(self._call.path), names, places
        )
        for place, tensor in enumerate((*tensors, *moved)):
            part = self._tracer.create_node(
                "call_function",
                operator.getitem,
                (node, place),
                {},
                name="stagecut_part",
            )
            proxy_tensor.track_tensor(
                tensor, fx.Proxy(part, self._tracer), constant=None, tracer=self._tracer
            )
            part.meta["val"] = node.meta["val"][place]
        return returned(body.results, body.spec, self._call, tensors)

    def _reserved(self, step: Step) -> str:
        """The name that the node of a step would have; no other node gets it."""
        graph = self._tracer.graph
        wish = step.wish if step.wish is not None else graph._target_to_str(step.target)
        name: str = graph._graph_namespace.create_name(wish, None)
        return name


def begins(tracer: Any, call: Call, number: int) -> None:
    """The trace has a mark where the call begins that is recorded by that number."""
    node = _marker(tracer, call, BEGINS)
    node.meta["val"] = []
    node.meta[BEGINS] = Template(number, in_model(call.path))


def _marker(tracer: Any, call: Call, name: str) -> fx.Node:
    """A node that is given the arguments and the state of a call."""
    operands = [
        call.around.node(tensor) for tensor in (*call.tensors, *call.state.values())
    ]
    node: fx.Node = tracer.create_node(
        "call_function",
        torch.ops.stagecut.again.default,
        (name, operands),
        {},
        name=name,
    )
    return node


has_side_effect(torch.ops.stagecut.again.default)
