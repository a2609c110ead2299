"""`help()` of every public name: a docstring of its own that begins with its subject and names every parameter."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cached_property
from types import ModuleType
from typing import Any

import pytest

import stagecut
from stagecut.backend.costs.record import Recording
from stagecut.backend.costs.report import Report as StageCosts
from stagecut.backend.pictures.summary import Summary

RESULTS = {"record(...)": Recording, "pipe.report()": StageCosts, "pipe.summary()": Summary}
"""Classes of what public functions return, which have no public name."""


def is_ours(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] == "stagecut"


def function_of(member: Any) -> Any:
    """The function behind a method or a property; None for other members of a class."""
    if isinstance(member, staticmethod | classmethod):
        return member.__func__
    if isinstance(member, property):
        return member.fget
    if isinstance(member, cached_property):
        return member.func
    return member if inspect.isfunction(member) else None


def members(name: str, cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties of a class, those of our base classes too, each as it is overridden last."""
    parts: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if is_ours(base):
            parts |= {key: function_of(part) for key, part in vars(base).items() if not key.startswith("_")}
    yield from ((f"{name}.{key}", part) for key, part in parts.items() if part is not None)


def public() -> Iterator[tuple[str, Any]]:
    """Every public name of ours, every public name in it, and what it stands for."""
    ours = {name: getattr(stagecut, name) for name in stagecut.__all__}
    for name, value in (ours | RESULTS).items():
        if isinstance(value, ModuleType):
            yield name, value
            yield from ((f"{name}.{key}", getattr(value, key)) for key in value.__all__)
        elif is_ours(value):
            yield name, value
            if isinstance(value, type):
                yield from members(name, value)


PUBLIC = dict(public())


def test_the_list_has_what_people_use() -> None:
    names = {"pipeline", "Pipe.verify", "Pipe.train", "Driver.step", "Driver.modules", "Driver.is_last", "Plan.bottleneck", "InputError"}
    names |= {"checkpoint", "checkpoint.save_adapter", "Stage.forward", "pipe.report().to_svg", "record(...).timeline", "StepLosses"}
    assert names <= {*PUBLIC}
    assert len(PUBLIC) > 150


def faults_of(doc: str | None) -> list[str]:
    """Why a docstring reads badly."""
    if not doc or not doc.strip():
        return ["it has no docstring"]
    first, *rest = doc.strip().partition("\n\n")
    faults: list[str] = []
    if not re.match(r"[A-Z`]", first):
        faults.append("it does not begin with a capital letter, or with a name")
    if re.match(r"(What|Of|Whether)\b", first):
        faults.append(f"it begins with {first.split()[0]}")
    if not first.rstrip().endswith((".", "`.", ":")) or (first.rstrip().endswith(":") and not rest):
        faults.append("its first sentence has no end")
    return faults


@pytest.mark.parametrize("name", [*PUBLIC])
def test_help_begins_with_its_subject(name: str) -> None:
    assert faults_of(PUBLIC[name].__doc__) == []


@pytest.mark.parametrize("doc", [None, " ", "What it is.", "Of use.", "Whether so.", "lower case.", "No end"])
def test_help_that_reads_badly_is_found(doc: str | None) -> None:
    assert faults_of(doc) != []


# --- parameters ---------------------------------------------------------------------------------------


def parameters(value: Any) -> list[str]:
    """The names of what a call takes, *args and **kwargs excepted."""
    taken = inspect.signature(value).parameters.values()
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [parameter.name for parameter in taken if parameter.kind not in many and parameter.name != "self"]


def unnamed(doc: str, names: list[str]) -> list[str]:
    return [name for name in names if not re.search(rf"(?<![\w.]){name}\b", doc)]


AS_ELSEWHERE = re.compile(r"\b(?:as (?:of|for) `(\w+)`)|\b(As torch's|those\s+of\s+torch's\s+modules)")
"""A docstring that says where the parameters are described: a method of the same class, or torch."""


def described(name: str, doc: str) -> str:
    """A docstring with those that it points at."""
    owner = name.rpartition(".")[0]
    pointed = [match[1] for match in AS_ELSEWHERE.finditer(doc) if match[1]]
    others = [PUBLIC.get(f"{owner}.{other}", PUBLIC.get(other)) for other in pointed]
    return "\n".join([doc, *(inspect.getdoc(other) or "" for other in others)])


def callables() -> Iterator[str]:
    """The public names that people call with arguments of their own. An error of the plain kind is made as StagecutError is."""
    for name, value in PUBLIC.items():
        plain = isinstance(value, type) and "__init__" not in vars(value)
        if isinstance(value, ModuleType) or (plain and issubclass(value, stagecut.StagecutError | Enum)):
            continue
        yield name


@pytest.mark.parametrize("name", [*callables()])
def test_help_names_every_parameter(name: str) -> None:
    value: Callable[..., Any] = PUBLIC[name]
    doc = value.__doc__ or ""
    if any(match[2] for match in AS_ELSEWHERE.finditer(doc)):
        return
    assert unnamed(described(name, doc), parameters(value)) == []


def test_a_parameter_without_a_word_is_found() -> None:
    assert unnamed("The sum of `left` and more.", ["left", "right"]) == ["right"]
