"""What a call of a block returns, and the same again for an equal call: new tensors of these kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from stagecut.frontend.fold.calls import LITERALS, Call, Ref, is_odd, varies
from stagecut.frontend.watch.watch import TraceEach
from stagecut.ir.run.storage import storage_of


class Odd(Exception):
    """A call stands for no other one; the text says why."""


@dataclass(frozen=True)
class Memory:
    """A tensor: its kind, its place in a memory, and which memory that is."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    home: Ref
    size: int
    """Bytes of the memory."""


class Memories:
    """The memories that a call finds and makes. Each has a name: that of what the call was given there, or a
    number.
    """

    def __init__(self) -> None:
        self._homes: dict[int | None, Ref] = {}

    def know(self, tensor: torch.Tensor, ref: Ref) -> None:
        """The memory of a tensor that the call is given has its name."""
        self._homes.setdefault(storage_of(tensor), ref)

    def home(self, tensor: Any) -> Ref | None:
        """The memory of a tensor; None for one that was not seen."""
        return self._homes.get(storage_of(tensor))

    def of(self, tensor: torch.Tensor) -> Memory:
        """The kind of a tensor, and where it is. Raises Odd for one that cannot be made again."""
        if is_odd(tensor) or varies(tensor):
            raise Odd("a tensor of another kind")
        storage = storage_of(tensor)
        if storage not in self._homes:
            self._homes[storage] = Ref("memory", len(self._homes))
        return Memory(
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
            tensor.device,
            tensor.requires_grad,
            self._homes[storage],
            int(tensor.untyped_storage().nbytes()),
        )


@dataclass
class Result:
    """What a call returns: a tensor that it makes, an argument, or a literal."""

    ref: Ref | None = None
    memory: Memory | None = None
    literal: Any = None


def sameness(results: Iterable[Result]) -> Any:
    """Equal for results that are the same."""
    return strict([(result.ref, result.memory, result.literal) for result in results])


def strict(tree: Any) -> Any:
    """A tree in which 1 is not True."""
    leaves, spec = tree_flatten(tree)
    return spec, [
        leaf if isinstance(leaf, (Ref, Memory)) else (type(leaf), repr(leaf))
        for leaf in leaves
    ]


def results_of(
    leaves: Iterable[Any],
    call: Call,
    memories: Memories,
    made: Callable[[torch.Tensor], Ref | None],
) -> list[Result]:
    """What a call has returned. `made` says where the call made a tensor, None for one of others. Raises Odd
    for what cannot be returned again.
    """
    given = {id(leaf): Ref("argument", place) for place, leaf in enumerate(call.leaves)}
    state = {id(tensor) for tensor in call.state.values()}
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
        ref = made(leaf)
        if ref is None or id(leaf) in state or id(leaf) in seen:
            raise Odd("it returns what it does not make")
        memory = memories.of(leaf)
        if memory.home.kind != "memory" or memory.home in homes:
            raise Odd("it returns a view of what it is given, or two of one memory")
        if leaf.requires_grad and leaf.is_leaf:
            raise Odd("it returns a tensor without history")
        if vars(leaf).keys() - _plain_attributes():
            raise Odd("it leaves something in a tensor")
        seen.add(id(leaf))
        homes.add(memory.home)
        results.append(Result(ref, memory))
    return results


@cache
def _plain_attributes() -> frozenset[str]:
    """The attributes of a fake tensor in which nobody has left anything.

    Not at import: torch's mode asks for GPUs, and a process that has asked cannot be forked to use them.
    """
    with _disable_current_modes(), torch._subclasses.FakeTensorMode():
        return frozenset(vars(torch.empty(1)))


# --- again ------------------------------------------------------------------------------------------------


def made_again(results: Sequence[Result], call: Call) -> list[torch.Tensor]:
    """New tensors for those results that an equal call has made."""
    memories = [result.memory for result in results if result.memory is not None]
    if not memories:
        return []
    with _disable_current_modes():
        anchor = torch.empty((), requires_grad=True)
        return [*_History.apply(anchor, _fake_mode(call), memories)]


def returned(
    results: Sequence[Result], spec: Any, call: Call, made: Iterable[torch.Tensor]
) -> Any:
    """What a call returns that has made these tensors."""
    fresh = iter(made)
    leaves: list[Any] = []
    for result in results:
        if result.memory is not None:
            leaves.append(next(fresh))
        elif result.ref is not None:
            leaves.append(call.leaves[result.ref.key])
        else:
            leaves.append(result.literal)
    return tree_unflatten(leaves, spec)


def _fake_mode(call: Call) -> Any:
    for _, tensor in call.given():
        assert isinstance(tensor, FakeTensor)
        return tensor.fake_mode
    return None


def _tensor(memory: Memory, mode: Any) -> torch.Tensor:
    storage = torch.UntypedStorage(memory.size, device="meta")
    inner = torch.empty(0, dtype=memory.dtype, device="meta")
    inner.set_(storage, memory.offset, memory.shape, memory.stride)
    return FakeTensor(mode, inner, memory.device)


class CutHistory(TraceEach):
    """Gradients are asked for through a call that was made again."""


class _History(torch.autograd.Function):
    """Makes tensors with a history, as the ops of a block would. Nobody may go back through it."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, mode: Any, memories: Sequence[Memory]
    ) -> Any:
        tensors = [_tensor(memory, mode) for memory in memories]
        pairs = zip(tensors, memories, strict=True)
        plain = [tensor for tensor, memory in pairs if not memory.requires_grad]
        ctx.mark_non_differentiable(*plain)
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise CutHistory
