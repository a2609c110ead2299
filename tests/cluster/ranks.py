"""Processes that stand for ranks. A server forks them that has computed nothing: autograd's threads do not survive a fork.

Those threads are there where torch knows CUDA, with a GPU or without one, as soon as a process has gone backward.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[2]
DEBUG = "TORCH_DISTRIBUTED_DEBUG"
PRELOADED = [
    "cluster.matrix",
    "cluster.adapters",
    "cluster.training",
    "cluster.graphs",
    "stagecut.backend.files.checkpoint",
    "torch.utils.serialization",
    "transformers.trainer",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.albert.modeling_albert",
]
"""What ranks import, besides the tests that they run a function of."""


def start(
    ranks: int, folder: Path, enter: Callable[[int, int, Path], None], work: Callable[..., Any], args: Any
) -> list[ForkServerProcess]:
    """A process for each rank, which calls `enter(rank, ranks, folder)`; `read_work(folder)` is what it shall do."""
    torch.save((work, args, warnings.filters, os.environ.get(DEBUG, "OFF")), folder / "work")
    return forked(ranks, partial(enter, folder=folder))


def forked(ranks: int, enter: Callable[[int, int], None]) -> list[ForkServerProcess]:
    """A process for each rank, which calls `enter(rank, ranks)`."""
    processes = [_context().Process(target=enter, args=(rank, ranks)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def read_work(folder: Path) -> Callable[[], Any]:
    """What a rank shall do, with arguments of its own; warnings are errors where they were, and torch checks as much as it was told to."""
    gc.freeze()  # what all ranks share is not looked through, and so not copied
    sys.path.append(str(ROOT))  # pytest names a test's module after its folder, which only some ways to start it find
    work, args, filters, os.environ[DEBUG] = torch.load(folder / "work", weights_only=False)
    warnings.filters[:] = filters  # type: ignore[index]
    torch.set_num_threads(1)
    return lambda: work(*args)


@cache
def _context() -> ForkServerContext:
    """A server that has imported, and not run, what ranks need: they would each take longer to import it than for all else."""
    sys.path.append(str(ROOT))  # ranks take it over before they know what to enter
    context = multiprocessing.get_context("forkserver")
    tests = [name for name, module in sys.modules.items() if name.startswith("tests.") and hasattr(module, "on_ranks")]
    context.set_forkserver_preload([*PRELOADED, *tests])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()
    return context
