"""turns: pieces of work run in threads, one at a time, in one order."""

from __future__ import annotations

import pytest
import torch

from stagecut.backend.serve.turns import Turns

CPU = torch.device("cpu")


def test_work_takes_turns_until_each_is_done() -> None:
    turns, seen = Turns(CPU), list[str]()

    def work(name: str, steps: int) -> None:
        for step in range(steps):
            seen.append(f"{name}{step}")
            turns.pass_on()

    turns.run([lambda: work("a", 3), lambda: work("b", 1), lambda: work("c", 2)])
    assert seen == ["a0", "b0", "c0", "a1", "c1", "a2"]
    turns.run([])
    turns.run([lambda: work("d", 2)])
    assert seen[-2:] == ["d0", "d1"]


def test_random_numbers_go_on_where_they_were() -> None:
    turns, drawn = Turns(CPU), dict[int, list[float]]()

    def work(seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(3):
            drawn.setdefault(seed, []).append(torch.rand(()).item())
            turns.pass_on()

    with torch.random.fork_rng():
        turns.run([lambda: work(1), lambda: work(2)])
        for seed, numbers in drawn.items():
            torch.manual_seed(seed)
            assert numbers == [torch.rand(()).item() for _ in range(3)]


def test_what_fails_stops_the_others() -> None:
    turns, seen = Turns(CPU), list[int]()

    def endless() -> None:
        while True:
            seen.append(1)
            turns.pass_on()

    def failing() -> None:
        turns.pass_on()
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        turns.run([endless, failing, endless])
    assert len(seen) == 3
    turns.pass_on()  # outside of any work it does nothing
