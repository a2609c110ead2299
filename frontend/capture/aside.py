"""Keeps torch's own work on the parameters of a model away from the modes that watch the code of the model.

torch.export looks at each parameter several times, before and after the trace: thousands of questions, each
of which would pass through all modes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import proxy_tensor
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves

_OUTSIDE = ("_fakify_params_buffers", "_produce_aten_artifact")
"""Functions of torch.export in which no code of the model runs."""

_PLAIN = frozenset((FakeTensor, bool, int, float, complex, str, type(None)))
"""Kinds of values of which torch asks no code of the user's."""


@contextmanager
def modes_aside() -> Iterator[None]:
    """While open, torch.export asks no mode that was opened since about parameters."""
    outer = len(_get_current_function_mode_stack())
    export: Any = importlib.import_module("torch.export._trace")
    track = proxy_tensor.track_tensor_tree

    def track_fakes(tree: Any, *args: Any, **kwargs: Any) -> Any:
        if any(type(leaf) not in _PLAIN for leaf in tree_leaves(tree)):
            return track(tree, *args, **kwargs)
        with torch._C.DisableTorchFunction():
            return track(tree, *args, **kwargs)

    make = proxy_tensor.PythonKeyTracer.create_node

    def create_node(own: Any, kind: str, *args: Any, **kwargs: Any) -> Any:
        if kind != "placeholder":
            return make(own, kind, *args, **kwargs)
        # a placeholder has no line, and torch forgets the one that it looks for
        with patch.object(own, "record_stack_traces", False):
            return make(own, kind, *args, **kwargs)

    with ExitStack() as patches:
        for name in _OUTSIDE:
            aside = _aside(getattr(export, name), outer)
            patches.enter_context(patch.object(export, name, aside))
        patches.enter_context(
            patch.object(proxy_tensor, "track_tensor_tree", track_fakes)
        )
        patches.enter_context(
            patch.object(proxy_tensor.PythonKeyTracer, "create_node", create_node)
        )
        yield


def _aside(run: Callable[..., Any], outer: int) -> Callable[..., Any]:
    """The function, run without the modes above so many."""

    def without_modes(*args: Any, **kwargs: Any) -> Any:
        inner = len(_get_current_function_mode_stack()) - outer
        modes = [_pop_mode() for _ in range(inner)]
        try:
            return run(*args, **kwargs)
        finally:
            for mode in reversed(modes):
                _push_mode(mode)

    return without_modes
