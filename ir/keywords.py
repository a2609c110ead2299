"""A public function refuses an argument of a name that it does not have, and lists the nearest names. Its
errors have short tracebacks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import wraps
from pathlib import Path
from types import FunctionType
from typing import ParamSpec, TypeVar

from stagecut.ir.blame import drop_our_steps
from stagecut.ir.errors import InputError, StagecutError, nearest

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def near_names(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises InputError with the nearest names for an argument of a name that it does not
    have. What it raises as a StagecutError has no steps of ours in its traceback.
    """
    return _public(function, {})


def near_names_or(
    elsewhere: Mapping[str, str],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """As `near_names`; of an argument that belongs `elsewhere`, the error says where: name -> the hint."""
    return lambda function: _public(function, elsewhere)


def _public(function: Callable[P, R], elsewhere: Mapping[str, str]) -> Callable[P, R]:
    signature = inspect.signature(function)
    names = names_taken(signature)
    most = _most_by_position(signature)
    title = function.__qualname__.removesuffix(".__init__")

    @wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        if names is not None:
            refuse_unknown(f"{title}()", names, kwargs, elsewhere)
        if most is not None and len(args) > most:
            raise _too_many(title, signature, args[most])
        return function(*args, **kwargs)

    return short_errors(named)


def _most_by_position(signature: inspect.Signature) -> int | None:
    """How many arguments can be given by position, `self` among them; None for any number."""
    kinds = [each.kind for each in signature.parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    return len(kinds) - sum(kind in _BY_NAME for kind in kinds)


_BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)


def _too_many(title: str, signature: inspect.Signature, more: object) -> InputError:
    """The error for `more` arguments by position than a function takes."""
    parameters = signature.parameters.values()
    taken = [each.name for each in parameters if each.kind not in _BY_NAME]
    named = [f"{each.name}=" for each in parameters if each.kind in _BY_NAME[:1]]
    taken = [name for name in taken if name != "self"]
    hint = f"by name: {', '.join(named)}" if named else ""
    if signature.return_annotation in ("str", str) and isinstance(more, str | Path):
        hint = f"it returns text: Path({str(more)!r}).write_text(...)"
    shown = " ".join(repr(more).split())
    return InputError(
        f"{title}() takes {', '.join(taken) or 'nothing'} by position, and was given {shown:.60} besides",
        hint=hint,
    )


def short_errors(function: Callable[P, R]) -> Callable[P, R]:
    """The function. What it raises as a StagecutError has no steps of ours in its traceback."""

    @wraps(function)
    def short(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except StagecutError as error:
            drop_our_steps(error)
            raise

    return short


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def names_taken(signature: inspect.Signature) -> list[str] | None:
    """The names by which arguments can be given, None for any."""
    parameters = signature.parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    named = [each.name for each in parameters if each.kind in _NAMED]
    return [name for name in named if name != "self"]


def refuse_unknown(
    title: str,
    names: Collection[str],
    given: Iterable[str],
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Returns when all names that are given are among those that there are. Raises InputError with what says
    it `elsewhere`, or the nearest ones, otherwise.
    """
    for name in given:
        if name in names:
            continue
        hint = (elsewhere or {}).get(name)
        raise InputError(
            f"{title} has no argument '{name}'",
            hint=hint or nearest(str(name), names),
        )


def near_names_in(cls: type[T]) -> type[T]:
    """The class, of which the constructor and all public methods have `near_names`."""
    for name, method in [*vars(cls).items()]:
        is_public = name == "__init__" or not name.startswith("_")
        if isinstance(method, FunctionType) and is_public:
            setattr(cls, name, near_names(method))
    return cls
