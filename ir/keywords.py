"""A public function refuses an argument of a name that it does not have, and lists the nearest names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import ParamSpec, TypeVar

from stagecut.ir.errors import InputError, nearest

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def near_names(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises InputError with the nearest names for an argument of a name that it does not
    have.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return function
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {each.name: None for each in parameters if each.kind in named}
    names.pop("self", None)
    title = function.__qualname__.removesuffix(".__init__")

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                raise InputError(
                    f"{title}() has no argument '{name}'", hint=nearest(name, names)
                )
        return function(*args, **kwargs)

    return checked


def near_names_in(cls: type[T]) -> type[T]:
    """The class, of which the constructor and all public methods have `near_names`."""
    for name, method in [*vars(cls).items()]:
        is_public = name == "__init__" or not name.startswith("_")
        if isinstance(method, FunctionType) and is_public:
            setattr(cls, name, near_names(method))
    return cls
