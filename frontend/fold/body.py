"""The trace of one call of a block as steps, which can be taken again for an equal block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import proxy_tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from stagecut.frontend.fold.calls import LITERALS, Call, is_odd, varies
from stagecut.frontend.marks import FOLLOWS, GRAD, SAME
from stagecut.ir.run.storage import storage_of

_CONTEXTS = (
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
)
_GETITEM = "getitem"
_META = frozenset(
    ("val", "tensor_meta", "nn_module_stack", "stack_trace", "torch_fn", "original_aten", FOLLOWS, GRAD, SAME)
)
"""What a node is known to say about itself."""

_NOTHING: Mapping[Any, int] = MappingProxyType({})


class Odd(Exception):
    """The trace of a call stands for no other one; the text says why."""


@dataclass(frozen=True)
class Ref:
    """A node from the view of a block: a step, an argument or a state tensor of it."""

    kind: str
    key: Any


@dataclass(frozen=True)
class Memory:
    """A tensor in a trace: its kind, its place in a memory, and which memory that is."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    home: Ref
    size: int
    """Bytes of the memory."""


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
    function: Any = None
    count: int = 0

    def sameness(self) -> Any:
        """Equal for steps that do the same."""
        return (
            self.target,
            _literal(self.args),
            _literal(self.kwargs),
            self.wish,
            _literal(self.value),
            sorted((key, repr(value)) for key, value in self.meta.items()),
            self.trace,
            self.stack,
            self.function,
            self.count,
        )


def _literal(tree: Any) -> Any:
    """A tree in which 1 is not True."""
    leaves, spec = tree_flatten(tree)
    return spec, [leaf if isinstance(leaf, (Ref, Memory)) else (type(leaf), repr(leaf)) for leaf in leaves]


@dataclass
class Result:
    """What a call returns: a tensor that a step makes, an argument, or a literal."""

    ref: Ref | None = None
    tensor: Memory | None = None
    literal: Any = None


@dataclass
class Body:
    """The steps of a call, what it returns, and what it leaves in the tracer."""

    steps: list[Step]
    results: list[Result]
    spec: Any
    calls: dict[str, int]
    functions: dict[Any, int]
    last_function: Any
    reads: list[Any] = field(default_factory=list)

    def equals(self, other: Body) -> bool:
        return self._sameness() == other._sameness()

    def _sameness(self) -> Any:
        return (
            [step.sameness() for step in self.steps],
            _literal([(result.ref, result.tensor, result.literal) for result in self.results]),
            self.spec,
            self.calls,
            self.functions,
            self.last_function,
            self.reads,
        )


