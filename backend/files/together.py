"""A folder that all ranks write together, or none: it is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from stagecut.ir.errors import StagecutError

T = TypeVar("T")


class CheckpointError(StagecutError):
    """A checkpoint is missing, does not fit the model, or could not be written."""

    __module__ = "stagecut"


def clear(folder: Path, aside: Path) -> None:
    """Returns when `folder` can be written by way of `aside`, which is not there. Raises CheckpointError
    where it is there already.
    """
    if folder.exists():
        raise CheckpointError(
            f"'{folder}' is there already",
            hint="remove it before a new run, or give every checkpoint a folder of its own, such as "
            "run/step-100",
        )
    shutil.rmtree(aside, ignore_errors=True)  # left by a save that was killed
    folder.parent.mkdir(parents=True, exist_ok=True)


def publish(aside: Path, folder: Path) -> None:
    """What was written `aside` is `folder`, and stays so when the machine stops."""
    os.rename(aside, folder)
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def on_first(group: dist.ProcessGroup | None, work: Callable[[], None]) -> None:
    """Rank 0 has done `work`; if it raised, every rank raises the same error."""
    is_first = dist.get_rank(group) == 0
    together(group, lambda: work() if is_first else None)


def together(group: dist.ProcessGroup | None, work: Callable[[], T]) -> T:
    """The result of `work` of every rank, on every rank; when it raises on one rank, CheckpointError
    on all.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    failures: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(
        failures, None if error is None else str(error) or type(error).__name__, group
    )
    if isinstance(error, StagecutError):
        raise error
    failed = next(
        (rank for rank, text in enumerate(failures) if text is not None), None
    )
    if failed is not None:
        raise CheckpointError(f"rank {failed}: {failures[failed]}") from error
    return result  # type: ignore[return-value]
