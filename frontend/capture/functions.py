"""A torch.autograd.Function of the user's is one op that calls it: its own backward would be lost if its
forward were traced through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from stagecut.frontend.capture.whole import EffectObserver, tensors_in
from stagecut.frontend.marks import CALL, SYMBOLIC, LeafCall
from stagecut.frontend.watch.forbidden import Untraceable
from stagecut.ir.run.storage import shared_with, storage_of

torch.library.define(
    "stagecut::function", "(str key, Tensor[] args, Scalar[] numbers) -> Tensor[]"
)

_SHOWN: dict[str, list[torch.Tensor]] = {}
"""Key -> the result of that call on fake tensors."""

_keys = count()


@torch.library.impl("stagecut::function", "CompositeExplicitAutograd")
def _function(
    key: str, args: list[torch.Tensor], numbers: list[Any]
) -> list[torch.Tensor]:
    raise Untraceable(
        "stagecut::function stands in for an autograd.Function during capture and cannot be run"
    )


@torch.library.register_fake("stagecut::function")
def _function_fake(
    key: str, args: list[torch.Tensor], numbers: list[Any]
) -> list[torch.Tensor]:
    return [
        torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        for tensor in _SHOWN[key]
    ]


@contextmanager
def functions_whole(notes: list[str], line: Callable[[], str]) -> Iterator[None]:
    """While open, a call of a user's autograd.Function is one op of the trace.

    A function that is given modules or functions, whose parameters it would hide, is traced through; `notes`
    says so.
    """
    base: Any = torch.autograd.Function
    apply = base.__dict__["apply"]

    def stand_in(cls: Any, *args: Any, **kwargs: Any) -> Any:
        run = apply.__get__(None, cls)
        is_torchs = cls.__module__.startswith(
            "torch."
        ) and not cls.__module__.startswith("torch.distributions.")
        if (
            is_torchs
            or get_proxy_mode() is None
            or torch._C._are_functorch_transforms_active()
        ):
            return run(*args, **kwargs)
        flat, spec = tree_flatten((args, kwargs))
        if any(isinstance(leaf, nn.Module) or callable(leaf) for leaf in flat):
            notes.append(
                f"the gradient of {cls.__name__} is that of the ops in its forward, not its own backward: "
                f"{line()}"
            )
            # a grad mode inside says nothing, because the Function decides what its backward does
            with torch._C.DisableTorchFunction():
                return run(*args, **kwargs)
        return _one_op(cls, run, flat, spec)

    base.apply = classmethod(stand_in)
    try:
        with _WithoutMeta():
            yield
    finally:
        base.apply = apply


class _WithoutMeta(TorchFunctionMode):
    """Torch functions that cannot run on fake tensors, because a fast path in them looks at values, become
    one op each.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        stand_in = _WITHOUT_META.get(func)
        if stand_in is None or get_proxy_mode() is None:
            return func(*args, **kwargs)
        flat, spec = tree_flatten((args, kwargs))
        return _one_op(func, func, flat, spec, stand_in)


def _ctc_loss(log_probs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    reduction = kwargs.get("reduction", args[4] if len(args) > 4 else "mean")
    return log_probs.new_empty(
        log_probs.shape[1:-1] if reduction in ("none", 0) else ()
    )


_WITHOUT_META = {torch.nn.functional.ctc_loss: _ctc_loss, torch.ctc_loss: _ctc_loss}
"""Such a function -> a stand-in for its result, right in size only."""


def _one_op(
    cls: Any,
    function: Callable[..., Any],
    flat: list[Any],
    spec: Any,
    stand_in: Callable[..., Any] | None = None,
) -> Any:
    """The result of a call that is one op of the trace. `stand_in` runs on fake tensors in place of the
    function.
    """
    call = _recorded(cls, function, flat, spec, stand_in or function)
    key = f"{cls.__name__}#{next(_keys)}"
    _SHOWN[key] = tensors_in(call.out_flat)
    numbers = [leaf for leaf in flat if isinstance(leaf, SYMBOLIC)]
    results = iter(torch.ops.stagecut.function(key, tensors_in(flat), numbers))
    del _SHOWN[key]
    _newest_call().meta[CALL] = call
    return tree_unflatten(
        [
            next(results) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in call.out_flat
        ],
        call.out_spec,
    )


def _recorded(
    cls: Any,
    function: Callable[..., Any],
    flat: list[Any],
    spec: Any,
    stand_in: Callable[..., Any],
) -> LeafCall:
    """The record of a call of `function`, by a run of `stand_in` on the same arguments."""
    tensors = tensors_in(flat)
    versions = [tensor._version for tensor in tensors]
    args, kwargs = tree_unflatten(flat, spec)
    with (
        torch._C.DisableTorchFunction(),
        disable_proxy_modes_tracing(),
        torch.no_grad(),
        EffectObserver() as effects,
    ):
        result = stand_in(*args, **kwargs)
    out_flat, out_spec = tree_flatten(result)
    written = [
        tensor._version != version or storage_of(tensor) in effects.wrote
        for tensor, version in zip(tensors, versions, strict=True)
    ]
    return LeafCall(
        cls.__name__,
        flat,
        spec,
        out_flat,
        out_spec,
        views=shared_with(tensors_in(out_flat), tensors),
        written_inputs=tuple(
            position for position, is_written in enumerate(written) if is_written
        ),
        random=effects.drew,
        function=function,
    )


def _newest_call() -> fx.Node:
    """The newest node of the trace that stands for such a call."""
    tracer: Any = get_proxy_mode()
    node: fx.Node = next(
        node
        for node in reversed(tracer.tracer.graph.nodes)
        if node.target is torch.ops.stagecut.function.default
    )
    return node