class Recorder:
    """Notes the nodes that a tracer makes in one call."""

    def __init__(self, tracer: Any, call: Call, frames: Frames) -> None:
        self._tracer = tracer
        self._call = call
        self._frames = frames
        self._wishes: dict[fx.Node, tuple[str | None, Any, int]] = {}
        self._calls = dict(tracer.num_calls)
        self._functions = dict(tracer.torch_fn_counts)
        self._refs: dict[fx.Node, Ref] = {}
        self._homes: dict[int | None, Ref] = {}
        for name, tensor in call.state.items():
            self._know(tensor, Ref("state", name))
        for place, leaf in enumerate(call.leaves):
            if isinstance(leaf, torch.Tensor):
                self._know(leaf, Ref("argument", place))
        self._versions = [tensor._version for tensor in self._given()]
        self._last = _last(tracer.graph)

    def _given(self) -> list[torch.Tensor]:
        return [*self._call.state.values(), *self._call.tensors]

    def _know(self, tensor: torch.Tensor, ref: Ref) -> None:
        node = self._call.around.node(tensor)
        assert node is not None
        self._refs.setdefault(node, ref)
        self._homes.setdefault(storage_of(tensor), ref)

    def __enter__(self) -> Recorder:
        graph = self._tracer.graph
        create = graph.create_node

        def create_node(
            op: str, target: Any, args: Any = None, kwargs: Any = None, name: str | None = None, *rest: Any
        ) -> fx.Node:
            node: fx.Node = create(op, target, args, kwargs, name, *rest)
            function = self._tracer.torch_fn_metadata
            self._wishes[node] = name, function, self._tracer.torch_fn_counts.get(function, 0)
            return node

        graph.create_node = create_node
        return self

    def __exit__(self, *_: Any) -> None:
        del self._tracer.graph.create_node

    def body(self, result: Any) -> Body:
        """The steps between now and then. Raises Odd."""
        if self._versions != [tensor._version for tensor in self._given()]:
            raise Odd("it writes what it is given, or its state")
        nodes: list[fx.Node] = []
        node = _last(self._tracer.graph) if self._last is None else self._last.next
        while node is not None and node.op != "root":
            nodes.append(node)
            node = node.next
        for place, node in enumerate(nodes):
            self._refs[node] = Ref("step", place)
        steps = [self._step(node) for node in nodes]
        leaves, spec = tree_flatten(result)
        return Body(
            steps,
            self._results(leaves),
            spec,
            self._more(self._tracer.num_calls, self._calls),
            _more(self._tracer.torch_fn_counts, self._functions),
            self._tracer.torch_fn_metadata,
        )

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
        wish, function, count = self._wishes[node]
        own = {key: node.meta[key] for key in ("original_aten", "tensor_meta", GRAD, SAME) if key in node.meta}
        if FOLLOWS in node.meta:
            root = self._call.path.partition(".")[0]
            own[FOLLOWS] = tuple(self._inside(f"{root}.{path}") for path in node.meta[FOLLOWS])
        trace = node.meta.get("stack_trace", "")
        if not trace.startswith(self._frames.trace):
            raise Odd("a line of another place")
        return Step(
            target,
            self._operands(node.args),
            self._operands(node.kwargs),
            wish,
            self._value(node.meta.get("val")),
            own,
            trace[len(self._frames.trace) :],
            tuple(self._stack(node)),
            function if "torch_fn" in node.meta else None,
            count - self._functions.get(function, 0),
        )

    def _refuse_writes(self, target: OpOverload, node: fx.Node) -> None:
        for argument, place in zip(target._schema.arguments, node.args, strict=False):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for written in tree_flatten(place)[0]:
                val = written.meta.get("val") if isinstance(written, fx.Node) else None
                if self._homes.get(storage_of(val)) is None:
                    continue
                if self._homes[storage_of(val)].kind != "memory":
                    raise Odd("it writes what it is given, or its state")
        names = [argument.name for argument in target._schema.arguments if argument.alias_info is not None]
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
            return self._memory(value)
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            return type(value)(self._value(part) for part in value)
        if value is not None and type(value) not in (bool, int, float):
            raise Odd(f"a value of type {type(value).__name__}")
        return value

    def _memory(self, value: torch.Tensor) -> Memory:
        if is_odd(value) or varies(value) or value.is_conj() or value.is_neg():
            raise Odd("a tensor of another kind")
        storage = storage_of(value)
        if storage not in self._homes:
            self._homes[storage] = Ref("memory", len(self._homes))
        return Memory(
            tuple(value.shape),
            value.stride(),
            int(value.storage_offset()),
            value.dtype,
            value.device,
            value.requires_grad,
            self._homes[storage],
            int(value.untyped_storage().nbytes()),
        )

    def _results(self, leaves: Sequence[Any]) -> list[Result]:
        given = {id(leaf): Ref("argument", place) for place, leaf in enumerate(self._call.leaves)}
        state = {id(tensor) for tensor in self._call.state.values()}
        seen: set[int] = set()
        homes: set[Ref] = set()
        results: list[Result] = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                if not isinstance(leaf, LITERALS):
                    raise Odd(f"it returns a {type(leaf).__name__}")
                results.append(Result(literal=leaf))
                continue
            if id(leaf) in given:
                results.append(Result(given[id(leaf)]))
                continue
            node = self._call.around.node(leaf)
            ref = self._refs.get(node) if node is not None else None
            if ref is None or ref.kind != "step" or id(leaf) in state or id(leaf) in seen:
                raise Odd("it returns what it does not make")
            memory = self._memory(leaf)
            if memory.home.kind != "memory" or memory.home in homes:
                raise Odd("it returns a view of what it is given, or two of one memory")
            if leaf.requires_grad and leaf.is_leaf:
                raise Odd("it returns a tensor without history")
            if vars(leaf).keys() - _ATTRIBUTES:
                raise Odd("it leaves something in a tensor")
            seen.add(id(leaf))
            homes.add(memory.home)
            results.append(Result(ref, memory))
        return results


def _is_plain(target: Any) -> bool:
    """True for an op of torch's dispatcher that is not one of ours, and for a change of the mode."""
    if isinstance(target, OpOverload):
        return target.namespace != "stagecut"
    return target in _CONTEXTS or getattr(target, "__name__", "") == _GETITEM


def _more(after: Mapping[Any, int], before: Mapping[Any, int]) -> dict[Any, int]:
    return {key: count - before.get(key, 0) for key, count in after.items() if count != before.get(key, 0)}


def _last(graph: fx.Graph) -> fx.Node | None:
    return next(iter(reversed(graph.nodes)), None)


def _plain_attributes() -> frozenset[str]:
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        tensor = torch.empty(1)
    return frozenset(vars(tensor))


_ATTRIBUTES = _plain_attributes()


# --- again ------------------------------------------------------------------------------------------------


