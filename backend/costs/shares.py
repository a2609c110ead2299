"""What each op takes of the time and the memory of its stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagecut.backend.costs.line import Line
from stagecut.backend.costs.ops import Device
from stagecut.backend.costs.runtime import Parts


@dataclass(frozen=True)
class OpShare:
    """One op, or the loss, for one micro-batch. forward, backward: seconds. flops and moved (bytes read and
    written) are those of the forward.

    state: bytes of the state that no earlier op of the stage reads, with gradients and what the optimizer
    keeps. kept: bytes that it keeps for the backward, of all micro-batches in flight.
    """

    forward: float
    backward: float
    flops: float
    moved: float
    state: int
    kept: float


def shares_of(
    line: Line, where: Device, seconds: Parts[float], kept: int
) -> tuple[OpShare, ...]:
    """The shares of the ops of a stage, the loss behind them. Their times add up to `seconds` and what they
    keep to `kept`, in the proportions of the roofline and of autograd.
    """
    parts = [line.parts_of(cost, where)[:2] for cost in line.costs]
    flops = [cost.flops for cost in line.costs]
    moved = [cost.moved for cost in line.costs]
    if line.loss is not None:
        parts.append(line.loss.on(where, line.setting.training))
        flops.append(sum(count for count, _, _ in line.loss.forward))
        moved.append(sum(size for _, size, _ in line.loss.forward))
    forward = _scaled([part[0] for part in parts], seconds.forward)
    backward = _scaled([part[1] for part in parts], seconds.backward)
    state, held = _memory(line, len(parts))
    columns = (forward, backward, flops, moved, state, _scaled(held, kept))
    return tuple(OpShare(*row) for row in zip(*columns, strict=True))


def _memory(line: Line, count: int) -> tuple[list[int], list[float]]:
    """For each of `count` shares, the bytes of state and those kept. A holder counts where it comes first."""
    state = [0] * count
    kept = [0.0] * count
    seen: set[object] = set()
    for position, holdings in enumerate(line.holdings):
        for holding in holdings:
            if holding.holder in seen:
                continue
            seen.add(holding.holder)
            at = count - 1 if holding.holder is line.loss else position
            state[at] += holding.static
            kept[at] += holding.kept
    return state, kept


def _scaled(amounts: Sequence[float], total: float) -> list[float]:
    """The amounts in the same proportions, with that total."""
    whole = sum(amounts)
    if not whole:
        return [total / max(1, len(amounts))] * len(amounts)
    return [amount * total / whole for amount in amounts]
