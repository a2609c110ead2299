"""A function of tensors -> one graph of what it computes and of the gradients, by AOT autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch.utils._pytree import tree_leaves

from stagecut.frontend.source import first_line
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import CaptureError
from stagecut.ir.ops import facts_of

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
        raise CaptureError(
            f"AOT autograd cannot trace it: {first_line(error)}",
            hint="the stage runs by autograd",
        ) from error
    _refuse_effects(graph)
    return graph, tuple(carrying)


def _refuse_effects(graph: fx.GraphModule) -> None:
    """Raises CaptureError for an op that does more than give results, such as a check: a role would not know
    when to do it. torch threads such ops on tokens, which are arguments besides.
    """
    for node in graph.graph.nodes:
        if node.target is torch.ops.higher_order.with_effects:
            raise CaptureError(
                f"{node.args[1]} checks or prints, besides what it computes",
                hint="the stage runs by autograd",
            )


def _traced(function: Function, arguments: Sequence[torch.Tensor]) -> Any:
    joint = any(argument.requires_grad for argument in arguments)
    return aot_export_joint_simple(function, tuple(arguments), trace_joint=joint)


@contextmanager
def _kernels_kept() -> Iterator[None]:
    """Inside, a trace holds the ops that eager runs on the device, as torch's C++ chooses them. In a trace
    torch would compute some of them from others, by formulas that round differently, and draw otherwise.
    """
    replaced: list[tuple[Any, Any, Any]] = []
    for op in _with_kernel_and_formula():
        replaced.append((op, _FORMULA, partial(_formula_without_kernel, op)))
    for op in _with_formula_in_python():
        replaced += [(op, key, None) for key in (_FORMULA, _AUTOGRAD)]
    for op in _DROPOUTS:
        replaced += [
            (op, key, partial(_as_it_lies, op)) for key in (_FORMULA, _AUTOGRAD)
        ]
    before = [op.py_kernels.get(key) for op, key, _ in replaced]
    for op, key, formula in replaced:
        _set_formula(op, key, formula)
    try:
        yield
    finally:
        for (op, key, _), formula in zip(replaced, before, strict=True):
            _set_formula(op, key, formula)


_FORMULA = torch._C.DispatchKey.CompositeImplicitAutograd
_AUTOGRAD = torch._C.DispatchKey.Autograd


def _formula_without_kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """What the formula of an op gives; NotImplemented where the device has a kernel for the op."""
    kinds = {
        leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)
    }
    # a number in a tensor may lie on the CPU while the op runs elsewhere
    key = torch._C._dispatch_key_for_device(min(kinds - {"cpu"}, default="cpu"))
    if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key):
        return NotImplemented
    return op._op_dk(_FORMULA, *args, **kwargs)


_DROPOUTS = [
    torch.ops.aten.dropout.default,
    torch.ops.aten.dropout_.default,
    torch.ops.aten.alpha_dropout.default,
    torch.ops.aten.alpha_dropout_.default,
]


def _as_it_lies(op: Any, tensor: torch.Tensor, *args: Any) -> Any:
    """A dropout that draws for the elements in the order in which they lie, as in eager. In a trace it would
    draw for them in the order of the dims. A GPU has a kernel for the whole of a dropout, and draws there.
    """
    if op is torch.ops.aten.dropout.default and tensor.device.type != "cpu":
        return op._op_dk(_FORMULA, tensor, *args)
    steps = torch.empty_like(tensor).stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -steps[dim])
    laid = tensor.permute(order)
    result = op._op_dk(_FORMULA, laid, *args)
    if op._schema.is_mutable:
        return tensor
    back = sorted(range(tensor.dim()), key=lambda dim: order[dim])
    return result.permute(back)


def _set_formula(op: Any, key: Any, formula: Any) -> None:
    if formula is None:
        op.py_kernels.pop(key, None)
    else:
        op.py_kernels[key] = formula
    op._dispatch_cache.clear()


@cache
def _with_kernel_and_formula() -> list[Any]:
    """The ops of torch that have a kernel of their own on some device, and a formula in other ops besides."""
    keys = [_FORMULA.name, "CPU"], [_FORMULA.name, "CUDA"]
    return [
        op
        for op in _torchs_ops()
        if any(_has_kernels(op.name(), pair) for pair in keys)
    ]


@cache
def _with_formula_in_python() -> list[Any]:
    """The ops of torch for which Python has a formula that stands before autograd. Norms that write their
    statistics are not among them: without the formula no trace would show that they write.
    """
    return [
        op
        for op in _torchs_ops()
        if _AUTOGRAD in op.py_kernels
        and not facts_of(op.overloadpacket.__name__).statistics
    ]


def _torchs_ops() -> Iterator[Any]:
    """All ops of torch."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if namespace == "aten":
            yield getattr(getattr(torch.ops.aten, packet), overload or "default")


def _has_kernels(name: str, keys: Sequence[str]) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return all(has(name, key) for key in keys)
