"""Values that depend on no input, no state and no random number are known while a model is traced, and
forward may branch on them.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from stagecut.frontend.watch.training import node_of
from stagecut.ir.ops import facts_of
from stagecut.ir.run.constants import MOST_ELEMENTS

_READS = frozenset(
    {
        torch.Tensor.__bool__,
        torch.Tensor.__int__,
        torch.Tensor.__float__,
        torch.Tensor.__complex__,
        torch.Tensor.__index__,
        torch.Tensor.__contains__,
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.is_nonzero,
        torch.Tensor.equal,
        torch.Tensor.allclose,
        torch.is_nonzero,
        torch.equal,
        torch.allclose,
    }
)
"""Functions that look at the values of tensors."""

_CHANGES_NO_VALUE = torch.ops.aten.detach_.default
"""An in-place op that leaves the values as they are; torch puts it after every tensor that is made of
Python's numbers.
"""


class KnownValues(TorchFunctionMode):
    """While open, code that looks at a known value gets that value, so the trace takes the path of the eager
    run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[fx.Node, Any] = {}
        self.asked = 0
        """How often code has asked for the value of a tensor."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        by_name = any(isinstance(arg, FakeTensor) for arg in kwargs.values())
        if func not in _READS or by_name or get_proxy_mode() is None:
            return func(*args, **kwargs)
        self.asked += 1
        values = [
            self.value(arg) if isinstance(arg, FakeTensor) else arg for arg in args
        ]
        if any(
            value is None and arg is not None
            for value, arg in zip(values, args, strict=True)
        ):
            return func(*args, **kwargs)
        with _disable_current_modes():
            return func(*values, **kwargs)

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The real tensor that `tensor` stands for in the trace, None where it depends on more than
        constants.
        """
        node = node_of(tensor)
        cone = _cone(node) if node is not None else None
        if cone is None:
            return None
        steps = [step for step in cone if step not in self._values]
        self._values |= {
            step: _attribute(step) for step in steps if step.op == "get_attr"
        }
        with (
            _disable_current_modes(),
            torch._C.DisableTorchFunction(),
            torch._C._DisableAutocast(),
            torch.no_grad(),
        ):
            for step in steps:
                if step.op != "get_attr":
                    self._values[step] = _computed(step, self._values)
        if any(_is_cast(step, self._values[step]) for step in cone):
            return None
        value: torch.Tensor = self._values[node]  # type: ignore[index]
        return value


def depends_on_constants(tensor: torch.Tensor) -> bool:
    """True for a tensor of a trace whose value is known."""
    node = node_of(tensor)
    return node is not None and _cone(node) is not None


def _cone(node: fx.Node) -> list[fx.Node] | None:
    """The nodes that `node` is computed from, in order. None where they are more than constants, or where one
    of them is written by now, though it may not have been when it was read.
    """
    steps: dict[fx.Node, None] = {}
    todo = [(node, False)]
    while todo:
        step, is_ready = todo.pop()
        if is_ready:
            steps[step] = None
        elif step not in steps:
            if not _is_constant(step) or _is_written(step):
                return None
            todo.append((step, True))
            todo += [(operand, False) for operand in step.all_input_nodes]
    return list(steps)


def _is_constant(node: fx.Node) -> bool:
    """True for an op that makes the same result of constants in every call, if the result is small enough to
    be worth computing.
    """
    if node.op == "get_attr":
        return isinstance(_attribute(node), torch.Tensor)
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, torch.Tensor) else ()
    if (
        not all(isinstance(size, int) for size in sizes)
        or math.prod(sizes) > MOST_ELEMENTS
    ):
        return False
    return (
        not _writes(target)
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not facts_of(target._opname).uninitialised
    )


def _is_written(node: fx.Node) -> bool:
    """True when an op writes into the result of `node`, or into a view of it."""
    todo, seen = [node], {node}
    while todo:
        for user in todo.pop().users:
            target = user.target
            if not isinstance(target, OpOverload):
                if target is not operator.getitem:
                    return True
            elif _writes(target):
                return True
            elif all(
                argument.alias_info is None for argument in target._schema.arguments
            ):
                continue
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def _writes(target: OpOverload) -> bool:
    return target._schema.is_mutable and target is not _CHANGES_NO_VALUE


def _attribute(node: fx.Node) -> Any:
    tracer: Any = get_proxy_mode()
    return getattr(tracer.tracer.root, str(node.target), None)


def _computed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = (
        tree_map(lambda leaf: _operand(leaf, values), tree)
        for tree in (node.args, node.kwargs)
    )
    function: Any = node.target
    return function(*args, **kwargs)


def _is_cast(node: fx.Node, value: Any) -> bool:
    """True where autocast has the op compute in another dtype than its operands alone would give, and so
    round in another way.
    """
    traced = node.meta.get("val")
    return (
        isinstance(traced, torch.Tensor)
        and isinstance(value, torch.Tensor)
        and traced.dtype != value.dtype
    )


def _operand(leaf: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(leaf, fx.Node):
        return values[leaf]
    return torch.device("cpu") if leaf == torch.device("meta") else leaf
