"""Random numbers of stages: no two stages and no two micro-batches draw the same ones, though all ranks are
seeded alike.

By default each micro-batch of each stage has a stream of its own. The streams depend on torch's generator as
it is when a call of the driver begins, and on nothing that a schedule or a placement decides.

With `seed=`, the stages of a micro-batch draw from one stream: the generator's state crosses from stage to
stage beside the values. Micro-batch m of call k then draws what the model draws after
`torch.manual_seed(seed + k * n_microbatches + m)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from stagecut.backend.ranks.wire import Port
from stagecut.ir.graph import Op, Program, Value
from stagecut.ir.ops import attention_arguments, facts
from stagecut.ir.types import TensorType

_ODD = 0x9E3779B97F4A7C15
"""Spreads small numbers over 64 bits."""
_SEEDS = 2**63


def draws(program: Program) -> bool:
    """True when the stages draw random numbers, or may: nobody knows what a module kept whole does."""
    return any(_may_draw(op) for op in _all(program.all_ops()))


def _may_draw(op: Op) -> bool:
    if op.is_users:
        return True
    return op.effects.random and not _is_attention_without_dropout(op)


def _is_attention_without_dropout(op: Op) -> bool:
    """True for a scaled_dot_product_attention whose dropout_p is 0 in either mode."""
    if not facts(op).attention:
        return False
    rate = attention_arguments(op).get("dropout_p", 0.0)
    return isinstance(rate, float) and rate == 0.0


def _all(ops: Iterable[Op]) -> Iterator[Op]:
    for op in ops:
        yield op
        for region in op.regions:
            yield from _all(region.ops)


class Draws:
    """The random numbers of the stages of one device.

    `calls` is how many calls of the driver have begun; set it to go on with a run that was stopped.
    """

    def __init__(
        self, program: Program, device: torch.device, count: int, seed: int | None
    ) -> None:
        self.device = device
        self.seed = seed
        self.calls = 0
        self._active = draws(program)
        self._count = count
        self._base = 0
        self.port = self._state_port() if self._active and seed is not None else None

    def begin(self) -> None:
        """A call of the driver begins."""
        if not self._active:
            return
        if self.seed is None:
            self._base = int(torch.randint(_SEEDS - 1, ()))
        else:
            self._base = self.seed + self.calls * self._count
        self.calls += 1

    @contextmanager
    def stream(
        self, stage: int, microbatch: int, received: torch.Tensor | None
    ) -> Iterator[None]:
        """Inside, the stage draws from the stream of this micro-batch, which goes on from the state that it
        received. Afterwards torch's generator is as it was.
        """
        if not self._active:
            yield
            return
        outer = self.state()
        try:
            self._enter(stage, microbatch, received)
            yield
        finally:
            self._set(outer)

    def _enter(
        self, stage: int, microbatch: int, received: torch.Tensor | None
    ) -> None:
        if received is not None:
            self._set(received.cpu())
            return
        offset = microbatch
        if self.seed is None:
            stream = 1 + stage + (microbatch << 20)
            offset = _ODD * stream
        number = self._base + offset
        self._seed(number % _SEEDS)

    def state(self) -> torch.Tensor:
        """The states of the generators from which the stages draw, one after the other."""
        return torch.cat([generator.get_state() for generator in self._generators()])

    def _set(self, state: torch.Tensor) -> None:
        start = 0
        for generator in self._generators():
            end = start + generator.get_state().numel()
            generator.set_state(state[start:end].clone())
            start = end

    def _seed(self, number: int) -> None:
        """The generators start anew; those of other devices go on."""
        for generator in self._generators():
            generator.manual_seed(number)

    def _generators(self) -> list[torch.Generator]:
        """The generators of the CPU and of the stages' device."""
        generators = [torch.default_generator]
        if self.device.type == "cuda":
            index = self.device.index
            if index is None:
                index = torch.cuda.current_device()
            generators.append(torch.cuda.default_generators[index])
        return generators

    def _state_port(self) -> Port:
        shape = tuple(self.state().shape)
        value = Value(TensorType("u8", shape), "random_state")
        return Port(value, shape, torch.uint8, tuple(range(len(shape))))
