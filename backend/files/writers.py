"""The processes that write a folder of tensors, and the files in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stagecut.backend.files.streamed import write_file
from stagecut.backend.files.together import CheckpointError, on_first, together
from stagecut.backend.ranks.driver import Driver
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import StagecutError

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Ranks:
    """The processes that write a folder: those of a driver's group, or without a driver this one."""

    driver: Driver | None

    @classmethod
    def of(cls, driver_or_pipe: Any) -> Ranks:
        """Those that have the stages of a driver, or this process, which has those of a pipe."""
        return cls(driver_or_pipe if isinstance(driver_or_pipe, Driver) else None)

    @contextmanager
    def watched(self, call: str) -> Iterator[None]:
        """All ranks make this call, or raise InputError. A rank that fails or dies inside ends the others
        too; a StagecutError is raised by all alike.
        """
        if self.driver is None:
            yield
            return
        with self.driver.faults.together(agreed=(StagecutError,)):
            self.driver.calls.announce(call)
            yield

    @property
    def rank(self) -> int:
        return 0 if self.driver is None else dist.get_rank(self.driver.group)

    def gather(self, item: T) -> list[T]:
        """The items of all ranks, in their order."""
        if self.driver is None:
            return [item]
        group = self.driver.group
        items: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(items, item, group)
        return items

    def together(self, work: Callable[[], T]) -> T:
        """As the function `together`."""
        return work() if self.driver is None else together(self.driver.group, work)

    def first(self, work: Callable[[], None]) -> None:
        """As the function `on_first`."""
        if self.driver is None:
            work()
        else:
            on_first(self.driver.group, work)


def folder_of(folder: Any) -> Path:
    """The folder that is written. Raises CheckpointError for what is none."""
    if not isinstance(folder, str | Path):
        raise CheckpointError(
            f"{folder!r} is no folder", hint='a str or a Path, such as "run/tuned"'
        )
    return Path(folder)


def stages_of(of: Any) -> tuple[Staged, Collection[int]]:
    """The pipe, and the stages that this process writes. Raises ChangedError where the model is not the one
    that was cut.
    """
    if not isinstance(of, Driver | Staged):
        raise CheckpointError(
            f"a checkpoint is of a Driver or of a Pipe, not of a {type(of).__name__}"
        )
    pipe = of.pipe if isinstance(of, Driver) else of
    pipe.refuse_changed_model()
    return pipe, of.stage_indices if isinstance(of, Driver) else range(of.num_stages)


def without_values(tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor on meta, of the same shape and dtype. Not every class of tensors knows `empty_like`."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def refuse_unplain(tensors: Mapping[str, torch.Tensor]) -> None:
    """Returns when a file can hold these tensors. Raises CheckpointError otherwise."""
    for name, tensor in tensors.items():
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            raise CheckpointError(
                f"'{name}' is a {type(tensor).__name__} of layout {tensor.layout}",
                hint="plain dense tensors are saved; make it one first",
            )


def write_all(files: Mapping[str, Tensors], folder: Path) -> None:
    """`folder` has these files, and keeps them when the machine stops."""
    for name, tensors in files.items():
        write_file(tensors, folder / name)


def opened(file: Path) -> Any:
    """A safetensors file to read tensors from. Raises CheckpointError where there is none."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise CheckpointError(
            "safetensors is not installed", hint="pip install 'stagecut[safetensors]'"
        ) from None
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(
            f"'{file.name}' is missing, though the index names it",
            where=str(file.parent),
            hint="load it again",
        ) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"'{file.name}' cannot be read: {error}",
            where=str(file),
            hint="load it again",
        ) from error
