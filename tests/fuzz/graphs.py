"""Models as fx graphs: a symbolic trace that also records what `x[i] = y` and the switches of the grad mode do."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode


class _Proxy(fx.Proxy):
    def __setitem__(self, key: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, item), {})


class _Tracer(fx.Tracer):
    """Modules at the paths `whole` are one node each, as those of torch.nn are."""

    proxy_buffer_attributes = True

    def __init__(self, whole: tuple[str, ...]) -> None:
        super().__init__()
        self._whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self._whole or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Switches(TorchFunctionMode):
    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            self._tracer.create_node("call_function", func, args, {})
        return func(*args, **(kwargs or {}))


def symbolic(model: nn.Module, whole: tuple[str, ...] = ()) -> fx.GraphModule:
    """The graph of a model. What no graph has, such as a branch on a value, raises; a write that no operand shows is done to the model."""
    tracer = _Tracer(whole)
    with _Switches(tracer):
        graph = tracer.trace(model)
    if any(isinstance(buffer, fx.Proxy) for buffer in model.buffers()):
        raise TypeError("a buffer is given another tensor, which no graph shows")
    return fx.GraphModule(model, graph, type(model).__name__)