class Replay:
    """Takes the steps of a body for another call."""

    def __init__(self, body: Body, call: Call, tracer: Any, frames: Frames) -> None:
        self._body = body
        self._call = call
        self._tracer = tracer
        self._frames = frames
        self._nodes: dict[Ref, fx.Node] = {}
        self._homes: dict[Ref, Any] = {}
        self._stacks: dict[Any, dict[str, Any]] = {}
        self._mode: Any = None
        for name, tensor in call.state.items():
            self._know(Ref("state", name), tensor)
        for place, leaf in enumerate(call.leaves):
            if isinstance(leaf, torch.Tensor):
                self._know(Ref("argument", place), leaf)

    def _know(self, ref: Ref, tensor: torch.Tensor) -> None:
        node = self._call.around.node(tensor)
        assert node is not None and isinstance(tensor, FakeTensor)
        self._nodes[ref] = node
        self._homes[ref] = tensor.untyped_storage()
        self._mode = tensor.fake_mode

    def run(self) -> Any:
        """The result of the call. The tracer has the nodes of its trace."""
        counts = dict(self._tracer.torch_fn_counts)
        for place, step in enumerate(self._body.steps):
            self._nodes[Ref("step", place)] = self._node(step, counts)
        self._tracer.torch_fn_metadata = self._body.last_function
        for function, count in self._body.functions.items():
            self._tracer.torch_fn_counts[function] = counts.get(function, 0) + count
        for path, count in self._body.calls.items():
            path = self._call.path + path
            self._tracer.num_calls[path] = self._tracer.num_calls.get(path, 0) + count
        return tree_unflatten(self._results(), self._body.spec)

    def _node(self, step: Step, counts: Mapping[Any, int]) -> fx.Node:
        node: fx.Node = self._tracer.graph.create_node(
            "call_function", step.target, self._operands(step.args), self._operands(step.kwargs), step.wish
        )
        meta = dict(step.meta)
        meta["nn_module_stack"] = dict(self._stack(step.stack))
        meta["val"] = self._value(step.value)
        if FOLLOWS in meta:
            meta[FOLLOWS] = tuple(self._outside(path) for path in meta[FOLLOWS])
        trace = self._frames.trace + step.trace
        if trace:
            meta["stack_trace"] = trace
        if step.function is not None:
            number = step.count + counts.get(step.function, 0)
            name = step.function.__name__
            meta["torch_fn"] = (f"{name}_{number}", f"{type(step.function).__name__}.{name}")
        node.meta = meta
        return node

    def _outside(self, path: str) -> str:
        return (self._call.path + path).partition(".")[2]

    def _operands(self, tree: Any) -> Any:
        return fx.node.map_aggregate(tree, lambda leaf: self._nodes[leaf] if isinstance(leaf, Ref) else leaf)

    def _stack(self, stack: tuple[tuple[str, str, str], ...]) -> dict[str, Any]:
        if stack not in self._stacks:
            entries: dict[str, Any] = dict(self._frames.stack[:-1])
            own, own_key = self._call.path, self._frames.stack[-1][0]
            for key, path, cls in stack:
                entries[own + key if path else own_key] = (own + path, cls)
            self._stacks[stack] = entries
        return self._stacks[stack]

    def _value(self, value: Any) -> Any:
        if isinstance(value, Memory):
            return self._tensor(value)
        if isinstance(value, (tuple, list)):
            return type(value)(self._value(part) for part in value)
        return value

    def _tensor(self, memory: Memory) -> torch.Tensor:
        """A tensor of that kind, in the memory that it has for this call."""
        if memory.home not in self._homes:
            self._homes[memory.home] = torch.UntypedStorage(memory.size, device="meta")
        storage = self._homes[memory.home]
        inner = torch.empty(0, dtype=memory.dtype, device="meta")
        inner.set_(storage, memory.offset, memory.shape, memory.stride)
        tensor = FakeTensor(self._mode, inner, memory.device)
        return tensor.requires_grad_(memory.requires_grad)

    def _results(self) -> list[Any]:
        made = [result for result in self._body.results if result.tensor is not None]
        tensors: list[Any] = []
        if made:
            tensors = [*_History.apply(_anchor(), self, [result.tensor for result in made])]  # type: ignore[no-untyped-call]
        for result, tensor in zip(made, tensors, strict=True):
            assert result.ref is not None
            proxy = fx.Proxy(self._nodes[result.ref], self._tracer)
            proxy_tensor.track_tensor(tensor, proxy, constant=None, tracer=self._tracer)
        fresh = iter(tensors)
        return [
            next(fresh) if result.tensor is not None
            else self._call.leaves[result.ref.key] if result.ref is not None
            else result.literal
            for result in self._body.results
        ]


def _anchor() -> torch.Tensor:
    return torch.empty((), requires_grad=True)


class CutHistory(Exception):
    """Gradients are asked for through a call that was not traced by itself."""


class _History(torch.autograd.Function):
    """Makes tensors with a history, as the ops of a block would. Nobody may go back through it."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, replay: Replay, kinds: Sequence[Memory]) -> Any:
        tensors: list[torch.Tensor] = []
        plain: list[torch.Tensor] = []
        for memory in kinds:
            tensor = replay._tensor(memory).requires_grad_(False)
            tensors.append(tensor)
            if not memory.requires_grad:
                plain.append(tensor)
        ctx.mark_non_differentiable(*plain)
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise CutHistory


__all__ = ["Body", "CutHistory", "Frames", "Odd", "Recorder", "Replay"]
