"""Rewrites calls that a tracer does not see into calls that it sees, while `visible()` is open."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.checkpoint
from torch._dynamo import _trace_wrapped_higher_order_op
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import has_side_effect
from torch.overrides import TorchFunctionMode

from stagecut.frontend.capture.draws import KnownDraws
from stagecut.frontend.source import shown, user_line
from stagecut.frontend.watch.forbidden import KEEP_WHOLE, Untraceable
from stagecut.ir.errors import CaptureError

torch.library.define(
    "stagecut::checkpoint", "(int number, bool begins, bool preserve_rng_state) -> ()"
)


@torch.library.impl("stagecut::checkpoint", "BackendSelect")
def _checkpoint(number: int, begins: bool, preserve_rng_state: bool) -> None:
    return None


@torch.library.register_fake("stagecut::checkpoint")
def _checkpoint_fake(number: int, begins: bool, preserve_rng_state: bool) -> None:
    return None


has_side_effect(torch.ops.stagecut.checkpoint.default)


@contextmanager
def visible() -> Iterator[None]:
    """inference_mode is recorded as no_grad, `tensor.data` as an op, a checkpointed region as ops where it
    begins and ends.

    Distributions do not validate what they are given, which would branch on values; an argument
    `validate_args=True` still does. Indices in the function of a mask are an op, and no call of a Function of
    torch's that a graph would hold by name.
    """
    unchecked = patch.object(torch.distributions.Distribution, "_validate_args", False)
    indexed = patch.object(_trace_wrapped_higher_order_op, "mod_index", _index)
    recorded = _DataAsOp()
    with (
        _inference_mode_as_no_grad(),
        recorded,
        KnownDraws(),
        _checkpoints_marked(),
        unchecked,
        indexed,
    ):
        try:
            yield
        except RuntimeError as error:
            if (
                "fake tensor in the exported program constant" not in str(error)
                or not recorded.differentiated
            ):
                raise
            raise CaptureError(
                "forward computes gradients, which cannot be traced through this model",
                where=recorded.differentiated,
                hint=(
                    "compute them outside of the model; or keep the submodule that does it whole: "
                    "leaf_modules=[...]"
                ),
            ) from error


def _index(tensor: torch.Tensor, indices: list[torch.Tensor]) -> torch.Tensor:
    picked: torch.Tensor = torch.ops.aten.index.Tensor(tensor, indices)
    return picked


@contextmanager
def _inference_mode_as_no_grad() -> Iterator[None]:
    """inference_mode, which the tracer loses, becomes no_grad, which computes the same and is recorded."""
    cls: Any = torch.inference_mode
    enter, leave = cls.__enter__, cls.__exit__

    def start(self: Any) -> None:
        self._stagecut_before = torch.is_grad_enabled()
        if self.mode:
            torch.set_grad_enabled(False)

    def stop(self: Any, *_: Any) -> None:
        torch.set_grad_enabled(self._stagecut_before)

    cls.__enter__, cls.__exit__ = start, stop
    try:
        yield
    finally:
        cls.__enter__, cls.__exit__ = enter, leave


def _into_out(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of `func`, written into `out=`. Raises Untraceable where torch would resize `out`: a trace
    knows only the size that `out` had.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "error", message="An output with one or more elements was resized"
            )
            return func(*args, **kwargs)
    except UserWarning:
        raise Untraceable(
            "an operation writes its result to out=, a tensor of another size, which torch would resize",
            "give out= a tensor of the size of the result, or assign the result: x[:] = ...",
        ) from None


_OF_NUMBERS = (torch.tensor, torch.as_tensor)
"""Functions that make tensors of Python's numbers."""


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


_GRADIENTS = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)


class _DataAsOp(TorchFunctionMode):
    """Records `tensor.data` as the op `aten.data`, because the tracer would take it for a constant. A use
    that cannot be recorded is an error.

    differentiated: the user's line that first asked for gradients, '' for none.
    """

    differentiated = ""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _GRADIENTS:
            self.differentiated = self.differentiated or shown(user_line())
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return torch.ops.aten.data.default(args[0])
        # Dynamo of torch 2.11 traces this for torch.cond, and knows no bool(args)
        if func == torch.Tensor.data.__set__ and isinstance(args[0], FakeTensor):  # type: ignore[attr-defined]
            _refuse_other_data(*args)
            return None  # `tensor.data += 1` ends by assigning the tensor that it wrote in place
        if func in _OF_NUMBERS and _is_meta(kwargs.get("device")):
            # a tensor made on meta would lose its numbers
            return func(
                *args,
                **kwargs | {"device": "cpu"},
            ).to(kwargs["device"])
        if kwargs.get("out") is not None:
            return _into_out(func, args, kwargs)
        return func(*args, **kwargs)


def _refuse_other_data(tensor: torch.Tensor, new: torch.Tensor) -> None:
    """Raises Untraceable where `new` does not lie in the memory of `tensor`, or has another shape."""
    if (
        new.untyped_storage()._cdata != tensor.untyped_storage()._cdata
        or new.shape != tensor.shape
    ):
        raise Untraceable(
            "the .data of a tensor is replaced",
            "write into the tensor under torch.no_grad(), as in tensor.copy_(new), "
            + KEEP_WHOLE,
        )


_AROUND = (
    "_checkpoint_without_reentrant_generator_impl",
    "_checkpoint_without_reentrant_generator",
)
"""The generator of torch's around a checkpointed region: its name since torch 2.14, and before."""


@contextmanager
def _checkpoints_marked() -> Iterator[None]:
    """torch.utils.checkpoint runs its function plainly, between two marks."""
    module = torch.utils.checkpoint
    around = next(name for name in _AROUND if hasattr(module, name))
    signature = inspect.signature(getattr(module, around))
    numbers = count()

    def region(preserve_rng_state: bool) -> Iterator[None]:
        number = next(numbers)
        torch.ops.stagecut.checkpoint(number, True, preserve_rng_state)
        yield
        torch.ops.stagecut.checkpoint(number, False, preserve_rng_state)

    def marked(*args: Any, **kwargs: Any) -> Iterator[None]:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        if call.arguments["context_fn"] not in (None, module.noop_context_fn):
            what = "a checkpoint's context_fn is not kept: the stages compute all of the region again"
            warnings.warn_explicit(what, UserWarning, *user_line()[:2])
        return region(call.arguments["preserve_rng_state"])

    class Reentrant:
        @staticmethod
        def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
            marks = region(preserve_rng_state)
            next(marks)
            result = function(*args)
            next(marks, None)
            return result

    with (
        patch.object(module, around, marked),
        patch.object(module, "CheckpointFunction", Reentrant),
    ):
        yield
