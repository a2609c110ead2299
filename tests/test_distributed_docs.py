"""docs/DISTRIBUTED.md: its Python runs on two processes, and what it says is refused is refused in these words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cluster.matrix import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.export import Dim

from stagecut import Driver, SplitPoint, pipe_split, pipeline

PAGE = (Path(__file__).parent.parent / "docs" / "DISTRIBUTED.md").read_text()


def test_the_python_on_the_page_runs() -> None:
    assert on_ranks(2, _run_page) == ["ok", "ok"]


def _run_page() -> str:
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), {"__name__": "page"})
    return "ok"


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layers(tokens)  # type: ignore[no-any-return]


class Nonzero(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = x.nonzero()
        pipe_split()
        return found * 2


class Counter(nn.Module):
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.count
        pipe_split()
        self.count.add_(1)
        return x + self.count


class Dropped(nn.Module):
    """Writes its first input where dropout does not make a new tensor, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.drop(x).tanh_()
        pipe_split()
        return x + y


def shared_tensor() -> None:
    x = torch.randn(4, 8)
    Driver(pipeline(Dropped(), (x, x), check=None), eval_mode=True).eval(x, x)


def chain(stages: int, **options: Any) -> Any:
    cuts = {f"layers.{4 * i // stages}": SplitPoint.BEGINNING for i in range(1, stages)}
    return pipeline(Chain(), (torch.randn(4, 8),), split_spec=cuts, check=None, **options)


class Scaled(nn.Module):
    """The tensor that it makes is a constant of the code."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.first, self.last = rate, nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.first * torch.tensor(self.rate) * self.last


def refusals() -> dict[str, Callable[[], Any]]:
    """What is tried on two ranks, by the words of the page that answer it."""

    def hooked() -> None:
        pipe = chain(1)  # on a rank alone: a neighbour would wait for what is not sent
        pipe.stages[0].register_forward_hook(lambda module, given, made: made.flatten())
        Driver(pipe, "GPipe", 2, group=dist.new_group([dist.get_rank()], use_local_synchronization=True)).eval(torch.randn(8, 8))

    def split_columns(stage: nn.Module, index: int) -> nn.Module:
        return parallelize_module(stage, init_device_mesh("cpu", (2,)), {"layers.*": ColwiseParallel()})

    def compiled() -> Driver:
        driver = Driver(chain(4), "ZBVZeroBubble", 2, torch.sum, wrap=lambda m, i: torch.compile(m, backend="eager"))  # type: ignore[arg-type,return-value]
        driver.step(torch.randn(8, 8))
        return driver

    sizes = {"tokens": {0: Dim("batch", min=1, max=64)}}
    return {
        "Schedule1F1B has one stage a rank: 4 stages, 2 ranks": lambda: Driver(chain(4)),
        "ScheduleZBVZeroBubble cannot place 2 stages on 2 ranks": lambda: Driver(chain(2), "ZBVZeroBubble"),
        "there is no schedule '1F2B'": lambda: Driver(chain(2), "1F2B"),
        "the ranks do not run the same program": lambda: Driver(chain(2), "1F1B", 2 + dist.get_rank()),
        "which is a constant of the code": lambda: Driver(pipeline(Scaled(1.0 + dist.get_rank()), (torch.ones(4),), stages=2)),
        "input 'tokens' has a batch of 18, which 4 micro-batches do not divide": lambda: Driver(
            chain(2, dynamic_shapes=sizes), "GPipe", 4
        ).eval(torch.randn(18, 8)),
        "input 'tokens' has shape [12, 8], and 4 micro-batches of [4, 8], as traced, have 16 along dim 0": lambda: Driver(
            chain(2), "GPipe", 4
        ).eval(torch.randn(12, 8)),
        "nothing is divided among 4 micro-batches": lambda: Driver(chain(2), "GPipe", 4).eval(torch.randn(4, 8)),
        "depends on data, so the receiver cannot know it": lambda: Driver(pipeline(Nonzero(), (torch.ones(4),), check=None)).eval(
            torch.ones(4)
        ),
        "'count' is written in one stage and read or written in another": lambda: Driver(
            pipeline(Counter(), (torch.ones(4),), check=None)
        ).eval(torch.ones(4)),
        "is written, and shares memory with input 'y'": shared_tensor,
        "shape mismatch": hooked,
        "is not supported with stage modules that have used torch.compile": compiled,
        "ColwiseParallel currently only support nn.Linear and nn.Embedding!": lambda: Driver(chain(2), wrap=split_columns).modules,
    }


def test_the_limits_are_refused_in_the_words_of_the_page() -> None:
    listed = re.findall(r"^\|.*\| `(.*)` \|$", PAGE.split("## Limits")[1], re.MULTILINE)
    assert listed == list(refusals())
    assert on_ranks(2, _refuse) == [[], []]


def _refuse() -> list[str]:
    """The limits that were not met as the page says."""
    wrong = []
    for words, attempt in refusals().items():
        try:
            attempt()
            wrong.append(f"nothing refused: {words}")
        except Exception as error:
            if words not in str(error):
                wrong.append(f"{words}: {type(error).__name__} {error}")
        dist.barrier()
    return wrong
