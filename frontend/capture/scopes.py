"""Calls of modules that a tracer gives no name or a wrong one: `m.forward(x)`, and `layers[1:3]` in a model
that shares modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import FunctionType
from typing import Any
from unittest.mock import patch

from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.fx.experimental import proxy_tensor

_calling: list[int] = []
"""The modules that are being called in a trace, outermost first, each by the id of its dict. A tracer puts
other objects in front of a module, but all of them have its dict.
"""


@contextmanager
def scopes(module: nn.Module) -> Iterator[None]:
    """While open, a tracer records these calls under the model's paths.

    `m.forward(x)` of a module in `module` counts as a call of m, unless m has hooks: a call would run them.
    """
    tracer: Any = proxy_tensor._ModuleStackTracer
    run = tracer.call_module

    def call_module(self: Any, owner: nn.Module, *call: Any) -> Any:
        _calling.append(id(vars(owner)))
        try:
            return run(self, owner, *call)
        finally:
            _calling.pop()

    with ExitStack() as stack:
        stack.enter_context(patch.object(tracer, "call_module", call_module))
        stack.enter_context(
            patch.object(tracer, "path_of_module", _unsliced(tracer.path_of_module))
        )
        for cls in _classes_with_forward(module):
            stack.enter_context(
                patch.object(cls, "forward", _as_call(vars(cls)["forward"]))
            )
        yield


def goes_past_call(module: nn.Module) -> bool:
    """True where `module`, whose forward runs now in a trace, was not called, and a call would run more than
    its forward.
    """
    has_call = any(
        "__call__" in vars(cls)
        for cls in type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    )
    return id(vars(module)) not in _calling[-1:] and (_has_hooks(module) or has_call)


def _as_call(forward: FunctionType) -> Callable[..., Any]:
    @wraps(forward)
    def as_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Dynamo traces the code in a region, and must not see the code below
        if is_dynamo_compiling():
            return forward(self, *args, **kwargs)
        asks_a_base = type(self).forward is not as_call
        if asks_a_base or id(vars(self)) in _calling[-1:] or _has_hooks(self):
            return forward(self, *args, **kwargs)
        # not a __call__ of the class, which may have called forward
        return nn.Module.__call__(self, *args, **kwargs)

    return as_call


def _classes_with_forward(module: nn.Module) -> list[type]:
    """The classes, bases among them, that define a forward of a module."""
    classes: dict[type, None] = {}
    for owner in module.modules():
        classes |= dict.fromkeys(type(owner).__mro__)
    classes.pop(nn.Module, None)
    return [
        cls for cls in classes if isinstance(vars(cls).get("forward"), FunctionType)
    ]


def _has_hooks(module: nn.Module) -> bool:
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


_SLICE = re.compile(r"slice\((None|-?\d+), (None|-?\d+), (None|-?\d+)\)")


def _unsliced(path_of_module: Callable[..., str]) -> Callable[..., str]:
    """`path_of_module` of a tracer, with the model's path for a part of a slice. The slice itself is no
    module of the model.
    """

    def path_in_model(tracer: Any, module: nn.Module) -> str:
        path = path_of_module(tracer, module)
        return (
            _resolved(tracer.scope_root, path.split(".")) if "slice(" in path else path
        )

    return path_in_model


def _resolved(root: nn.Module, parts: list[str]) -> str:
    """The path in the model: a list counts its parts anew in a slice, a Sequential does not."""
    owner, rest = root, None
    resolved: list[str] = []
    for part in parts:
        match = _SLICE.fullmatch(part)
        if match:
            bounds = [None if text == "None" else int(text) for text in match.groups()]
            chosen = slice(*bounds)
            rest = (list(owner._modules) if rest is None else rest)[chosen]
            continue
        resolved.append(
            rest[int(part)]
            if rest is not None and isinstance(owner, nn.ModuleList)
            else part
        )
        owner, rest = owner.get_submodule(resolved[-1]), None
    if rest is not None:
        raise proxy_tensor._ModuleNotInstalledAsSubmoduleError
    return ".".join(resolved)
