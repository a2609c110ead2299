"""The schedules of torch.distributed.pipelining by name, and which rank has which stage under each."""

from __future__ import annotations

from dataclasses import dataclass

SINGLE = ("GPipe", "1F1B")
"""One stage a rank."""

LOOPED = ("LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble")
"""Several stages a rank, in turn."""

V = ("ZBVZeroBubble", "DualPipeV")
"""Two stages a rank, there and back again."""

SCHEDULES = (*SINGLE, *LOOPED, *V)

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"
"""Kinds of steps: a forward, a whole backward, a backward for the inputs only, one for the weights only."""


def homes(stages: int, ranks: int, mirrored: bool) -> list[int]:
    """Stage -> rank, in turn or there and back again."""
    if not mirrored:
        return [stage % ranks for stage in range(stages)]
    return [min(stage, 2 * ranks - 1 - stage) for stage in range(stages)]


@dataclass(frozen=True)
class Step:
    """One step of a rank: what it does, for which stage and which micro-batch."""

    kind: str
    stage: int
    microbatch: int


@dataclass(frozen=True)
class Event:
    """A step and when it runs, in seconds."""

    step: Step
    rank: int
    start: float
    end: float
