"""A pipe that looks like the model that was cut, for code that asks a model what it is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import nn

from stagecut.backend.stages.names import Named
from stagecut.backend.stages.staged import Staged
from stagecut.frontend.watch.attributes import SIMPLE, content_of
from stagecut.ir.run.call import NO_NAMES


class PipedModel(Named):
    """A pipe with the model's own signature: same arguments, same output structure, same state names. Made by
    `Pipe.module`.

    pipe: the pipe, with which it shares the stages. data: attributes of the model's that are data, such as
    its config; they are attributes of this module.

    Its class is one of its own, because some code asks a class for the signature.
    """

    _pipe: Staged

    def __init__(self, pipe: Staged, data: Mapping[str, Any] = NO_NAMES) -> None:
        super().__init__()
        # no child: the children are the model's modules
        object.__setattr__(self, "_pipe", pipe)
        self._name(pipe.stages, pipe._names)
        self.training = pipe.training
        ours = {*dir(self), *vars(self)}
        self.__dict__.update({n: value for n, value in data.items() if n not in ours})
        self._take_class()

    def _take_class(self) -> None:
        """From here on its class has the signature of the model's forward."""
        spec = self._pipe._call_spec
        if spec is None:
            return

        def forward(self: PipedModel, *args: Any, **kwargs: Any) -> Any:
            return PipedModel.forward(self, *args, **kwargs)

        name = "self_"
        while name in spec.signature.parameters:
            name += "_"
        itself = inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
        parameters = [itself, *spec.signature.parameters.values()]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        members = {"forward": forward, "__module__": PipedModel.__module__}
        name = f"Piped{self._pipe.program.name}"
        # the model may have a module of this name
        object.__setattr__(self, "__class__", type(name, (PipedModel,), members))

    @property
    def device(self) -> torch.device:
        """The device of its first real tensor; meta where no tensor is real, cpu where it has none."""
        tensors = [*self.parameters(), *self.buffers()]
        real = [tensor for tensor in tensors if not tensor.is_meta]
        return next((t.device for t in (*real, *tensors)), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its first parameter or buffer of floats; torch's default dtype without one."""
        tensors = (*self.parameters(), *self.buffers())
        floats = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
        return next(floats, torch.get_default_dtype())

    def train(self, mode: bool = True) -> PipedModel:
        """The pipe and this module are in train mode, or with `mode=False` in eval mode. As `Pipe.train`."""
        self._pipe.train(mode)
        self.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs all stages one after the other. Takes and returns what the model's forward does."""
        flat = self._pipe.flat_outputs(args, kwargs)
        spec = self._pipe._call_spec
        return spec.unflatten(flat, args, kwargs) if spec is not None else flat

    def _get_name(self) -> str:
        return self._pipe.program.name

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a class that was made here cannot be found by its name
        return PipedModel.__new__, (PipedModel,), self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take_class()


def data_of(model: nn.Module) -> dict[str, Any]:
    """The public attributes of a model, and of its class, that are data: numbers, texts, containers and
    objects of these, such as a config. Tensors, modules and functions are none, nor what holds any.
    """
    found: dict[str, Any] = {}
    for cls in reversed(type(model).__mro__):
        if not issubclass(nn.Module, cls):
            found |= vars(cls)
    # a descriptor in a class is no value of the model's
    found = {n: v for n, v in found.items() if not hasattr(type(v), "__get__")}
    found |= vars(model)
    return {
        name: value
        for name, value in found.items()
        if not name.startswith("_") and name != "training" and _is_data(value)
    }


def _is_data(root: Any) -> bool:
    seen: set[int] = set()
    todo = [root]
    while todo:
        part = todo.pop()
        if isinstance(part, (*SIMPLE, Enum, torch.dtype, torch.device)):
            continue
        content = content_of(part)
        if content is None:
            return False
        if id(content) in seen:
            continue
        seen.add(id(content))
        if isinstance(content, dict):
            todo += [*content.keys(), *content.values()]
        elif isinstance(content, list | tuple | set):
            todo += content
        # else it is an array of numbers
    return True
