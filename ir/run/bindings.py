"""The objects that a program refers to outside itself: the model's own tensors, modules and functions, and
its calling convention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stagecut.ir.run.remembered import Remembered

EXTRA = "_extra_state"
"""The last part of the name under which torch stores what get_extra_state returns."""


@dataclass(frozen=True)
class ModuleFacts:
    """The facts about one module of the model that a stage needs to stand for it.

    kind: the name of its class. training: its flag when captured. branch: where, and why, the stages cannot
    follow its mode; '' where they can. switches: mode -> the flags below it, where train() is the user's own.
    extra: what its get_extra_state returned, and where that stands. described: what its extra_repr returned.
    """

    kind: str = "Module"
    training: bool = True
    branch: str = ""
    switches: Mapping[bool, Mapping[str, bool]] = field(default_factory=dict)
    extra: tuple[Any, str] | None = None
    described: str = ""


@dataclass
class Bindings:
    """Real objects behind the names of a program.

    tensors: state name -> tensor, for every name. modules: path -> the user's module, kept for leaf ops.
    functions: `extern.NAME` -> the user's function. facts: module path -> its facts. choices: path of a
    module by whose `training` Python chose in the trace -> where. notes: what capture did. whole: path of a
    module that capture keeps whole by itself -> why. call: how user arguments become the flat list of inputs.
    sources: the files that ops name are this machine's, so that their lines may be shown. device: where the
    stages are made, None for where the model was traced. attributes_read: those of the model on which the
    program depends.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    facts: dict[str, ModuleFacts] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    call: Any = None
    sources: bool = False
    device: Any = None
    notes: list[str] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)
    attributes_read: list[Remembered] = field(default_factory=list)

    @property
    def training(self) -> bool:
        """The mode of the model when it was captured."""
        return self.facts[""].training if "" in self.facts else True

    @property
    def branches(self) -> dict[str, str]:
        """Path of each module whose mode the stages cannot follow -> where, and why."""
        return {
            path: facts.branch for path, facts in self.facts.items() if facts.branch
        }

    @property
    def extras(self) -> list[str]:
        """The paths of the modules that have extra state."""
        return [path for path, facts in self.facts.items() if facts.extra is not None]

    def facts_of(self, path: str) -> ModuleFacts:
        """The facts of the module at a path. One that is not known has the mode of the model."""
        return self.facts.get(path) or ModuleFacts(training=self.training)

    def flag(self, path: str) -> bool | None:
        """The `training` flag of a module when it was captured; None for a module that is not known."""
        return self.facts[path].training if path in self.facts else None

    def learn(self, path: str, **facts: Any) -> None:
        """`facts` hold for the module at `path` from here on, beside those known before."""
        self.facts[path] = replace(self.facts_of(path), **facts)

    def names(self) -> list[str]:
        """The names of the model's state, extra state among it, in its order."""
        extras = [f"{path}.{EXTRA}".removeprefix(".") for path in self.extras]
        order = {path: place for place, path in enumerate(self.facts if extras else ())}
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
