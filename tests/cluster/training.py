"""A small language model, a loss per token, and a run of some work under all schedules beside one process."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from cluster.matrix import SCHEDULES, on_ranks, stages_of
from torch import nn
from torch.nn import functional as F
from zoo.cuts import equal_ops

from stagecut import Driver, Pipe, pipeline

WIDTH, WORDS, IGNORED = 8, 12, -100


class Hidden(nn.Module):
    """Hidden states of a language model. The head, tied to the embedding or not, is for the loss function to use."""

    def __init__(self, tied: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(10))
        self.drop = nn.Dropout(drop)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.emb(tokens)
        for layer in self.layers:
            x = x + self.drop(torch.tanh(layer(x)))
        return x


class Words(Hidden):
    """Logits."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(super().forward(tokens))  # type: ignore[no-any-return]


def per_token(logits: torch.Tensor, target: torch.Tensor, smoothing: float = 0.0) -> tuple[torch.Tensor, dict[str, Any]]:
    """The sum over the labelled tokens, and how many they are."""
    labelled = target != IGNORED
    right = (logits.argmax(-1) == target) & labelled
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    share = right.sum() / labelled.sum().clamp(min=1)
    return loss, {"tokens": labelled.sum(), "right": int(right.sum()), "accuracy": share, "best": logits.amax((1, 2))}


def micro_batches() -> int:
    """How many there are: DualPipeV wants as many as there are stages."""
    return 2 * dist.get_world_size()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and labels of which micro-batches have unequal numbers."""
    count = 2 * micro_batches()
    tokens, target = torch.randint(WORDS, (count, 6)), torch.randint(WORDS, (count, 6))
    for row in range(count):
        target[row, : row % 6] = IGNORED
    return tokens, target


def cut(make: Callable[[], nn.Module], stages: int, rows: int = 2) -> tuple[nn.Module, Pipe]:
    """A model, always the same, and its pipe."""
    torch.manual_seed(3)
    model = make().double()
    return model, pipeline(model, (torch.randint(WORDS, (rows, 6)),), split_policy=equal_ops(stages), check=None)


def on_schedules(ranks: int, work: Callable[..., str], make: Callable[[], nn.Module], *args: Any) -> dict[str, set[str]]:
    """Schedule -> what `work(model, pipe, schedule, *args)` says on the ranks."""
    found: dict[str, set[str]] = {name: set() for name in SCHEDULES}
    for stages in dict.fromkeys(stages_of(name, ranks) for name in SCHEDULES):
        chosen = [name for name in SCHEDULES if stages_of(name, ranks) == stages]
        for answers in on_ranks(ranks, _each, work, *cut(make, stages), chosen, args):
            for name, answer in zip(chosen, answers, strict=True):
                found[name].add(answer)
    return found


def _each(work: Callable[..., str], model: nn.Module, pipe: Pipe, names: list[str], args: Any) -> list[str]:
    answers, start = [], deepcopy(model.state_dict())
    for name in names:
        model.load_state_dict(start)
        model.zero_grad()
        torch.manual_seed(7)
        answers.append(work(model, pipe, name, *args) or "ok")
    return answers


OK = {name: {"ok"} for name in SCHEDULES}


def gradients_differ(driver: Driver, reference: nn.Module) -> str:
    """The first parameter of this rank whose gradient is not that of the model, or ''."""
    want = dict(reference.named_parameters(remove_duplicate=False))
    for index in driver.stage_indices:
        for name, parameter in driver.pipe.stages[index].named_parameters():
            mine, theirs = parameter.grad, want[name].grad
            if (mine is None) != (theirs is None) or (mine is not None and not torch.allclose(mine, theirs, atol=1e-9)):  # type: ignore[arg-type]
                return f"gradient of {name}: {mine is not None}, {theirs is not None}"
    return ""
