"""Runs a block of modules that a model repeats twice on fake tensors; further calls alike return such tensors
as those did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from stagecut.frontend.fold.calls import LITERALS, Call, Ref
from stagecut.frontend.fold.kinds import Kinds, has_global_hooks
from stagecut.frontend.fold.results import (
    Memories,
    Odd,
    Result,
    made_again,
    results_of,
    returned,
    sameness,
)


class RepeatedRuns:
    """Open while a model runs on fake tensors. `skipped` counts the calls that did not run."""

    def __init__(self, module: nn.Module) -> None:
        self._kinds: Kinds[Ran] = Kinds(module)
        self._paths = {id(owner): path for path, owner in module.named_modules()}
        self.skipped = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """While open, calls of repeated blocks run once for all."""
        run = nn.Module.__call__

        def call(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._call(owner, args, kwargs, lambda: run(owner, *args, **kwargs))

        with patch.object(nn.Module, "__call__", call):
            yield

    def _call(
        self, owner: nn.Module, args: Any, kwargs: Any, run: Callable[[], Any]
    ) -> Any:
        if not self._kinds.may_be_known(owner) or has_global_hooks():
            return run()
        with torch._C.DisableTorchFunction():
            path = self._paths.get(id(owner), "")
            found = self._kinds.find(Call(owner, path, args, kwargs, _OnFakes()))
            if found is not None and found.known is not None:
                self.skipped += 1
                return found.known.again(found.call)
            steps = _Steps(found.call) if found is not None else None
        if found is None or steps is None:
            return run()
        return self._kinds.record(found, run, steps, steps.done)


class _OnFakes:
    """What a call finds around it: a run on fake tensors makes no graph, and follows no flag."""

    def knows(self, tensor: torch.Tensor) -> bool:
        return True

    def node(self, tensor: torch.Tensor) -> fx.Node | None:
        return None

    def facts(self, tensor: torch.Tensor) -> Any:
        return None

    def state(self) -> Any:
        return torch.is_grad_enabled()

    def counts(self, path: str) -> int:
        return 0

    def sets_flag(self, path: str) -> bool:
        return False

    def others(self, name: str) -> Iterable[str]:
        return ()


@dataclass
class Ran:
    """The ops of a call on fake tensors, and what it returned."""

    ops: list[Any]
    results: list[Result]
    spec: Any

    def equals(self, other: Any) -> bool:
        """True for a call with the same ops and results."""
        return bool(
            (self.ops, sameness(self.results), self.spec)
            == (other.ops, sameness(other.results), other.spec)
        )

    def again(self, call: Call) -> Any:
        """What an equal call returns."""
        made = made_again(self.results, call)
        return returned(self.results, self.spec, call, made)


class _Steps(TorchDispatchMode):
    """Notes the ops of one call."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call
        self._memories = Memories()
        self._ops: list[Any] = []
        self._odd = ""
        self._refs: dict[int, Ref] = {}
        self._kept: list[Any] = []
        for ref, tensor in call.given():
            self._refs.setdefault(id(tensor), ref)
            self._memories.know(tensor, ref)
        self._versions = self._versions_now()

    def _versions_now(self) -> list[int]:
        return [tensor._version for _, tensor in self._call.given()]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        try:
            operands = self._said((args, kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._refs.setdefault(id(leaf), Ref("made", len(self._refs)))
                    self._kept.append(leaf)
            if not isinstance(func, OpOverload) or func.namespace == "stagecut":
                raise Odd(f"it calls {func}")
            self._ops.append((func, operands, self._said(result), self._kinds(result)))
        except Odd as error:
            self._odd = self._odd or str(error)
        return result

    def _said(self, tree: Any) -> Any:
        leaves, spec = tree_flatten(tree)
        return spec, [self._leaf(leaf) for leaf in leaves]

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in self._refs:
                raise Odd("it reads a tensor from outside")
            return self._refs[id(leaf)]
        if not isinstance(leaf, LITERALS):
            raise Odd(f"an operand of type {type(leaf).__name__}")
        return type(leaf), repr(leaf)

    def _kinds(self, result: Any) -> list[Any]:
        tensors = [
            leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)
        ]
        return [self._memories.of(tensor) for tensor in tensors]

    def done(self, result: Any) -> Ran:
        """What the call has done. Raises Odd."""
        if self._odd:
            raise Odd(self._odd)
        if self._versions != self._versions_now():
            raise Odd("it writes what it is given, or its state")
        leaves, spec = tree_flatten(result)
        results = results_of(leaves, self._call, self._memories, self._made)
        return Ran(self._ops, results, spec)

    def _made(self, tensor: torch.Tensor) -> Ref | None:
        """The number of a tensor that an op has made; None for another one."""
        ref = self._refs.get(id(tensor))
        return ref if ref is not None and ref.kind == "made" else None
