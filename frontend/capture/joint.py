"""A function of tensors -> one graph of what it computes and of the gradients, by AOT autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_joint_simple

from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import CaptureError

Function = Callable[..., tuple[torch.Tensor, ...]]


def joint_graph(
    function: Function, arguments: Sequence[torch.Tensor]
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """The graph takes the arguments and a tangent for each result that carries gradient; it returns the
    results, then a gradient for each argument, None where it requires none. Beside it stand the places of the
    results that carry gradient. Where none does, the graph returns the results alone.

    `function` writes none of its arguments, and none of its results shares memory with anything. Raises
    CaptureError where AOT autograd cannot trace it.
    """
    carrying: list[int] = []

    def traced(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = function(*tensors)
        carrying[:] = [i for i, result in enumerate(results) if result.requires_grad]
        return results

    try:
        with _kernels_kept():
            graph = _traced(traced, arguments)
            if not carrying:
                # there is no backward
                graph = _traced(traced, [argument.detach() for argument in arguments])
    except Exception as error:  # anything that torch's or the user's code may raise
        raise_ours(error)
        first_line = str(error).strip().partition("\n")[0]
        raise CaptureError(
            f"AOT autograd cannot trace it: {type(error).__name__}: {first_line}",
            hint="the stage runs by autograd",
        ) from error
    return graph, tuple(carrying)


def _traced(function: Function, arguments: Sequence[torch.Tensor]) -> Any:
    joint = any(argument.requires_grad for argument in arguments)
    return aot_export_joint_simple(function, tuple(arguments), trace_joint=joint)


@contextmanager
def _kernels_kept() -> Iterator[None]:
    """Inside, a trace holds the ops that eager runs as one kernel on the device. Torch would take apart those
    that it can also compute from other ops, which rounds differently.
    """
    ops = _with_kernel_and_formula()
    before = [op.py_kernels.get(_FORMULA) for op in ops]
    for op, formula in zip(ops, before, strict=True):
        _set_formula(op, partial(_formula_without_kernel, op, formula))
    try:
        yield
    finally:
        for op, formula in zip(ops, before, strict=True):
            _set_formula(op, formula)


_FORMULA = torch._C.DispatchKey.CompositeImplicitAutograd


def _formula_without_kernel(op: Any, formula: Any, *args: Any, **kwargs: Any) -> Any:
    """What the formula of an op gives; NotImplemented where the device has a kernel for the op."""
    tensors = (arg for arg in args if isinstance(arg, torch.Tensor))
    key = torch._C._dispatch_key_for_device(next(tensors).device.type)
    if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key):
        return NotImplemented
    if formula is not None:
        return formula(*args, **kwargs)
    return op._op_dk(_FORMULA, *args, **kwargs)


def _set_formula(op: Any, formula: Any) -> None:
    if formula is None:
        op.py_kernels.pop(_FORMULA, None)
    else:
        op.py_kernels[_FORMULA] = formula
    op._dispatch_cache.clear()


@cache
def _with_kernel_and_formula() -> list[Any]:
    """The ops of torch that have a kernel of their own on some device, and a formula in other ops besides."""
    ops = []
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        keys = [_FORMULA.name, "CPU"], [_FORMULA.name, "CUDA"]
        if namespace == "aten" and any(_has_kernels(name, pair) for pair in keys):
            ops.append(
                getattr(
                    getattr(torch.ops.aten, packet),
                    overload or "default",
                )
            )
    return ops


def _has_kernels(name: str, keys: Sequence[str]) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return all(has(name, key) for key in keys)
