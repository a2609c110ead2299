"""Stages that run by graphs, each as in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from compare import Posted

from stagecut import Pipe
from stagecut.backend.ranks.mailbox import Mailbox
from stagecut.backend.stages.graphs import Graphs
from stagecut.backend.stages.roles import RoleCode
from stagecut.ir.graph import Stage, Value
from stagecut.ir.types import TensorType

NO_GRADIENT = "nothing in it carries gradient"
"""Of a stage that has no backward."""


class Packed(Posted):
    """Stages under autograd. What crosses is packed as between ranks: in its order, without gaps; and so is its gradient."""

    def _mailbox(self, pipe: Pipe) -> Mailbox:
        return _PackedMailbox(pipe.program, pipe.stages)


class ByGraphs(Posted):
    """The stages as `Driver(..., backward="graph")` runs them on ranks. The gradients of all weights come last."""

    def __init__(self, pipe: Pipe, recompute: bool = False) -> None:
        self._graphs = _GraphMailbox(pipe, recompute)
        super().__init__(pipe)

    @property
    def notes(self) -> list[str]:
        """For each stage why no graphs ran it last, '' where they did."""
        return [graphs.note or ("" if graphs._splits else NO_GRADIENT) for graphs in self._graphs.graphs]

    def _mailbox(self, pipe: Pipe) -> Mailbox:
        return self._graphs


class _PackedMailbox(Mailbox):
    def _sent_on(self, value: Value, sent: Any) -> Any:
        if not isinstance(value.type, TensorType):
            return super()._sent_on(value, sent)
        repeated = [step == 0 for step in value.type.strides or [1] * sent.dim()]
        once = sent.detach()[tuple(slice(0, 1) if often else slice(None) for often in repeated)]
        return super()._sent_on(value, torch.empty_like(once).copy_(once).expand(sent.shape))

    def _gradient(self, value: Value, index: int) -> torch.Tensor | None:
        grad = super()._gradient(value, index)
        (sent,) = (sent for output, sent in zip(self._program.stages[index].outputs, self._sent[index], strict=True) if output is value)
        return None if grad is None else torch.empty_like(sent).copy_(grad)


class _GraphMailbox(_PackedMailbox):
    def __init__(self, pipe: Pipe, recompute: bool) -> None:
        super().__init__(pipe.program, pipe.stages)
        code = RoleCode()
        self.graphs = [Graphs(pipe, index, code, recompute, stage) for index, stage in enumerate(self._stages)]

    def backward(self) -> None:
        super().backward()
        for graphs in reversed(self.graphs):
            graphs.take_weights()()

    def _results(self, block: Stage, arguments: Sequence[Any]) -> tuple[Any, ...]:
        graphs = self.graphs[block.index]
        graphs.begin(self._stages[block.index])
        results = graphs.run(arguments)
        return super()._results(block, arguments) if results is None else results
