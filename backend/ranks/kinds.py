"""Arguments of the wrong kind: each is refused by its name, with what to write in its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist
from torch.amp.grad_scaler import GradScaler

from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import InputError, wrong_kind

Accepts = Callable[[Any], bool]

_OPTIONS: Mapping[str, tuple[Accepts, str]] = {
    "schedule": (
        lambda value: isinstance(value, str),
        'its name, in front of the number of micro-batches: Driver(pipe, "1F1B", 8, loss_fn)',
    ),
    "loss_fn": (
        lambda value: value is None or callable(value),
        "loss_fn=a function of the output and the target, or None",
    ),
    "group": (
        lambda value: value is None or _is_group(value),
        'group=a process group, such as mesh.get_group("pipe"), or None for all ranks',
    ),
    "wrap": (
        lambda value: value is None or callable(value),
        "wrap=a function of a stage's module and its index, which returns a module",
    ),
    "normalize_by": (
        lambda value: value is None or isinstance(value, str),
        'normalize_by="tokens", the name of a metric that loss_fn returns',
    ),
    "seed": (
        lambda value: value is None or isinstance(value, Integral),
        "seed=a whole number, or None",
    ),
    "compare_steps": (
        lambda value: isinstance(value, Integral),
        "compare_steps=a whole number, 0 for never",
    ),
    "args_chunk_spec": (
        lambda value: value is None or _is_list(value),
        "args_chunk_spec=(TensorChunkSpec(0),), with a spec for each positional argument",
    ),
    "kwargs_chunk_spec": (
        lambda value: value is None or isinstance(value, Mapping),
        'kwargs_chunk_spec={"mask": TensorChunkSpec(0)}, with a spec for each name',
    ),
    "schedule_kwargs": (
        lambda value: value is None or isinstance(value, Mapping),
        'schedule_kwargs={"defer_pp_recv": True}, for the schedule of torch',
    ),
    "order": (
        lambda value: value is None or isinstance(value, tuple),
        "order=pipe.plan.order",
    ),
    "optimizer": (
        lambda value: hasattr(value, "register_step_pre_hook"),
        "an optimizer of torch or None; of several, driver.attach(each)",
    ),
    "scaler": (
        lambda value: isinstance(value, GradScaler),
        'driver.attach_scaler(torch.amp.GradScaler("cuda"))',
    ),
    "max_norm": (
        lambda value: isinstance(value, Real | torch.Tensor),
        "driver.clip_grad_norm_(1.0), which knows the parameters",
    ),
    "clip_value": (
        lambda value: isinstance(value, Real | torch.Tensor),
        "driver.clip_grad_value_(1.0), which knows the parameters",
    ),
    "loss_kwargs": (
        lambda value: value is None or isinstance(value, Mapping),
        'loss_kwargs={"smoothing": 0.1}, by the names that loss_fn has',
    ),
}
"""Argument of a Driver or of one of its methods -> whether a value may be given for it, and what to write."""


def refuse_wrong_options(pipe: object, loss_fn: object, **given: Any) -> None:
    """Returns when these arguments of the constructor are of kinds that it takes. Raises InputError
    otherwise.
    """
    _refuse_no_pipe(pipe)
    refuse_wrong_kinds(**given, loss_fn=loss_fn)
    _refuse_class(loss_fn)
    _refuse_other_call(given["wrap"])


def refuse_wrong_kinds(**given: Any) -> None:
    """Returns when each argument is of a kind that it takes. Raises InputError otherwise."""
    for name, value in given.items():
        accepts, hint = _OPTIONS[name]
        if not accepts(value):
            raise InputError(wrong_kind(name, value), hint=hint)


def _refuse_no_pipe(pipe: object) -> None:
    """Returns when it is a pipe. Raises InputError otherwise."""
    if isinstance(pipe, Staged):
        return
    raise InputError(
        f"a Driver runs a pipe, and was given a {type(pipe).__name__}",
        hint="pipe = pipeline(model, (example,), stages=2); Driver(pipe, ...)",
    )


def _refuse_class(loss_fn: object) -> None:
    """Returns unless a class of losses is given in the place of one of its objects."""
    if isinstance(loss_fn, type) and issubclass(loss_fn, torch.nn.Module):
        name = loss_fn.__name__
        raise InputError(
            f"loss_fn is the class {name}", hint=f"loss_fn={name}(), an object of it"
        )


def _refuse_other_call(wrap: Any) -> None:
    """Returns when `wrap` can be called with a module and an index. Raises InputError otherwise."""
    if wrap is None:
        return
    try:
        signature = inspect.signature(wrap)
    except ValueError:  # of code that is not Python's
        return
    try:
        signature.bind(torch.nn.Identity(), 0)
    except TypeError:
        name = getattr(wrap, "__qualname__", type(wrap).__name__)
        raise InputError(
            f"wrap is called as wrap(module, index), and {name} takes {signature}",
            hint="wrap=a function of a stage's module and its index, which returns a module",
        ) from None


def device_of(device: torch.device | str) -> torch.device:
    """The device that is meant. Raises InputError for what is none, and for a GPU that is not there."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(
            f"device={device!r:.60} is no device",
            hint='device="cuda:0", "cpu", or a torch.device',
        ) from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device={str(found)!r}, and torch finds {torch.cuda.device_count()} GPUs here",
            hint='device="cpu", or a machine and a build of torch with CUDA',
        )
    return found


def norm_order(norm_type: Any) -> float:
    """The order of a norm as a number. Raises InputError for what is none."""
    try:
        return float(norm_type)
    except (TypeError, ValueError):
        raise InputError(
            f"norm_type={norm_type!r:.60} is no number",
            hint='norm_type=2.0, or "inf" for the largest',
        ) from None


def _is_group(value: object) -> bool:
    return (
        isinstance(value, dist.ProcessGroup)
        or value is dist.GroupMember.NON_GROUP_MEMBER
    )


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
