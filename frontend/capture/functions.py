"""A torch.autograd.Function of the user's is one op that calls it: its own backward would be lost if its
forward were traced through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from stagecut.frontend.capture.whole import OpWatch
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
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        for t in _SHOWN[key]
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
        plain = apply.__get__(None, cls)
        own = cls.__module__.startswith("torch.") and not cls.__module__.startswith(
            "torch.distributions."
        )
        if (
            own
            or get_proxy_mode() is None
            or torch._C._are_functorch_transforms_active()
        ):
            return plain(*args, **kwargs)
        flat, spec = tree_flatten((args, kwargs))
        if any(isinstance(item, nn.Module) or callable(item) for item in flat):
            notes.append(
                f"the gradient of {cls.__name__} is that of the ops in its forward, not its own backward: "
                f"{line()}"
            )
            # a grad mode inside says nothing, because the Function decides what its backward does
            with torch._C.DisableTorchFunction():
                return plain(*args, **kwargs)
        return _one_op(cls, plain, flat, spec)

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
        shown = _WITHOUT_META.get(func)
        if shown is None or get_proxy_mode() is None:
            return func(*args, **kwargs)
        flat, spec = tree_flatten((args, kwargs))
        return _one_op(func, func, flat, spec, shown)


def _ctc_loss(log_probs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    reduction = kwargs.get("reduction", args[4] if len(args) > 4 else "mean")
    return log_probs.new_empty(
        log_probs.shape[1:-1] if reduction in ("none", 0) else ()
    )


_WITHOUT_META = {torch.nn.functional.ctc_loss: _ctc_loss, torch.ctc_loss: _ctc_loss}
"""Such a function -> a stand-in for its result, right in size only."""


def _one_op(
    cls: Any,
    plain: Callable[..., Any],
    flat: list[Any],
    spec: Any,
    shown: Callable[..., Any] | None = None,
) -> Any:
    given = [item for item in flat if isinstance(item, torch.Tensor)]
    before = [tensor._version for tensor in given]
    args, kwargs = tree_unflatten(flat, spec)
    with (
        torch._C.DisableTorchFunction(),
        disable_proxy_modes_tracing(),
        torch.no_grad(),
        OpWatch() as watch,
    ):
        result = (shown or plain)(*args, **kwargs)
    out_flat, out_spec = tree_flatten(result)
    out = [item for item in out_flat if isinstance(item, torch.Tensor)]
    call = LeafCall(
        cls.__name__,
        flat,
        spec,
        out_flat,
        out_spec,
        views=shared_with(out, given),
        written_inputs=tuple(
            place
            for place, t in enumerate(given)
            if t._version != before[place] or storage_of(t) in watch.wrote
        ),
        random=watch.drew,
        function=plain,
    )
    key = f"{cls.__name__}#{next(_keys)}"
    _SHOWN[key] = out
    made = iter(
        torch.ops.stagecut.function(
            key, given, [item for item in flat if isinstance(item, SYMBOLIC)]
        )
    )
    del _SHOWN[key]
    tracer: Any = get_proxy_mode()
    node = next(
        n
        for n in reversed(tracer.tracer.graph.nodes)
        if n.target is torch.ops.stagecut.function.default
    )
    node.meta[CALL] = call
    return tree_unflatten(
        [next(made) if isinstance(item, torch.Tensor) else item for item in out_flat],
        out_spec,
    )
