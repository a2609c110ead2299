"""Adapters of peft and of the user's own: trained by ranks as by one process, saved and loaded in peft's format."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from cluster.adapters import SAMPLES, cut, inputs, loss_of, optimizer_of, train, train_each
from cluster.matrix import SCHEDULES, on_ranks, stages_of

from stagecut import Driver, Pipe

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft reads it
]
STEPS = 3


@pytest.mark.parametrize(
    ("stages", "tried"),
    [
        (2, {"lora": ["GPipe", "1F1B"], "mixed_lora": ["1F1B"], "saved_lora": ["GPipe"]}),
        (4, {"lora": ["LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"], "upper_lora": ["DualPipeV"],
             "dora": ["Interleaved1F1B"], "ia3": ["ZBVZeroBubble"], "own_lora": ["InterleavedZeroBubble"]}),
    ],
)  # fmt: skip
def test_adapters_train_as_in_one_process(stages: int, tried: dict[str, list[str]]) -> None:
    """`python tests/cluster/tune.py` tries all of them under all schedules."""
    work = [(*cut(name, stages), schedules) for name, schedules in tried.items()]
    assert all(stages_of(schedule, 2) == stages and schedule in SCHEDULES for _, _, schedules in work for schedule in schedules)
    on_ranks(2, train_each, work, STEPS)


def test_frozen_stages_send_no_gradients_and_keep_nothing_for_a_backward() -> None:
    """A rank below all that is trained does nothing in a backward, and a rank above it lets gradients through."""
    counts = on_ranks(2, _count_step, [cut(name, 2)[1] for name in ("upper_lora", "lower_lora")])
    (first_upper, first_lower), (last_upper, last_lower) = counts
    assert first_upper["saved"] == 0
    assert last_upper["sent"] == 0
    assert min(first_lower["saved"], last_lower["saved"], last_upper["saved"]) > 0
    assert last_lower["sent"] > 0


def _count_step(pipes: list[Pipe]) -> list[dict[str, int]]:
    """For each pipe, what this rank sends to its neighbour, and the tensors that it saves for a backward, in a step of 4 micro-batches."""
    return [_count(Driver(pipe, "1F1B", 4, loss_of)) for pipe in pipes]


def _count(driver: Driver) -> dict[str, int]:
    train(driver, optimizer_of(driver), range(1))
    counts = {"sent": 0, "saved": 0}
    make = dist.P2POp.__init__

    def send(self: dist.P2POp, op: Any, *args: Any, **kwargs: Any) -> None:
        counts["sent"] += op is dist.isend
        make(self, op, *args, **kwargs)

    def save(tensor: torch.Tensor) -> torch.Tensor:
        counts["saved"] += 1
        return tensor

    with patch.object(dist.P2POp, "__init__", send), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        driver.step(**inputs(SAMPLES * driver.n_microbatches))
    return counts
