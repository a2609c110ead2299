"""What `import stagecut` gives: every name loads, and every error that may be raised has one."""

from __future__ import annotations

import importlib
import pickle
import pkgutil

import stagecut
from stagecut import StagecutError


def test_every_public_name_loads() -> None:
    assert len(set(stagecut.__all__)) == len(stagecut.__all__)
    assert all(getattr(stagecut, name) is not None for name in stagecut.__all__)


def test_every_error_is_public() -> None:
    for module in pkgutil.walk_packages(stagecut.__path__, "stagecut."):
        if not module.name.startswith("stagecut.tools"):
            importlib.import_module(module.name)
    found, todo = set[type[StagecutError]](), [StagecutError]
    while todo:
        found.update(below := todo.pop().__subclasses__())
        todo += below
    public = {getattr(stagecut, name) for name in stagecut.__all__ if name.endswith("Error") or name == "CannotCompare"}
    others = {error for error in found if not error.__module__.startswith("stagecut.tools.") and not error.__name__.startswith("_")}
    assert {error for error in others if "stagecut" in error.__module__} <= public
    assert stagecut.SplitError in others


def test_an_error_is_named_as_a_user_imports_it() -> None:
    for name in stagecut.__all__:
        error = getattr(stagecut, name)
        if isinstance(error, type) and issubclass(error, StagecutError):
            assert f"{error.__module__}.{error.__qualname__}" == f"stagecut.{name}"
            assert pickle.loads(pickle.dumps(error)) is error


def test_a_checkpoint_module_is_there_by_its_name() -> None:
    assert stagecut.checkpoint.__name__ == "stagecut.backend.files.checkpoint"
