"""A pipe under the model's own names: the module tree, the tensors and the state dict of the model, over all
stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from stagecut.backend.stages.modules import (
    UNSEEN_LAYERS,
    Stage,
    layers,
    stored,
    submodule,
    unknown,
)
from stagecut.ir.blame import drop_our_steps
from stagecut.ir.errors import StagecutError, UnknownNameError


class Everywhere(MutableMapping[str, Any]):
    """A dict of several modules as one. A value that is put in is put into each module that has the name.

    kind: `_parameters`, `_buffers` or `_modules`.
    """

    def __init__(self, modules: Sequence[nn.Module], kind: str) -> None:
        self._parts, self._kind = modules, kind

    def _places(self) -> Iterator[dict[str, Any]]:
        return (
            getattr(layer, self._kind)
            for module in self._parts
            for layer in layers(module)
        )

    def __getitem__(self, name: str) -> Any:
        owned = [place[name] for place in self._places() if name in place]
        if not owned:
            raise KeyError(name)
        return joined(owned) if self._kind == "_modules" else owned[0]

    def __setitem__(self, name: str, value: Any) -> None:
        places = [place for place in self._places() if name in place]
        if not places:
            raise UnknownNameError(
                f"the model has no '{name}' here",
                hint="put it into a stage: pipe.stages[i]",
            )
        for place in places:
            place[name] = value

    def __delitem__(self, name: str) -> None:
        for place in self._places():
            place.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        names = dict.fromkeys(chain.from_iterable(self._places()))
        return (name for name in names if name not in UNSEEN_LAYERS)

    def __len__(self) -> int:
        return len(list(iter(self)))


KINDS = ("_parameters", "_buffers", "_modules")


class Parts(nn.Module):
    """A module of which each of several modules has a part. Switching and loading act on the parts."""

    _parts: Sequence[nn.Module]

    def train(self, mode: bool = True) -> Any:
        """Every part is in train mode, or with `mode=False` in eval mode."""
        for part in self._parts:
            part.train(mode)
        self.training = mode
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """torch calls this on a module inside another one. A key is unexpected if none of the parts expects
        it.
        """
        missing: list[str] = []
        unexpected: list[list[str]] = [[] for _ in self._parts]
        for part, names in zip(self._parts, unexpected, strict=True):
            part._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, names, error_msgs
            )
        missing_keys += dict.fromkeys(missing)
        unexpected_keys += [
            name for name in unexpected[0] if all(name in names for names in unexpected)
        ]


class Joined(Parts):
    """A module of the model of which several stages have a part. The parts run; this module does not."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self._parts = parts
        self.training = parts[0].training
        self._non_persistent_buffers_set = {
            name for part in parts for name in part._non_persistent_buffers_set
        }
        self.__dict__.update({kind: Everywhere(parts, kind) for kind in KINDS})

    def _get_name(self) -> str:
        return str(self._parts[0]._get_name())

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise StagecutError(
            "several stages have a part of this module, and it does not run as a whole",
            hint="take the part of a stage",
        )

    forward = register_forward_hook = register_forward_pre_hook = _refuse
    register_full_backward_hook = register_full_backward_pre_hook = (
        register_backward_hook
    ) = _refuse


def joined(parts: Sequence[nn.Module]) -> nn.Module:
    """The one module that is there, or its parts in several stages as one module."""
    distinct = list(dict.fromkeys(parts))
    return distinct[0] if len(distinct) == 1 else Joined(distinct)


class Named(Parts):
    """A module made of stages that has the module tree and the names of the model.

    Where a name of the model is also one of ours, such as `stages`, the attribute is ours; a method that
    takes a name finds the model's.
    """

    _parts: Sequence[Stage]
    _names: dict[str, None]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch. What it raises as a StagecutError has no steps of ours in its traceback."""
        try:
            return super().__call__(*args, **kwargs)
        except StagecutError as error:
            drop_our_steps(error)
            raise

    def _name(self, stages: list[Stage], names: Iterable[str]) -> None:
        """From here on its tree is that of these stages, and `names` are the model's names, in its order."""
        self._parts, self._names = stages, dict.fromkeys(names)
        self.__dict__.update({kind: Everywhere(stages, kind) for kind in KINDS})

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for stage in self._parts:
            stage._apply(fn, recurse)
        return self

    def get_submodule(self, target: str) -> nn.Module:
        """The module at `target`, a path of the model: from the one stage that has it, or its parts in
        several stages as one module.
        """
        return submodule(self, target)

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter that the model calls `target`. Raises AttributeError when there is none."""
        parameter: nn.Parameter = self._tensor("_parameters", target)
        return parameter

    def get_buffer(self, target: str) -> torch.Tensor:
        """The buffer that the model calls `target`. Raises AttributeError when there is none."""
        buffer: torch.Tensor = self._tensor("_buffers", target)
        return buffer

    def _tensor(self, kind: str, target: str) -> Any:
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        places = (getattr(layer, kind) for layer in layers(module))
        tensor = next((place[name] for place in places if name in place), None)
        if tensor is None:
            raise unknown(module, kind.strip("_")[:-1], target)
        return tensor

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters under the model's names, in its order. The arguments are those of
        torch's modules.
        """
        yield from self._named(
            (stage.named_parameters("", recurse, False) for stage in self._parts),
            prefix,
            remove_duplicate,
        )

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's buffers under the model's names, in its order. The arguments are those of torch's
        modules.
        """
        yield from self._named(
            (stage.named_buffers("", recurse, False) for stage in self._parts),
            prefix,
            remove_duplicate,
        )

    def _named(
        self,
        streams: Iterable[Iterator[tuple[str, Any]]],
        prefix: str,
        remove_duplicate: bool,
    ) -> Iterator[tuple[str, Any]]:
        """Named tensors of all stages in the model's order. With duplicates removed, a tied tensor has its
        first name only.
        """
        tensors = dict(chain.from_iterable(streams))
        shown: set[int] = set()
        for name in dict.fromkeys([*self._names, *tensors]):
            tensor = tensors.get(name)
            if tensor is None or (remove_duplicate and id(tensor) in shown):
                continue
            shown.add(id(tensor))
            yield f"{prefix}.{name}" if prefix else name, tensor

    def state_dict(  # type: ignore[override]
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The model's state dict: the same names in the same order, whatever stage has a tensor.
        `destination`, `prefix` and `keep_vars` are torch's.
        """
        merged: dict[str, Any] = {}
        for stage in self._parts:
            merged |= stage.state_dict(prefix=prefix, keep_vars=keep_vars)
        names = [prefix + stored(name) for name in self._names]
        ordered = {name: merged.pop(name) for name in names if name in merged} | merged
        if destination is None:
            return ordered
        destination.update(ordered)
        return destination  # type: ignore[no-any-return]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """The stages have the values of `state_dict`, one of the unsplit model. `strict` and `assign` are
        torch's, and so is the result. Raises RuntimeError, with `strict`, for names that are missing or not
        the model's.
        """
        own = self.state_dict()
        missing = [name for name in own if name not in state_dict]
        unexpected = [name for name in state_dict if name not in own]
        if strict and (missing or unexpected):
            raise RuntimeError(
                f"Error(s) in loading state_dict for Pipe: missing keys {missing}, unexpected keys "
                f"{unexpected}"
            )
        for stage in self._parts:
            names = stage.state_dict()
            stage.load_state_dict(
                {name: state_dict[name] for name in state_dict if name in names},
                strict=False,
                assign=assign,
            )
        return nn.modules.module._IncompatibleKeys(missing, unexpected)
