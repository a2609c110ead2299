"""Running stages as separate processes would: nothing is shared, everything is sent.

A run in one process hides the worst bugs of a splitter: nobody notices there that a port is bound in another
order or that a copy is stale.

    box = Mailbox(pipe.program, pipe.stages)     # StagecutError when state would have to flow backward
    outputs = box.forward(pipe.flatten(args, kwargs))
    loss(outputs).backward()
    box.backward()
    box.gradients(), box.input_gradients(), box.state()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stagecut.backend.ranks.wire import refuse_quantized, writable, writes_explained
from stagecut.backend.stages.crossing import refuse_feedback, written_inputs
from stagecut.backend.stages.modules import Stage, copied, find
from stagecut.backend.stages.run import results_of
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import Program, StateEntry, Value
from stagecut.ir.graph import Stage as IrStage
from stagecut.ir.types import carries_grad


class Mailbox:
    """Runs a pipe as separate processes would.

    Every stage is a copy with tensors of its own. A value that crosses is cloned into fresh, detached storage
    of the same strides, and carries gradient only where the IR says so. Ports are bound by position. Call it
    with the model's arguments, call backward on a loss of the outputs, then `backward()`; afterwards
    `gradients()` and `state()` are by the model's names.

    Raises StagecutError when state would have to flow from a later stage to an earlier one.
    """

    def __init__(self, program: Program, stages: Sequence[Stage]) -> None:
        refuse_feedback(program, any(stage.training for stage in stages))
        self._program = program
        self._stages = [copied(stage)[0] for stage in stages]
        self._received: list[list[Any]] = []
        self._sent: list[tuple[Any, ...]] = []
        self._outputs: list[Any] = []
        self._fed: dict[Value, Any] = {}

    def forward(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """The flat outputs; tensors that carry gradient are leaves."""
        program = self._program
        refuse_feedback(program, any(stage.training for stage in self._stages))
        self._received = []
        self._sent = []
        mail: dict[Value, Any] = {}
        self._fed = dict(zip(program.inputs, flat, strict=True))
        for block in program.stages:
            received = [
                self._feed(v) if v in self._fed else self._sent_on(v, mail[v])
                for v in block.inputs
            ]
            owned = written_inputs(block)
            arguments = [
                writable(tensor) if value in owned else tensor
                for value, tensor in zip(block.inputs, received, strict=True)
            ]
            with writes_explained(block.index):
                results = self._results(block, arguments)
            self._received.append(received)
            self._sent.append(results)
            mail.update(zip(block.outputs, results, strict=True))
        self._outputs = [self._returned(leaf, mail) for leaf in program.outputs]
        return tuple(self._outputs)

    def _results(self, block: IrStage, arguments: Sequence[Any]) -> tuple[Any, ...]:
        return results_of(self._stages[block.index](*arguments), block)

    def _sent_on(self, value: Value, sent: Any) -> Any:
        refuse_quantized(value, sent)
        return _post(sent, carries_grad(value.type))

    def _feed(self, value: Value) -> Any:
        fed = self._fed[value]
        return _post(fed, isinstance(fed, torch.Tensor) and fed.requires_grad)

    def _returned(self, leaf: Any, mail: dict[Value, Any]) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        if leaf in self._fed:
            return self._fed[leaf]
        sent = mail[leaf]
        refuse_quantized(leaf, sent)
        return _post(sent, isinstance(sent, torch.Tensor) and sent.requires_grad)

    def backward(self) -> None:
        """Gradients flow from the outputs' `.grad` back through all stages, last stage first."""
        program = self._program
        for index in reversed(range(len(self._stages))):
            block = program.stages[index]
            pairs = [
                (v, sent, self._gradient(v, index))
                for v, sent in zip(block.outputs, self._sent[index], strict=True)
            ]
            live = [
                (t, g)
                for v, t, g in pairs
                if g is not None and carries_grad(v.type) and _has_history(t)
            ]
            if not live:
                continue
            with writes_explained(index):
                outputs = [tensor for tensor, _ in live]
                grads = [grad for _, grad in live]
                torch.autograd.backward(outputs, grads)

    def _gradient(self, value: Value, index: int) -> torch.Tensor | None:
        """The sum of the gradients that all readers of a value send back."""
        grads = [
            leaf.grad
            for output, leaf in zip(self._program.outputs, self._outputs, strict=True)
            if output is value and _has_grad(leaf)
        ]
        for later in range(index + 1, len(self._stages)):
            for received, leaf in zip(
                self._program.stages[later].inputs, self._received[later], strict=True
            ):
                if received is value and _has_grad(leaf):
                    grads.append(leaf.grad)
        if len(grads) > 1:
            return torch.stack(grads).sum(0)
        return next(iter(grads), None)

    def input_gradients(self) -> list[torch.Tensor | None]:
        """Per flat input, the sum of the gradients of the stages it was fed to."""
        sums: list[torch.Tensor | None] = []
        for value in self._program.inputs:
            fed = self._fed[value]
            grads = [fed.grad] if _has_grad(fed) else []
            for block, received in zip(
                self._program.stages, self._received, strict=True
            ):
                grads += [
                    leaf.grad
                    for v, leaf in zip(block.inputs, received, strict=True)
                    if v is value and _has_grad(leaf)
                ]
            sums.append(torch.stack(grads).sum(0) if grads else None)
        return sums

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """Every parameter name -> its gradient, summed over the stages that hold a replica."""
        gradients: dict[str, torch.Tensor | None] = {}
        for entry in self._program.state:
            if entry.kind != "param":
                continue
            replicas = [self._tensor(entry, index) for index in entry.stages]
            grads = [t.grad for t in replicas if t.grad is not None]
            total = None
            if grads:
                total = torch.stack(grads).sum(0)
            gradients.update(dict.fromkeys(entry.names, total))
        return gradients

    def state(self) -> dict[str, torch.Tensor]:
        """Every state name -> its tensor afterwards, as its owner holds it."""
        return {
            name: self._tensor(e, e.stages[0])
            for e in self._program.state
            if e.kind != "const"
            for name in e.names
        }

    def _tensor(self, entry: StateEntry, index: int) -> torch.Tensor:
        name = self._program.stages[index].state[entry][0]
        tensor = find(self._stages[index], name)
        if tensor is None:
            raise StagecutError(f"stage {index} does not hold '{name}'")
        return tensor


def _post(sent: Any, grad: bool) -> Any:
    """A tensor as it arrives: fresh storage, no history, the strides it was sent with."""
    if not isinstance(sent, torch.Tensor):
        return sent
    if sent.layout is not torch.strided:
        return sent.detach().clone().requires_grad_(grad)
    once = sent.detach()[
        tuple(slice(0, 1) if step == 0 else slice(None) for step in sent.stride())
    ]
    fresh = torch.empty_strided(
        once.shape, once.stride(), dtype=sent.dtype, device=sent.device
    ).copy_(once)
    return fresh.expand(sent.shape).requires_grad_(grad)


def _has_grad(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_leaf and leaf.grad is not None


def _has_history(tensor: torch.Tensor) -> bool:
    """True when gradients flow through a tensor. A view made under no_grad says that it requires grad, but
    nothing flows through it: not even a leaf takes its gradient.
    """
    if not tensor.requires_grad or tensor.grad_fn is not None:
        return tensor.requires_grad
    with torch.enable_grad():
        behind = tensor.view_as(tensor).grad_fn
    return behind is not None and behind.next_functions[0][0] is not None
