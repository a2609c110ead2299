"""The objects that a program refers to outside itself: the model's own tensors, modules and functions, and
its calling convention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

EXTRA = "_extra_state"
"""The last part of the name under which torch stores what get_extra_state returns."""


@dataclass
class Bindings:
    """Real objects behind the names of a program.

    tensors: state name -> tensor, for every name. modules: path -> the user's module, kept for leaf ops.
    functions: `extern.NAME` -> the user's function. training: module path -> its `training` flag when
    captured. classes: module path -> class name. choices: path of a module by whose `training` Python chose
    in the trace -> where. branches: path of a module whose mode the stages cannot follow -> where and why.
    switches: module path -> mode -> the flags below it, where train() is the user's own. notes: what capture
    did. whole: path of a module that capture keeps whole by itself -> why. call: how user arguments become
    the flat list of inputs. sources: the files that ops name are this machine's, so that their lines may be
    shown. extras: module path -> what its get_extra_state returned, and where that stands. device: where the
    stages are made, None for where the model was traced.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    training: dict[str, bool] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    switches: dict[str, dict[bool, dict[str, bool]]] = field(default_factory=dict)
    extras: dict[str, tuple[Any, str]] = field(default_factory=dict)
    call: Any = None
    sources: bool = False
    device: Any = None
    notes: list[str] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The names of the model's state, extra state among it, in its order."""
        extras = [f"{path}.{EXTRA}".removeprefix(".") for path in self.extras]
        order = {
            path: place for place, path in enumerate(self.training if extras else ())
        }
        return sorted(
            [*self.tensors, *extras],
            key=lambda name: order.get(name.rpartition(".")[0], len(order)),
        )


def is_torchs(module: Any) -> bool:
    """True for a module whose code, with that of all modules in it, is torch's own. One run in each mode
    shows what such a module does.
    """
    return all(
        type(part).__module__.startswith("torch.nn.") for part in module.modules()
    )
