"""stagecut/garbage: Python looks for garbage seldom while a model is cut, and as before afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from stagecut import CaptureError, pipeline
from stagecut.garbage import SELDOM, collected_seldom


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    often = gc.get_threshold()
    yield
    gc.set_threshold(*often)


@pytest.mark.parametrize("of_the_user", [700, 0, SELDOM * 2])
def test_only_a_lower_number_is_raised(of_the_user: int) -> None:
    """With 0 the user has turned the search off."""
    gc.set_threshold(of_the_user, 7, 8)
    with collected_seldom():
        assert gc.get_threshold() == (SELDOM if of_the_user == 700 else of_the_user, 7, 8)
    assert gc.get_threshold() == (of_the_user, 7, 8)


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x


def test_a_cut_sets_it_and_puts_it_back() -> None:
    gc.set_threshold(700, 7, 8)
    seen: list[int] = []

    def policy(program: Any) -> list[int]:
        seen.append(gc.get_threshold()[0])
        return []

    pipeline(nn.Linear(2, 2), (torch.ones(1, 2),), split_policy=policy, check=None)
    assert seen == [SELDOM]
    with pytest.raises(CaptureError):
        pipeline(Fails(), (torch.ones(2),), check=None)
    assert gc.get_threshold() == (700, 7, 8)
