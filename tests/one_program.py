"""Cuts the models it is told of and says what came out. Processes that run this must all say the same.

Each line of its input is JSON: the plan of a drawn model or the name of one below, and which modules are kept whole. Each line of its
output is the text of the program and the code of all stages, or of the error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from fuzz import plans
from fuzz.judge import quiet
from fuzz.plans import build, inputs, options
from torch import nn
from torch.nn import functional as F
from zoo.models import ARCHITECTURES

from stagecut import pipe_split, pipeline
from stagecut.ir.errors import StagecutError

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any], dict[str, Any]]
"""A model, its arguments by position and by keyword, and what else pipeline() is told."""


class Several(nn.Module):
    """Writes several buffers, and branches on a value, so that it is kept whole."""

    names = ("total", "largest", "smallest", "first", "last", "count")

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        for name in self.names:
            self.register_buffer(name, torch.zeros(4))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        """The sum, and a number for each buffer."""
        for name in self.names:
            getattr(self, name).add_(x.detach().mean(0))
        return {"sum": x + self.weight if x.sum() > 0 else x - self.weight} | {name: len(name) for name in self.names}


class Counted(nn.Module):
    """A module that is kept whole between layers that share a tensor; the outputs hold sets of plain data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.whole, self.second = nn.Linear(4, 4), Several(), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> Any:
        """What the layers make of it, and what does not depend on it."""
        made = self.whole(self.first(x))
        pipe_split()
        return {"y": self.second(made["sum"]), "names": {*Several.names}, "pair": (frozenset("abc"), len(made))}


class Assigned(nn.Module):
    """Gives several buffers new tensors."""

    def __init__(self) -> None:
        super().__init__()
        for name in Several.names:
            self.register_buffer(name, torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input, shifted by all of them."""
        for name in Several.names:
            setattr(self, name, getattr(self, name) * 0.5 + x.detach().mean(0))
            x = x + getattr(self, name)
        return x


class Grown(Assigned):
    """Is refused: several buffers get another size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input."""
        for name in Several.names:
            setattr(self, name, torch.zeros(len(name)))
        return x


class Regions(nn.Module):
    """A split point inside two regions that run as a whole, of two kinds: refused, and for the outer one."""

    def forward(self, x: torch.Tensor) -> Any:
        """The input, through a checkpoint around a vmap."""

        def each(row: torch.Tensor) -> torch.Tensor:
            pipe_split()
            return F.relu(row)

        return torch.utils.checkpoint.checkpoint(lambda t: torch.vmap(each)(t).sin(), x, use_reentrant=False)


MODELS: dict[str, Callable[[], nn.Module]] = {cls.__name__: cls for cls in (Counted, Assigned, Grown, Regions)}


def _named(name: str) -> Call:
    if name in MODELS:
        return MODELS[name](), (torch.ones(2, 4, requires_grad=True),), {}, {}
    if name.startswith("fuzz "):
        from fuzz.judge import draw

        return _drawn(draw(*map(int, name.split()[1:]))[0])
    torch.manual_seed(0)
    (architecture,) = (a for a in ARCHITECTURES if a.name == name)
    return architecture.make(), (), architecture.inputs(), {"stages": 2}


def _drawn(plan: plans.ModelPlan) -> Call:
    return build(plan), *inputs(plan), options(plan)


def answer(model: dict[str, Any]) -> str:
    """The program and the code of the stages, or the error."""
    module, args, kwargs, more = _drawn(eval(model["plan"], vars(plans))) if "plan" in model else _named(model["name"])
    if model.get("whole"):
        more["leaf_modules"] = model["whole"]
    try:
        pipe = pipeline(module, args, kwargs, **more)
    except StagecutError as error:
        return f"{type(error).__name__}: {error}"
    return "\n".join([pipe.ir(), *pipe.notes, *(stage.code for stage in pipe.stages)])


def main() -> None:
    """One answer for each question, until there are no more."""
    quiet()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
