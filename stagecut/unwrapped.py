"""The module that is meant where a model comes in a wrapper of torch's."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stagecut.ir.errors import InputError

COMPILED = (
    "the model is what torch.compile made of another one: the stages are cut from that one, have its names, "
    "without `_orig_mod.`, and run as it is written\n"
    "  otherwise: compile the stages, by pipe.stages[i].compile() or Driver(wrap=...)"
)

PARALLEL = (DataParallel, DistributedDataParallel, FullyShardedDataParallel)


def unwrapped(model: Any) -> Any:
    """The module of which torch.compile made the model, or the model itself. Raises InputError where copies
    of the model on other devices are kept equal around it or around a part of it: its stages would not.
    """
    if isinstance(model, OptimizedModule):
        model = model._orig_mod
    if isinstance(model, nn.Module):
        _refuse_parallel(model)
    return model


def _refuse_parallel(model: nn.Module) -> None:
    for path, part in model.named_modules():
        if not isinstance(part, PARALLEL):
            continue
        kind = type(part).__name__
        what = f"the model is a {kind}"
        cut = "cut the module inside: pipeline(model.module, ...)"
        if path:
            what = f"'{path}' of the model is a {kind}"
            cut = f"put the module inside in its place: model.{path}.module"
        raise InputError(
            f"{what}, and its stages would run without what it does besides calling its module",
            hint=f"{cut}; Driver(wrap=...) wraps each stage",
        )
