"""The cost of a loss, which is in no program: the time, and the bytes it keeps, on the last stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from stagecut.backend.costs.ops import Device, known_shape
from stagecut.backend.costs.setting import Setting
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import InputError
from stagecut.ir.graph import Op, Program, Value
from stagecut.ir.run.call import CallSpec
from stagecut.ir.run.storage import storage_of
from stagecut.ir.types import DTYPES, TensorType, carries_grad

OWN_LOSS = "the model's own"


@dataclass(frozen=True, eq=False)
class LossCost:
    """FLOPs, bytes moved and dtype of each op of a loss, forward and backward. kept: the bytes that it keeps
    between them. passing: the bytes of the largest gradients that one of its ops reads and makes.
    """

    forward: tuple[tuple[float, float, str], ...]
    backward: tuple[tuple[float, float, str], ...]
    kept: int
    passing: int
    function: Callable[..., Any]
    target: Any

    @property
    def name(self) -> str:
        """The name of the function."""
        return _name(self.function)

    def on(self, where: Device, training: bool = True) -> tuple[float, float]:
        """Seconds on a device, forward and backward."""
        forward = sum(where.seconds(*counts) for counts in self.forward)
        backward = sum(where.seconds(*counts) for counts in self.backward)
        return forward, backward if training else 0.0


def loss_cost(
    program: Program,
    call: CallSpec | None,
    sizes: Mapping[str, int],
    loss_fn: Callable[..., Any],
    target: Any,
) -> LossCost:
    """The cost of `loss_fn(output, target)` for a micro-batch. `target` is an example, whose contents count
    for nothing.

    Raises InputError where the loss cannot be computed on the meta device.
    """
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    leaves = [_on_meta(leaf, sizes) for leaf in program.outputs]
    output = output_of(call, leaves, loss_fn)
    goal = tree_map(
        lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, target
    )
    forward = _Counter()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    try:
        with torch.enable_grad(), hooks, forward:
            loss = loss_fn(output, goal)
        backward = _Counter(frozenset(map(storage_of, kept)))
        with backward:
            loss_alone(loss).backward()
    except Exception as error:
        raise_ours(error)
        raise InputError(
            f"the loss cannot be counted: {error}",
            where=f"loss_fn={_name(loss_fn)} on tensors without contents",
            hint="give target= as for one micro-batch; or leave loss_fn= away",
        ) from error
    outputs = {storage_of(leaf) for leaf in tree_leaves(output) if _is_tensor(leaf)}
    sized = {storage_of(t): t.untyped_storage().nbytes() for t in kept}
    return LossCost(
        tuple(forward.ops),
        tuple(backward.ops),
        sum(size for storage, size in sized.items() if storage not in outputs),
        backward.passing,
        loss_fn,
        target,
    )


def output_of(
    call: CallSpec | None, leaves: Sequence[Any], loss_fn: Callable[..., Any]
) -> Any:
    """What the loss is given: the model's output, or its leaves where nothing is known of its structure. A
    loss that the outputs suggest is given all leaves: a cache in the output is one leaf to torch.
    """
    if isinstance(loss_fn, _CrossEntropy):
        return [*leaves]
    if call is not None:
        return call.result_alone(leaves)
    return leaves[0] if len(leaves) == 1 else [*leaves]


def loss_alone(returned: Any) -> torch.Tensor:
    """The loss in what a loss function returns, which may be (loss, metrics)."""
    loss: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
    return loss


def counted_loss(
    program: Program,
    call: CallSpec | None,
    sizes: Mapping[str, int],
    setting: Setting,
    loss_fn: Callable[..., Any] | None = None,
    target: Any = None,
) -> LossCost | None:
    """The cost of the loss that is given, or else of the one that the outputs suggest; None for none."""
    if not setting.training:
        return None
    if loss_fn is not None:
        return loss_cost(program, call, sizes, loss_fn, target)
    assumed = assumed_loss(program, sizes)
    if assumed is None:
        return None
    return loss_cost(program, call, sizes, *assumed)


def assumed_loss(
    program: Program, sizes: Mapping[str, int]
) -> tuple[Callable[..., Any], Any] | None:
    """The loss that the outputs of a model suggest, and a target for it: cross-entropy where an output has
    logits for every token of an input. None where they suggest nothing, and for a model that returns its own.
    """
    if returns_loss(program):
        return None
    tokens = [
        tuple(value.type.shape)
        for value in program.inputs
        if isinstance(value.type, TensorType) and value.type.dtype in ("i64", "i32")
    ]
    for place, leaf in enumerate(program.outputs):
        kind = leaf.type if isinstance(leaf, Value) else None
        if not isinstance(kind, TensorType) or not carries_grad(kind):
            continue
        if len(kind.shape) > 2 and tuple(kind.shape[:-1]) in tokens:
            logits = _on_meta(leaf, sizes)
            target = torch.zeros(logits.shape[:-1], dtype=torch.long, device="meta")
            return _CrossEntropy(place), target
    return None


def returns_loss(program: Program) -> bool:
    """True for a model that returns its loss: a number with a gradient, computed from another output, or the
    only output that has one.
    """
    trained = [leaf for leaf in program.outputs if _trains(leaf)]
    numbers: list[Value] = []
    others: set[Value] = set()
    for leaf in trained:
        if leaf.type.shape == ():
            numbers.append(leaf)
        else:
            others.add(leaf)
    if not others:
        return bool(numbers)
    return any(_is_computed_from(leaf, others) for leaf in numbers)


def _trains(leaf: Any) -> bool:
    kind = leaf.type if isinstance(leaf, Value) else None
    return isinstance(kind, TensorType) and carries_grad(kind)


def _is_computed_from(value: Value, wanted: set[Value]) -> bool:
    waiting = [value]
    seen: set[Value] = set()
    while waiting:
        value = waiting.pop()
        if value in wanted:
            return True
        if isinstance(value.owner, Op) and value not in seen:
            waiting += value.owner.operands
        seen.add(value)
    return False


@dataclass(frozen=True)
class _CrossEntropy:
    """Cross-entropy in float32 of one of the leaves of the output."""

    place: int
    __name__ = "cross-entropy in float32"

    def __call__(self, leaves: Sequence[Any], target: torch.Tensor) -> torch.Tensor:
        logits = leaves[self.place]
        rows = logits.flatten(0, -2).float()
        return torch.nn.functional.cross_entropy(rows, target.flatten())


@dataclass
class _Counter(TorchDispatchMode):
    """Counts every op that runs inside. passing: the most bytes that one of them reads and makes besides the
    storages in `kept`.
    """

    kept: frozenset[int | None] = frozenset()
    passing: int = 0
    ops: list[tuple[float, float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable or not _is_view(func):
            leaves = tree_leaves((args, kwargs, result))
            self._count([leaf for leaf in leaves if _is_tensor(leaf)], counter)
        return result

    def _count(self, tensors: list[torch.Tensor], counter: FlopCounterMode) -> None:
        moved = float(sum(t.numel() * t.element_size() for t in tensors))
        widest = max((t.element_size() for t in tensors), default=4)
        dtype = "bf16" if widest < 4 else "f32"
        self.ops.append((counter.get_total_flops(), moved, dtype))
        sizes = {storage_of(t): t.untyped_storage().nbytes() for t in tensors}
        passing = sum(n for storage, n in sizes.items() if storage not in self.kept)
        self.passing = max(self.passing, passing)


def _is_view(func: Any) -> bool:
    returned = func._schema.returns
    return bool(returned) and returned[0].alias_info is not None


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _on_meta(leaf: Any, sizes: Mapping[str, int]) -> Any:
    """A tensor without contents of the type of an output."""
    kind = leaf.type if isinstance(leaf, Value) else None
    if not isinstance(kind, TensorType):
        return leaf
    shape = known_shape(kind, sizes)
    dtype = getattr(torch, DTYPES[kind.dtype])
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.requires_grad_(carries_grad(kind))


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
