"""What `import stagecut` gives: every name loads, and every error that may be raised has one."""

from __future__ import annotations

import importlib
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
    ours = {
        error.__name__
        for error in found
        if error.__module__.startswith("stagecut.")
        and not error.__module__.startswith("stagecut.tools.")
        and not error.__name__.startswith("_")
    }
    assert ours - {"Unsettled"} <= set(stagecut.__all__)  # which only chooses what capture tries next
    assert "SplitError" in ours


def test_a_checkpoint_module_is_there_by_its_name() -> None:
    assert stagecut.checkpoint.__name__ == "stagecut.backend.files.checkpoint"
